# SPDX-License-Identifier: Apache-2.0
"""org.vmbus1.Manager: makes machines and finds them."""

from __future__ import annotations

import contextlib
from typing import Any

from vmbus import __version__
from vmbus.api.machine import job_path, machine_path
from vmbus.api.options import booleans
from vmbus.bus import Prepared, Variant
from vmbus.service.definitions import Definitions
from vmbus.service.exports import ROOT, Subscribers
from vmbus.service.files import PassedFile
from vmbus.service.machine import Machine
from vmbus.service.registry import UUID, Registry
from vmbus.service.standard import Caller
from vmbus.service.starts import Starts
from vmbus.service.templates import Templates
from vmbus.service.workers import Workers
from vmbus.wire.dbus_form import parse
from vmbus.wire.definition import brought
from vmbus.wire.errors import VmbusError


class ManagerObject:
    """The object at /org/vmbus1."""

    path = ROOT
    interface = "org.vmbus1.Manager"
    owner: int | None = None

    def __init__(self, instance: str) -> None:
        self._values = {"Version": Variant("s", __version__), "Instance": Variant("s", instance)}

    def token(self) -> object:
        """It never changes."""
        return None

    def property(self, name: str) -> Any:
        """A property as a Variant."""
        return self._values[name]


class ManagerApi:
    """Its methods."""

    def __init__(
        self,
        registry: Registry,
        definitions: Definitions,
        starts: Starts,
        workers: Workers,
        subscribers: Subscribers,
        templates: Templates,
    ) -> None:
        self._registry = registry
        self._definitions = definitions
        self._starts = starts
        self._workers = workers
        self._subscribers = subscribers
        self._templates = templates
        self._lists: dict[int, Prepared] = {}
        self._unstarted: dict[str, list[Machine]] = {}

    def brings(self, method: str, args: list[Any]) -> set[str]:
        """What the definition asks for beyond a machine."""
        definition = parse(args[0])
        huge = {"hugepages"} if definition.memory_kind == "huge" else set()
        return brought(definition.nics) | huge

    async def define_machine(self, caller: Caller, item: ManagerObject, form: dict[str, Any]) -> str:
        """DefineMachine."""
        machine = await self._definitions.create(caller.uid, parse(form), persistent=True)
        return machine_path(machine.uuid)

    async def define_machine_as(
        self, caller: Caller, item: ManagerObject, form: dict[str, Any], uuid: str
    ) -> str:
        """DefineMachineAs."""
        if not UUID.fullmatch(uuid):
            text = f"{uuid!r} is no UUID in lower case with dashes"
            raise VmbusError("InvalidArgument", text, argument="uuid")
        machine = await self._definitions.create(caller.uid, parse(form), persistent=True, uuid=uuid)
        return machine_path(machine.uuid)

    async def create_transient(
        self,
        caller: Caller,
        item: ManagerObject,
        form: dict[str, Any],
        files: dict[str, PassedFile],
        options: dict[str, Any],
    ) -> str:
        """CreateTransient."""
        wanted = booleans(options, paused=False, start=True)
        definition = parse(form)
        if files and not wanted["start"]:
            raise VmbusError(
                "InvalidArgument", "with start=false give the files with AddFile", argument="files"
            )
        machine = await self._definitions.create(caller.uid, definition, persistent=False)
        if not wanted["start"]:
            self._unstarted.setdefault(caller.name, []).append(machine)
            return machine_path(machine.uuid)
        try:
            for file in files.values():
                file.claimed = True
            await self._starts.start(machine, files, paused=wanted["paused"])
        except BaseException:
            self._workers.forget(machine)
            raise
        return machine_path(machine.uuid)

    def get_machine(self, caller: Caller, item: ManagerObject, name: str) -> str:
        """GetMachine."""
        return machine_path(self._registry.find(caller.uid, name).uuid)

    def list_machines(self, caller: Caller, item: ManagerObject) -> Prepared:
        """ListMachines."""
        prepared = self._lists.get(caller.uid)
        if prepared is None:
            machines = self._registry.all() if caller.uid == 0 else self._registry.of(caller.uid)
            prepared = Prepared("ao", [machine_path(machine.uuid) for machine in machines])
            self._lists[caller.uid] = prepared
        return prepared

    def import_template(self, caller: Caller, item: ManagerObject, name: str, file: PassedFile) -> str:
        """ImportTemplate."""
        file.claimed = True
        return job_path(self._templates.make(caller.uid, name, file, ROOT).number)

    def list_templates(self, caller: Caller, item: ManagerObject) -> list[dict[str, Any]]:
        """ListTemplates."""
        return [
            {
                "name": Variant("s", one.name),
                "created": Variant("t", one.created),
                "size": Variant("t", one.size),
                "verity": Variant("b", one.verity),
            }
            for one in self._templates.of(caller.uid)
        ]

    def delete_template(self, caller: Caller, item: ManagerObject, name: str) -> None:
        """DeleteTemplate."""
        self._templates.remove(caller.uid, name)

    async def subscribe(self, caller: Caller, item: ManagerObject) -> None:
        """Subscribe."""
        await self._subscribers.add(caller.name, caller.uid)

    def unsubscribe(self, caller: Caller, item: ManagerObject) -> None:
        """Unsubscribe."""
        self._subscribers.remove(caller.name)

    # -- what others tell us

    def machines_changed(self) -> None:
        """A machine was added or removed."""
        self._lists.clear()

    def sender_left(self, name: str) -> None:
        """Transient machines that this connection made and did not start go with it."""
        for machine in self._unstarted.pop(name, ()):
            if machine.reason == "defined" and not machine.alive:
                with contextlib.suppress(VmbusError):
                    self._workers.forget(machine)
