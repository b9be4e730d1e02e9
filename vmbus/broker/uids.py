# SPDX-License-Identifier: Apache-2.0
"""The uids of worker processes: a range that is nobody else's.

The survey at start refuses a range that a user, a group or a subordinate range meets; another instance's
broker is kept off by a byte-range lock at the range's own offsets of one file, so that the kernel finds any
overlap. Uids are handed out least recently used first: those never used, then the one freed longest ago.
"""

import collections
import fcntl
import os
from pathlib import Path

from vmbus.wire.errors import VmbusError


class Uids:
    """Hands out uids of ``first`` … ``first + count - 1``; a gid of the same number goes with each."""

    def __init__(self, first: int, count: int, lock: Path, marker: Path) -> None:
        """``lock``: a file shared by all instances; ``marker`` remembers the next never-used uid."""
        self.range = range(first, first + count)
        self._lock = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB, count, first)
        except OSError:
            message = f"uids {first}+{count} are held by another instance; give this one a range of its own"
            raise VmbusError("InUse", message, argument="workers.uid_first") from None
        self._marker = marker
        noted = marker.read_text() if marker.exists() else ""  # empty if a broker died while it wrote
        start = int(noted) if noted.isdigit() else first
        self._free = collections.deque(sorted(self.range, key=lambda uid: (uid < start, uid)))

    def take(self) -> int:
        """A uid that no process has. Raises QuotaExceeded when all are taken."""
        if not self._free:
            raise VmbusError("QuotaExceeded", f"all {len(self.range)} worker uids are in use")
        uid = self._free.popleft()
        self._marker.write_text(str(uid + 1))
        return uid

    def hold(self, uid: int) -> None:
        """``uid`` is in use by a worker of before."""
        if uid in self._free:
            self._free.remove(uid)

    def free(self, uid: int) -> None:
        """Nothing runs as ``uid`` any more."""
        if uid in self.range:
            self._free.append(uid)
