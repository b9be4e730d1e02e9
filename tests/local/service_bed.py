# SPDX-License-Identifier: Apache-2.0
"""vmbusd on a real bus with the real polkitd and a broker of the test (``service_fakes``), and callers of
any uid."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import os
import pwd
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from tests.lab.system import ALICE, BOB, SLOW, System
from tests.local.service_fakes import FakeBroker
from vmbus.bus import Client, variants
from vmbus.wire.dbus_form import build, parse

__all__ = ["ALICE", "BOB", "ROOT", "Bed", "Caller", "connect", "ended", "form", "scenario", "uuid_of"]

ROOT = "/org/vmbus1"
_numbers = itertools.count(1)


class _System(System):
    def __init__(self, library: str) -> None:
        self._library = library
        super().__init__(parts="bus")

    def environment(self, user: str = "root") -> dict[str, str]:
        return {**super().environment(user), "VMBUS_DBUS_LIBRARY": self._library}


class Bed:
    """One vmbusd, used by many tests. A context manager."""

    def __init__(self, library: str = "dbus_next") -> None:
        self.system = _System(library)
        self.library = library

    def __enter__(self) -> Bed:
        self.system.start()
        self.broker = FakeBroker(self.system.run_dir / "broker" / "socket")
        self.broker.start()
        self.system.service.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.system.close()
        self.broker.close()

    def fds(self) -> int:
        """How many descriptors vmbusd has, placeholders aside."""
        place = Path(f"/proc/{self.service_pid}/fd")
        count = 0
        for entry in place.iterdir():
            with contextlib.suppress(OSError):
                count += os.readlink(entry) != "/dev/null"
        return count

    @property
    def service_pid(self) -> int:
        """vmbusd's process (setpriv and nsenter have become it)."""
        return self.system.service.pid

    @asynccontextmanager
    async def caller(self, user: str = ALICE) -> AsyncIterator[Caller]:
        """A connection of ``user`` to the bus."""
        async with connect(self.system, user) as caller:
            yield caller

    def file(self, name: str = "", content: bytes = b"\0" * 512, user: str = ALICE) -> Path:
        """A file of ``user``."""
        path = self.system.files(user) / (name or f"file-{next(_numbers)}")
        path.write_bytes(content)
        os.chown(path, pwd.getpwnam(user).pw_uid, -1)
        path.chmod(0o600)
        return path


class Caller:
    """A user's connection, with what tests say often."""

    def __init__(self, client: Client, uid: int) -> None:
        self.client = client
        self.uid = uid

    async def __call__(self, path: str, method: str, *args: Any, **options: Any) -> Any:
        """Call a method."""
        return await self.client.call(path, method, *args, **options)

    async def define(self, **changes: Any) -> str:
        """A machine with what ``changes`` (underscores for dashes) add to the least definition."""
        return str(await self(ROOT, "Manager.DefineMachine", form(**changes)))

    async def state(self, path: str) -> str:
        """The machine's state."""
        return str(await self.client.get(path, "Machine", "State"))

    async def until(self, path: str, *states: str, within: float = 10) -> str:
        """Wait until the machine is in one of ``states``; the state it is in then."""
        deadline = asyncio.get_running_loop().time() + within * SLOW
        while (state := await self.state(path)) not in states:
            assert asyncio.get_running_loop().time() < deadline, f"{state}, not {states}"
            await asyncio.sleep(0.02)
        return state


async def ended(caller: Caller, job: str) -> dict[str, Any]:
    """A job's properties, when it has ended."""
    while (found := await caller.client.get_all(job, "Job"))["State"] == "running":
        await asyncio.sleep(0.01)
    return dict(found)


@asynccontextmanager
async def connect(system: System, user: str) -> AsyncIterator[Caller]:
    """A connection of ``user``: this process becomes that user while it connects."""
    account = pwd.getpwnam(user)
    os.setresuid(account.pw_uid, account.pw_uid, 0)
    try:
        client = await Client.connect(system.bus_address)
    finally:
        os.setresuid(0, 0, 0)
    try:
        yield Caller(client, account.pw_uid)
    finally:
        await client.close()


def form(**changes: Any) -> dict[str, Any]:
    """A definition as it goes over the bus."""
    plain: dict[str, Any] = {
        "name": f"machine-{next(_numbers)}",
        "memory": 16 << 20,
        "kernel": {"path": "/bin/true"},
    }
    plain |= {key.replace("_", "-"): value for key, value in changes.items()}
    return variants(build(parse(plain)))


def uuid_of(path: str) -> str:
    """The UUID in a machine's path."""
    return path.rsplit("/", 1)[1].replace("_", "-")


def scenario(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """A test that is told as a coroutine; at most a minute."""

    @functools.wraps(test)
    def run(*args: Any, **fixtures: Any) -> None:
        asyncio.run(asyncio.wait_for(test(*args, **fixtures), 60 * SLOW))

    return run
