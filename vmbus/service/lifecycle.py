# SPDX-License-Identifier: Apache-2.0
"""What is done with a machine that runs: power button, stop, kill, reset, pause, resume, consoles, figures.

``starts`` leads it there, and ``workers`` knows when it has ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from vmbus.service import descriptors
from vmbus.service.broker_client import BrokerClient
from vmbus.service.jobs import Job, Jobs
from vmbus.service.machine import Machine
from vmbus.service.registry import Registry
from vmbus.service.workers import END_DEADLINE, Workers
from vmbus.wire.errors import VmbusError


class Lifecycle:
    """The operations on machines that run."""

    def __init__(self, registry: Registry, broker: BrokerClient, jobs: Jobs, workers: Workers) -> None:
        self._registry = registry
        self._broker = broker
        self._jobs = jobs
        self._workers = workers

    async def shutdown(self, machine: Machine) -> None:
        """Press the power button."""
        machine.require("Shutdown", "running", "stopping")
        await machine.connection().shutdown()

    def stop(self, machine: Machine, deadline: float) -> Job:
        """Ask the guest, and end it after ``deadline`` seconds; 0: at once, disks flushed."""
        machine.require("Stop", "running", "paused")
        machine.connection()
        ask = deadline > 0 and machine.state == "running"
        before = machine.job
        machine.set_state("stopping", "stop")
        job = machine.job = self._jobs.start(
            "stop",
            machine.owner,
            machine.uuid,
            lambda job: self._stop(machine, job, deadline if ask else 0, before),
        )
        return job

    async def _stop(self, machine: Machine, job: Job, deadline: float, before: Job | None) -> None:
        try:
            await self._end(machine, deadline, before)
            job.tell(reason=machine.reason)
        except asyncio.CancelledError:
            if machine.state == "stopping" and not machine.killed and not _has_ended(machine):
                machine.set_state(machine.guest)
            raise
        finally:
            machine.job = None

    async def _end(self, machine: Machine, deadline: float, before: Job | None) -> None:
        if before is not None and before.kind in ("save", "snapshot", "migrate"):
            with contextlib.suppress(VmbusError):
                await before.cancel()
        if deadline:
            with contextlib.suppress(VmbusError):  # a worker that cannot press it is ended all the same
                await machine.connection().shutdown()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(machine.gone.wait(), deadline)
                return
        with contextlib.suppress(VmbusError):
            await machine.connection().stop()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(machine.gone.wait(), END_DEADLINE)
        if not machine.gone.is_set():
            await self._workers.make_gone(machine)
        if not machine.gone.is_set():
            raise VmbusError("Timeout", "the worker has not ended; StatusFlags says why")

    async def kill(self, machine: Machine) -> None:
        """End the worker now."""
        machine.require("Kill", "starting", "running", "paused", "stopping")
        machine.killed = True
        if machine.job is not None:
            with contextlib.suppress(VmbusError):
                await machine.job.cancel()
        if machine.gone.is_set():
            return
        machine.set_state("stopping", "kill")
        await self._broker.kill(machine.uuid)
        try:
            await asyncio.wait_for(machine.gone.wait(), END_DEADLINE)
        except TimeoutError:
            raise VmbusError(
                "Timeout", "the worker was killed and has not ended; it waits in the kernel"
            ) from None

    async def reset(self, machine: Machine) -> None:
        """Pull the reset line."""
        machine.require("Reset", "running", "paused")
        await machine.connection().reset()

    async def pause(self, machine: Machine) -> None:
        """Stop the vCPUs."""
        machine.require("Pause", "running")
        await machine.connection().pause()
        await _state_follows(machine, "paused")

    async def resume(self, machine: Machine) -> None:
        """Let a paused machine go on, or begin."""
        machine.require("Resume", "paused")
        worker = machine.connection()
        if machine.recorded().first_run:
            await worker.run()
            self._registry.write_run(machine, msgspec.structs.replace(machine.recorded(), first_run=False))
            machine.guest = "running"
            machine.set_state("running")
            return
        await worker.resume()
        await _state_follows(machine, "running")

    async def open_console(self, machine: Machine, *, write: bool, steal: bool) -> int:
        """One end of a socketpair whose other end is the console hub's; the caller's."""
        machine.require("OpenConsole", "running", "paused", "stopping")
        worker = machine.connection()
        return await _one_end(lambda fd: worker.console(fd, write=write, steal=steal))

    async def open_port(self, machine: Machine, name: str, *, write: bool, steal: bool) -> int:
        """The same for a named port."""
        machine.require("OpenPort", "running", "paused", "stopping")
        worker = machine.connection()
        return await _one_end(lambda fd: worker.open_port(name, fd, write=write, steal=steal))

    async def stats(self, machine: Machine) -> dict[str, Any]:
        """What the machine counts, and its worker's memory."""
        machine.require("GetStats", "running", "paused", "stopping")
        worker = machine.connection()
        return {**await worker.stats(), **worker.figures.totals()}


def _has_ended(machine: Machine) -> bool:
    return machine.run is None or bool(machine.run.end_reason)


async def _state_follows(machine: Machine, wanted: str) -> None:
    """The worker has said done; its event with the new state is on the way."""
    await machine.reaches(wanted, "stopping", "stopped", "crashed", within=5)


async def _one_end(give: Callable[[int], Awaitable[None]]) -> int:
    """One end of a socketpair whose other end somebody is given; the caller's."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with theirs:
        mine = descriptors.keep(ours.detach())
        try:
            await give(theirs.fileno())
        except BaseException:
            descriptors.close(mine)
            raise
    return mine
