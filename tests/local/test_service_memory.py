# SPDX-License-Identifier: Apache-2.0
"""A machine's memory over the bus: its target, what the guest makes of it, and what a bad guest may say."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from tests.local.service_bed import BOB, ROOT, Bed, Caller, scenario, uuid_of
from tests.local.service_fakes import FakeWorker
from vmbus.wire.errors import VmbusError

MIB = 1 << 20
MEMORY = 64 * MIB


@pytest.fixture(scope="module")
def shared() -> Iterator[Bed]:
    with Bed() as made:
        yield made


@pytest.fixture
def bed(shared: Bed) -> Bed:
    shared.broker.reset()
    return shared


async def running(caller: Caller, bed: Bed, **changes: Any) -> tuple[str, FakeWorker]:
    machine = await caller.define(memory=MEMORY, **changes)
    await caller(machine, "Machine.Start", {}, {})
    return machine, bed.broker.workers[uuid_of(machine)]


async def actual(caller: Caller, machine: str, wanted: int) -> None:
    """Wait until the property says so."""
    for _ in range(500):
        if (found := await caller.client.get(machine, "Machine", "MemoryActual")) == wanted:
            return
        await asyncio.sleep(0.02)
    raise AssertionError(f"MemoryActual is {found}, not {wanted}")


async def refused(caller: Caller, machine: str, target: int) -> VmbusError:
    with pytest.raises(VmbusError) as caught:
        await caller(machine, "Machine.SetMemoryTarget", target)
    return caught.value


@scenario
async def test_the_properties_follow_a_guest_to_its_target(bed: Bed) -> None:
    async with bed.caller() as alice:
        machine, worker = await running(alice, bed)
        found = await alice.client.get_all(machine, "Machine")
        assert (found["MemoryTarget"], found["MemoryActual"]) == (MEMORY, MEMORY)
        worker.heeds = False
        await alice(machine, "Machine.SetMemoryTarget", MEMORY // 2)
        found = await alice.client.get_all(machine, "Machine")
        assert (found["MemoryTarget"], found["MemoryActual"]) == (MEMORY // 2, MEMORY)
        assert worker.balloon is not None
        worker.balloon["ballooned"] = 8 * MIB
        await actual(alice, machine, MEMORY - 8 * MIB)
        worker.balloon["ballooned"] = MEMORY // 2
        await actual(alice, machine, MEMORY // 2)
        await alice(machine, "Machine.Kill")
        found = await alice.client.get_all(machine, "Machine")
        assert (found["MemoryTarget"], found["MemoryActual"]) == (0, 0)


@scenario
async def test_a_target_outside_of_floor_and_memory_is_refused_and_nothing_asked(bed: Bed) -> None:
    async with bed.caller() as alice:
        machine, worker = await running(alice, bed, memory_minimum=24 * MIB)
        for bad in (0, 24 * MIB - 4096, MEMORY + 4096, 32 * MIB + 1, (1 << 64) - 1):
            error = await refused(alice, machine, bad)
            assert error.kind == "InvalidArgument" and error.message.startswith("target: "), error
            assert str(24 * MIB) in error.message
        assert "memory-target" not in worker.asked
        await alice(machine, "Machine.SetMemoryTarget", 24 * MIB)
        assert "memory-target" in worker.asked


@scenario
async def test_without_a_guest_or_a_balloon_there_is_no_target(bed: Bed) -> None:
    async with bed.caller() as alice:
        machine = await alice.define(memory=MEMORY)
        assert (await refused(alice, machine, MEMORY)).kind == "InvalidState"
        plain, _ = await running(alice, bed, balloon=False)
        error = await refused(alice, plain, MEMORY)
        assert error.kind == "NotSupported" and "without a balloon" in error.message


@scenario
async def test_another_users_machine_is_not_to_be_squeezed(bed: Bed) -> None:
    async with bed.caller() as alice, bed.caller(BOB) as bob:
        machine, worker = await running(alice, bed)
        assert (await refused(bob, machine, MEMORY // 2)).kind == "NotAuthorized"
        with pytest.raises(VmbusError) as caught:
            await bob(machine, "Machine.GetMemory")
        assert caught.value.kind == "NotAuthorized"
        assert "memory-target" not in worker.asked


@scenario
async def test_the_figures_are_the_kernels_and_the_guests(bed: Bed) -> None:
    async with bed.caller() as alice:
        machine, worker = await running(alice, bed)
        assert worker.balloon is not None
        worker.balloon["guest"] = {"free": 5 * MIB, "major_faults": 3, "age_ms": 7}
        await alice(machine, "Machine.SetMemoryTarget", MEMORY // 2)
        found = await alice(machine, "Machine.GetMemory")
        assert (found["kind"], found["size"], found["minimum"]) == ("mergeable", MEMORY, MEMORY // 4)
        assert (found["target"], found["ballooned"]) == (MEMORY // 2, MEMORY // 2)
        assert found["guest"] == {"free": 5 * MIB, "major-faults": 3, "age-ms": 7}
        # The process behind the fake's files is this one, which has no guest.
        assert found["resident"] == found["saved"] == 0
        assert found["overhead"] > MIB


@scenario
async def test_what_a_bad_worker_says_is_bounded(bed: Bed) -> None:
    async with bed.caller() as alice:
        machine, worker = await running(alice, bed)
        for said in (
            {"target": -1, "ballooned": (1 << 64) - 1, "guest": {f"figure{n}": "x" for n in range(1000)}},
            {"target": "much", "ballooned": None, "guest": [1]},
            {"target": [], "ballooned": -5},
        ):
            worker.balloon = said
            found = await alice(machine, "Machine.GetMemory")
            assert 0 <= found["ballooned"] <= MEMORY
            assert 0 < found["target"] <= MEMORY
            assert len(found.get("guest", {})) <= 32


@scenario
async def test_a_restarted_service_finds_target_and_actual(bed: Bed) -> None:
    async with bed.caller() as alice:
        machine, _ = await running(alice, bed)
        await alice(machine, "Machine.SetMemoryTarget", MEMORY // 2)
    bed.system.service.kill()
    bed.system.service.start()
    async with bed.caller() as alice:
        await actual(alice, machine, MEMORY // 2)
        assert await alice.client.get(machine, "Machine", "MemoryTarget") == MEMORY // 2


@scenario
async def test_memory_is_touched_by_a_job_that_shows_its_progress_and_can_be_cancelled(bed: Bed) -> None:
    async with bed.caller() as alice:
        machine, worker = await running(alice, bed)
        worker.slow = True
        job = await alice(machine, "Machine.Prefault")
        while list(await alice.client.get(job, "Job", "Progress")) != [MEMORY // 2, MEMORY]:
            await asyncio.sleep(0.02)
        with pytest.raises(VmbusError) as caught:
            await alice(machine, "Machine.Prefault")
        assert caught.value.kind == "InvalidState"
        await alice(job, "Job.Cancel")
        assert "cancel-prefault" in worker.asked
        assert await alice.client.get(job, "Job", "State") == "cancelled"
        worker.slow = False
        job = await alice(machine, "Machine.Prefault")
        while await alice.client.get(job, "Job", "State") == "running":
            await asyncio.sleep(0.02)
        assert await alice.client.get(job, "Job", "State") == "done"
        assert list(await alice.client.get(job, "Job", "Progress")) == [MEMORY, MEMORY]


@scenario
async def test_who_has_subscribed_hears_how_far_a_job_is_and_what_came_of_it(bed: Bed) -> None:
    async with bed.caller() as alice, bed.caller(BOB) as bob:
        machine, worker = await running(alice, bed)
        heard: list[dict[str, Any]] = []
        others: list[Any] = []
        ended = asyncio.Event()

        def told(_interface: str, member: str, body: list[Any]) -> None:
            if member == "PropertiesChanged":
                heard.append(body[1])
            elif member == "Finished":
                ended.set()

        worker.slow = True
        job = await alice(machine, "Machine.Prefault")
        await alice(ROOT, "Manager.Subscribe")
        await bob(ROOT, "Manager.Subscribe")
        await alice.client.watch(job, told)
        await bob.client.watch(job, lambda _interface, _member, body: others.append(body))
        while not any(list(news.get("Progress", [])) == [MEMORY // 2, MEMORY] for news in heard):
            await asyncio.sleep(0.02)
        worker.finish_touching()
        await ended.wait()
        (last,) = [news for news in heard if "Result" in news and "Message" in news]
        assert list(last["Progress"]) == [MEMORY, MEMORY]
        assert last["Result"]["seconds"] > 0
        assert await alice.client.get(job, "Job", "Result") == last["Result"]
        assert not any("Result" in str(body) or "Progress" in str(body) for body in others)


@scenario
async def test_a_start_touches_memory_where_the_definition_says_so(bed: Bed) -> None:
    async with bed.caller() as alice:
        _, plain = await running(alice, bed)
        assert "prefault" not in plain.asked
        _, worker = await running(alice, bed, prefault=True)
        asked = [name for name in worker.asked if name in ("configure", "prefault", "run")]
        assert asked == ["configure", "prefault", "run"]


@scenario
async def test_a_start_that_is_cancelled_while_it_touches_memory_leaves_nothing(bed: Bed) -> None:
    async with bed.caller() as alice:
        bed.broker.make_worker = lambda worker: setattr(worker, "slow", True)
        machine = await alice.define(memory=MEMORY, prefault=True)
        start = asyncio.ensure_future(alice(machine, "Machine.Start", {}, {}))
        while await alice.client.get(machine, "Machine", "StateReason") != "prefault":
            await asyncio.sleep(0.02)
        await alice(machine, "Machine.Kill")
        with pytest.raises(VmbusError) as caught:
            await start
        assert caught.value.kind == "Cancelled"
        assert await alice.until(machine, "stopped") == "stopped"
        assert uuid_of(machine) not in bed.broker.workers


@scenario
async def test_nodes_that_the_host_lacks_are_refused(bed: Bed) -> None:
    async with bed.caller() as alice:
        with pytest.raises(VmbusError) as caught:
            await alice.define(memory_nodes=[0, 1000])
        assert caught.value.kind == "NotSupported" and "node 1000" in caught.value.message
