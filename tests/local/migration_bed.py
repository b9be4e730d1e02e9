# SPDX-License-Identifier: Apache-2.0
"""Two whole systems side by side, between which machines move: through a pair of sockets, or through a relay
that does something to what passes after so many bytes."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

from tests.lab.system import ALICE, System
from tests.local.service_bed import ROOT, Caller, ended, uuid_of
from tests.local.test_service_real import Stage, console_says

SHARED = """
[[open.grant]]
users = ["*"]
prefixes = ["{place}/files/{{user}}"]
"""
LOOP = "disk-loop sector=0 count=64 beat=20"
DIRTY = "dirty mib=1"
MEMORY = 20 << 20
RUNNING = 19
"""The record with which the destination says that it goes on."""


def model() -> str:
    """A processor model that runs here and can be moved."""
    vendor = "intel" if "GenuineIntel" in Path("/proc/cpuinfo").read_text() else "amd"
    return f"x86-64-v1-{vendor}-1"


class Pair:
    """The system ``here``, and another that may open its users' files."""

    def __init__(self, here: System, there: System) -> None:
        self.here, self.there = Stage(here), Stage(there)
        self.length = 0
        """Bytes that it takes to move a certain machine, once somebody has counted them."""

    @property
    def systems(self) -> tuple[System, System]:
        return self.here.system, self.there.system

    def counts(self) -> list[dict[str, int]]:
        """What must not grow, on both sides."""
        return [system.counts() for system in self.systems]

    def settle(self, wanted: list[dict[str, int]]) -> list[dict[str, int]]:
        """What is left, at last."""
        return [system.settle(counts) for system, counts in zip(self.systems, wanted, strict=True)]

    @asynccontextmanager
    async def callers(self) -> AsyncIterator[tuple[Caller, Caller]]:
        """Alice on both sides."""
        async with self.here.caller() as here, self.there.caller() as there:
            yield here, there

    async def defined(self, here: Caller, there: Caller, mode: str, **changes: Any) -> tuple[str, str]:
        """A machine, and itself on the other side; stopped."""
        form = self.here.guest(mode, **{"cpu_model": model(), "memory": MEMORY, **changes})
        machine = await here(ROOT, "Manager.DefineMachine", form)
        return machine, await there(ROOT, "Manager.DefineMachineAs", form, uuid_of(machine))


@contextmanager
def pair(also: str = "") -> Iterator[Pair]:
    """``also``: a further policy of the one there."""
    with System() as here, System(policy=SHARED.format(place=here.place) + also) as there:
        yield Pair(here, there)


@contextmanager
def nothing_left(systems: Pair) -> Iterator[Pair]:
    """The two, of which nothing is left that was not there before."""
    before = systems.counts()
    yield systems
    for system in systems.systems:
        for name in system.vmbusctl(ALICE, "list", "--names").stdout.split():
            system.vmbusctl(ALICE, "kill", name)
            system.vmbusctl(ALICE, "undefine", name)
    assert systems.settle(before) == before


async def state(caller: Caller, machine: str) -> tuple[str, str]:
    found = await caller.client.get_all(machine, "Machine")
    return found["State"], found["StateReason"]


async def move(
    source: Caller,
    destination: Caller,
    machine: str,
    relay: Relay | None = None,
    receive: Mapping[str, Any] | None = None,
    **options: Any,
) -> tuple[str, str]:
    """Begin to move it, with these options there and here; the jobs there and here."""
    ours, theirs = relay.ends() if relay else socket.socketpair()
    with ours, theirs:
        received = await destination(machine, "Machine.Receive", theirs.fileno(), dict(receive or {}), {})
        sent = await source(machine, "Machine.Migrate", ours.fileno(), options)
    return received, sent


async def done(caller: Caller, job: str) -> dict[str, Any]:
    """The same of a job that has to succeed."""
    found = await ended(caller, job)
    assert found["State"] == "done", found
    return found


async def says(caller: Caller, machine: str, wanted: str) -> str:
    """What the guest says from now on, until ``wanted``; what it said before is left out."""
    console = socket.socket(fileno=await caller(machine, "Machine.OpenConsole", {}))
    with console:
        console.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while console.recv(65536):
                pass
        console.setblocking(True)
        return await console_says(console.fileno(), wanted)


def disk_holds(disk: str, written: int, count: int = 64) -> bool:
    """Whether it holds the last that mode disk-loop wrote to each sector, of ``written`` in all."""
    data = Path(disk).read_bytes()
    found = [struct.unpack_from("<Q", data, 512 * sector)[0] for sector in range(count)]
    return found == [written - 1 - (written - 1 - sector) % count for sector in range(count)]


class Relay:
    """Passes bytes on between two sockets. After ``after`` bytes from source to destination ``then`` is
    called before any more pass; ``change`` sees each piece with its place. The connection breaks instead of
    the first record of kind ``lost`` from the destination (native/vmm/src/migrate/stream.rs). A context
    manager.
    """

    def __init__(
        self,
        after: int = -1,
        then: Callable[[], object] = lambda: None,
        change: Callable[[int, bytes], bytes] = lambda place, piece: piece,
        lost: int = -1,
    ) -> None:
        self._after, self._then, self._change, self._lost = after, then, change, lost
        self.passed = 0
        self._pairs: list[socket.socket] = []
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Relay:
        return self

    def __exit__(self, *_: object) -> None:
        self.cut()
        for thread in self._threads:
            thread.join()
        for sock in self._pairs:
            sock.close()

    def ends(self) -> tuple[socket.socket, socket.socket]:
        """The source's end and the destination's."""
        (here, source), (there, destination) = socket.socketpair(), socket.socketpair()
        self._pairs = [source, destination]
        self._threads = [
            threading.Thread(target=self._forward, args=(source, destination)),
            threading.Thread(target=self._back, args=(destination, source)),
        ]
        for thread in self._threads:
            thread.start()
        return here, there

    def cut(self) -> None:
        """Break the connection."""
        for sock in self._pairs:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def _forward(self, source: socket.socket, destination: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                left = self._after - self.passed
                piece = source.recv(min(65536, left) if left > 0 else 65536)
                if not piece:
                    break
                destination.sendall(self._change(self.passed, piece))
                self.passed += len(piece)
                if self.passed == self._after:
                    self._then()
        self.cut()

    def _back(self, destination: socket.socket, source: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while header := destination.recv(32, socket.MSG_WAITALL):
                kind, _, length = struct.unpack_from("<III", header)
                if kind == self._lost:
                    break
                source.sendall(header)
                if length:
                    source.sendall(destination.recv(length, socket.MSG_WAITALL))
        self.cut()


def worker_of(system: System) -> int:
    """The process of the one machine that runs there."""
    (pid,) = system.workers()
    return pid
