# SPDX-License-Identifier: Apache-2.0
"""Files given with AddFile, until a Start by the same connection takes them or that connection leaves."""

from __future__ import annotations

from vmbus.service.files import PassedFile
from vmbus.service.machine import Machine
from vmbus.wire.definition import slots
from vmbus.wire.errors import VmbusError


class Parked:
    """Owns the files that it holds."""

    def __init__(self) -> None:
        self._files: dict[tuple[str, str], dict[str, PassedFile]] = {}

    def add(self, machine: Machine, sender: str, slot: str, file: PassedFile) -> None:
        """Keep ``file``; one that was there for the slot is closed. Raises InvalidArgument, InvalidState."""
        machine.require("AddFile", "stopped", "crashed")
        known = {known.name: known for known in slots(machine.definition) if known.path is None}
        if slot not in known:
            there_are = ", ".join(known) or "none: all slots have paths"
            raise VmbusError(
                "InvalidArgument",
                f"{slot!r} is no slot with source fd; there are: {there_are}",
                argument="slot",
            )
        file.check(slot, writable=known[slot].writable, regular=known[slot].regular)
        file.claimed = True
        mine = self._files.setdefault((machine.uuid, sender), {})
        before = mine.get(slot)
        mine[slot] = file
        if before is not None:
            before.close()

    def take(self, machine: Machine, sender: str) -> dict[str, PassedFile]:
        """All of this connection's for the machine; the caller's now."""
        return self._files.pop((machine.uuid, sender), {})

    def sender_left(self, sender: str) -> None:
        """Close what a connection left behind."""
        self._drop([key for key in self._files if key[1] == sender])

    def machine_removed(self, machine: Machine) -> None:
        """Close what was given for a machine that is no more."""
        self._drop([key for key in self._files if key[0] == machine.uuid])

    def _drop(self, keys: list[tuple[str, str]]) -> None:
        for key in keys:
            for file in self._files.pop(key).values():
                file.close()
