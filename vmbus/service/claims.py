# SPDX-License-Identifier: Apache-2.0
"""Who uses which image: a writer excludes everybody, readers exclude writers.

An image is its st_rdev if it is a block device, else its st_dev and st_ino: names and links do not matter.
A machine's claims are written to its run directory before its worker is told to use the files, are
loaded again at start, and are dropped only when the worker's end is confirmed.
OFD locks, which the core takes as QEMU does, are the same thing towards other programs.
"""

from __future__ import annotations

import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import msgspec

from vmbus.service import durable
from vmbus.wire.broker import Identity
from vmbus.wire.errors import VmbusError

FILE: Final = "claims.json"


class Claim(msgspec.Struct, frozen=True):
    """One image of one machine."""

    image: str
    slot: str
    writable: bool


def image(identity: Identity) -> str:
    """The key under which an image is claimed."""
    if stat.S_ISBLK(identity.mode):
        return f"block {identity.rdev}"
    return f"file {identity.dev} {identity.ino}"


class Claims:
    """All claims of this instance; ``directory`` is RUN/service."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._held: dict[str, list[Claim]] = {}

    def load(self, uuid: str) -> None:
        """Take up again what a machine held when the service ended."""
        claims = durable.read(self._directory / uuid / FILE, list[Claim])
        if claims:
            self._held[uuid] = claims

    def add(self, uuid: str, slot: str, identity: Identity, *, writable: bool) -> None:
        """Claim, and write it down. Raises VmbusError InUse, which does not name the other machine: it may
        be somebody else's."""
        wanted = Claim(image(identity), slot, writable)
        for holder, claims in self._held.items():
            for claim in claims:
                if claim.image == wanted.image and (claim.writable or writable):
                    whose = f"slot {claim.slot} of this machine" if holder == uuid else "another machine"
                    how = "writes to it" if claim.writable else "reads it"
                    raise VmbusError(
                        "InUse", f"{whose} {how}; one writer or many readers can have an image", argument=slot
                    )
        held = [*self._held.get(uuid, ()), wanted]
        durable.write(self._directory / uuid / FILE, held)
        self._held[uuid] = held

    def release(self, uuid: str, prefix: str) -> None:
        """The machine's worker has closed the files of the slots that begin with ``prefix``."""
        held = [claim for claim in self._held.get(uuid, ()) if not claim.slot.startswith(prefix)]
        durable.write(self._directory / uuid / FILE, held)
        self._held[uuid] = held

    def held(self, uuid: str, prefix: str) -> list[Claim]:
        """What a machine holds for the slots that begin with ``prefix``."""
        return [claim for claim in self._held.get(uuid, ()) if claim.slot.startswith(prefix)]

    def give_up(self, uuid: str, claims: Iterable[Claim]) -> None:
        """The machine's worker has closed these, or never had them; one of each goes."""
        held = list(self._held.get(uuid, ()))
        for claim in claims:
            held.remove(claim)
        durable.write(self._directory / uuid / FILE, held)
        self._held[uuid] = held

    def drop(self, uuid: str) -> None:
        """The machine's worker has ended; the run directory goes with it."""
        self._held.pop(uuid, None)

    def count(self) -> int:
        """How many claims there are."""
        return sum(map(len, self._held.values()))
