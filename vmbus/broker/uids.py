# SPDX-License-Identifier: Apache-2.0
"""The uids of worker processes: a range that is nobody else's (DESIGN rule 9).

The range is refused if a user, a group or a subordinate range meets it, if this user namespace does not have
it, or if another instance's broker holds it (a byte-range lock at the range's own offsets, so that the kernel
finds any overlap). Uids are handed out least recently used first: those never used, then the one freed
longest ago.
"""

from __future__ import annotations

import collections
import fcntl
import os
from pathlib import Path
from typing import Final

from vmbus.wire.errors import VmbusError

_TABLES: Final = {
    "passwd": (2, 1),
    "group": (2, 1),
    "subuid": (1, 0),
    "subgid": (1, 0),
}  # column; 1: single ids


class Uids:
    """Hands out uids of ``first`` … ``first + count - 1``; a gid of the same number goes with each."""

    def __init__(self, first: int, count: int, *, lock: Path, marker: Path, etc: Path = Path("/etc")) -> None:
        """``lock``: a file shared by all instances; ``marker`` remembers the next never-used uid."""
        self._range = range(first, first + count)
        _check(self._range, etc)
        self._lock = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB, count, first)
        except OSError:
            message = f"uids {first}+{count} are held by another instance; give this one a range of its own"
            raise VmbusError("InUse", message, argument="workers.uid_first") from None
        self._marker = marker
        self._used: set[int] = set()
        self._freed: collections.deque[int] = collections.deque()
        try:
            self._next = int(marker.read_text())
        except (OSError, ValueError):
            self._next = first
        if self._next not in self._range:
            self._next = first
        self._untouched = count

    def take(self) -> int:
        """A uid that no process has. Raises QuotaExceeded when all are taken."""
        while self._untouched:
            uid = self._next
            self._next = uid + 1 if uid + 1 in self._range else self._range.start
            self._untouched -= 1
            if uid not in self._used:
                self._marker.write_text(str(self._next))
                self._used.add(uid)
                return uid
        if not self._freed:
            raise VmbusError("QuotaExceeded", f"all {len(self._range)} worker uids are in use")
        uid = self._freed.popleft()
        self._used.add(uid)
        return uid

    def hold(self, uid: int) -> None:
        """``uid`` is in use by a worker of before."""
        self._used.add(uid)

    def free(self, uid: int) -> None:
        """Nothing runs as ``uid`` any more."""
        self._used.discard(uid)
        if uid in self._range:
            self._freed.append(uid)

    def index(self, uid: int) -> int:
        """The place of ``uid`` in the range, from 0."""
        return uid - self._range.start


def _check(wanted: range, etc: Path) -> None:
    for name, (column, single) in _TABLES.items():
        try:
            lines = (etc / name).read_text(errors="replace").splitlines()
        except FileNotFoundError:
            continue
        for line in lines:
            fields = line.split(":")
            try:
                start = int(fields[column])
                taken = range(start, start + (1 if single else int(fields[column + 1])))
            except (IndexError, ValueError):
                continue
            if taken.start < wanted.stop and wanted.start < taken.stop:
                message = f"{etc / name} has '{line}' within {wanted.start}+{len(wanted)}; name another range"
                raise VmbusError("InUse", message, argument="workers.uid_first")
    for kind in ("uid", "gid"):
        mapped = [
            [int(n) for n in line.split()] for line in Path(f"/proc/self/{kind}_map").read_text().splitlines()
        ]
        if not any(start <= wanted.start and wanted.stop <= start + count for start, _, count in mapped):
            message = f"{wanted.start}+{len(wanted)} does not lie in this user namespace's {kind}_map"
            raise VmbusError("NotSupported", message, argument="workers.uid_first")
