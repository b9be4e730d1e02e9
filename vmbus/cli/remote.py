# SPDX-License-Identifier: Apache-2.0
"""vmbusd's objects as vmbusctl sees them: one method here for one on the bus, in Python's types.

Everything goes through ``Connection``: vmbus.bus.Client with what a command-line program needs besides
(connection.py), or the fake of the tests.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal, Protocol, TypeVar

from vmbus.wire.definition import Definition, Disk, Medium, Nic
from vmbus.wire.errors import KINDS, VmbusError

ROOT: Final = "/org/vmbus1"
HOST: Final = "/org/vmbus1/host"
KSM: Final = "/org/vmbus1/ksm"
ENDED: Final = frozenset({"stopped", "crashed"})

T = TypeVar("T")
Handler = Callable[[str, str, list[Any]], None]
"""Told of interface, member and body of a signal."""


class Connection(Protocol):
    """A connection to the bus, speaking to one vmbusd. Everything raises VmbusError and nothing else."""

    async def call(self, path: str, method: str, *args: Any) -> Any:
        """Call "Machine.Start"; None, one value or a list of values. fds in and out as they are."""
        ...

    async def get_all(self, path: str, interface: str) -> dict[str, Any]:
        """The properties of "Machine" (or another) that the caller may see."""
        ...

    async def managed_objects(self) -> dict[str, dict[str, dict[str, Any]]]:
        """All objects: path, interface, property, value."""
        ...

    async def watch(self, path: str, handler: Handler) -> None:
        """Tell ``handler`` of each signal of the object at ``path``, as long as the connection lives."""
        ...

    async def gone(self) -> None:
        """Return when vmbusd has left the bus, or the bus is gone."""
        ...

    def form(self, described: Definition | Disk | Medium | Nic) -> dict[str, Any]:
        """A definition, or one device of it, as an ``a{sv}``."""
        ...

    def values(self, values: Mapping[str, int | str]) -> dict[str, Any]:
        """Numbers and words as an ``a{sv}``."""
        ...

    def lists(self, lists: Mapping[str, list[str]]) -> dict[str, Any]:
        """Lists of words as an ``a{sv}``; not those that are empty, which an older vmbusd may not know."""

    def flags(self, **flags: bool) -> dict[str, Any]:
        """Boolean options as an ``a{sv}``."""
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
    """A machine's state at one moment, with its reason where the caller may know it."""

    state: str
    reason: str
    detail: str


@dataclass(frozen=True)
class Outcome:
    """What a job that is done has to say, and what it has counted; nothing if it was done too long ago."""

    message: str = ""
    result: Mapping[str, Any] = field(default_factory=dict)


class Remote:
    """vmbusd, over one connection."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._call = connection.call

    async def define(self, definition: Definition) -> str:
        """Manager.DefineMachine; the new machine's path."""
        return str(await self._call(ROOT, "Manager.DefineMachine", self._connection.form(definition)))

    async def define_as(self, uuid: str, definition: Definition) -> str:
        """Manager.DefineMachineAs; the new machine's path."""
        form = self._connection.form(definition)
        return str(await self._call(ROOT, "Manager.DefineMachineAs", form, uuid))

    async def create_transient(
        self, definition: Definition, files: Mapping[str, int], *, paused: bool
    ) -> str:
        """Manager.CreateTransient. ``files`` are fds by slot; they stay the caller's."""
        form, options = self._connection.form(definition), self._connection.flags(paused=paused)
        return str(await self._call(ROOT, "Manager.CreateTransient", form, dict(files), options))

    async def find(self, name: str) -> str:
        """The path of the caller's machine ``name``, or of the one with that UUID."""
        return str(await self._call(ROOT, "Manager.GetMachine", name))

    async def machine(self, path: str) -> Machine:
        """What the caller may see of a machine."""
        return Machine(path, await self._connection.get_all(path, "Machine"))

    async def machines(self, *, everyone: bool) -> list[Machine]:
        """The caller's machines, or all that there are; by owner and name. Root's are everybody's."""
        objects = await self._connection.managed_objects()
        found = [
            Machine(path, interfaces["org.vmbus1.Machine"])
            for path, interfaces in objects.items()
            if "org.vmbus1.Machine" in interfaces
        ]
        mine = os.getuid()
        shown = [one for one in found if everyone or mine in (0, one.properties["Owner"])]
        return sorted(shown, key=lambda one: (one.properties["Owner"], one.name))

    async def start(self, path: str, files: Mapping[str, int], *, paused: bool) -> None:
        """Machine.Start; returns when the guest runs."""
        await self._call(path, "Machine.Start", self._connection.flags(paused=paused), dict(files))

    async def act(self, path: str, method: str) -> None:
        """A method of Machine without arguments or result: Shutdown, Kill, Reset, Pause, Resume, Undefine."""
        await self._call(path, f"Machine.{method}")

    async def stop(self, path: str, deadline_seconds: float) -> str:
        """Machine.Stop; the path of its job."""
        return str(await self._call(path, "Machine.Stop", round(deadline_seconds * 1e6)))

    async def save(self, path: str, file: int, *, keep: bool) -> str:
        """Machine.Save; the path of its job. ``file`` stays the caller's."""
        return str(await self._call(path, "Machine.Save", file, self._connection.flags(keep=keep)))

    async def restore(
        self, path: str, file: int, files: Mapping[str, int], *, paused: bool, changed_disks: bool
    ) -> None:
        """Machine.Restore; returns when the guest goes on."""
        options = self._connection.flags(**{"paused": paused, "changed-disks": changed_disks})
        await self._call(path, "Machine.Restore", file, options, dict(files))

    async def migrate(self, path: str, end: int, copy: list[str], pace: Mapping[str, int]) -> str:
        """Machine.Migrate; the path of its job. ``end``, a socket, stays the caller's."""
        options = self._connection.values(pace) | self._connection.lists({"copy": copy})
        return str(await self._call(path, "Machine.Migrate", end, options))

    async def receive(
        self,
        path: str,
        end: int,
        files: Mapping[str, int],
        disks: Mapping[str, list[str]],
        *,
        paused: bool,
    ) -> str:
        """Machine.Receive; the path of its job. ``end``, the other socket, stays the caller's. ``disks``: its
        options ``copy`` and ``separate``."""
        options = self._connection.flags(paused=paused) | self._connection.lists(disks)
        return str(await self._call(path, "Machine.Receive", end, options, dict(files)))

    async def create_snapshot(self, path: str, name: str) -> str:
        """Machine.CreateSnapshot; the path of its job."""
        options = self._connection.flags()
        return str(await self._call(path, "Machine.CreateSnapshot", name, options))

    async def revert_to_snapshot(
        self, path: str, name: str, files: Mapping[str, int], *, paused: bool
    ) -> None:
        """Machine.RevertToSnapshot; returns when the guest goes on."""
        options = self._connection.flags(paused=paused)
        await self._call(path, "Machine.RevertToSnapshot", name, options, dict(files))

    async def delete_snapshot(self, path: str, name: str, files: Mapping[str, int]) -> str:
        """Machine.DeleteSnapshot; the path of its job."""
        return str(await self._call(path, "Machine.DeleteSnapshot", name, dict(files)))

    async def snapshots(self, path: str) -> list[Mapping[str, Any]]:
        """Machine.ListSnapshots."""
        found: list[Mapping[str, Any]] = await self._call(path, "Machine.ListSnapshots")
        return found

    async def clone(self, path: str, template: str, files: Mapping[str, int], *, paused: bool) -> None:
        """Machine.Clone; returns when the guest goes on."""
        options = self._connection.flags(paused=paused)
        await self._call(path, "Machine.Clone", template, options, dict(files))

    async def import_template(self, name: str, file: int) -> str:
        """Manager.ImportTemplate; the path of its job. ``file`` stays the caller's."""
        return str(await self._call(ROOT, "Manager.ImportTemplate", name, file))

    async def templates(self) -> list[Mapping[str, Any]]:
        """Manager.ListTemplates."""
        found: list[Mapping[str, Any]] = await self._call(ROOT, "Manager.ListTemplates")
        return found

    async def delete_template(self, name: str) -> None:
        """Manager.DeleteTemplate."""
        await self._call(ROOT, "Manager.DeleteTemplate", name)

    async def attach_nic(self, path: str, nic: Nic) -> int:
        """Machine.AttachNic; its slot."""
        return int(await self._call(path, "Machine.AttachNic", self._connection.form(nic)))

    async def attach_disk(self, path: str, disk: Disk, files: Mapping[str, int]) -> int:
        """Machine.AttachDisk; its slot."""
        form = self._connection.form(disk)
        return int(await self._call(path, "Machine.AttachDisk", form, dict(files)))

    async def detach(self, path: str, kind: str, identifier: str, deadline_seconds: float) -> str:
        """Machine.DetachNic or DetachDisk (``kind``: Nic, Disk); the path of its job."""
        deadline = round(deadline_seconds * 1e6)
        return str(await self._call(path, f"Machine.Detach{kind}", identifier, deadline))

    async def set_link(self, path: str, identifier: str, *, up: bool) -> None:
        """Machine.SetLink; returns when the guest has been told."""
        await self._call(path, "Machine.SetLink", identifier, up)

    async def resize_disk(self, path: str, identifier: str, size: int) -> None:
        """Machine.ResizeDisk; returns when the guest has been told."""
        await self._call(path, "Machine.ResizeDisk", identifier, size)

    async def change_media(
        self, path: str, drive: str, medium: Medium, files: Mapping[str, int], *, force: bool
    ) -> None:
        """Machine.ChangeMedia; returns when the drive has the medium, or none."""
        form, options = self._connection.form(medium), self._connection.flags(force=force)
        await self._call(path, "Machine.ChangeMedia", drive, form, dict(files), options)

    async def console(self, path: str, *, write: bool, steal: bool) -> socket.socket:
        """Machine.OpenConsole; the caller closes the socket."""
        options = self._connection.flags(write=write, steal=steal)
        return socket.socket(fileno=await self._call(path, "Machine.OpenConsole", options))

    async def port(self, path: str, name: str, *, write: bool, steal: bool) -> socket.socket:
        """Machine.OpenPort; the caller closes the socket."""
        options = self._connection.flags(write=write, steal=steal)
        return socket.socket(fileno=await self._call(path, "Machine.OpenPort", name, options))

    async def vsock(self, path: str, how: Literal["Connect", "Listen"], port: int) -> socket.socket:
        """Machine.ConnectVsock or ListenVsock; the caller closes the socket."""
        return socket.socket(fileno=await self._call(path, f"Machine.{how}Vsock", port))

    async def stats(self, path: str) -> Mapping[str, Any]:
        """Machine.GetStats."""
        found: Mapping[str, Any] = await self._call(path, "Machine.GetStats")
        return found

    async def capabilities(self) -> Mapping[str, Any]:
        """Host.GetCapabilities, with the version of vmbusd."""
        found: Mapping[str, Any] = await self._call(HOST, "Host.GetCapabilities")
        return {**found, "version": (await self._connection.get_all(ROOT, "Manager"))["Version"]}

    async def memory(self, path: str) -> Mapping[str, Any]:
        """Machine.GetMemory."""
        found: Mapping[str, Any] = await self._call(path, "Machine.GetMemory")
        return found

    async def set_memory_target(self, path: str, target: int) -> None:
        """Machine.SetMemoryTarget; returns when the guest has been asked."""
        await self._call(path, "Machine.SetMemoryTarget", target)

    async def prefault(self, path: str) -> str:
        """Machine.Prefault; the job's path."""
        return str(await self._call(path, "Machine.Prefault"))

    async def cancel(self, job: str) -> None:
        """Job.Cancel; returns when everything is undone."""
        await self._call(job, "Job.Cancel")

    async def host_memory(self) -> Mapping[str, Any]:
        """Host.GetMemory."""
        found: Mapping[str, Any] = await self._call(HOST, "Host.GetMemory")
        return found

    async def ksm(self) -> Mapping[str, Any]:
        """The properties of Ksm."""
        return await self._connection.get_all(KSM, "Ksm")

    async def set_ksm(self, settings: Mapping[str, int | str]) -> None:
        """Ksm.Set."""
        await self._call(KSM, "Ksm.Set", self._connection.values(settings))

    async def restore_ksm(self) -> None:
        """Ksm.Restore."""
        await self._call(KSM, "Ksm.Restore")

    async def ksm_machines(self) -> Mapping[str, Mapping[str, Any]]:
        """Ksm.GetMachines, by path."""
        found: Mapping[str, Mapping[str, Any]] = await self._call(KSM, "Ksm.GetMachines")
        return found

    async def ksm_others(self) -> list[list[Any]]:
        """Ksm.GetOthers: process, uid, name, merged bytes, profit."""
        return list(await self._call(KSM, "Ksm.GetOthers"))

    async def pools(self) -> list[Mapping[str, Any]]:
        """The host's pools of huge pages: their properties and Path, by page size and node."""
        objects = await self._connection.managed_objects()
        found = [
            {**interfaces["org.vmbus1.HugePages"], "Path": path}
            for path, interfaces in objects.items()
            if "org.vmbus1.HugePages" in interfaces
        ]
        return sorted(found, key=lambda pool: (pool["PageSize"], pool["Node"]))

    async def pool_machines(self, path: str) -> Mapping[str, int]:
        """HugePages.GetMachines: pages by machine's path."""
        found: Mapping[str, int] = await self._call(path, "HugePages.GetMachines")
        return found

    async def resize_pool(self, path: str, change: int) -> str:
        """HugePages.Grow or Shrink; the path of its job."""
        method = "HugePages.Grow" if change > 0 else "HugePages.Shrink"
        return str(await self._call(path, method, abs(change)))

    async def hear(self, job: str, told: Callable[[Mapping[str, Any]], None]) -> None:
        """Have ``told`` hear of a job's result, as far as it is, from now on."""

        def changed(_interface: str, member: str, body: list[Any]) -> None:
            if member == "PropertiesChanged" and "Result" in body[1]:
                told(body[1]["Result"])

        await self._connection.watch(job, changed)
        await self._call(ROOT, "Manager.Subscribe")

    async def finish(self, job: str) -> Outcome:
        """Return when a job is done, with what it has to say; raises VmbusError as it failed, Cancelled, or
        Disconnected."""
        ended = asyncio.Event()

        def told(_interface: str, member: str, body: list[Any]) -> None:
            news = body[1] if member == "PropertiesChanged" else {}
            if news.get("State", "running") != "running":
                ended.set()

        await self._connection.watch(job, told)
        try:
            found = await self._connection.get_all(job, "Job")
            if found["State"] == "running":
                await self._or_gone(ended.wait())
                found = await self._connection.get_all(job, "Job")
        except VmbusError as error:
            if error.kind == "NotFound":  # a finished job is kept for half a minute only
                return Outcome()
            raise
        if found["State"] == "failed":
            kind = str(found.get("Error", "")).rpartition(".")[2]
            raise VmbusError(kind if kind in KINDS else "Internal", str(found.get("Message", "")))
        if found["State"] == "cancelled":
            raise VmbusError("Cancelled", "somebody cancelled it")
        return Outcome(str(found.get("Message", "")), found.get("Result", {}))

    @contextlib.asynccontextmanager
    async def watch(self, path: str) -> AsyncIterator[Watch]:
        """The states of a machine from now on."""
        watch = Watch(self._or_gone)
        await self._connection.watch(path, watch.told)
        await self._connection.watch(ROOT, watch.told_by_manager(path))
        await self._call(ROOT, "Manager.Subscribe")
        try:
            watch.begin((await self.machine(path)).properties)
        except VmbusError as error:
            if error.kind != "NotFound":
                raise
            watch.removed()
        yield watch

    async def _or_gone(self, what: Coroutine[Any, Any, T]) -> T:
        """The result of ``what``, unless vmbusd leaves the bus first: then VmbusError Disconnected."""
        result, gone = asyncio.ensure_future(what), asyncio.ensure_future(self._connection.gone())
        try:
            await asyncio.wait({result, gone}, return_when=asyncio.FIRST_COMPLETED)
            if result.done():
                return result.result()
            raise VmbusError("Disconnected", "vmbusd has left the bus; machines go on without it")
        finally:
            result.cancel()
            gone.cancel()


class Watch:
    """The states that a machine goes through; made by Remote.watch."""

    def __init__(self, or_gone: Callable[[Coroutine[Any, Any, Any]], Coroutine[Any, Any, Any]]) -> None:
        self._or_gone = or_gone
        self._known: dict[str, Any] = {}
        self._news: asyncio.Queue[Moment | None] = asyncio.Queue()

    async def until(self, wanted: Callable[[Moment], bool]) -> Moment:
        """The first moment that is wanted, the present one included.

        A machine that is removed has ended, with the last state that was told. Raises VmbusError
        Disconnected when vmbusd leaves the bus.
        """
        last = Moment("stopped", "", "the machine is not there any more")
        while True:
            moment: Moment | None = await self._or_gone(self._news.get())
            if moment is None:
                return last
            last = moment
            if wanted(moment):
                return moment

    def begin(self, properties: Mapping[str, Any]) -> None:
        """What is so now, beneath what signals have already said."""
        self._known = {**properties, **self._known}
        self._tell()

    def told(self, _interface: str, member: str, body: list[Any]) -> None:
        """A signal of the machine. StateChanged comes last, after the broadcast of the public properties and
        the private ones (the reason among them) that are sent to us alone."""
        if member == "PropertiesChanged" and body[0] == "org.vmbus1.Machine":
            self._known.update(body[1])
        elif member == "StateChanged":
            self._known["State"] = body[1]
            self._tell()

    def told_by_manager(self, path: str) -> Handler:
        """What hears of the removal of ``path``."""

        def told(_interface: str, member: str, body: list[Any]) -> None:
            if member == "InterfacesRemoved" and body[0] == path:
                self.removed()

        return told

    def removed(self) -> None:
        """The machine is not there any more."""
        self._news.put_nowait(None)

    def _tell(self) -> None:
        if "State" in self._known:
            news = (str(self._known.get(key, "")) for key in ("State", "StateReason", "StateDetail"))
            self._news.put_nowait(Moment(*news))
