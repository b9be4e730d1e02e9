# SPDX-License-Identifier: Apache-2.0
"""A vmbusd in a dictionary, for vmbusctl's tests: one machine, and a record of every call."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping
from typing import Any

from vmbus.cli.remote import Handler
from vmbus.wire import dbus_form
from vmbus.wire.definition import Definition, Disk, Nic
from vmbus.wire.errors import VmbusError

UUID = "0b5a2f0e-7d1c-4c56-9a3e-2f60c1d3e4f5"
PATH = "/org/vmbus1/machine/" + UUID.replace("-", "_")
JOB = "/org/vmbus1/job/1"


class FakeBus:
    """One machine, ``web``, in ``state``; ``errors`` by method are raised instead of an answer, ``then`` is
    called after an answer, ``meanwhile`` before it."""

    def __init__(self, state: str = "stopped") -> None:
        self.properties: dict[str, Any] = {
            "Uuid": UUID,
            "Owner": os.getuid(),
            "State": state,
            "Name": "web",
            "StateReason": "",
            "StateDetail": "",
            "Definition": {"name": "web", "memory": 64 << 20, "kernel": {"source": "fd"}, "vcpus": 2},
        }
        self.calls: list[tuple[str, list[Any]]] = []
        self.files: list[int] = []
        self.errors: dict[str, VmbusError] = {}
        self.meanwhile: dict[str, Callable[[], object]] = {}
        self.then: dict[str, Callable[[], object]] = {}
        self.job = {"State": "running", "Error": "", "Message": ""}
        self.console_end = -1
        self.memory: dict[str, Any] = {
            "kind": "mergeable",
            "size": 64 << 20,
            "target": 64 << 20,
            "resident": 48 << 20,
            "pss": 32 << 20,
            "huge": 0,
            "merged": 20 << 20,
            "saved": 16 << 20,
            "ballooned": 0,
            "swapped": 0,
            "overhead": 7 << 20,
        }
        self.host_memory: dict[str, Any] = {"total": 8 << 30, "available": 6 << 30, "pressure-some": 1.5}
        self._handlers: list[tuple[str, Handler]] = []
        self._gone = asyncio.Event()

    async def call(self, path: str, method: str, *args: Any) -> Any:
        member = method.partition(".")[2]
        self.calls.append((member, list(args)))
        for files in args:
            if isinstance(files, dict) and all(isinstance(fd, int) for fd in files.values()):
                self.files += [os.fstat(fd).st_ino for fd in files.values() if not isinstance(fd, bool)]
        if member in self.errors:
            raise self.errors[member]
        if member in self.meanwhile:
            self.meanwhile[member]()
        if member in self.then:
            asyncio.get_running_loop().call_soon(self.then[member])
        if member == "GetMachine" and args[0] not in ("web", UUID):
            raise VmbusError("NotFound", f"you have no machine {args[0]!r}", argument="name")
        answers: dict[str, Any] = {
            "GetMachine": PATH,
            "DefineMachine": PATH,
            "CreateTransient": PATH,
            "Stop": JOB,
            "OpenConsole": self.console_end,
            "GetCapabilities": {"kvm": True, "memory": 8 << 30, "machine-types": ["vmbus-1"]},
            "GetStats": {"memory-pss": 7 << 20},
            "GetMemory": self.host_memory if path.endswith("/host") else self.memory,
        }
        return answers.get(member)

    async def get_all(self, path: str, interface: str) -> dict[str, Any]:
        return dict({"Machine": self.properties, "Job": self.job, "Manager": {"Version": "0.1.0"}}[interface])

    async def managed_objects(self) -> dict[str, dict[str, dict[str, Any]]]:
        return {PATH: {"org.vmbus1.Machine": self.properties}, "/org/vmbus1": {"org.vmbus1.Manager": {}}}

    async def watch(self, path: str, handler: Handler) -> None:
        self._handlers.append((path, handler))

    async def gone(self) -> None:
        await self._gone.wait()

    def form(self, described: Definition | Disk | Nic) -> dict[str, Any]:
        return dbus_form.plain(described)

    def values(self, values: Mapping[str, int | str]) -> dict[str, Any]:
        return dict(values)

    def flags(self, **flags: bool) -> dict[str, Any]:
        return dict(flags)

    def change(self, state: str, reason: str = "") -> None:
        """The machine goes into ``state``: told as vmbusd does, public, private, signal."""
        before = self.properties["State"]
        for news in ({"State": state}, {"StateReason": reason}):
            self.properties.update(news)
            self._tell(PATH, "PropertiesChanged", ["org.vmbus1.Machine", news, []])
        self._tell(PATH, "StateChanged", [before, state])

    def remove(self) -> None:
        """The machine is removed, as a transient one is at its end."""
        self._tell("/org/vmbus1", "InterfacesRemoved", [PATH, ["org.vmbus1.Machine"]])

    def finish_job(self, state: str, error: str = "", message: str = "") -> None:
        """The job ends."""
        self.job.update(State=state, Error=error, Message=message)
        self._tell(JOB, "PropertiesChanged", ["org.vmbus1.Job", {"State": state}, []])

    def leave(self) -> None:
        """vmbusd leaves the bus."""
        self._gone.set()

    def _tell(self, path: str, member: str, body: list[Any]) -> None:
        for watched, handler in self._handlers:
            if watched == path:
                handler("", member, body)
