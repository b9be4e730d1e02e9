# SPDX-License-Identifier: Apache-2.0
"""Pools as the service changes them, on a /sys of the test whose kernel finds only so many pages."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Any

import pytest

from vmbus.service.hugepages import HugePages, Pool, found
from vmbus.service.jobs import Job, Jobs
from vmbus.wire.errors import VmbusError
from vmbus.wire.memory import Tuned

MIB2 = 2 << 20


class Kernel:
    """/sys with one pool on each of two nodes, and a broker that writes to it."""

    def __init__(self, sys: Path, most: int) -> None:
        self.sys, self.most = sys, most
        self.grown: dict[str, int] = {}
        self.writes: list[int] = []
        self.pause = asyncio.Event()
        self.pause.set()
        for place in ("kernel/mm", "devices/system/node/node0", "devices/system/node/node1"):
            directory = sys / place / "hugepages/hugepages-2048kB"
            directory.mkdir(parents=True)
            for name in ("nr", "free", "surplus", "resv"):
                (directory / f"{name}_hugepages").write_text("0\n")

    async def tune(self, settings: dict[str, str]) -> Tuned:
        await asyncio.sleep(0)
        await self.pause.wait()
        for name, value in settings.items():
            file = self.sys / name
            pages = min(int(value), self.most)
            self.writes.append(pages)
            self.grown[name] = self.grown.get(name, 0) + pages - int(file.read_text())
            for path in (file, file.parent / "free_hugepages"):
                path.write_text(f"{pages}\n")
            (self.sys / "kernel/mm/hugepages/hugepages-2048kB/free_hugepages").write_text(f"{pages}\n")
        return Tuned(grown={name: pages for name, pages in self.grown.items() if pages})


class NoMachines:
    def all(self) -> list[Any]:
        return []


def made(kernel: Kernel) -> tuple[HugePages, Pool]:
    pools = HugePages(NoMachines(), kernel, Jobs(), [])  # type: ignore[arg-type]
    pools.pools = found(kernel.sys)
    return pools, pools.pools[0]


async def ended(job: Job) -> Job:
    with contextlib.suppress(VmbusError):
        await job.wait()
    return job


def test_there_is_one_for_each_size_and_node_that_the_host_has(tmp_path: Path) -> None:
    async def scenario() -> list[tuple[int, int]]:
        return [(pool.page_size, pool.node) for pool in found(Kernel(tmp_path, 0).sys)]

    assert asyncio.run(scenario()) == [(MIB2, 0), (MIB2, 1)]


def test_a_large_pool_grows_in_steps_and_shows_progress(tmp_path: Path) -> None:
    async def scenario() -> None:
        kernel = Kernel(tmp_path, 1000)
        pools, pool = made(kernel)
        job = await ended(pools.resize(pool, 300, 0, "/x"))
        assert (job.state, job.note, job.kind, job.machine) == ("done", "", "grow", "/x")
        assert kernel.writes == [128, 256, 300]
        assert job.progress == (300 * MIB2, 300 * MIB2)
        assert pool.grown == 300

    asyncio.run(scenario())


def test_less_than_was_asked_for_stays_and_the_job_says_how_much_and_why(tmp_path: Path) -> None:
    async def scenario() -> None:
        pools, pool = made(Kernel(tmp_path, 150))
        job = await ended(pools.resize(pool, 300, 0, "/x"))
        assert job.state == "done"
        assert job.note == "150 of 300 pages were added: no more free memory in pieces of that size"
        assert (pool.total, job.progress) == (150, (150 * MIB2, 300 * MIB2))

    asyncio.run(scenario())


def test_a_cancelled_growth_is_undone(tmp_path: Path) -> None:
    async def scenario() -> None:
        kernel = Kernel(tmp_path, 1000)
        pools, pool = made(kernel)
        job = pools.resize(pool, 300, 0, "/x")
        while not kernel.writes:
            await asyncio.sleep(0)
        kernel.pause.clear()
        cancelling = asyncio.ensure_future(job.cancel())
        await asyncio.sleep(0)
        kernel.pause.set()
        await cancelling
        assert (job.state, pool.total, pool.grown) == ("cancelled", 0, 0)
        pools.resize(pool, 1, 0, "/x")  # nothing is left that would forbid it

    asyncio.run(scenario())


def test_what_others_reserved_is_not_taken_away(tmp_path: Path) -> None:
    async def scenario() -> None:
        kernel = Kernel(tmp_path, 1000)
        pools, pool = made(kernel)
        await ended(pools.resize(pool, 20, 0, "/x"))
        (tmp_path / "kernel/mm/hugepages/hugepages-2048kB/resv_hugepages").write_text("15\n")
        job = await ended(pools.resize(pool, -6, 0, "/x"))
        assert (job.state, job.error and job.error.kind, pool.total) == ("failed", "InUse", 20)
        job = await ended(pools.resize(pool, -5, 0, "/x"))
        assert (job.state, pool.total, pool.grown) == ("done", 15, 15)

    asyncio.run(scenario())


@pytest.mark.parametrize("change", [1, -1])
def test_a_second_job_on_the_same_pool_is_refused(tmp_path: Path, change: int) -> None:
    async def scenario() -> None:
        kernel = Kernel(tmp_path, 1000)
        pools, pool = made(kernel)
        first = pools.resize(pool, 10, 0, "/x")
        with pytest.raises(VmbusError, match="another job"):
            pools.resize(pool, change, 0, "/x")
        await ended(first)

    asyncio.run(scenario())
