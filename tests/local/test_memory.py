# SPDX-License-Identifier: Apache-2.0
"""Machines' memory on a whole system, with bare-metal guests that give it back."""

from __future__ import annotations

import asyncio
import os
import re
import resource
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.system import BOB, System
from tests.local.service_bed import ROOT, Caller, form, scenario
from tests.local.test_service_real import Stage, console_says
from vmbus.bus import Variant
from vmbus.wire.errors import VmbusError

pytestmark = pytest.mark.requires("root", "kvm")

MIB = 1 << 20
MEMORY = 64 * MIB
POLICY = '[quota]\nfor = [ {users = ["vmbus-alice"], locked = "12M"} ]\n'


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    with System(policy=POLICY) as system:
        yield Stage(system)


@scenario
async def test_what_a_guest_gives_back_the_host_has(stage: Stage) -> None:
    async with stage.caller() as alice:
        for kind in ("mergeable", "shareable"):
            definition = stage.guest("balloon touch=16", memory=MEMORY, memory_kind=kind)
            machine = await alice(ROOT, "Manager.DefineMachine", definition)
            await alice(machine, "Machine.Start", {}, {})
            console = await alice(machine, "Machine.OpenConsole", {})
            await console_says(console, "touched 4096 pages")
            before = await alice(machine, "Machine.GetMemory")
            assert 16 * MIB <= before["resident"] < 20 * MIB, before
            assert MIB < before["overhead"] < 64 * MIB, before
            assert before["ballooned"] == before["saved"] == before["merged"] == 0, before
            await alice(machine, "Machine.SetMemoryTarget", MEMORY - 12 * MIB)
            await console_says(console, "3072 pages")
            for _ in range(100):
                after = await alice(machine, "Machine.GetMemory")
                if after["ballooned"] == 12 * MIB:
                    break
                await asyncio.sleep(0.05)
            assert after["ballooned"] == 12 * MIB, after
            assert before["resident"] - after["resident"] >= 12 * MIB, (before, after)
            assert await alice.client.get(machine, "Machine", "MemoryActual") == MEMORY - 12 * MIB
            await alice(machine, "Machine.Kill")
            await alice(machine, "Machine.Undefine")


@scenario
async def test_memory_is_there_before_the_guest_runs(stage: Stage) -> None:
    async with stage.caller() as alice:
        for kind in ("mergeable", "shareable"):
            definition = stage.guest("idle", memory=MEMORY, memory_kind=kind, prefault=True)
            machine = await alice(ROOT, "Manager.DefineMachine", definition)
            await alice(machine, "Machine.Start", {"paused": Variant("b", True)}, {})
            found = await alice(machine, "Machine.GetMemory")
            assert found["resident"] == MEMORY, found
            await alice(machine, "Machine.Kill")
            await alice(machine, "Machine.Undefine")


@scenario
async def test_touching_is_a_job_beside_the_running_guest(stage: Stage) -> None:
    async with stage.caller() as alice:
        size = 1 << 30
        machine = await alice(ROOT, "Manager.DefineMachine", stage.guest("idle", memory=size))
        await alice(machine, "Machine.Start", {}, {})
        job = await alice(machine, "Machine.Prefault")
        await alice(job, "Job.Cancel")
        assert await alice.client.get(job, "Job", "State") == "cancelled"
        assert (await alice(machine, "Machine.GetMemory"))["resident"] < size
        job = await alice(machine, "Machine.Prefault")
        while await alice.client.get(job, "Job", "State") == "running":
            await asyncio.sleep(0.05)
        assert list(await alice.client.get(job, "Job", "Progress")) == [size, size]
        assert (await alice(machine, "Machine.GetMemory"))["resident"] == size
        assert await alice.state(machine) == "running"
        await alice(machine, "Machine.Kill")


@scenario
async def test_memory_comes_from_the_nodes_it_is_bound_to(stage: Stage) -> None:
    async with stage.caller() as alice:
        definition = stage.guest("idle", memory=MEMORY, memory_nodes=[0])
        machine = await alice(ROOT, "Manager.DefineMachine", definition)
        await alice(machine, "Machine.Start", {}, {})
        pid = await alice.client.get(machine, "Machine", "WorkerPid")
        maps = Path(f"/proc/{pid}/numa_maps")
        if maps.exists():
            assert "bind:0" in maps.read_text()
        await alice(machine, "Machine.Kill")


@scenario
async def test_memory_is_locked_where_it_is_asked_for_and_allowed(stage: Stage) -> None:
    size = 8 * MIB  # what may be locked without CAP_SYS_RESOURCE on most hosts
    async with stage.caller() as alice, stage.caller(BOB) as bob:
        definition = stage.guest("idle", memory=size, locked=True, prefault=True)
        machine = await alice(ROOT, "Manager.DefineMachine", definition)
        await alice(machine, "Machine.Start", {}, {})
        found = await alice(machine, "Machine.GetMemory")
        assert found["locked"] == found["resident"] == size
        with pytest.raises(VmbusError) as caught:
            await alice(machine, "Machine.SetMemoryTarget", size // 2)
        assert caught.value.kind == "NotSupported" and "locked" in caught.value.message
        pid = await alice.client.get(machine, "Machine", "WorkerPid")
        limit = re.search(r"^Max locked memory +(\d+) +(\d+)", Path(f"/proc/{pid}/limits").read_text(), re.M)
        assert limit and int(limit[1]) == int(limit[2]) == size
        status = Path(f"/proc/{pid}/status").read_text()
        assert int(re.search(r"^VmLck:\s+(\d+) kB", status, re.M)[1]) == size >> 10  # type: ignore[index]
        with pytest.raises(VmbusError) as caught:
            await alice(ROOT, "Manager.DefineMachine", stage.guest("idle", memory=2 * size, locked=True))
        assert caught.value.kind == "QuotaExceeded" and "locked" in caught.value.message
        with pytest.raises(VmbusError) as caught:
            await bob(ROOT, "Manager.DefineMachine", form(memory=size, locked=True))
        assert caught.value.kind == "QuotaExceeded"
        await alice(machine, "Machine.Kill")


@scenario
async def test_what_is_not_to_be_locked_is_not_and_what_the_host_does_not_let_be_locked_is_refused(
    stage: Stage,
) -> None:
    async with stage.caller() as alice:
        machine = await alice(
            ROOT, "Manager.DefineMachine", stage.guest("idle", memory=MEMORY, prefault=True)
        )
        await alice(machine, "Machine.Start", {}, {})
        pid = await alice.client.get(machine, "Machine", "WorkerPid")
        assert re.search(r"^VmLck:\s+0 kB", Path(f"/proc/{pid}/status").read_text(), re.M)
        assert (await alice(machine, "Machine.GetMemory"))["locked"] == 0
        limit = re.search(r"^Max locked memory +(\d+) ", Path(f"/proc/{pid}/limits").read_text(), re.M)
        assert limit and int(limit[1]) <= MIB  # io_uring's, and nothing for the guest
        await alice(machine, "Machine.Kill")

        size = 12 * MIB  # as broker.toml allows; the broker itself may have less to give
        machine = await alice(ROOT, "Manager.DefineMachine", stage.guest("idle", memory=size, locked=True))
        _, most = resource.getrlimit(resource.RLIMIT_MEMLOCK)
        if most != resource.RLIM_INFINITY and most < size:
            with pytest.raises(VmbusError) as caught:
                await alice(machine, "Machine.Start", {}, {})
            assert caught.value.kind == "AccessDenied" and "RLIMIT_MEMLOCK" in caught.value.message
            assert await alice.state(machine) in ("stopped", "crashed")
        else:
            await alice(machine, "Machine.Start", {}, {})
            await alice(machine, "Machine.Kill")


def press(source: Path, per_cent: float) -> None:
    """What the kernel would write there."""
    draft = source.with_suffix(".new")
    draft.write_text(f"some avg10={per_cent:.2f} avg60=0.00 avg300=0.00 total=1\n")
    draft.chmod(0o644)
    draft.replace(source)


@scenario
async def test_under_pressure_machines_give_memory_and_get_it_back() -> None:
    source = Path(tempfile.mkdtemp()) / "pressure"
    source.parent.chmod(0o755)
    press(source, 0.0)
    config = f"[pressure]\non = true\nsource = '{source}'\ninterval = 0.2\nstep = 0.1\n"
    with System(config=config) as system:
        stage = Stage(system)
        async with stage.caller() as alice:
            machines = []
            for name, floor in (("one", 40 * MIB), ("two", 56 * MIB)):
                definition = stage.guest(
                    "balloon touch=32", name=name, memory=MEMORY, memory_minimum=floor, vcpus=1
                )
                machines.append(await alice(ROOT, "Manager.DefineMachine", definition))
                await alice(machines[-1], "Machine.Start", {}, {})
                console = await alice(machines[-1], "Machine.OpenConsole", {})
                await console_says(console, "touched 8192 pages")
                os.close(console)
            before = [await resident(alice, machine) for machine in machines]
            press(source, 40.0)
            assert await targets(alice, machines, [40 * MIB, 56 * MIB]) == [40 * MIB, 56 * MIB]
            for _ in range(200):
                during = [await resident(alice, machine) for machine in machines]
                if before[0] - during[0] >= 24 * MIB and before[1] - during[1] >= 8 * MIB:
                    break
                await asyncio.sleep(0.05)
            assert before[0] - during[0] >= 24 * MIB, (before, during)
            assert before[1] - during[1] >= 8 * MIB, (before, during)
            press(source, 0.5)
            assert await targets(alice, machines, [MEMORY, MEMORY]) == [MEMORY, MEMORY]
    shutil.rmtree(source.parent)


async def resident(caller: Caller, machine: str) -> int:
    return int((await caller(machine, "Machine.GetMemory"))["resident"])


async def targets(caller: Caller, machines: list[str], wanted: list[int]) -> list[int]:
    """The machines' targets, once they are as wanted, or after 20 s."""
    found: list[int] = []
    for _ in range(400):
        found = [await caller.client.get(machine, "Machine", "MemoryTarget") for machine in machines]
        if found == wanted:
            break
        await asyncio.sleep(0.05)
    return found
