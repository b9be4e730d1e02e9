# SPDX-License-Identifier: Apache-2.0
"""org.vmbus1.HugePages: one object a pool of huge pages."""

from __future__ import annotations

from typing import Any, Final

from vmbus.api.machine import job_path, machine_path
from vmbus.bus import Variant
from vmbus.service.hugepages import SIZES, HugePages, Pool
from vmbus.service.standard import Caller
from vmbus.wire.errors import VmbusError

MOST: Final = 1 << 24
"""Pages that one call may ask for."""


class PoolObject:
    """A pool on the bus; its figures are read when they are asked for."""

    interface = "org.vmbus1.HugePages"
    owner: int | None = None

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        node = f"node{pool.node}" if pool.node >= 0 else "host"
        self.path = f"/org/vmbus1/hugepages/{SIZES[pool.page_size]}_{node}"

    def token(self) -> object:
        """It never changes."""
        return None

    def property(self, name: str) -> Any:
        """A property as a Variant."""
        return _PROPERTIES[name](self.pool)


_PROPERTIES: Final = {
    "PageSize": lambda pool: Variant("t", pool.page_size),
    "Node": lambda pool: Variant("i", pool.node),
    "Total": lambda pool: Variant("t", pool.total),
    "Free": lambda pool: Variant("t", pool.free),
    "Reserved": lambda pool: Variant("t", pool.reserved),
    "Surplus": lambda pool: Variant("t", pool.surplus),
    "Idle": lambda pool: Variant("t", pool.idle),
    "Grown": lambda pool: Variant("t", pool.grown),
}


class HugePagesApi:
    """Its methods."""

    def __init__(self, hugepages: HugePages) -> None:
        self._hugepages = hugepages

    def grow(self, caller: Caller, item: PoolObject, pages: int) -> str:
        """Grow."""
        return self._resize(caller, item, pages, 1)

    def shrink(self, caller: Caller, item: PoolObject, pages: int) -> str:
        """Shrink."""
        return self._resize(caller, item, pages, -1)

    def _resize(self, caller: Caller, item: PoolObject, pages: int, sign: int) -> str:
        if not 0 < pages <= MOST:
            raise VmbusError("InvalidArgument", f"{pages} is not in 1–{MOST}", argument="pages")
        return job_path(self._hugepages.resize(item.pool, sign * pages, caller.uid, item.path).number)

    def get_machines(self, caller: Caller, item: PoolObject) -> dict[str, int]:
        """GetMachines."""
        machines = self._hugepages.machines(item.pool.page_size)
        return {
            machine_path(machine.uuid): pages
            for machine, pages in machines.items()
            if caller.uid in (0, machine.owner)
        }
