# SPDX-License-Identifier: Apache-2.0
"""The worker's birth: what it does, in order, between exec and its first request.

The broker's spawn child has made the namespaces, given up every capability and become the worker's own
user before it executed this; nothing here or below ever runs as root. What follows closes the process
step by step; STEPS is the whole of it, and each step's reason stands beside it. Not one byte of an image,
a kernel or a save file is read before the last of them. A step that fails ends the worker: it never runs
half closed.

When the binds are taken away (``wait_for_empty_root``), nothing can be imported any more. So everything
that the worker will ever use is imported at the top of this file, directly or not.
"""

from __future__ import annotations

import sys

# msgspec takes typing_extensions where it happens to be installed, and with it inspect, ast, dis and
# tokenize: 1.2 MB in every worker for what typing of Python 3.11 has as well.
sys.modules["typing_extensions"] = None  # type: ignore[assignment]

# ruff: noqa: E402
import gc
import os
import select
import socket
import time
from collections.abc import Callable
from typing import Final

import prctl

from vmbus.wire import startup
from vmbus.worker import core
from vmbus.worker.control import Control
from vmbus.worker.events import EventQueue
from vmbus.worker.files import Files
from vmbus.worker.log import say
from vmbus.worker.loop import Loop
from vmbus.worker.machine import Machine

EMPTY_ROOT_SECONDS: Final = 10.0
RING_ENTRIES: Final = 256


class Worker:
    """What the steps build, one after the other."""

    orders: startup.Startup
    loop: Loop
    machine: Machine
    control: Control


def read_orders(worker: Worker) -> None:
    worker.orders = startup.read(0)


def check_core(_: Worker) -> None:
    core.check_abi()


def close_the_rest(worker: Worker) -> None:
    orders = worker.orders
    keep = sorted({0, 1, 2, orders.listen, orders.kvm, orders.status})
    for low, high in zip(keep, [*keep[1:], 1 << 20], strict=True):
        os.closerange(low + 1, high)
    for fd in keep:
        os.set_inheritable(fd, False)


def make_the_desk(worker: Worker) -> None:
    """Everything that needs a system call which the filter denies: epoll, the console's socket pair."""
    listener = socket.socket(fileno=worker.orders.listen)
    if (listener.family, listener.type) != (socket.AF_UNIX, socket.SOCK_SEQPACKET):
        raise ValueError("the listening descriptor is no SEQPACKET socket")
    worker.loop = Loop()
    files, events = Files(), EventQueue()
    worker.machine = Machine(worker.loop, files, events, kvm=worker.orders.kvm)
    worker.control = Control(worker.loop, listener, files=files, events=events, desk=worker.machine)
    worker.machine.events_added = worker.control.send_events


def say_imported(worker: Worker) -> None:
    os.write(worker.orders.status, startup.IMPORTED)


def wait_for_empty_root(worker: Worker) -> None:
    """Until the stager has taken every bind away; its hang-up only shortens the wait, / itself decides."""
    if worker.orders.expect_empty_root:
        hang_up = select.poll()
        hang_up.register(worker.orders.status, 0)
        deadline = time.monotonic() + EMPTY_ROOT_SECONDS
        pause_ms = 2
        while os.listdir("/"):
            if time.monotonic() > deadline:
                raise TimeoutError(f"/ is not empty: {' '.join(sorted(os.listdir('/'))[:10])}")
            if hang_up.poll(pause_ms):
                time.sleep(pause_ms / 1000)
            pause_ms = min(2 * pause_ms, 50)
    os.close(worker.orders.status)


def make_rings(worker: Worker) -> None:
    """One an I/O thread, restricted and enabled; from seccomp on there are no others."""
    orders = worker.orders
    if orders.rings and core.rings(orders.rings, RING_ENTRIES, orders.ring_files) == 0:
        say("io_uring is switched off on this host; images are read and written by plain system calls")


def hide(_: Worker) -> None:
    prctl.set_no_new_privs(1)
    prctl.set_dumpable(0)


def deny_paths(_: Worker) -> None:
    if core.landlock() == 0:
        say("this kernel has no Landlock; the empty root and seccomp stand alone")


def close_by_seccomp(worker: Worker) -> None:
    core.seccomp(worker.orders.profile)


def start_core_thread(worker: Worker) -> None:
    worker.machine.core.start_thread()


def narrow_main(_: Worker) -> None:
    core.narrow("main")


def settle(_: Worker) -> None:
    """What is imported stays: the collector need not look at it again."""
    gc.collect()
    gc.freeze()


STEPS: Final[tuple[tuple[str, Callable[[Worker], None]], ...]] = (
    ("read the line on stdin", read_orders),
    ("check that the core is the one this was written for", check_core),
    ("close every descriptor that the line does not name", close_the_rest),
    ("make the loop, the console and the control channel, while sockets can be made", make_the_desk),
    ("say that no file is needed any more", say_imported),
    ("wait until / is empty", wait_for_empty_root),
    ("make the io_uring rings", make_rings),
    ("no new privileges, not dumpable", hide),
    ("Landlock: no path", deny_paths),
    ("the base seccomp filter, on all threads", close_by_seccomp),
    ("the core's thread, which may make threads", start_core_thread),
    ("the main thread, which may not", narrow_main),
    ("settle the heap", settle),
)


def main() -> None:
    """Close the process, then serve until the machine has ended."""
    worker = Worker()
    for what, step in STEPS:
        try:
            step(worker)
        except Exception as error:
            say(f"could not {what}: {type(error).__name__}: {error}")
            os._exit(1)
    worker.loop.run()
    # No interpreter shutdown: the core's threads may still run, and the kernel closes everything.
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
