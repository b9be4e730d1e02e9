# SPDX-License-Identifier: Apache-2.0
"""A machine that comes from elsewhere, as its start waits for it, though the connection to its worker breaks.

Worker and source have the rest between them: a worker that is not heard may have got the machine, which is
nowhere else then, and must not be killed as what is left of a start that failed.

| the connection breaks, and | the start |
|---|---|
| the worker is gone, or the machine is killed | fails |
| it is reached again, and runs or is paused | is done |
| it is reached again, and the machine is on its way still | waits; stops it, if it was cancelled meanwhile |
| it is reached again, and has ended, or has never heard of it | fails |
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Mapping
from typing import Any, Final

from vmbus.service.machine import Machine
from vmbus.service.workers import RECONNECT, Workers
from vmbus.wire.errors import VmbusError

log = logging.getLogger("vmbus.arrivals")

_LOOK: Final = 0.1
"""Seconds between two looks at what the worker has said."""


class Arrival:
    """One of a machine whose worker was, or will be, told to receive it."""

    def __init__(self, machine: Machine, workers: Workers) -> None:
        self._machine = machine
        self._workers = workers
        self._cancelled = False

    async def cancel(self) -> None:
        """Stop it, unless it is too late; as soon as the worker is reached."""
        self._cancelled = True
        await self._machine.connection().cancel_save()

    async def wait(self, asked: Awaitable[Mapping[str, Any]]) -> None:
        """Until the machine is there, which ``asked`` says, if the connection lasts. Raises VmbusError."""
        try:
            await asked
        except VmbusError as error:
            worker = self._machine.worker
            if error.kind != "Disconnected" or (worker is not None and worker.open):
                raise
            await self._without_connection(error)

    async def _without_connection(self, lost: VmbusError) -> None:
        machine, attempt = self._machine, 0
        while not (machine.gone.is_set() or machine.killed):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(machine.gone.wait(), RECONNECT[min(attempt, len(RECONNECT) - 1)])
            attempt += 1
            if machine.gone.is_set():
                break
            try:
                arrived = await self._arrived()
            except VmbusError as error:
                log.info("%s is not reached: %s", machine.uuid, error)
                continue
            if arrived:
                return
            break
        raise lost

    async def _arrived(self) -> bool:
        """Whether the machine is there, once that is known. Raises VmbusError if no worker is reached."""
        worker = await self._workers.reach_again(self._machine)
        if self._cancelled and worker.state == "configured":
            await worker.cancel_save()
        while not self._machine.killed:
            on_its_way = "migration" in await worker.stats()
            if worker.state != "configured" or not on_its_way:  # what it says of its state comes before
                break
            await asyncio.sleep(_LOOK)
        return worker.state in ("running", "paused")
