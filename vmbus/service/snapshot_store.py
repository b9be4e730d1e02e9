# SPDX-License-Identifier: Apache-2.0
"""Where the snapshots of machines are written down, and the memory of each.

| file | what |
|---|---|
| STATE/snapshots/UUID/index.json | the snapshots of machine UUID, and what is left on its disks |
| STATE/snapshots/UUID/ID | the memory of one, in the format of a saved machine (native/vmm/src/save) |

Memory is the service's and not in the first disk (as QEMU has it), because then

- any disk will do that has snapshots of its own, and a machine without disks has snapshots, too;
- one file has one format, one parser and one checksum, whatever it is for;
- nothing has to be read from an image before a worker has it, and the worker gets it as a file of its own.

What that costs: a disk that is moved elsewhere loses the memory. Its internal snapshot stays one, for
``vmbus-img`` and ``qemu-img``.

**A snapshot is there if the index names it.** What an operation does to disks before or after that moment
is written down in the index before it is done: ``drop`` are internal snapshots that nobody wants, ``undo``
are those to go back to, because a way back was begun and not finished. A machine's worker tidies them away
at its next start; files of memory that no index names go when the service starts.
"""

from __future__ import annotations

import logging
import os
import uuid as uuids
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import msgspec

from vmbus.service import descriptors, durable
from vmbus.service.files import OwnFile
from vmbus.wire.errors import VmbusError

log = logging.getLogger("vmbus.snapshots")

INDEX: Final = "index.json"


class Snapshot(msgspec.Struct, frozen=True):
    """One; ``parent`` is an id, empty for none. ``created``: microseconds since 1970; ``memory``: bytes that
    its file takes."""

    id: str
    name: str
    created: int
    parent: str = ""
    memory: int = 0


class Index(msgspec.Struct, frozen=True):
    """Of one machine. ``current``: the id of the one that it was made, or has gone back to, last."""

    snapshots: list[Snapshot] = []
    current: str = ""
    undo: list[str] = []
    drop: list[str] = []

    def find(self, name: str) -> Snapshot:
        """By its name. Raises NotFound."""
        for snapshot in self.snapshots:
            if snapshot.name == name:
                return snapshot
        raise VmbusError("NotFound", f"the machine has no snapshot '{name}'", argument="name")


def internal(identifier: str) -> str:
    """The name of the internal snapshot of each disk."""
    return f"vmbus-{identifier}"


def new_identifier() -> str:
    """One that no other snapshot, or template, has."""
    return uuids.uuid4().hex


class Store:
    """All machines'. What cannot be written raises Unavailable."""

    def __init__(self, state: Path) -> None:
        self._root = state / "snapshots"
        self._root.mkdir(mode=0o700, exist_ok=True)
        self._known: dict[str, Index] = {}

    def load(self, machines: Iterable[str]) -> None:
        """At start: read the indices, and remove what a crash, or a machine that is no more, has left."""
        uuids = set(machines)
        for directory in self._root.iterdir():
            if directory.name not in uuids:
                durable.remove(directory)
                continue
            index = durable.read(directory / INDEX, Index)
            if index is None:
                continue
            self._known[directory.name] = index
            wanted = {INDEX, *(snapshot.id for snapshot in index.snapshots)}
            for file in directory.iterdir():
                if file.name not in wanted:
                    durable.remove(file)

    def of(self, uuid: str) -> Index:
        """What is written down of a machine."""
        return self._known.get(uuid, Index())

    def put(self, uuid: str, index: Index) -> None:
        """Write it down, durably."""
        directory = self._root / uuid
        try:
            if not directory.is_dir():
                directory.mkdir(mode=0o700)
                durable.sync_directory(self._root)
            durable.write(directory / INDEX, index)
        except OSError as error:
            raise _cannot(error) from None
        self._known[uuid] = index

    def forget(self, uuid: str) -> None:
        """The machine is no more."""
        if self._known.pop(uuid, None) is not None:
            durable.remove(self._root / uuid)

    def create_memory(self, uuid: str, identifier: str) -> OwnFile:
        """A new file for the memory of a snapshot."""
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        try:
            return OwnFile(descriptors.keep(os.open(self._root / uuid / identifier, flags, 0o600)))
        except OSError as error:
            raise _cannot(error) from None

    def open_memory(self, uuid: str, identifier: str) -> OwnFile:
        """For reading. Raises NotFound."""
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            return OwnFile(descriptors.keep(os.open(self._root / uuid / identifier, flags)))
        except OSError as error:
            message = f"the snapshot's memory cannot be opened: {error.strerror}; delete it"
            raise VmbusError("NotFound", message, argument="name") from None

    def settle_memory(self, uuid: str) -> None:
        """The names of files that were created are durable."""
        durable.sync_directory(self._root / uuid)

    def remove_memory(self, uuid: str, identifier: str) -> None:
        """It need not be there."""
        try:
            durable.remove(self._root / uuid / identifier)
        except OSError as error:
            log.error("the memory of a snapshot stays until the next start: %s", error)

    def used(self, machines: Iterable[str]) -> int:
        """Bytes that the memory of these machines' snapshots takes."""
        return sum(snapshot.memory for uuid in machines for snapshot in self.of(uuid).snapshots)


def _cannot(error: OSError) -> VmbusError:
    return VmbusError("Unavailable", f"the snapshot cannot be written down: {error.strerror}")
