# SPDX-License-Identifier: Apache-2.0
"""Making and forgetting machines: what the broker's policy and record have to do with it."""

from __future__ import annotations

import uuid as uuids
from pathlib import Path
from typing import Final

import msgspec

from vmbus.service.broker_client import BrokerClient
from vmbus.service.firmware import Firmware
from vmbus.service.host import numa_nodes
from vmbus.service.machine import Machine
from vmbus.service.owned import Owned
from vmbus.service.registry import Registry
from vmbus.wire import packet
from vmbus.wire.definition import Definition, check_machine_type, huge_page_size, slots
from vmbus.wire.errors import VmbusError

MACHINES: Final = 4096
"""Machines that one user may have."""
SIZE: Final = packet.LIMIT - 4096
"""Bytes that a definition may take: it goes to the worker in one datagram, its paths to the broker."""

HUGEPAGES: Final = Path("/sys/kernel/mm/hugepages")


class Definitions:
    """Operations of the Manager."""

    def __init__(self, registry: Registry, broker: BrokerClient, owned: Owned, firmware: Firmware) -> None:
        self._registry = registry
        self._broker = broker
        self._owned = owned
        self._firmware = firmware
        self._coming: set[str] = set()

    async def create(
        self, owner: int, definition: Definition, *, persistent: bool, uuid: str | None = None
    ) -> Machine:
        """A new machine that belongs to ``owner``, stored if persistent, in state stopped; with a ``uuid``
        that it has elsewhere, or one of its own.

        Raises AlreadyExists, Unavailable (no such firmware), and the broker's QuotaExceeded, AccessDenied,
        NotFound, Unavailable.
        """
        check_machine_type(definition)
        self._registry.check_name(owner, definition.name)
        if sum(1 for _ in self._registry.of(owner)) >= MACHINES:
            raise VmbusError("QuotaExceeded", f"you have {MACHINES} machines; undefine one")
        size = len(msgspec.msgpack.encode(definition))
        if size > SIZE:
            text = f"the definition takes {size} bytes, not up to {SIZE}; shorten paths or chains"
            raise VmbusError("InvalidArgument", text, argument="definition")
        page = huge_page_size(definition)
        if page and not (HUGEPAGES / f"hugepages-{page >> 10}kB").is_dir():
            text = f"this host's CPU or kernel has no pages of {definition.page_size or '2M'}"
            raise VmbusError("NotSupported", text, argument="page-size")
        missing = set(definition.memory_nodes) - set(numa_nodes())
        if missing:
            text = f"this host has no memory on node {min(missing)}; the nodes with memory: {numa_nodes()}"
            raise VmbusError("NotSupported", text, argument="memory-nodes")
        paths = {slot.path: slot.name for slot in slots(definition) if slot.path is not None}
        try:
            await self._broker.check(owner, definition, list(paths))
        except VmbusError as error:
            if error.argument != "path":
                raise
            named = [name for path, name in paths.items() if repr(path) in error.message]
            raise VmbusError(error.kind, error.message, argument=named[0] if named else "path") from None
        if uuid is None:
            uuid = str(uuids.uuid4())
        elif self._registry.get(uuid) or uuid in self._coming:
            text = "there is a machine with this UUID; if it is yours, have that receive it, or undefine it"
            raise VmbusError("AlreadyExists", text, argument="uuid")
        self._coming.add(uuid)
        try:
            return await self._make(uuid, owner, definition, persistent=persistent)
        finally:
            self._coming.discard(uuid)

    async def _make(self, uuid: str, owner: int, definition: Definition, *, persistent: bool) -> Machine:
        try:
            await self._owned.make(uuid, owner)
            async with self._firmware.taken(uuid, definition) as hashes:
                machine = self._registry.create(uuid, owner, definition, hashes, persistent=persistent)
        except BaseException:
            await self._owned.drop(uuid)
            raise
        return machine

    async def undefine(self, machine: Machine) -> None:
        """Forget a stopped or crashed machine. Its images stay."""
        machine.require("Undefine", "stopped", "crashed")
        machine.busy = "it is being undefined"
        try:
            await self._owned.remove(machine.uuid)
        finally:
            machine.busy = ""
        self._registry.remove(machine)
