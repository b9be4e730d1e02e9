# SPDX-License-Identifier: Apache-2.0
"""Devices that are attached to and detached from a machine: its definition, and what runs, in step.

Of a stopped or crashed machine only the definition changes. Of one that runs or is paused:

| attach | the definition has it; then files and device go to the worker; undone when that fails |
| detach | the guest is asked; when it has let go, the definition has it no more |

The definition is written before the worker is told, so that whatever ends in between, nothing runs that
nobody knows. The guest's consent comes as an event of the worker's, at any time, and counts only for a device
that somebody asked for (``Run.detaching``, written down): a worker cannot take devices out of a definition by
itself. An attached device sits in a hotplug slot, which the definition keeps, so it is where it was at the
next start. What is on bus 0 (slot 0) stays for the life of a run.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Mapping
from typing import Final

import msgspec

from vmbus.service.broker_client import BrokerClient
from vmbus.service.claims import Claims
from vmbus.service.files import PassedFile
from vmbus.service.handover import Handover, check_passed, close_all
from vmbus.service.jobs import Job, Jobs
from vmbus.service.machine import Machine
from vmbus.service.registry import Registry
from vmbus.wire import worker as wire
from vmbus.wire.definition import (
    BLOCK_DISKS,
    DISKS_MOST,
    HOTPLUG_SLOTS,
    Definition,
    Disk,
    Nic,
    disk_slots,
    grants,
    is_scsi,
)
from vmbus.wire.errors import VmbusError

log = logging.getLogger("vmbus.hotplug")

RESTING: Final = ("stopped", "crashed")
LIVE: Final = ("running", "paused")


class Hotplug:
    """Attach and detach."""

    def __init__(
        self, registry: Registry, broker: BrokerClient, claims: Claims, jobs: Jobs, handover: Handover
    ) -> None:
        self._registry = registry
        self._broker = broker
        self._claims = claims
        self._jobs = jobs
        self._handover = handover
        self._waiting: dict[tuple[str, str], asyncio.Future[str]] = {}
        self._going: set[asyncio.Future[None]] = set()

    # -- attach

    async def attach(self, machine: Machine, device: Disk | Nic, files: Mapping[str, PassedFile]) -> int:
        """Add a device; its slot comes back. Takes over ``files``, those of a disk with source fd."""
        try:
            machine.require("Attach", *RESTING, *LIVE)
            if machine.changing:
                raise VmbusError("InvalidState", "another device is being attached; try again")
            device = _placed(machine.definition, device)
            if machine.state in LIVE and not device.slot:
                raise VmbusError(
                    "NotSupported",
                    "a disk on the SCSI bus is attached while the machine is stopped; bus blk is at any time",
                    argument="disk.bus",
                )
            await self._check(machine, device)
            if machine.state in RESTING and files:
                raise VmbusError("InvalidArgument", "files are passed to a running machine", argument="files")
            machine.changing = True
            try:
                await self._attach(machine, device, files)
            finally:
                machine.changing = False
        finally:
            close_all(files)
        return device.slot

    async def _check(self, machine: Machine, device: Disk | Nic) -> None:
        """Whether the owner may have it."""
        if isinstance(device, Nic):
            await self._broker.check_device(machine.owner, grants=grants([device]))
        elif device.source == "path":
            paths = [slot.path for slot in disk_slots(device) if slot.path is not None]
            await self._broker.check_device(machine.owner, paths=paths)
        machine.require("Attach", *RESTING, *LIVE)

    async def _attach(self, machine: Machine, device: Disk | Nic, files: Mapping[str, PassedFile]) -> None:
        before, live = machine.definition, machine.state in LIVE
        if live and isinstance(device, Disk):
            check_passed(disk_slots(device), files)
        self.store(machine, _with(before, device))
        if not live:
            return
        try:
            if isinstance(device, Disk):
                await self._handover.files(machine, disk_slots(device), files)
            else:
                await self._handover.nics(machine, [device])
            await machine.connection().attach(device)
            if isinstance(device, Nic):
                await self._handover.networks.join(machine, [device])
        except BaseException:
            # Whatever was delivered, the worker has closed or closes with the next device.
            with contextlib.suppress(VmbusError):
                self._forget(machine, _name(device))
            await self._let_go(machine, device)
            raise

    # -- detach

    def detach(self, machine: Machine, kind: type[Disk | Nic], identifier: str, deadline: float) -> Job:
        """A job that ends when the guest has let go. After ``deadline`` seconds it keeps it."""
        machine.require("Detach", *RESTING, *LIVE)
        name = f"{'disk' if kind is Disk else 'nic'}/{identifier}"
        device = find(machine.definition, name)
        if machine.state in LIVE and not device.slot:
            raise VmbusError(
                "InvalidState",
                f"{name} is in no hotplug slot; it can be detached while the machine is stopped",
                argument="id",
            )
        if (machine.uuid, name) in self._waiting:
            raise VmbusError("InvalidState", f"the guest has been asked for {name} already", argument="id")
        return self._jobs.start("detach", machine.owner, machine.uuid, self._detach(machine, name, deadline))

    async def _detach(self, machine: Machine, name: str, deadline: float) -> None:
        if machine.state in RESTING:
            self.store(machine, _without(machine.definition, name))
            return
        worker = machine.connection()
        self._note(machine, name, asked=True)
        gone = asyncio.get_running_loop().create_future()
        self._waiting[machine.uuid, name] = gone
        ended = asyncio.ensure_future(machine.gone.wait())
        try:
            await worker.detach(name)
            await asyncio.wait({gone, ended}, timeout=deadline, return_when=asyncio.FIRST_COMPLETED)
            if gone.done():
                if detail := gone.result():
                    raise VmbusError("Unavailable", f"{name} is detached, but: {detail}")
            elif ended.done():
                # Nobody holds it any more.
                self.store(machine, _without(machine.definition, name))
            else:
                raise VmbusError(
                    "Timeout",
                    f"the guest has not let go of {name} within {deadline:g} s, and keeps it",
                    argument="id",
                )
        finally:
            ended.cancel()
            del self._waiting[machine.uuid, name]
            if not gone.done() and not machine.gone.is_set():
                with contextlib.suppress(VmbusError):
                    await worker.keep(name)
                    self._note(machine, name, asked=False)

    def detached(self, machine: Machine, event: wire.Event) -> None:
        """The worker says that the guest has let go of a device."""
        name = event.device
        if machine.run is None or name not in machine.run.detaching:
            log.warning("%s: %s was detached, and nobody had asked", machine.uuid, name[:64])
            return
        try:
            device = find(machine.definition, name)
            self._forget(machine, name)
            self._note(machine, name, asked=False)
        except VmbusError as error:
            log.error("%s: %s is detached, which is not stored: %s", machine.uuid, name, error)
            self._tell(machine, event)
            return
        going = asyncio.ensure_future(self._let_go(machine, device))
        self._going.add(going)
        going.add_done_callback(self._going.discard)
        going.add_done_callback(lambda _: self._tell(machine, event))

    async def _let_go(self, machine: Machine, device: Disk | Nic) -> None:
        """What the host has for a device that the machine has no more; then its address is anybody's."""
        if isinstance(device, Nic):
            await self._handover.take_away(machine, device)
        self._handover.networks.keep(machine, machine.definition.nics)

    def _tell(self, machine: Machine, event: wire.Event) -> None:
        waiting = self._waiting.get((machine.uuid, event.device))
        if waiting is not None and not waiting.done():
            waiting.set_result(event.detail)

    # -- what is written down

    def _forget(self, machine: Machine, name: str) -> None:
        if machine.run is not None:
            self._claims.release(machine.uuid, f"{name}/")
        self.store(machine, _without(machine.definition, name))

    def store(self, machine: Machine, definition: Definition) -> None:
        """Write a machine's new definition down. Raises VmbusError, and then it has the old one."""
        before, generation = machine.definition, machine.generation
        machine.set_definition(definition)
        try:
            self._registry.store(machine)
            if machine.run is not None:
                run = msgspec.structs.replace(
                    machine.run, definition=definition, generation=machine.generation
                )
                self._registry.write_run(machine, run)
        except VmbusError:
            machine.set_definition(before)
            machine.generation = generation
            raise

    def _note(self, machine: Machine, name: str, *, asked: bool) -> None:
        """Write down whether the guest is asked for a device."""
        if machine.run is None:
            raise VmbusError("InvalidState", "the machine has just ended")
        asking = machine.run.detaching | {name} if asked else machine.run.detaching - {name}
        self._registry.write_run(machine, msgspec.structs.replace(machine.run, detaching=asking))


def _name(device: Disk | Nic) -> str:
    """As the core calls it."""
    return f"{'disk' if isinstance(device, Disk) else 'nic'}/{device.id}"


def find(definition: Definition, name: str) -> Disk | Nic:
    """The device that the core calls ``name``. Raises NotFound."""
    devices: list[Disk | Nic] = [*definition.disks, *definition.nics]
    for device in devices:
        if _name(device) == name:
            return device
    known = ", ".join(map(_name, devices)) or "none"
    raise VmbusError("NotFound", f"the machine has no {name}; it has {known}", argument="id")


def _placed(definition: Definition, device: Disk | Nic) -> Disk | Nic:
    """The device in the slot it asks for, or in the first free one."""
    devices: list[Disk | Nic] = [*definition.disks, *definition.nics]
    if device.id in {other.id for other in devices}:
        raise VmbusError(
            "AlreadyExists", f"the machine has a device {device.id!r}; choose another id", argument="id"
        )
    if isinstance(device, Disk) and is_scsi(device):
        if len(definition.disks) >= DISKS_MOST:
            raise VmbusError("QuotaExceeded", f"a machine has at most {DISKS_MOST} disks; detach one")
        return device
    block = [disk for disk in definition.disks if not is_scsi(disk)]
    if len(block if isinstance(device, Disk) else definition.nics) >= BLOCK_DISKS:
        raise VmbusError("QuotaExceeded", f"a machine has at most {BLOCK_DISKS} of a kind; detach one")
    taken = {other.slot for other in devices}
    free = [slot for slot in range(1, HOTPLUG_SLOTS + 1) if slot not in taken]
    if device.slot and device.slot not in free:
        holder = next(_name(other) for other in devices if other.slot == device.slot)
        raise VmbusError("InUse", f"slot {device.slot} holds {holder}", argument="slot")
    if not free:
        raise VmbusError("QuotaExceeded", f"all {HOTPLUG_SLOTS} hotplug slots are in use; detach a device")
    return msgspec.structs.replace(device, slot=device.slot or free[0])


def _with(definition: Definition, device: Disk | Nic) -> Definition:
    if isinstance(device, Disk):
        return msgspec.structs.replace(definition, disks=[*definition.disks, device])
    return msgspec.structs.replace(definition, nics=[*definition.nics, device])


def _without(definition: Definition, name: str) -> Definition:
    return msgspec.structs.replace(
        definition,
        disks=[disk for disk in definition.disks if _name(disk) != name],
        nics=[nic for nic in definition.nics if _name(nic) != name],
    )
