# SPDX-License-Identifier: Apache-2.0
"""org.vmbus1.Machine: one object a machine."""

from __future__ import annotations

from typing import Any, Final

from vmbus.api.options import booleans, lists, numbers
from vmbus.bus import Variant, variants
from vmbus.service.changes import Changes
from vmbus.service.definitions import Definitions
from vmbus.service.dispatcher import Reply
from vmbus.service.files import PassedFile, PassedSocket
from vmbus.service.handover import close_all
from vmbus.service.hotplug import Hotplug
from vmbus.service.lifecycle import Lifecycle
from vmbus.service.machine import Machine
from vmbus.service.memory import Memory
from vmbus.service.migration import DOWNTIME, DOWNTIME_MOST, Migration
from vmbus.service.parked import Parked
from vmbus.service.saving import Saving, resumption
from vmbus.service.snapshots import Snapshots
from vmbus.service.standard import Caller
from vmbus.service.starts import Starts
from vmbus.service.templates import Templates
from vmbus.service.vsock import Vsock
from vmbus.wire.dbus_form import build, parse_disk, parse_nic
from vmbus.wire.definition import Disk, Nic, brought
from vmbus.wire.errors import VmbusError

CANNOT: Final = {"mergeable": [], "shareable": ["merge"], "huge": ["swap", "balloon", "merge"]}
"""What the host cannot do with the memory of a machine, by its kind."""
DAY: Final = 86_400_000_000
"""Microseconds."""


def machine_path(uuid: str) -> str:
    """The object path of a machine."""
    return f"/org/vmbus1/machine/{uuid.replace('-', '_')}"


class MachineObject:
    """A machine on the bus; its properties are made once and again when they change."""

    interface = "org.vmbus1.Machine"

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.path = machine_path(machine.uuid)
        self.owner: int | None = machine.owner
        self._values: dict[str, Any] = {}

    def token(self) -> object:
        """What a caller was authorized for: this owner's machine with this definition."""
        return self.machine.owner, self.machine.generation

    def property(self, name: str) -> Any:
        """A property as a Variant."""
        value = self._values.get(name)
        if value is None:
            value = self._values[name] = _PROPERTIES[name](self.machine)
        return value

    def forget(self, names: tuple[str, ...]) -> None:
        """These properties have new values."""
        for name in names:
            self._values.pop(name, None)


_PROPERTIES: Final = {
    "Uuid": lambda m: Variant("s", m.uuid),
    "Owner": lambda m: Variant("u", m.owner),
    "State": lambda m: Variant("s", m.state),
    "Name": lambda m: Variant("s", m.definition.name),
    "StateReason": lambda m: Variant("s", m.reason),
    "StateDetail": lambda m: Variant("s", m.detail),
    "StateSince": lambda m: Variant("t", m.since),
    "StatusFlags": lambda m: Variant("as", sorted(m.flags)),
    "Persistent": lambda m: Variant("b", m.persistent),
    "Generation": lambda m: Variant("t", m.generation),
    "MemoryCannot": lambda m: Variant("as", CANNOT[m.definition.memory_kind]),
    "Merging": lambda m: Variant("s", m.merging),
    "Definition": lambda m: Variant("a{sv}", variants(build(m.definition))),
    "MemoryTarget": lambda m: Variant("t", m.memory_target),
    "MemoryActual": lambda m: Variant("t", m.memory_actual),
    "WorkerPid": lambda m: Variant("u", m.pid),
}


class MachineApi:
    """Its methods."""

    def __init__(
        self,
        starts: Starts,
        lifecycle: Lifecycle,
        hotplug: Hotplug,
        changes: Changes,
        definitions: Definitions,
        parked: Parked,
        memory: Memory,
        saving: Saving,
        migration: Migration,
        snapshots: Snapshots,
        vsock: Vsock,
        templates: Templates,
    ) -> None:
        self._starts = starts
        self._lifecycle = lifecycle
        self._hotplug = hotplug
        self._changes = changes
        self._definitions = definitions
        self._parked = parked
        self._memory = memory
        self._saving = saving
        self._migration = migration
        self._snapshots = snapshots
        self._vsock = vsock
        self._templates = templates

    def brings(self, method: str, args: list[Any]) -> set[str]:
        """What a device that is attached asks for beyond the machine."""
        return brought([parse_nic(args[0])]) if method == "AttachNic" else set()

    async def start(
        self, caller: Caller, item: MachineObject, options: dict[str, Any], files: dict[str, PassedFile]
    ) -> None:
        """Start."""
        wanted = booleans(options, paused=False)
        item.machine.require("Start", "stopped", "crashed")
        everything = self._with_parked(caller, item, files)
        await self._starts.start(item.machine, everything, paused=wanted["paused"])

    def _with_parked(
        self, caller: Caller, item: MachineObject, files: dict[str, PassedFile]
    ) -> dict[str, PassedFile]:
        """A start's files, taken over: those of AddFile, too, unless the call itself brings one for the
        slot."""
        parked = self._parked.take(item.machine, caller.name)
        for slot, file in files.items():
            file.claimed = True
            if slot in parked:
                parked[slot].close()
        return {**parked, **files}

    def add_file(self, caller: Caller, item: MachineObject, slot: str, file: PassedFile) -> None:
        """AddFile."""
        self._parked.add(item.machine, caller.name, slot, file)

    async def shutdown(self, caller: Caller, item: MachineObject) -> None:
        """Shutdown."""
        await self._lifecycle.shutdown(item.machine)

    def stop(self, caller: Caller, item: MachineObject, deadline: int) -> str:
        """Stop."""
        _check_deadline(deadline)
        return job_path(self._lifecycle.stop(item.machine, deadline / 1e6).number)

    async def kill(self, caller: Caller, item: MachineObject) -> None:
        """Kill."""
        await self._lifecycle.kill(item.machine)

    async def reset(self, caller: Caller, item: MachineObject) -> None:
        """Reset."""
        await self._lifecycle.reset(item.machine)

    async def pause(self, caller: Caller, item: MachineObject) -> None:
        """Pause."""
        await self._lifecycle.pause(item.machine)

    async def resume(self, caller: Caller, item: MachineObject) -> None:
        """Resume."""
        await self._lifecycle.resume(item.machine)

    async def open_console(self, caller: Caller, item: MachineObject, options: dict[str, Any]) -> Reply:
        """OpenConsole."""
        wanted = booleans(options, write=True, steal=False)
        fd = await self._lifecycle.open_console(item.machine, write=wanted["write"], steal=wanted["steal"])
        return Reply([0], [fd])

    async def open_port(
        self, caller: Caller, item: MachineObject, name: str, options: dict[str, Any]
    ) -> Reply:
        """OpenPort."""
        wanted = booleans(options, write=True, steal=False)
        write, steal = wanted["write"], wanted["steal"]
        fd = await self._lifecycle.open_port(item.machine, name, write=write, steal=steal)
        return Reply([0], [fd])

    async def connect_vsock(self, caller: Caller, item: MachineObject, port: int) -> Reply:
        """ConnectVsock."""
        return Reply([0], [await self._vsock.connect(item.machine, port)])

    def listen_vsock(self, caller: Caller, item: MachineObject, port: int) -> Reply:
        """ListenVsock."""
        return Reply([0], [self._vsock.listen(item.machine, port)])

    async def attach_nic(self, caller: Caller, item: MachineObject, form: dict[str, Any]) -> int:
        """AttachNic."""
        return await self._hotplug.attach(item.machine, parse_nic(form), {})

    async def attach_disk(
        self, caller: Caller, item: MachineObject, form: dict[str, Any], files: dict[str, PassedFile]
    ) -> int:
        """AttachDisk."""
        disk = parse_disk(form)
        for file in files.values():
            file.claimed = True
        return await self._hotplug.attach(item.machine, disk, files)

    def detach_nic(self, caller: Caller, item: MachineObject, identifier: str, deadline: int) -> str:
        """DetachNic."""
        return self._detach(item, Nic, identifier, deadline)

    def detach_disk(self, caller: Caller, item: MachineObject, identifier: str, deadline: int) -> str:
        """DetachDisk."""
        return self._detach(item, Disk, identifier, deadline)

    def _detach(self, item: MachineObject, kind: type[Disk | Nic], identifier: str, deadline: int) -> str:
        _check_deadline(deadline)
        job = self._hotplug.detach(item.machine, kind, identifier, deadline / 1e6)
        return job_path(job.number)

    async def set_link(self, caller: Caller, item: MachineObject, identifier: str, up: bool) -> None:
        """SetLink."""
        await self._changes.set_link(item.machine, identifier, up=up)

    async def resize_disk(self, caller: Caller, item: MachineObject, identifier: str, size: int) -> None:
        """ResizeDisk."""
        await self._changes.resize_disk(item.machine, identifier, size)

    async def change_media(
        self,
        caller: Caller,
        item: MachineObject,
        identifier: str,
        form: dict[str, Any],
        files: dict[str, PassedFile],
        options: dict[str, Any],
    ) -> None:
        """ChangeMedia."""
        force = booleans(options, force=False)["force"]
        for file in files.values():
            file.claimed = True
        await self._changes.change_media(item.machine, identifier, form, files, force=force)

    def save(self, caller: Caller, item: MachineObject, file: PassedFile, options: dict[str, Any]) -> str:
        """Save."""
        wanted = booleans(options, keep=False)
        file.claimed = True
        return job_path(self._saving.save(item.machine, caller.name, file, **wanted).number)

    async def restore(
        self,
        caller: Caller,
        item: MachineObject,
        file: PassedFile,
        options: dict[str, Any],
        files: dict[str, PassedFile],
    ) -> None:
        """Restore."""
        wanted = booleans(options, **{"paused": False, "changed-disks": False})
        item.machine.require("Restore", "stopped", "crashed")
        everything = self._with_parked(caller, item, files)
        file.claimed = True
        try:
            saved = resumption(file, changed_disks=wanted["changed-disks"])
        except VmbusError:
            close_all(everything)
            raise
        await self._starts.start(item.machine, everything, paused=wanted["paused"], saved=saved)

    def migrate(
        self, caller: Caller, item: MachineObject, socket: PassedSocket, options: dict[str, Any]
    ) -> str:
        """Migrate."""
        disks, others = lists(options, "copy")
        wanted = numbers(others, downtime=(DOWNTIME, 1, DOWNTIME_MOST), bandwidth=(0, 0, (1 << 63) - 1))
        socket.claimed = True
        job = self._migration.send(item.machine, caller.name, socket, disks["copy"], **wanted)
        return job_path(job.number)

    def receive(
        self,
        caller: Caller,
        item: MachineObject,
        socket: PassedSocket,
        options: dict[str, Any],
        files: dict[str, PassedFile],
    ) -> str:
        """Receive."""
        disks, others = lists(options, "copy", "separate")
        paused = booleans(others, paused=False)["paused"]
        item.machine.require("Receive", "stopped", "crashed")
        everything = self._with_parked(caller, item, files)
        socket.claimed = True
        job = self._migration.receive(
            item.machine,
            caller.name,
            socket,
            everything,
            copy=disks["copy"],
            separate=disks["separate"],
            paused=paused,
        )
        return job_path(job.number)

    def create_snapshot(self, caller: Caller, item: MachineObject, name: str, options: dict[str, Any]) -> str:
        """CreateSnapshot."""
        booleans(options)
        return job_path(self._snapshots.create(item.machine, name).number)

    async def revert_to_snapshot(
        self,
        caller: Caller,
        item: MachineObject,
        name: str,
        options: dict[str, Any],
        files: dict[str, PassedFile],
    ) -> None:
        """RevertToSnapshot."""
        wanted = booleans(options, paused=False)
        everything = self._with_parked(caller, item, files)
        await self._snapshots.revert(item.machine, name, everything, paused=wanted["paused"])

    def delete_snapshot(
        self, caller: Caller, item: MachineObject, name: str, files: dict[str, PassedFile]
    ) -> str:
        """DeleteSnapshot."""
        everything = self._with_parked(caller, item, files)
        return job_path(self._snapshots.delete(item.machine, name, everything).number)

    def list_snapshots(self, caller: Caller, item: MachineObject) -> list[dict[str, Any]]:
        """ListSnapshots."""
        kinds = {"name": "s", "created": "t", "parent": "s", "current": "b", "memory": "t"}
        found = self._snapshots.list(item.machine)
        return [{key: Variant(kinds[key], value) for key, value in one.items()} for one in found]

    async def clone(
        self,
        caller: Caller,
        item: MachineObject,
        template: str,
        options: dict[str, Any],
        files: dict[str, PassedFile],
    ) -> None:
        """Clone."""
        wanted = booleans(options, paused=False)
        everything = self._with_parked(caller, item, files)
        await self._templates.clone(item.machine, template, everything, paused=wanted["paused"])

    async def get_stats(self, caller: Caller, item: MachineObject) -> dict[str, Any]:
        """GetStats."""
        return figures(await self._lifecycle.stats(item.machine))

    async def set_memory_target(self, caller: Caller, item: MachineObject, target: int) -> None:
        """SetMemoryTarget."""
        await self._memory.set_target(item.machine, target)

    def prefault(self, caller: Caller, item: MachineObject) -> str:
        """Prefault."""
        return job_path(self._memory.prefault(item.machine).number)

    async def get_memory(self, caller: Caller, item: MachineObject) -> dict[str, Any]:
        """GetMemory."""
        return figures(await self._memory.figures(item.machine))

    async def undefine(self, caller: Caller, item: MachineObject) -> None:
        """Undefine."""
        await self._definitions.undefine(item.machine)


def _check_deadline(deadline: int) -> None:
    if deadline > DAY:
        raise VmbusError("InvalidArgument", f"{deadline} is not in 0–{DAY} microseconds", argument="deadline")


def job_path(number: int) -> str:
    """The object path of a job."""
    return f"/org/vmbus1/job/{number}"


def figures(stats: dict[str, Any], depth: int = 0) -> dict[str, Any]:
    """What a worker says it counts, as ``a{sv}``; the worker is not trusted with depth, number or type."""
    found: dict[str, Any] = {}
    for key, value in list(stats.items())[:1000]:
        if isinstance(value, bool):
            found[key[:64]] = Variant("b", value)
        elif isinstance(value, int) and -(1 << 63) <= value < 1 << 64:
            found[key[:64]] = Variant("t" if value >= 0 else "x", value)
        elif isinstance(value, float):
            found[key[:64]] = Variant("d", value)
        elif isinstance(value, str) and "\0" not in value:
            found[key[:64]] = Variant("s", value[:1000])
        elif isinstance(value, list | dict) and depth < 4:
            inner = value if isinstance(value, dict) else {str(n): item for n, item in enumerate(value)}
            found[key[:64]] = Variant("a{sv}", figures(inner, depth + 1))
    return found
