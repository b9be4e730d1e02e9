# SPDX-License-Identifier: Apache-2.0
"""Machines that go on in another vmbusd while they run: two whole systems side by side, the real core, guests
that write to their memory and disks all the time."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import re
import signal
import subprocess
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from tests.lab.system import ALICE, SLOW
from tests.local.migration_bed import (
    DIRTY,
    LOOP,
    MEMORY,
    RUNNING,
    Pair,
    Relay,
    disk_holds,
    done,
    model,
    move,
    nothing_left,
    pair,
    says,
    state,
    worker_of,
)
from tests.local.service_bed import ROOT, Caller, ended, scenario, uuid_of
from vmbus.bus import Variant
from vmbus.wire.errors import VmbusError

pytestmark = [pytest.mark.requires("root", "kvm"), pytest.mark.long]

SEED = int(os.environ.get("VMBUS_SEED", "0")) or random.randrange(1 << 32)
SEEDS = [pytest.param(SEED + n, marks=[pytest.mark.soak] if n >= 3 else []) for n in range(20)]


@pytest.fixture(scope="module")
def systems() -> Iterator[Pair]:
    with pair() as made:
        yield made


@pytest.fixture
def both(systems: Pair) -> Iterator[Pair]:
    with nothing_left(systems):
        yield systems


async def running(both: Pair, here: Caller, there: Caller, mode: str, **changes: Any) -> str:
    """A machine that runs here, has said something, and is defined there, too."""
    machine, _ = await both.defined(here, there, mode, **changes)
    await here(machine, "Machine.Start", {}, {})
    await says(here, machine, "\n")
    return machine


async def runs_on_one_side(here: Caller, there: Caller, machine: str) -> Caller:
    """Where it runs: on one side, and its memory is what it should be; the other has stopped."""
    states = [await state(caller, machine) for caller in (here, there)]
    on = [caller for caller, (now, _) in zip((here, there), states, strict=True) if now == "running"]
    assert len(on) == 1, states
    assert sorted(now for now, _ in states) == ["running", "stopped"]
    said = await says(on[0], machine, "pass")
    assert "page" not in said
    return on[0]


async def length(both: Pair, here: Caller, there: Caller) -> int:
    """How many bytes it takes to move the machine of mode DIRTY, at the least: while it stands."""
    if both.length == 0:
        machine = await running(both, here, there, DIRTY)
        await here(machine, "Machine.Pause")
        with Relay() as relay:
            received, sent = await move(here, there, machine, relay)
            await done(here, sent)
            await done(there, received)
        await there(machine, "Machine.Kill")
        for caller in (here, there):
            await caller(machine, "Machine.Undefine")
        both.length = relay.passed
    return both.length


@scenario
async def test_a_guest_goes_on_there_with_its_memory_and_its_disk(both: Pair) -> None:
    async with both.callers() as (here, there):
        disk = both.here.disk()
        disks = [{"id": "root", "layers": [{"format": "raw", "path": disk}]}]
        machine = await running(both, here, there, LOOP, disks=disks)
        # There and back again, and there: each time it is the same machine.
        source, destination = here, there
        for _ in range(3):
            received, sent = await move(source, destination, machine)
            result = (await done(source, sent))["Result"]
            await done(destination, received)
            assert await state(source, machine) == ("stopped", "migrated")
            assert (await state(destination, machine))[0] == "running"
            assert result["sent"] > 0
            assert result["rounds"] >= 1
            assert result["downtime"] >= 0
            source, destination = destination, source
        said = await says(source, machine, "loop: beat")
        assert "begins" not in said
        console = await source(machine, "Machine.OpenConsole", {})
        await source(machine, "Machine.Shutdown")
        await source.until(machine, "stopped")
        last = b""
        while piece := os.read(console, 65536):
            last += piece
        os.close(console)
        (written,) = re.findall(rb"loop: ended at (\d+)", last)
        assert disk_holds(disk, int(written))


@scenario
async def test_a_qcow2_disk_is_whole_and_nobody_s_afterwards(both: Pair) -> None:
    async with both.callers() as (here, there):
        path = both.systems[0].files(ALICE) / "disk.qcow2"
        both.systems[0].run_as(ALICE, ["qemu-img", "create", "-q", "-f", "qcow2", path, "8M"])
        disks = [{"id": "root", "layers": [{"format": "qcow2", "path": str(path)}]}]
        machine = await running(both, here, there, LOOP, disks=disks)
        received, sent = await move(here, there, machine)
        await done(here, sent)
        await done(there, received)
        await says(there, machine, "loop: beat")
        # The one there holds it now, and the one here cannot.
        with pytest.raises(VmbusError) as caught:
            await here(machine, "Machine.Start", {}, {})
        assert caught.value.kind == "InUse"
        await ended(there, await there(machine, "Machine.Stop", 0))
        checked = subprocess.run(["qemu-img", "check", "-q", path], capture_output=True, check=False)
        assert checked.returncode == 0, checked.stdout
        await here(machine, "Machine.Start", {}, {})


@scenario
async def test_one_that_is_paused_arrives_paused(both: Pair) -> None:
    async with both.callers() as (here, there):
        machine = await running(both, here, there, DIRTY)
        await here(machine, "Machine.Pause")
        received, sent = await move(here, there, machine)
        await done(here, sent)
        await done(there, received)
        assert (await state(there, machine))[0] == "paused"
        await there(machine, "Machine.Resume")
        assert await runs_on_one_side(here, there, machine) is there


@pytest.mark.parametrize("seed", SEEDS)
@scenario
async def test_cancelled_on_either_side_at_any_moment_it_runs_on_one(both: Pair, seed: int) -> None:
    chance = random.Random(seed)
    async with both.callers() as sides:
        total = await length(both, *sides)
        machine = await running(both, *sides, DIRTY)
        source, destination = sides
        for _ in range(3):
            after, of_source = chance.randrange(1, total + total // 10), chance.random() < 0.5
            outcomes = await cancelled(source, destination, machine, after, of_source=of_source)
            on = await runs_on_one_side(*sides, machine)
            assert (outcomes == ["done", "done"]) == (on is destination), outcomes
            if on is destination:
                source, destination = destination, source


async def cancelled(
    source: Caller, destination: Caller, machine: str, after: int, *, of_source: bool
) -> list[str]:
    """How both jobs end, of which one is cancelled after so many bytes, before any more pass."""
    loop, moment, go_on = asyncio.get_running_loop(), asyncio.Event(), threading.Event()

    def reached() -> None:
        loop.call_soon_threadsafe(moment.set)
        go_on.wait()

    with Relay(after, reached) as relay:
        try:
            received, sent = await move(source, destination, machine, relay)
            waiting = [asyncio.ensure_future(moment.wait()), asyncio.ensure_future(ended(source, sent))]
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for one in waiting:
                one.cancel()
            caller, job = (source, sent) if of_source else (destination, received)
            with contextlib.suppress(VmbusError):  # it had ended already
                await caller(job, "Job.Cancel")
        finally:
            go_on.set()  # whatever happens: the relay waits for its thread
        return [(await ended(c, j))["State"] for c, j in ((source, sent), (destination, received))]


@pytest.mark.parametrize("seed", SEEDS)
@scenario
async def test_a_destination_that_is_killed_at_any_moment_leaves_the_source_running(
    both: Pair, seed: int
) -> None:
    chance = random.Random(seed)
    async with both.callers() as (here, there):
        total = await length(both, here, there)
        machine = await running(both, here, there, DIRTY)
        for _ in range(3):

            def kill() -> None:
                os.kill(worker_of(both.systems[1]), signal.SIGKILL)

            # Not the very last: whoever is killed after it has got the machine takes it along.
            with Relay(chance.randrange(1, total * 9 // 10), kill) as relay:
                received, sent = await move(here, there, machine, relay)
                assert (await ended(here, sent))["State"] == "failed"
                assert (await ended(there, received))["State"] == "failed"
            assert await runs_on_one_side(here, there, machine) is here


@pytest.mark.parametrize("seed", SEEDS)
@scenario
async def test_what_is_damaged_on_its_way_is_refused(both: Pair, seed: int) -> None:
    chance = random.Random(seed)
    async with both.callers() as (here, there):
        total = await length(both, here, there)
        machine = await running(both, here, there, DIRTY)
        for _ in range(3):
            place, bit = chance.randrange(total * 9 // 10), 1 << chance.randrange(8)

            def flip(at: int, piece: bytes, place: int = place, bit: int = bit) -> bytes:
                if not at <= place < at + len(piece):
                    return piece
                index = place - at
                return piece[:index] + bytes([piece[index] ^ bit]) + piece[index + 1 :]

            with Relay(change=flip) as relay:
                received, sent = await move(here, there, machine, relay)
                states = [(await ended(c, j))["State"] for c, j in ((here, sent), (there, received))]
            assert states == ["failed", "failed"]
            assert await runs_on_one_side(here, there, machine) is here


@scenario
async def test_a_connection_that_breaks_as_the_machine_is_handed_on_leaves_one_that_runs(both: Pair) -> None:
    """The destination runs, and its word of that is lost: the source stands, and cannot go on beside it."""
    async with both.callers() as (here, there):
        disks = [{"id": "root", "layers": [{"format": "raw", "path": both.here.disk()}]}]
        machine = await running(both, here, there, LOOP, disks=disks)
        with Relay(lost=RUNNING) as relay:
            received, sent = await move(here, there, machine, relay)
            assert (await ended(here, sent))["Error"] == "org.vmbus1.Error.Disconnected"
            await done(there, received)
        assert await state(here, machine) == ("paused", "migration-unsure")
        assert (await state(there, machine))[0] == "running"
        with pytest.raises(VmbusError) as caught:
            await here(machine, "Machine.Resume")
        assert caught.value.kind == "InUse"
        await here(machine, "Machine.Kill")
        assert "begins" not in await says(there, machine, "loop: beat")
        # And when the one at the destination is ended, the source goes on.
        await there(machine, "Machine.Pause")
        with Relay(lost=RUNNING) as relay:
            received, sent = await move(there, here, machine, relay)
            assert (await ended(there, sent))["State"] == "failed"
            await done(here, received)
        assert await state(there, machine) == ("paused", "migration-unsure")
        assert (await state(here, machine))[0] == "paused"
        await here(machine, "Machine.Kill")
        await there(machine, "Machine.Resume")
        assert "begins" not in await says(there, machine, "loop: beat")


@pytest.mark.parametrize("which", [0, 1], ids=["source", "destination"])
def test_a_vmbusd_that_is_killed_in_the_middle_finds_what_came_of_it(both: Pair, which: int) -> None:
    """The relay kills it, and waits until it is dead; the workers have the rest between them."""

    @scenario
    async def test() -> None:
        async with both.callers() as (here, there):
            total = await length(both, here, there)
            machine = await running(both, here, there, DIRTY)
            service = both.systems[which].service
            with Relay(total // 2, service.kill) as relay:
                received, sent = await move(here, there, machine, relay)
                other, job = [(there, received), (here, sent)][which]
                await done(other, job)
                service.start()
        async with both.callers() as (here, there):
            await there.until(machine, "running")
            await here.until(machine, "stopped")
            assert await state(here, machine) == ("stopped", "migrated")
            assert await runs_on_one_side(here, there, machine) is there

    test()


@scenario
async def test_where_a_machine_cannot_run_it_is_refused_by_name_and_goes_on(both: Pair) -> None:
    async with both.callers() as (here, there):
        fits = {"cpu_model": model(), "memory": MEMORY}
        machine = await here(ROOT, "Manager.DefineMachine", both.here.guest(DIRTY, **fits))
        await here(machine, "Machine.Start", {}, {})
        other = model().replace("intel", "amd") if "intel" in model() else model().replace("amd", "intel")
        for changes, kind in (
            ({"cpu_model": other}, "NotSupported"),  # a processor that the host there has not
            ({"memory": 32 << 20}, "InvalidArgument"),
        ):
            form = both.there.guest(DIRTY, **{**fits, **changes})
            form["name"] = Variant("s", "elsewhere")
            await there(ROOT, "Manager.DefineMachineAs", form, uuid_of(machine))
            received, sent = await move(here, there, machine)
            found = await ended(there, received)
            assert found["Error"].rpartition(".")[2] == kind, found
            assert (await ended(here, sent))["State"] == "failed"
            assert await state(there, machine) == ("stopped", "start-failed")
            assert await runs_on_one_side(here, there, machine) is here
            await there(machine, "Machine.Undefine")


def test_vmbusctl_moves_a_machine_for_good_or_not_at_all(both: Pair) -> None:
    here, there = both.systems
    disk = both.here.disk()

    def vmbusctl(on: Any, *words: str, fails: bool = False) -> str:
        done = on.vmbusctl(ALICE, *words, timeout=60)
        assert bool(done.returncode) == fails, done.stderr
        return str(done.stderr if fails else done.stdout)

    words = ["--memory", "16M", "--cpu-model", model(), "--kernel", both.here.kernel(), "--cmdline", LOOP]
    vmbusctl(here, "define", "--name", "web", *words, "--disk", f"id=root,format=raw,path={disk}")
    vmbusctl(here, "start", "web")
    uuid = vmbusctl(here, "show", "web", "--json")
    assert "not a size" in vmbusctl(
        here, "migrate", "web", "--to", there.bus_address, "--bandwidth", "fast", fails=True
    )
    assert "cannot" in vmbusctl(here, "migrate", "web", "--to", "unix:path=/nowhere", fails=True)
    # What does not work there leaves no definition there.
    nowhere = f"disk/root/0={both.systems[0].files(ALICE)}/nowhere"
    assert "nowhere" in vmbusctl(
        here, "migrate", "web", "--to", there.bus_address, "--file", nowhere, fails=True
    )
    assert vmbusctl(there, "list") == ""
    assert "running" in vmbusctl(here, "list")
    said = vmbusctl(here, "migrate", "web", "--to", there.bus_address, "--downtime", "50")
    assert "stood still for" in said
    assert "running" in vmbusctl(there, "list")
    assert "stopped" in vmbusctl(here, "list")
    # Back, for good, as a program has it.
    said = vmbusctl(there, "migrate", "web", "--to", here.bus_address, "--undefine-source", "--json")
    assert '"downtime"' in said
    assert '"state": "migrated"' in said
    assert vmbusctl(there, "list") == ""
    assert vmbusctl(here, "show", "web", "--json").count(uuid.partition('"uuid"')[2][:42]) == 1
    vmbusctl(here, "kill", "web")


def test_vmbusctl_that_is_interrupted_leaves_one_machine_that_runs(both: Pair) -> None:
    here, there = both.systems
    words = ["--memory", "64M", "--cpu-model", model(), "--kernel", both.here.kernel(), "--cmdline", DIRTY]
    here.vmbusctl(ALICE, "define", "--name", "web", *words)
    here.vmbusctl(ALICE, "start", "web")
    slow = ["vmbusctl", "migrate", "web", "--to", there.bus_address, "--bandwidth", "64K"]
    moving = here.popen(ALICE, slow, stderr=subprocess.PIPE)
    assert here.vmbusctl(ALICE, "wait", "web", "--timeout", "60", "--state", "running").returncode == 0
    there_too = there.vmbusctl(ALICE, "wait", "web", "--timeout", "60", "--state", "starting")
    while there_too.returncode:  # it is not defined yet
        there_too = there.vmbusctl(ALICE, "wait", "web", "--timeout", "60", "--state", "starting")
    moving.send_signal(signal.SIGINT)
    moving.communicate(timeout=60 * SLOW)
    assert moving.returncode == 130
    assert there.vmbusctl(ALICE, "list").stdout == ""
    assert "running" in here.vmbusctl(ALICE, "list").stdout
