# SPDX-License-Identifier: Apache-2.0
"""The host's pools of huge pages: what they hold, and making them larger and smaller.

A pool is one size of page on one NUMA node (on a kernel without NUMA, on the host). Its figures are /sys's
own. Writing goes through the broker, which keeps the record of what vmbus added and takes nothing else away
(broker/dropped/settings.py); here are the order and the reasons:

- *grow* and *shrink* are jobs, in steps of ``STEP`` bytes, so that a large pool shows progress, can be
  cancelled between two steps (then what the job did is undone), and keeps no step of the broker long;
- growing ends when a step brought less than it asked for: free memory in pieces that are large enough has
  run out. What was got stays, and the job's message says how much and why;
- when the last machine of huge pages has ended, what was added is given back, down to what vmbusd.toml wants
  to have always (``persistent``). After a restart the same is done for what nobody uses.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

from vmbus.service.broker_client import BrokerClient
from vmbus.service.config import Persistent
from vmbus.service.jobs import Job, Jobs
from vmbus.service.machine import Machine
from vmbus.service.registry import Registry
from vmbus.wire.definition import huge_page_size
from vmbus.wire.errors import VmbusError

log = logging.getLogger("vmbus.hugepages")

STEP: Final = 256 << 20
SIZES: Final = {2 << 20: "2M", 1 << 30: "1G"}
SYS: Final = Path("/sys")


class Pool:
    """One pool. ``node`` is -1 where the kernel knows no nodes; ``grown``: pages that vmbus added."""

    def __init__(self, page_size: int, node: int, sys: Path = SYS) -> None:
        self.page_size, self.node = page_size, node
        name = f"hugepages/hugepages-{page_size >> 10}kB"
        place = "kernel/mm" if node < 0 else f"devices/system/node/node{node}"
        self.setting = f"{place}/{name}/nr_hugepages"
        self.grown = 0
        self._own, self._whole = sys / place / name, sys / "kernel/mm" / name

    @property
    def total(self) -> int:
        """Pages, whether in use or not."""
        return _number(self._own / "nr_hugepages")

    @property
    def free(self) -> int:
        """Pages that nobody has touched, the reserved ones included."""
        return _number(self._own / "free_hugepages")

    @property
    def surplus(self) -> int:
        """Pages beyond the pool's size, which go when they are let go."""
        return _number(self._own / "surplus_hugepages")

    @property
    def reserved(self) -> int:
        """Pages that are promised and not yet touched; the kernel counts them for the whole host."""
        return _number(self._whole / "resv_hugepages")

    @property
    def idle(self) -> int:
        """Pages that are neither used nor reserved, as far as the node can tell."""
        return max(0, min(self.free, _number(self._whole / "free_hugepages") - self.reserved))


def found(sys: Path = SYS) -> list[Pool]:
    """The pools of this host, of the sizes that machines can have."""
    nodes = sorted(int(path.name[4:]) for path in (sys / "devices/system/node").glob("node[0-9]*"))
    return [
        pool
        for size in SIZES
        for node in nodes or [-1]
        if (sys / (pool := Pool(size, node, sys)).setting).exists()
    ]


class HugePages:
    """All pools of the host."""

    def __init__(
        self, registry: Registry, broker: BrokerClient, jobs: Jobs, persistent: list[Persistent]
    ) -> None:
        self._registry, self._broker, self._jobs = registry, broker, jobs
        self.pools = found()
        self._least = self._persistent(persistent)
        self._tasks: set[asyncio.Task[None]] = set()
        self._busy: set[str] = set()

    def _persistent(self, wanted: list[Persistent]) -> dict[str, int]:
        least: dict[str, int] = {}
        for entry in wanted:
            fits = [
                p for p in self.pools if p.page_size == entry.bytes_of_a_page and p.node in (entry.node, -1)
            ]
            if fits:
                least[fits[0].setting] = entry.pages
            else:
                log.error("vmbusd.toml: there is no pool of %s on node %d", entry.page_size, entry.node)
        return least

    def machines(self, page_size: int) -> dict[Machine, int]:
        """The living machines of such pages, with how many each."""
        return {
            machine: machine.definition.memory // page_size
            for machine in self._registry.all()
            if not machine.gone.is_set() and huge_page_size(machine.definition) == page_size
        }

    # -- by request

    def resize(self, pool: Pool, change: int, owner: int, path: str) -> Job:
        """Begin to add ``change`` pages (take away, if negative). Raises InvalidState while another job does.

        The job fails with AccessDenied (broker.toml, or pages that are not ours) and InUse.
        """
        if pool.setting in self._busy:
            raise VmbusError("InvalidState", "another job changes this pool; wait for it")
        self._busy.add(pool.setting)

        async def work(job: Job) -> None:
            told: list[str] = []
            try:
                await self._resize(pool, change, job, told.append)
            finally:
                self._busy.discard(pool.setting)
                job.note = " ".join(told)

        return self._jobs.start("grow" if change > 0 else "shrink", owner, path, work)

    async def _resize(self, pool: Pool, change: int, job: Job, say: Callable[[str], object]) -> None:
        begun, goal = pool.total, abs(change)
        step = max(1, STEP // pool.page_size)
        done = 0
        job.tell((0, goal * pool.page_size), pages=0)
        if change < 0:
            self._check_shrink(pool, goal)
        try:
            while done < goal:
                asked = min(step, goal - done)
                before = pool.total
                await self._set(pool, before + asked if change > 0 else before - asked)
                got = abs(pool.total - before)
                done += got
                job.tell((done * pool.page_size, goal * pool.page_size), pages=done)
                if got < asked:
                    break
        except BaseException:
            if pool.total != begun:
                await self._quietly(self._set(pool, begun))
            raise
        if done < goal:
            what = "added" if change > 0 else "taken away"
            why = "no more free memory in pieces of that size" if change > 0 else "the others came into use"
            say(f"{done} of {goal} pages were {what}: {why}")

    def _check_shrink(self, pool: Pool, pages: int) -> None:
        """All or nothing, as far as it can be known beforehand."""
        if pages > pool.grown:
            message = (
                f"{pool.grown} pages of this pool were added by vmbus; the others are the administrator's"
            )
            raise VmbusError("AccessDenied", message, argument="pages")
        if pages > pool.idle:
            held = sum(self.machines(pool.page_size).values())
            message = f"{pool.idle} of {pool.total} pages are neither used nor reserved; machines hold {held}"
            raise VmbusError("InUse", message, argument="pages")

    async def _set(self, pool: Pool, pages: int) -> None:
        self._learn((await self._broker.tune({pool.setting: str(pages)})).grown)

    def _learn(self, grown: dict[str, int]) -> None:
        for pool in self.pools:
            pool.grown = grown.get(pool.setting, 0)

    # -- by itself

    def connected(self) -> None:
        """After each connection to the broker: learn what is ours, have what vmbusd.toml wants, give back."""
        self._spin(self._settle())

    async def _settle(self) -> None:
        self._learn((await self._broker.tune({})).grown)
        for pool in self.pools:
            least = self._least.get(pool.setting, 0)
            if pool.total < least:
                await self._quietly(self._set(pool, least))
                if pool.total < least:
                    log.warning(
                        "%s has %d pages of the %d that vmbusd.toml wants", pool.setting, pool.total, least
                    )
        await self._give_back()

    def machine_ended(self, machine: Machine) -> None:
        """When the last one of huge pages has ended, what was added for them goes back."""
        if huge_page_size(machine.definition):
            self._spin(self._give_back())

    async def _give_back(self) -> None:
        for pool in self.pools:
            more = pool.total - self._least.get(pool.setting, 0)
            back = min(pool.grown, more, pool.idle)
            if back > 0 and not self.machines(pool.page_size) and pool.setting not in self._busy:
                await self._quietly(self._set(pool, pool.total - back))
                log.info("%s: %d pages given back", pool.setting, back)

    def _spin(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(self._quietly(work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _quietly(self, work: Awaitable[None]) -> None:
        try:
            await work
        except VmbusError as error:
            log.warning("a pool of huge pages stays as it is: %s", error)


def _number(path: Path) -> int:
    return int(path.read_text())
