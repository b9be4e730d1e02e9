# SPDX-License-Identifier: Apache-2.0
"""The files that were delivered for a machine: slot names and their descriptors.

A slot is filled once. What arrives under a name that is taken, or after the machine has been built, is closed
and refused. Which slots a machine needs is its definition's business (``wire.definition.slots``); before
``Configure`` no definition is known, so only the form of a name and the number of slots is checked here.

Closing can hang on a file system whose server does not answer; service and broker let no such file through
unless the administrator allows it, and then it is this machine's worker alone that waits.
"""

from __future__ import annotations

import os
from typing import Final

from vmbus.wire.errors import VmbusError

SLOTS_MAX: Final = 8192
RESTORE: Final = "restore"
"""The file that a machine goes on from."""
_LETTERS: Final = frozenset("abcdefghijklmnopqrstuvwxyz0123456789/-")


class Files:
    """Owns every descriptor that it holds."""

    def __init__(self) -> None:
        self._slots: dict[str, list[int]] = {}
        self._built = False

    def add(self, slot: str, fds: list[int]) -> None:
        """Take ``fds`` over under ``slot``; they are closed if they are refused.

        Raises InvalidArgument (no fd, no slot name), InUse (the slot is filled), InvalidState (the
        machine is built), QuotaExceeded (too many slots).
        """
        try:
            self._check(slot, fds)
        except VmbusError:
            close(fds)
            raise
        self._slots[slot] = fds

    def _check(self, slot: str, fds: list[int]) -> None:
        if not fds:
            raise VmbusError("InvalidArgument", "no file descriptor came with the message", argument="slot")
        if not 0 < len(slot) <= 64 or not _LETTERS.issuperset(slot):
            raise VmbusError("InvalidArgument", f"{slot!r} is no name of a slot", argument="slot")
        if self._built and not slot.startswith(("disk/", "nic/")):
            raise VmbusError("InvalidState", f"the machine is built; {slot} comes before Configure")
        if slot in self._slots:
            raise VmbusError("InUse", f"the slot {slot} is filled already", argument="slot")
        if len(self._slots) >= SLOTS_MAX:
            raise VmbusError("QuotaExceeded", f"a machine has at most {SLOTS_MAX} slots", argument="slot")

    def one(self, slot: str) -> int:
        """The one descriptor of ``slot``. Raises InvalidArgument if there is none, or several."""
        fds = self.all(slot)
        if len(fds) != 1:
            raise VmbusError("InvalidArgument", f"the slot {slot} takes one file", argument=slot)
        return fds[0]

    def all(self, slot: str) -> list[int]:
        """The descriptors of ``slot``, at least one. Raises InvalidArgument if there is none."""
        fds = self._slots.get(slot)
        if fds is None:
            raise VmbusError("InvalidArgument", f"no file was given for the slot {slot}", argument=slot)
        return fds

    def has(self, slot: str) -> bool:
        """Whether ``slot`` is filled."""
        return slot in self._slots

    def built(self) -> None:
        """From now on only files of devices that are attached are added."""
        self._built = True

    def hand_over(self, slots: list[str], *, keep: str = "") -> None:
        """These slots' descriptors now belong to the core; the others but ``keep`` are closed."""
        for slot in slots:
            del self._slots[slot]
        kept = self._slots.pop(keep, None)
        self.close()
        if kept is not None:
            self._slots[keep] = kept

    def close(self) -> None:
        """Close what is still held."""
        for fds in self._slots.values():
            close(fds)
        self._slots.clear()


def close(fds: list[int]) -> None:
    """Close descriptors that nobody took."""
    for fd in fds:
        os.close(fd)
