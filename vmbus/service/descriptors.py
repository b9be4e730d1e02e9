# SPDX-License-Identifier: Apache-2.0
"""The table of descriptors, laid out so that what others send can leave it unclosed.

``files`` says why. Every number below N (a multiple of 64: the kernel copies tables in words) is
taken, by a file of ours or by a placeholder on /dev/null. Two rules keep it so: a file that we keep goes
through ``keep``, which moves it below N, and one that we close goes through ``close``, which leaves a
placeholder behind. Files that live only for a moment need neither.

``expel`` starts a thread, which shares our table, and then takes a new table that has only what is below N:
the thread is left with the old one. It closes all that is ours there and at last what was expelled, and if
that hangs it hangs alone. No other thread may use descriptors; vmbusd has none.

Before ``begin`` (in tests, in other programs) ``keep`` and ``close`` do the plain thing.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from collections.abc import Callable, Iterable
from typing import Final

BLOCK: Final = 64
SPARE: Final = 192
"""How many files can be kept beyond those there are at the beginning, before N grows."""

_libc = ctypes.CDLL(None, use_errno=True)
_SYS_CLOSE_RANGE: Final = 436
_UNSHARE: Final = 2
_ALL: Final = 0xFFFFFFFF


class _Table:
    def __init__(self) -> None:
        self.limit = 0
        self.placeholders: list[int] = []

    def fill(self) -> None:
        """Put placeholders into all holes below N."""
        while (fd := os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)) < self.limit:
            self.placeholders.append(fd)
        os.close(fd)


_table = _Table()


def begin() -> None:
    """Lay the table out. Called once, when the long-lived files of the event loop and the bus are there."""
    highest = max(int(name) for name in os.listdir("/proc/self/fd"))
    _table.limit = (highest + SPARE + BLOCK) // BLOCK * BLOCK
    _table.fill()


def limit() -> int:
    """N; 0 before ``begin``."""
    return _table.limit


def keep(fd: int) -> int:
    """Move a file that is to live long below N; returns its new number."""
    if fd < _table.limit or not _table.limit:
        return fd
    if not _table.placeholders:
        begin()
        if fd < _table.limit:
            return fd
    place = _table.placeholders.pop()
    os.dup2(fd, place, inheritable=False)
    os.close(fd)
    return place


def close(fd: int) -> None:
    """Close a file that is known to be harmless."""
    os.close(fd)
    if fd < _table.limit:
        _table.fill()


def close_all(fds: Iterable[int]) -> None:
    """``close`` for each."""
    for fd in fds:
        close(fd)


def expel(fds: list[int], ended: Callable[[], None]) -> bool:
    """Rid our table of ``fds`` without closing them here; ``ended`` is called, in another thread, if they
    could be closed. False, and nothing done, where the layout does not allow it."""
    if not _table.limit or min(fds) < _table.limit:
        return False
    limit = _table.limit
    go = threading.Semaphore(0)
    parted = False

    def grave() -> None:
        go.acquire()
        if parted:
            os.closerange(0, limit)
            for fd in fds:
                with contextlib.suppress(OSError):
                    os.close(fd)
            ended()

    threading.Thread(target=grave, name="closing", daemon=True).start()
    result = _libc.syscall(_SYS_CLOSE_RANGE, limit, ctypes.c_uint(_ALL), _UNSHARE)
    parted = bool(result == 0)
    go.release()
    return parted
