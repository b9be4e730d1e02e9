# SPDX-License-Identifier: Apache-2.0
"""Guest memory in a sealed memfd, which a worker's filter forbids it to make: shareable, or of huge pages.

Sealed against growing and shrinking, so that no holder can take memory away under a guest, or have more than
was counted. Ordinary pages belong to the cgroup that touches them, the worker's. Huge pages are reserved
here: the first mapping of a hugetlb file takes its pages out of what others can have, and the file keeps them
when the mapping is gone (hugetlb_reserve_pages of mm/hugetlb.c). They go back to the pool when the last
holder of the file, the worker, has ended, however it ends: no one else has a descriptor of it.

Nothing of this takes a right: any process may drain the pool. Hence the quota, which the broker has checked,
and the worker's filter.
"""

import errno
import fcntl
import mmap
import os
import socket
from pathlib import Path

from vmbus.broker.children import Channel
from vmbus.wire import packet
from vmbus.wire.errors import VmbusError
from vmbus.wire.inlet import Delivery

_SEALS = fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
_FLAGS = {0: 0, 2 << 20: os.MFD_HUGETLB | os.MFD_HUGE_2MB, 1 << 30: os.MFD_HUGETLB | os.MFD_HUGE_1GB}
NAMES = {2 << 20: "2 MiB", 1 << 30: "1 GiB"}
POOLS = Path("/sys/kernel/mm/hugepages")


def deliver(size: int, page_size: int, channel: Channel) -> None:
    """Send ``size`` bytes for slot ``memory`` through the inlet (kept); ``page_size`` 0: no huge pages.

    Reports what was made. Raises InvalidArgument, NotSupported, Unavailable (not enough in the pool),
    Disconnected.
    """
    fd = make(size, page_size)
    try:
        packet.send(socket.socket(fileno=channel.fds[0]), Delivery(slot="memory"), [fd])
    except OSError as error:
        raise VmbusError("Disconnected", f"the worker does not take its memory: {error.strerror}") from None
    channel.report(f"{size} bytes in pages of {page_size or mmap.PAGESIZE}")


def make(size: int, page_size: int, pools: Path = POOLS) -> int:
    """The sealed memfd, its huge pages reserved; the caller's."""
    pool = pools / f"hugepages-{page_size >> 10}kB"
    if page_size and not pool.is_dir():
        message = f"this host's CPU or kernel has no pages of {NAMES[page_size]}"
        raise VmbusError("NotSupported", message, argument="page-size")
    if page_size and size % page_size:
        message = f"{size} bytes is no multiple of a page of {NAMES[page_size]}"
        raise VmbusError("InvalidArgument", message, argument="memory")
    fd = os.memfd_create("guest-memory", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | _FLAGS[page_size])
    try:
        os.ftruncate(fd, size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
        if page_size:
            mmap.mmap(fd, size).close()
    except OSError as error:
        os.close(fd)
        if not page_size or error.errno != errno.ENOMEM:
            raise
        raise too_few(size // page_size, page_size, pool) from None
    return fd


def too_few(wanted: int, page_size: int, pool: Path, argument: str = "memory") -> VmbusError:
    """That the pool has not as many pages as are wanted."""
    free, reserved = (int((pool / f"{name}_hugepages").read_text()) for name in ("free", "resv"))
    message = (
        f"{wanted} pages of {NAMES[page_size]} are wanted, and {free - reserved} are free and unreserved"
    )
    return VmbusError("Unavailable", f"{message}; an administrator can enlarge the pool", argument=argument)
