# SPDX-License-Identifier: Apache-2.0
"""What running machines have to do with each other by their networks.

*Stations.* A MAC address is there once on a bridge, on an interface that carries macvtaps, and in an isolated
network: a machine that would be the second is refused at its start. Who else is there is not ours to know.

*Isolated networks.* Machines of one owner that name the same network hear each other and nobody else. There
is no process for it: for each two of them a pair of sockets is made here when the second starts, each worker
gets one end, and the core is a switch port (native/vmm/src/net/hub.rs). Both ends of a pair belong to
workers, so frames flow without the service; when it comes back it links all that it finds again, and the new
sockets take the place of the old ones. Who shares a network follows from the owner in the service's own
registry; a machine of another owner with a network of the same name is in a network of its own.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterable
from typing import Final

from vmbus.service.machine import Machine
from vmbus.wire.definition import Nic
from vmbus.wire.errors import VmbusError

log = logging.getLogger("vmbus.networks")

MEMBERS: Final = 64
"""Interfaces in one isolated network (native/vmm/src/net/hub.rs: one less than that beside each)."""

Place = tuple[str, int, str]


class Networks:
    """Of one service."""

    def __init__(self) -> None:
        self._stations: dict[tuple[Place, str], str] = {}
        self._joined: dict[str, Machine] = {}

    def claim(self, machine: Machine, nics: Iterable[Nic]) -> None:
        """Take the places of stations of its. Raises InUse, and takes none, if another machine has one."""
        wanted = [(nic, (place, nic.mac)) for nic in nics if (place := _place(machine, nic))]
        for nic, station in wanted:
            holder = self._stations.get(station, machine.uuid)
            if holder != machine.uuid:
                where = nic.bridge or nic.interface or nic.network
                message = (
                    f"machine {holder} runs with MAC address {nic.mac} on {where} too; change one of them"
                )
                raise VmbusError("InUse", message, argument=f"nic/{nic.id}")
        self._stations |= {station: machine.uuid for _, station in wanted}

    async def join(self, machine: Machine, nics: Iterable[Nic]) -> None:
        """Link the isolated ones of ``nics`` with all that run. Raises QuotaExceeded, and the worker's."""
        self._joined[machine.uuid] = machine
        others = [other for other in self._joined.values() if other is not machine]
        for nic in nics:
            place = _place(machine, nic)
            if nic.kind != "isolated":
                continue
            peers = [(other, its) for other in others for its in other.definition.nics]
            peers = [(other, its) for other, its in peers if _place(other, its) == place]
            if len(peers) >= MEMBERS:
                message = f"network {nic.network} has {MEMBERS} interfaces already"
                raise VmbusError("QuotaExceeded", message, argument=f"nic/{nic.id}")
            for other, its in peers:
                await self._link(machine, nic, other, its)

    async def _link(self, machine: Machine, nic: Nic, other: Machine, its: Nic) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours, theirs:
            name = f"{other.uuid}/{its.id}"
            await machine.connection().add_link(f"nic/{nic.id}", name, ours.fileno())
            try:
                name = f"{machine.uuid}/{nic.id}"
                await other.connection().add_link(f"nic/{its.id}", name, theirs.fileno())
            except VmbusError as error:  # it is ending, or out of reach: the other end is closed with this
                log.info("%s is not linked with %s: %s", machine.uuid, other.uuid, error)

    async def rejoin(self, machine: Machine) -> None:
        """A machine that was running before is found again: what it were refused now it has had before."""
        if machine.uuid in self._joined:  # only its control connection was lost
            return
        try:
            self.claim(machine, machine.definition.nics)
            await self.join(machine, machine.definition.nics)
        except VmbusError as error:
            log.warning("%s: its networks may be cut off: %s", machine.uuid, error)

    def keep(self, machine: Machine, nics: Iterable[Nic]) -> None:
        """Of its stations it has only those of ``nics`` any more; the others are anybody's at once."""
        kept = {(place, nic.mac) for nic in nics if (place := _place(machine, nic))}
        self._stations = {
            at: uuid for at, uuid in self._stations.items() if uuid != machine.uuid or at in kept
        }

    def leave(self, machine: Machine) -> None:
        """Its worker is gone. Idempotent."""
        self._joined.pop(machine.uuid, None)
        self._stations = {at: uuid for at, uuid in self._stations.items() if uuid != machine.uuid}


def _place(machine: Machine, nic: Nic) -> Place | None:
    """Where a MAC address must be there once; None for a network that has only one."""
    if nic.kind == "isolated":
        return "isolated", machine.owner, nic.network
    where = nic.bridge or nic.interface
    return (nic.kind, 0, where) if where else None
