# SPDX-License-Identifier: Apache-2.0
"""vmbusd's objects as vmbusctl sees them: one method here for one on the bus, in Python's types.

Everything goes through ``Bus``, the four operations of a D-Bus connection that a client needs;
vmbus.bus.Client has them, and so have the fakes of the tests.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeVar

from vmbus.wire.errors import KINDS, VmbusError

ROOT: Final = "/org/vmbus1"
HOST: Final = "/org/vmbus1/host"
MANAGER: Final = "org.vmbus1.Manager"
MACHINE: Final = "org.vmbus1.Machine"
JOB: Final = "org.vmbus1.Job"
_PROPERTIES: Final = "org.freedesktop.DBus.Properties"
_OBJECT_MANAGER: Final = "org.freedesktop.DBus.ObjectManager"

ENDED: Final = frozenset({"stopped", "crashed"})

T = TypeVar("T")


class Bus(Protocol):
    """A connection to the bus, speaking to one vmbusd."""

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
        """Call and return body and fds (the caller's to close). Variants are unwrapped. Raises VmbusError."""
        ...

    async def subscribe(
        self, path: str | None, interface: str, member: str, callback: Callable[[str, list[Any]], None]
    ) -> Callable[[], None]:
        """Call back with path and body for each such signal of vmbusd; returns what ends that."""
        ...

    async def gone(self) -> None:
        """Return when vmbusd has left the bus, or the bus is gone."""
        ...

    def variant(self, signature: str, value: Any) -> Any:
        """A value for a ``v``."""
        ...


@dataclass(frozen=True)
class Machine:
    """A machine as the caller may see it; ``properties`` are the interface's, those hidden left out."""

    path: str
    properties: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Its name, or its UUID where the caller may not know the name."""
        return str(self.properties.get("Name") or self.properties["Uuid"])

    @property
    def state(self) -> str:
        """stopped, starting, running, paused, stopping or crashed."""
        return str(self.properties["State"])


@dataclass(frozen=True)
class Moment:
    """A machine's state at one moment, as a watch reports it."""

    state: str
    reason: str
    detail: str


class Remote:
    """vmbusd, over one connection."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus

    async def define(self, tree: Mapping[str, Any]) -> str:
        """Manager.DefineMachine; the new machine's path."""
        return str(await self._value(ROOT, MANAGER, "DefineMachine", "a{sv}", [self._variants(tree)]))

    async def create_transient(
        self, tree: Mapping[str, Any], files: Mapping[str, int], *, paused: bool
    ) -> str:
        """Manager.CreateTransient. ``files`` are fds by slot; they stay the caller's."""
        fds = list(files.values())
        indices = {slot: index for index, slot in enumerate(files)}
        options = self._variants({"paused": paused})
        body = [self._variants(tree), indices, options]
        return str(await self._value(ROOT, MANAGER, "CreateTransient", "a{sv}a{sh}a{sv}", body, fds=fds))

    async def find(self, name: str) -> str:
        """The path of the caller's machine ``name``, or of the one with that UUID."""
        return str(await self._value(ROOT, MANAGER, "GetMachine", "s", [name]))

    async def machine(self, path: str) -> Machine:
        """What the caller may see of a machine."""
        return Machine(path, await self._value(path, _PROPERTIES, "GetAll", "s", [MACHINE]))

    async def machines(self, *, everyone: bool) -> list[Machine]:
        """The caller's machines, or all that there are; in the order of their names."""
        objects = await self._value(ROOT, _OBJECT_MANAGER, "GetManagedObjects", "", [])
        found = [Machine(path, known[MACHINE]) for path, known in objects.items() if MACHINE in known]
        own = [machine for machine in found if everyone or machine.properties["Owner"] == os.getuid()]
        return sorted(own, key=lambda machine: (machine.properties["Owner"], machine.name))

    async def start(self, path: str, files: Mapping[str, int], *, paused: bool) -> None:
        """Machine.Start; returns when the guest runs."""
        fds = list(files.values())
        body = [self._variants({"paused": paused}), {slot: index for index, slot in enumerate(files)}]
        await self._bus.call(path, MACHINE, "Start", "a{sv}a{sh}", body, fds=fds)

    async def act(self, path: str, method: str) -> None:
        """A method of Machine without arguments or result: Shutdown, Kill, Reset, Pause, Resume, Undefine."""
        await self._bus.call(path, MACHINE, method, "", [])

    async def stop(self, path: str, deadline_seconds: float) -> str:
        """Machine.Stop; the path of its job."""
        return str(await self._value(path, MACHINE, "Stop", "t", [round(deadline_seconds * 1e6)]))

    async def console(self, path: str, *, write: bool, steal: bool) -> socket.socket:
        """Machine.OpenConsole; the caller closes the socket."""
        options = self._variants({"write": write, "steal": steal})
        _, fds = await self._bus.call(path, MACHINE, "OpenConsole", "a{sv}", [options])
        for extra in fds[1:]:
            os.close(extra)
        if not fds:
            raise VmbusError("Internal", "vmbusd answered without a console")
        return socket.socket(fileno=fds[0])

    async def stats(self, path: str) -> Mapping[str, Any]:
        """Machine.GetStats."""
        found: Mapping[str, Any] = await self._value(path, MACHINE, "GetStats", "", [])
        return found

    async def capabilities(self) -> Mapping[str, Any]:
        """Host.GetCapabilities."""
        found: Mapping[str, Any] = await self._value(HOST, "org.vmbus1.Host", "GetCapabilities", "", [])
        return found

    async def version(self) -> str:
        """Manager.Version."""
        return str(await self._value(ROOT, _PROPERTIES, "Get", "ss", [MANAGER, "Version"]))

    async def finish(self, job: str) -> None:
        """Return when a job is done; raises VmbusError as it failed, Cancelled, or Disconnected."""
        ended = asyncio.Event()

        def changed(_path: str, body: list[Any]) -> None:
            if body[0] == JOB and body[1].get("State", "running") != "running":
                ended.set()

        stop = await self._bus.subscribe(job, _PROPERTIES, "PropertiesChanged", changed)
        try:
            found = await self._value(job, _PROPERTIES, "GetAll", "s", [JOB])
            if found["State"] == "running":
                await _or_gone(self._bus, ended.wait())
                found = await self._value(job, _PROPERTIES, "GetAll", "s", [JOB])
        finally:
            stop()
        if found["State"] == "failed":
            kind = str(found.get("Error", "")).rpartition(".")[2]
            raise VmbusError(kind if kind in KINDS else "Internal", str(found.get("Message", "")))
        if found["State"] == "cancelled":
            raise VmbusError("Cancelled", "somebody cancelled it")

    @contextlib.asynccontextmanager
    async def watch(self, path: str) -> AsyncIterator[Watch]:
        """The states of a machine from now on, with their reasons where the caller may know them."""
        watch = Watch(self._bus)
        stop_changes = await self._bus.subscribe(path, _PROPERTIES, "PropertiesChanged", watch.changed)
        stop_removals = await self._bus.subscribe(
            ROOT, _OBJECT_MANAGER, "InterfacesRemoved", watch.removed(path)
        )
        try:
            await self._bus.call(ROOT, MANAGER, "Subscribe", "", [])
            with contextlib.suppress(VmbusError):  # not there any more: the removal says so
                watch.begin((await self.machine(path)).properties)
            yield watch
        finally:
            stop_changes()
            stop_removals()

    async def _value(
        self,
        path: str,
        interface: str,
        member: str,
        signature: str,
        body: Sequence[Any],
        *,
        fds: Sequence[int] = (),
    ) -> Any:
        answer, extra = await self._bus.call(path, interface, member, signature, body, fds=fds)
        for fd in extra:
            os.close(fd)
        if not answer:
            raise VmbusError("Internal", f"vmbusd answered {member} without a value")
        return answer[0]

    def _variants(self, tree: Mapping[str, Any]) -> dict[str, Any]:
        return {key: self._variant(value) for key, value in tree.items()}

    def _variant(self, value: Any) -> Any:
        if isinstance(value, bool):
            return self._bus.variant("b", value)
        if isinstance(value, int):
            return self._bus.variant("t", value)
        if isinstance(value, str):
            return self._bus.variant("s", value)
        if isinstance(value, dict):
            return self._bus.variant("a{sv}", self._variants(value))
        return self._bus.variant("aa{sv}", [self._variants(item) for item in value])


class Watch:
    """The states that a machine goes through; made by Remote.watch."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._known: dict[str, Any] = {}
        self._news: asyncio.Queue[Moment | None] = asyncio.Queue()

    async def until(self, wanted: Callable[[Moment], bool]) -> Moment:
        """The first moment that is wanted, the present one included.

        A machine that is removed has ended, with the last state that was told. Raises VmbusError
        Disconnected when vmbusd leaves the bus.
        """
        last = Moment("stopped", "", "the machine is not there any more")
        while True:
            moment = await _or_gone(self._bus, self._news.get())
            if moment is None:
                return last
            last = moment
            if wanted(moment):
                return moment

    def begin(self, properties: Mapping[str, Any]) -> None:
        """What is so now, beneath what signals have already said."""
        self._known = {**properties, **self._known}
        self._tell()

    def changed(self, _path: str, body: list[Any]) -> None:
        """PropertiesChanged."""
        interface, values, _ = body
        if interface == MACHINE and values:
            self._known.update(values)
            self._tell()

    def removed(self, path: str) -> Callable[[str, list[Any]], None]:
        """InterfacesRemoved, of ``path``."""

        def callback(_manager: str, body: list[Any]) -> None:
            if body[0] == path:
                self._news.put_nowait(None)

        return callback

    def _tell(self) -> None:
        if "State" in self._known:
            self._news.put_nowait(
                Moment(
                    str(self._known["State"]),
                    str(self._known.get("StateReason", "")),
                    str(self._known.get("StateDetail", "")),
                )
            )


async def _or_gone(bus: Bus, what: Coroutine[Any, Any, T]) -> T:
    """The result of ``what``, unless vmbusd leaves the bus first: then VmbusError Disconnected."""
    result, gone = asyncio.ensure_future(what), asyncio.ensure_future(bus.gone())
    try:
        await asyncio.wait({result, gone}, return_when=asyncio.FIRST_COMPLETED)
        if result.done():
            return result.result()
        raise VmbusError("Disconnected", "vmbusd has left the bus; machines go on without it")
    finally:
        result.cancel()
        gone.cancel()
