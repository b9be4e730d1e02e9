# SPDX-License-Identifier: Apache-2.0
"""Which machines the broker has, or may have, an owner's record of: so that none is left that nobody knows.

A note, an empty file STATE/owned/UUID, is written before the broker is asked to make its record, and goes
after the broker has dropped it. Whatever vmbusd dies of in between, and whenever the broker is away when a
record should go, the note says so: a note without a machine is taken to the broker at the next connection.
A machine without a note (an older vmbusd made it) is as well off: its record goes when it is undefined.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Container
from pathlib import Path

from vmbus.service import durable
from vmbus.service.broker_client import BrokerClient
from vmbus.wire.errors import VmbusError

log = logging.getLogger("vmbus.owned")


class Owned:
    """The notes in ``place``, which exists, and the broker's records that they stand for."""

    def __init__(self, place: Path, broker: BrokerClient) -> None:
        self._place = place
        self._broker = broker
        self._left: set[str] = set()

    def load(self, known: Container[str]) -> None:
        """Find the notes that no machine of ``known`` (UUIDs) has."""
        self._left = {name for name in os.listdir(self._place) if name not in known}

    async def make(self, uuid: str, uid: int) -> None:
        """Have the broker record that a new machine belongs to ``uid``. Raises the broker's errors, Internal;
        the caller goes on to ``drop`` it."""
        if uuid in self._left:  # it was here before, and is gone
            await self.clear()
            if uuid in self._left:
                raise VmbusError("Unavailable", "the broker still has its record of the machine; try again")
        try:
            durable.touch(self._place / uuid)
        except OSError as error:
            raise VmbusError("Internal", f"the machine cannot be noted: {error.strerror}") from None
        await self._broker.own(uuid, uid)

    async def remove(self, uuid: str) -> None:
        """Have the record dropped. Raises the broker's errors; nothing has changed then."""
        await self._broker.disown(uuid)
        durable.remove(self._place / uuid)

    async def drop(self, uuid: str) -> None:
        """As ``remove``, for a machine that is gone: now, or when the broker is there again."""
        self._left.add(uuid)
        await self.clear()

    async def clear(self) -> None:
        """Drop what was left, one after the other. Called at each connection to the broker."""
        for uuid in sorted(self._left):
            try:
                await self.remove(uuid)
                self._left.discard(uuid)
            except VmbusError as error:
                log.warning("%s: its record stays with the broker for now: %s", uuid, error)
