# SPDX-License-Identifier: Apache-2.0
"""A vmbusd in a dictionary, for vmbusctl's tests: machines with states, and a record of every call."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from typing import Any

from vmbus.cli.remote import JOB, MACHINE, MANAGER
from vmbus.wire.errors import VmbusError

UUID = "0b5a2f0e-7d1c-4c56-9a3e-2f60c1d3e4f5"
PATH = "/org/vmbus1/machine/" + UUID.replace("-", "_")

Handler = Callable[[str, list[Any]], None]


class FakeBus:
    """One machine, ``web``, in ``state``; ``errors`` by method are raised instead of an answer."""

    def __init__(self, state: str = "stopped", *, owner: int | None = None) -> None:
        self.properties: dict[str, Any] = {
            "Uuid": UUID,
            "Owner": os.getuid() if owner is None else owner,
            "State": state,
            "Name": "web",
            "StateReason": "",
            "StateDetail": "",
            "Definition": {"name": "web", "memory": 64 << 20, "kernel": {"source": "fd"}, "vcpus": 2},
        }
        self.calls: list[tuple[str, list[Any]]] = []
        self.files: list[tuple[int, int]] = []
        self.errors: dict[str, VmbusError] = {}
        self.then: dict[str, Callable[[], None]] = {}
        self.job = {"State": "running", "Error": "", "Message": ""}
        self.console_end: int | None = None
        self._handlers: dict[tuple[str | None, str], list[Handler]] = {}
        self._gone = asyncio.Event()

    async def call(
        self,
        path: str,
        interface: str,
        member: str,
        signature: str,
        body: Sequence[Any],
        *,
        fds: Sequence[int] = (),
    ) -> tuple[list[Any], list[int]]:
        self.calls.append((member, list(body)))
        self.files += [(os.fstat(fd).st_dev, os.fstat(fd).st_ino) for fd in fds]
        if member in self.errors:
            raise self.errors[member]
        if member in self.then:
            asyncio.get_running_loop().call_soon(self.then[member])
        if member == "GetManagedObjects":
            return [{PATH: {MACHINE: self.properties}, "/org/vmbus1": {MANAGER: {}}}], []
        if member == "GetAll":
            return [dict(self.job if body[0] == JOB else self.properties)], []
        if member == "GetMachine" and body[0] not in ("web", UUID):
            raise VmbusError("NotFound", f"you have no machine {body[0]!r}", argument="name")
        if member == "OpenConsole":
            assert self.console_end is not None
            return [0], [os.dup(self.console_end)]
        answers: dict[str, Any] = {
            "GetMachine": PATH,
            "DefineMachine": PATH,
            "CreateTransient": PATH,
            "Stop": "/org/vmbus1/job/1",
            "GetCapabilities": {"kvm": True, "memory": 8 << 30, "machine-types": ["vmbus-0"]},
            "GetStats": {"memory-pss": 7 << 20},
            "Get": "0.1.0",
        }
        return ([answers[member]] if member in answers else []), []

    async def subscribe(
        self, path: str | None, interface: str, member: str, callback: Handler
    ) -> Callable[[], None]:
        handlers = self._handlers.setdefault((path, member), [])
        handlers.append(callback)
        return lambda: handlers.remove(callback)

    async def gone(self) -> None:
        await self._gone.wait()

    def variant(self, signature: str, value: Any) -> Any:
        return (signature, value)

    def change(self, state: str, reason: str = "") -> None:
        """The machine goes into ``state``, as PropertiesChanged tells."""
        news = {"State": state, "StateReason": reason}
        self.properties.update(news)
        for handler in self._handlers.get((PATH, "PropertiesChanged"), []):
            handler(PATH, [MACHINE, news, []])

    def finish_job(self, state: str, error: str = "", message: str = "") -> None:
        """The job ends."""
        self.job.update(State=state, Error=error, Message=message)
        for handler in self._handlers.get(("/org/vmbus1/job/1", "PropertiesChanged"), []):
            handler("/org/vmbus1/job/1", [JOB, {"State": state}, []])

    def leave(self) -> None:
        """vmbusd leaves the bus."""
        self._gone.set()

    @property
    def handlers(self) -> int:
        """Subscriptions that were not ended."""
        return sum(map(len, self._handlers.values()))
