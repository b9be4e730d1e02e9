# SPDX-License-Identifier: Apache-2.0
"""Devices that change while their machine has them: a cable that is pulled, a disk that grows.

What a definition says about a device changes first, and then the device of a machine that runs, so that
whatever ends in between, the next start finds what was asked for; when the worker refuses, the definition is
as it was. A disk's size stands in its image only.
"""

from __future__ import annotations

import contextlib
from typing import Final

import msgspec

from vmbus.service.hotplug import LIVE, RESTING, Hotplug, find
from vmbus.service.machine import Machine
from vmbus.wire.definition import Definition, Nic
from vmbus.wire.errors import VmbusError

SECTOR: Final = 512


class Changes:
    """Of one service."""

    def __init__(self, hotplug: Hotplug) -> None:
        self._hotplug = hotplug

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

    def _set_carrier(self, machine: Machine, name: str, *, up: bool) -> None:
        definition = with_carrier(machine.definition, name, up=up)
        if definition != machine.definition:
            self._hotplug.store(machine, definition)


def with_carrier(definition: Definition, name: str, *, up: bool) -> Definition:
    """The definition with the cable of ``name`` plugged in or not; as it is if it has no such interface."""
    nics = [
        msgspec.structs.replace(nic, carrier=up) if f"nic/{nic.id}" == name else nic
        for nic in definition.nics
    ]
    return msgspec.structs.replace(definition, nics=nics)
