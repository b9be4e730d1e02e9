# SPDX-License-Identifier: Apache-2.0
"""Devices that change while their machine has them: a cable that is pulled, a disk that grows, a new medium.

What a definition says about a device changes first, and then the device of a machine that runs, so that
whatever ends in between, the next start finds what was asked for; when the worker refuses, the definition is
as it was. A disk's size stands in its image only.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Final

import msgspec

from vmbus.service.broker_client import BrokerClient
from vmbus.service.claims import Claims
from vmbus.service.files import PassedFile
from vmbus.service.handover import Handover, check_passed, close_all
from vmbus.service.hotplug import LIVE, RESTING, Hotplug, find
from vmbus.service.machine import Machine
from vmbus.wire.dbus_form import parse_medium
from vmbus.wire.definition import Definition, Disk, Nic, disk_slots
from vmbus.wire.errors import VmbusError

SECTOR: Final = 512


class Changes:
    """Of one service."""

    def __init__(self, hotplug: Hotplug, broker: BrokerClient, claims: Claims, handover: Handover) -> None:
        self._hotplug = hotplug
        self._broker = broker
        self._claims = claims
        self._handover = handover

    async def set_link(self, machine: Machine, identifier: str, *, up: bool) -> None:
        """Plug the cable of a network interface in, or pull it. Raises NotFound, InvalidState, and as
        the worker."""
        machine.require("SetLink", *RESTING, *LIVE)
        name = f"nic/{identifier}"
        nic = find(machine.definition, name)
        assert isinstance(nic, Nic)
        self._set_carrier(machine, name, up=up)
        if machine.state not in LIVE:
            return
        try:
            await machine.connection().change(name, carrier=up)
        except VmbusError:
            with contextlib.suppress(VmbusError):
                self._set_carrier(machine, name, up=nic.carrier)
            raise

    async def resize_disk(self, machine: Machine, identifier: str, size: int) -> None:
        """Let a disk of a running machine grow to ``size`` bytes. Raises as ``set_link``."""
        machine.require("ResizeDisk", *LIVE)
        name = f"disk/{identifier}"
        find(machine.definition, name)
        if not 0 < size < 1 << 63 or size % SECTOR:
            message = f"{size} is no multiple of {SECTOR} below 2^63"
            raise VmbusError("InvalidArgument", message, argument="size")
        await machine.connection().change(name, size=size)

    async def change_media(
        self,
        machine: Machine,
        identifier: str,
        medium: Mapping[str, object],
        files: Mapping[str, PassedFile],
        *,
        force: bool,
    ) -> None:
        """Put another medium into a CD-ROM drive, or take its medium out. Takes over ``files``.

        Raises InUse when the guest has locked the drive, unless ``force``; and as AttachDisk.
        """
        try:
            machine.require("ChangeMedia", *RESTING, *LIVE)
            if machine.changing:
                raise VmbusError("InvalidState", "another device is being changed; try again")
            drive = find(machine.definition, f"disk/{identifier}")
            if not isinstance(drive, Disk) or not drive.cdrom:
                raise VmbusError("InvalidArgument", f"disk/{identifier} is no CD-ROM drive", argument="id")
            changed = parse_medium(medium, drive)
            machine.changing = True
            try:
                await self._change_media(machine, drive, changed, files, force=force)
            finally:
                machine.changing = False
        finally:
            close_all(files)

    async def _change_media(
        self,
        machine: Machine,
        drive: Disk,
        changed: Disk,
        files: Mapping[str, PassedFile],
        *,
        force: bool,
    ) -> None:
        slots = list(disk_slots(changed))
        paths = [slot.path for slot in slots if slot.path is not None]
        if paths:
            await self._broker.check_device(machine.owner, paths=paths)
            machine.require("ChangeMedia", *RESTING, *LIVE)
        if machine.state in RESTING:
            if files:
                raise VmbusError("InvalidArgument", "files are passed to a running machine", argument="files")
            self._hotplug.store(machine, with_disk(machine.definition, changed))
            return
        check_passed(slots, files)
        prefix = f"disk/{drive.id}/"
        before = self._claims.held(machine.uuid, prefix)
        self._hotplug.store(machine, with_disk(machine.definition, changed))
        try:
            await self._handover.files(machine, slots, files)
            await machine.connection().change_medium(changed, force=force)
        except BaseException:
            # Whatever was delivered, the worker has closed or closes with the next device.
            if machine.run is not None:
                self._claims.give_up(machine.uuid, self._claims.held(machine.uuid, prefix)[len(before) :])
            with contextlib.suppress(VmbusError):
                self._hotplug.store(machine, with_disk(machine.definition, drive))
            raise
        self._claims.give_up(machine.uuid, before)

    def _set_carrier(self, machine: Machine, name: str, *, up: bool) -> None:
        definition = with_carrier(machine.definition, name, up=up)
        if definition != machine.definition:
            self._hotplug.store(machine, definition)


def with_disk(definition: Definition, changed: Disk) -> Definition:
    """The definition with ``changed`` in the place of the disk that has its id."""
    disks = [changed if disk.id == changed.id else disk for disk in definition.disks]
    return msgspec.structs.replace(definition, disks=disks)


def with_carrier(definition: Definition, name: str, *, up: bool) -> Definition:
    """The definition with the cable of ``name`` plugged in or not; as it is if it has no such interface."""
    nics = [
        msgspec.structs.replace(nic, carrier=up) if f"nic/{nic.id}" == name else nic
        for nic in definition.nics
    ]
    return msgspec.structs.replace(definition, nics=nics)
