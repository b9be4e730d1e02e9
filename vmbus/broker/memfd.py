# SPDX-License-Identifier: Apache-2.0
"""Guest memory that other processes can share: a sealed memfd, which a worker's filter forbids it to make.

Its pages belong to the cgroup that touches them, the worker's. Sealed against growing and shrinking, so that
no holder can take memory away under a guest, or have more than was counted.
"""

import fcntl
import os
import socket

from vmbus.wire import packet
from vmbus.wire.inlet import Delivery


def deliver(size: int, inlet: socket.socket) -> None:
    """Send ``size`` bytes of sealed, empty memory for slot ``memory``. Raises OSError."""
    fd = os.memfd_create("guest-memory", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
        packet.send(inlet, Delivery(slot="memory"), [fd])
    finally:
        os.close(fd)
