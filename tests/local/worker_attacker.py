# SPDX-License-Identifier: Apache-2.0
"""A taken-over worker: closes itself by the worker's own steps, then makes one attempt.

Run by test_worker_attacks.py as ``attacker.py THREAD ATTEMPT``; writes the errno (0: it worked) to stdout,
if the attempt lets it live. THREAD says whose rights the injected code has: ``main`` (narrowed) or ``core``
(the base filter alone, the widest that any thread of a worker has).
"""

from __future__ import annotations

import ctypes
import os
import socket
import struct
import sys
import threading
from collections.abc import Callable

from tests.local.worker_ring import Ring
from vmbus.worker import main as worker_main

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
libc.mmap.restype = ctypes.c_void_p

# x86-64
NUMBERS = {
    "open": 2,
    "stat": 4,
    "socket": 41,
    "connect": 42,
    "sendmsg": 46,
    "bind": 49,
    "listen": 50,
    "socketpair": 53,
    "fork": 57,
    "vfork": 58,
    "execve": 59,
    "kill": 62,
    "shmget": 29,
    "mknod": 133,
    "chroot": 161,
    "mount": 165,
    "umount2": 166,
    "ptrace": 101,
    "setuid": 105,
    "init_module": 175,
    "tkill": 200,
    "io_setup": 206,
    "add_key": 248,
    "request_key": 249,
    "keyctl": 250,
    "openat": 257,
    "unshare": 272,
    "vmsplice": 278,
    "perf_event_open": 298,
    "fanotify_init": 300,
    "open_by_handle_at": 304,
    "sendmmsg": 307,
    "setns": 308,
    "process_vm_readv": 310,
    "process_vm_writev": 311,
    "finit_module": 313,
    "memfd_create": 319,
    "bpf": 321,
    "execveat": 322,
    "userfaultfd": 323,
    "pkey_mprotect": 329,
    "io_uring_setup": 425,
    "open_tree": 428,
    "fsopen": 430,
    "pidfd_open": 434,
    "openat2": 437,
    "pidfd_getfd": 438,
    "process_madvise": 440,
    "landlock_create_ruleset": 444,
    "memfd_secret": 447,
}
BUFFER = ctypes.create_string_buffer(b"/", 4096)
PIDS = {"kill": 1, "tkill": 1, "ptrace": 16, "pidfd_open": 1, "process_vm_readv": 1, "process_vm_writev": 1}


def syscall(number: int, *arguments: int) -> int:
    """The errno of a raw system call, 0 if it worked."""
    result = libc.syscall(ctypes.c_long(number), *(ctypes.c_long(value) for value in arguments))
    return ctypes.get_errno() if result == -1 else 0


def by_number(name: str) -> Callable[[], int]:
    first = PIDS.get(name, ctypes.addressof(BUFFER))
    if name.endswith("at") or name in ("openat2", "open_tree"):
        return lambda: syscall(NUMBERS[name], -100, ctypes.addressof(BUFFER), 0, 24)
    return lambda: syscall(NUMBERS[name], first, 0, 0, 0, 0)


def errno_of(action: Callable[[], object]) -> int:
    try:
        action()
    except OSError as error:
        return error.errno or -1
    return 0


def mapped(prot: int, flags: int, fd: int = -1) -> int:
    address = libc.mmap(None, ctypes.c_size_t(2 << 20), prot, flags, fd, ctypes.c_long(0))
    return ctypes.get_errno() if address == ctypes.c_void_p(-1).value else 0


def start_thread() -> int:
    try:
        threading.Thread(target=lambda: None).start()
    except RuntimeError:
        return 1
    return 0


PAIR: list[socket.socket] = []
RINGS: list[Ring] = []
# enum io_uring_op of linux/io_uring.h
RING_REQUESTS = {
    "nop": 0,
    "sendmsg": 9,
    "recvmsg": 10,
    "accept": 13,
    "connect": 16,
    "openat": 18,
    "files update": 20,
    "statx": 21,
    "send": 26,
    "openat2": 28,
    "splice": 30,
    "unlinkat": 36,
    "msg ring": 40,
    "socket": 45,
    "uring cmd": 46,
    "install fd": 54,
}


def ring_request(opcode: int) -> Callable[[], int]:
    return lambda: -RINGS[0].answer(opcode)


CODE = libc.mmap(None, ctypes.c_size_t(4096), 3, 0x22, -1, ctypes.c_long(0))

ATTEMPTS: dict[str, Callable[[], int]] = {
    **{name: by_number(name) for name in NUMBERS},
    "send an fd": lambda: errno_of(
        lambda: PAIR[0].sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", 0))])
    ),
    "read a file": lambda: errno_of(lambda: os.open("/etc/passwd", os.O_RDONLY)),
    "list a directory": lambda: errno_of(lambda: os.listdir("/")),
    "write a file": lambda: errno_of(lambda: os.open("/tmp/x", os.O_CREAT | os.O_WRONLY)),
    "a child process": lambda: errno_of(os.fork),
    "kill the parent": lambda: errno_of(lambda: os.kill(os.getppid(), 0)),
    "huge pages": lambda: mapped(3, 0x22 | 0x40000),
    "a private copy of a file": lambda: mapped(3, 0x02, 0),
    "executable memory": lambda: mapped(7, 0x22),
    "data made executable": lambda: syscall(10, CODE, 4096, 5),
    "dumpable again": lambda: syscall(157, 4, 1, 0, 0, 0),
    "a tap that stays": lambda: syscall(16, 0, 0x400454CB, 1),
    "bytes into a terminal": lambda: syscall(16, 0, 0x5412, ctypes.addressof(BUFFER)),
    "a thread": start_thread,
    **{f"ring: {name}": ring_request(opcode) for name, opcode in RING_REQUESTS.items()},
    "ring: read by descriptor": lambda: -RINGS[0].answer(22, flags=0),
    # what a worker lives by, so that the refusals above mean something
    "ring: read of an empty place": lambda: -RINGS[0].answer(22),
    "send bytes": lambda: errno_of(lambda: PAIR[0].send(b"x")),
    "memory": lambda: mapped(3, 0x22),
}


def main() -> None:
    who, what = sys.argv[1:]
    worker = worker_main.Worker()
    for _, step in worker_main.STEPS:
        step(worker)
        if step is worker_main.close_the_rest:
            PAIR.extend(socket.socketpair())
        if step is worker_main.make_rings:
            RINGS.append(Ring(worker_main.RING_ENTRIES))
    attempt = ATTEMPTS[what]
    if who == "main":
        report(attempt())

    def job() -> Callable[[], None]:
        errno = attempt()
        return lambda: report(errno)

    worker.machine.core._begin(job)
    worker.loop.run()


def report(errno: int) -> None:
    os.write(1, b"%d\n" % errno)
    os._exit(0)


if __name__ == "__main__":
    main()
