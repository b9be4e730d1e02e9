# SPDX-License-Identifier: Apache-2.0
"""What a worker that got out of everything but its SELinux domain tries: PID IMAGE.

The exit code has the bit of each attempt that succeeded, in the order of ATTEMPTS. SIGURG, which nothing in a
worker waits for, has no effect.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
from collections.abc import Callable

PID, IMAGE = int(sys.argv[1]), sys.argv[2]


class _Range(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]


def _open(path: str, flags: int = os.O_RDONLY) -> None:
    os.close(os.open(path, flags))


def _connect() -> None:
    socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET).connect("/run/vmbus/system/broker/socket")


def _read_memory() -> None:
    with open(f"/proc/{PID}/maps", encoding="ascii") as maps:
        address = int(maps.readline().split("-")[0], 16)
    buffer = ctypes.create_string_buffer(8)
    ours, theirs = _Range(ctypes.addressof(buffer), 8), _Range(address, 8)
    libc = ctypes.CDLL(None)
    if libc.process_vm_readv(PID, ctypes.byref(ours), 1, ctypes.byref(theirs), 1, 0) != 8:
        raise OSError("process_vm_readv")


ATTEMPTS: dict[str, Callable[[], object]] = {
    "open an image": lambda: _open(IMAGE),
    "open /dev/kvm": lambda: _open("/dev/kvm", os.O_RDWR),
    "open /etc/shadow": lambda: _open("/etc/shadow"),
    "connect to the broker": _connect,
    "open another worker's memory": lambda: _open(f"/proc/{PID}/mem"),
    "read another worker's memory": _read_memory,
    "signal another worker": lambda: os.kill(PID, signal.SIGURG),
    "make a network socket": lambda: socket.socket(socket.AF_INET).close(),
}

if __name__ == "__main__":
    done = 0
    for bit, attempt in enumerate(ATTEMPTS.values()):
        try:
            attempt()
            done |= 1 << bit
        except OSError:
            pass
    os._exit(done)
