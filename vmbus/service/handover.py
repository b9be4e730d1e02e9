# SPDX-License-Identifier: Apache-2.0
"""How a worker gets what a machine, or one device of it, needs: claimed files, and network ends.

A file with a path is opened by the broker as the machine's owner and goes straight to the worker; one that
a client passed goes there from here. Either way this sees its identity and claims it.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Awaitable, Iterable, Mapping
from typing import Final, Literal

from vmbus.service.broker_client import BrokerClient
from vmbus.service.claims import Claims
from vmbus.service.files import PassedFile
from vmbus.service.firmware import Firmware
from vmbus.service.machine import Machine
from vmbus.service.networks import Networks
from vmbus.wire import broker as wire
from vmbus.wire.definition import Nic, Slot, is_tapped, passt_options, queue_pairs
from vmbus.wire.errors import VmbusError

log = logging.getLogger("vmbus.handover")

AT_ONCE: Final = 3
"""Paths of one machine that are being opened at a time: the broker has four children for a user."""


class Handover:
    """For all machines. Errors name the slot."""

    def __init__(self, broker: BrokerClient, claims: Claims, firmware: Firmware) -> None:
        self._broker = broker
        self._claims = claims
        self.networks = Networks()
        self._firmware = firmware

    async def files(
        self,
        machine: Machine,
        slots: Iterable[Slot],
        passed: Mapping[str, PassedFile],
        *,
        greeted: Awaitable[object] | None = None,
    ) -> None:
        """Fill ``slots``; ``passed`` has those without a path, and stays the caller's.

        Paths are opened beside each other, and before the worker is ``greeted``: what the broker sends waits
        in its socket. They are claimed in their order, and of several that fail the first is named.
        """
        slots, turns = list(slots), asyncio.Semaphore(AT_ONCE)
        opening = {
            slot.name: asyncio.ensure_future(self._open(machine, slot, slot.path, turns))
            for slot in slots
            if slot.path is not None
        }
        try:
            for slot in slots:
                if slot.name in opening:
                    identity = await opening[slot.name]
                    self._claims.add(machine.uuid, slot.name, identity, writable=slot.writable)
                    continue
                file = passed[slot.name]
                if slot.kind != "secret":
                    self._claims.add(machine.uuid, slot.name, file.identity(), writable=slot.writable)
                if greeted is not None:
                    await greeted
                await machine.connection().add_file(slot.name, file.fd)
        finally:
            for task in opening.values():
                task.cancel()
            await asyncio.gather(*opening.values(), return_exceptions=True)

    async def _open(self, machine: Machine, slot: Slot, path: str, turns: asyncio.Semaphore) -> wire.Identity:
        try:
            async with turns:
                identity = await self._broker.open(machine.uuid, slot.name, path, writable=slot.writable)
        except VmbusError as error:
            raise _about(error, slot.name) from None
        if slot.regular and (identity.mode & 0o170000) != 0o100000:
            raise VmbusError("InvalidArgument", f"{path} is not a regular file", argument=slot.name)
        return identity

    async def firmware(self, machine: Machine) -> None:
        """What the machine was defined with, which the service keeps itself."""
        for slot, fd in self._firmware.opened(machine.uuid, machine.firmware):
            await machine.connection().add_file(slot, fd)

    async def ports(self, machine: Machine) -> None:
        """Named ports: for each a pair of sockets, one end for the worker's hub and one for the core."""
        for number, _ in enumerate(machine.definition.ports):
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
            with ours, theirs:
                ours.setblocking(False)
                theirs.setblocking(False)
                await machine.connection().add_port(number, [ours.fileno(), theirs.fileno()])

    async def nics(self, machine: Machine, nics: Iterable[Nic]) -> None:
        """The host's end of each: a tap, a helper's connection. Isolated ones are linked once it is built."""
        nics = list(nics)
        self.networks.claim(machine, nics)
        for nic in nics:
            slot = f"nic/{nic.id}"
            try:
                if is_tapped(nic):
                    queues = queue_pairs(nic, machine.definition.vcpus)
                    await self._broker.tap(machine.uuid, nic, queues)
                elif nic.kind == "user":
                    kind: Literal["passt", "passt-host"] = "passt-host" if nic.reach_host else "passt"
                    await self._broker.helper(machine.uuid, slot, kind, passt_options(nic))
            except VmbusError as error:
                raise _about(error, slot) from None

    async def take_away(self, machine: Machine, nic: Nic) -> None:
        """What the host has for an interface that is no more; a broker that is away does it at the end."""
        try:
            if is_tapped(nic):
                await self._broker.tap(machine.uuid, nic, 0)
        except VmbusError as error:
            log.info("%s: nic/%s stays until the machine ends: %s", machine.uuid, nic.id, error)


def _about(error: VmbusError, argument: str) -> VmbusError:
    return VmbusError(error.kind, error.message, argument=argument)


def check_passed(slots: Iterable[Slot], files: Mapping[str, PassedFile]) -> None:
    """Raise InvalidArgument unless each slot without a path, and no other, has a file that is fit for it."""
    wanted = {slot.name: slot for slot in slots if slot.path is None}
    for name in files:
        if name not in wanted:
            known = ", ".join(wanted) or "no slot: all have paths"
            raise VmbusError(
                "InvalidArgument", f"no slot to be filled by a file; there is {known}", argument=name
            )
    for name, slot in wanted.items():
        if name not in files:
            what = "the image is encrypted" if slot.kind == "secret" else "the slot has source fd"
            raise VmbusError("InvalidArgument", f"{what}; pass an open file for it", argument=name)
        files[name].check(name, writable=slot.writable, regular=slot.regular)


def close_all(files: Mapping[str, PassedFile]) -> None:
    """Close what was passed; what a worker has is a copy."""
    for file in files.values():
        file.close()
