# SPDX-License-Identifier: Apache-2.0
"""org.vmbus1.Host: what the host can do."""

from __future__ import annotations

from typing import Any

from vmbus.bus import variants
from vmbus.service import host_memory
from vmbus.service.broker_client import BrokerClient
from vmbus.service.host import capabilities
from vmbus.service.polkit import Polkit
from vmbus.service.standard import Caller


class HostObject:
    """The object at /org/vmbus1/host."""

    path = "/org/vmbus1/host"
    interface = "org.vmbus1.Host"
    owner: int | None = None

    def token(self) -> object:
        """It never changes."""
        return None

    def property(self, name: str) -> Any:
        """It has none."""
        raise KeyError(name)


class HostApi:
    """Its methods."""

    def __init__(self, broker: BrokerClient, polkit: Polkit) -> None:
        self._broker = broker
        self._polkit = polkit

    async def get_capabilities(self, caller: Caller, item: HostObject) -> dict[str, Any]:
        """GetCapabilities."""
        installed = await self._polkit.installed()
        return variants(
            capabilities(broker=self._broker.connected, polkit=installed, notes=self._broker.notes)
        )

    def get_memory(self, caller: Caller, item: HostObject) -> dict[str, Any]:
        """GetMemory."""
        return variants(host_memory.figures())
