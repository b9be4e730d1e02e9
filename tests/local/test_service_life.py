# SPDX-License-Identifier: Apache-2.0
"""Machines from start to end, and found again: vmbusd killed, the broker gone, both, while things happen."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.local.service_bed import ALICE, BOB, ROOT, Bed, Caller, form, scenario, uuid_of
from tests.local.service_fakes import eventually
from vmbus.bus import RemoteError, Variant
from vmbus.service.starts import AT_ONCE
from vmbus.wire import broker
from vmbus.wire.errors import VmbusError


@pytest.fixture
def bed() -> Iterator[Bed]:
    with Bed("dbus_next") as made:
        yield made


async def running(caller: Caller, **changes: Any) -> str:
    """A machine that runs."""
    machine = await caller.define(**changes)
    await caller(machine, "Machine.Start", {}, {})
    return machine


async def shown(caller: Caller, machine: str) -> tuple[str, str]:
    """State and reason."""
    found = await caller.client.get_all(machine, "Machine")
    return found["State"], found["StateReason"]


def restart(bed: Bed) -> None:
    """kill -9 of vmbusd, and a new one."""
    bed.system.service.kill()
    bed.system.service.start()


@scenario
async def test_a_record_of_the_broker_that_came_too_early_is_dropped_at_the_next_start(bed: Bed) -> None:
    bed.broker.silent = {"own"}
    async with bed.caller() as alice:
        defining = asyncio.ensure_future(alice.define())
        asked = [broker.Own(id=0, uuid="", uid=0)]

        def heard() -> bool:
            asked[:] = [request for request in bed.broker.asked if isinstance(request, broker.Own)]
            return bool(asked)

        assert await asyncio.to_thread(eventually, heard)
        bed.system.service.kill()
        with pytest.raises(RemoteError):
            await defining
    bed.broker.silent = set()
    bed.broker.owners[asked[0].uuid] = asked[0].uid  # it was made, and nobody was left to hear of it

    bed.system.service.start()

    assert eventually(lambda: asked[0].uuid not in bed.broker.owners)
    assert eventually(lambda: os.listdir(bed.system.place / "state/owned") == [])
    async with bed.caller() as alice:
        assert await alice(ROOT, "Manager.ListMachines") == []


@pytest.mark.parametrize("killed", [False, True], ids=["vmbusd stays", "vmbusd is killed too"])
@scenario
async def test_a_record_that_could_not_be_dropped_goes_when_the_broker_is_back(
    bed: Bed, killed: bool
) -> None:
    bed.broker.refuse = {"disown": ("Unavailable", "not now", "")}
    async with bed.caller() as alice:
        machine = str(await alice(ROOT, "Manager.CreateTransient", form(), {}, {}))
        await alice(machine, "Machine.Kill")
        assert await alice(ROOT, "Manager.ListMachines") == []
    assert list(bed.broker.owners) == [uuid_of(machine)]
    if killed:
        bed.system.service.kill()
    bed.broker.stop()
    bed.broker.refuse = {}
    bed.broker.start()
    if killed:
        bed.system.service.start()

    assert eventually(lambda: bed.broker.owners == {})
    assert eventually(lambda: os.listdir(bed.system.place / "state/owned") == [])


@scenario
async def test_pause_resume_reset_console_and_figures(bed: Bed) -> None:
    async with bed.caller() as alice:
        machine = await running(alice)
        await alice(machine, "Machine.Pause")
        assert await alice.state(machine) == "paused"
        await alice(machine, "Machine.Resume")
        assert await alice.state(machine) == "running"
        await alice(machine, "Machine.Reset")
        stats = await alice(machine, "Machine.GetStats")
        assert stats["vcpus"] == {"exits": 7}
        assert stats["memory-pss"] > 0
        console = await alice(machine, "Machine.OpenConsole", {})
        assert os.read(console, 100) == b"login: "
        os.write(console, b"root\n")
        worker = bed.broker.workers[uuid_of(machine)]
        assert worker.console is not None
        assert worker.console.recv(100) == b"root\n"
        os.close(console)


@scenario
async def test_a_paused_start_begins_with_resume(bed: Bed) -> None:
    async with bed.caller() as alice:
        machine = await alice.define()
        await alice(machine, "Machine.Start", {"paused": Variant("b", True)}, {})
        worker = bed.broker.workers[uuid_of(machine)]
        assert await alice.state(machine) == "paused"
        assert "run" not in worker.asked
        restart(bed)
    async with bed.caller() as alice:
        assert await alice.until(machine, "paused")
        await alice(machine, "Machine.Resume")
        assert await alice.state(machine) == "running"
        assert "run" in worker.asked
        assert "resume" not in worker.asked


@scenario
async def test_shutdown_is_what_the_guest_makes_of_it(bed: Bed) -> None:
    async with bed.caller() as alice:
        machine = await running(alice)
        await alice(machine, "Machine.Shutdown")
        await alice.until(machine, "stopped")
        assert await shown(alice, machine) == ("stopped", "guest-poweroff")


@pytest.mark.parametrize(("reason", "state"), [("guest-poweroff", "stopped"), ("triple-fault", "crashed")])
@scenario
async def test_ends_have_their_reasons_and_survive_a_restart(bed: Bed, reason: str, state: str) -> None:
    async with bed.caller() as alice:
        machine = await running(alice)
        bed.broker.workers[uuid_of(machine)].end(reason, "at 0x1234")
        await alice.until(machine, state)
        assert await shown(alice, machine) == (state, reason)
    restart(bed)
    async with bed.caller() as alice:
        assert await shown(alice, machine) == (state, reason)
        assert await alice.client.get(machine, "Machine", "StateDetail") == "at 0x1234"
        await alice(machine, "Machine.Start", {}, {})


@scenario
async def test_a_worker_that_ends_without_a_word_has_crashed(bed: Bed) -> None:
    async with bed.caller() as alice:
        machine = await running(alice)
        bed.broker.ended(uuid_of(machine))
        await alice.until(machine, "crashed")
        assert await shown(alice, machine) == ("crashed", "worker-lost")


@scenario
async def test_stop_ends_a_guest_that_does_not_listen_after_the_deadline(bed: Bed) -> None:
    def deaf(worker: Any) -> None:
        worker.obeys = False

    bed.broker.make_worker = deaf
    async with bed.caller() as alice:
        machine = await running(alice)
        begin = time.monotonic()
        job = await alice(machine, "Machine.Stop", 400_000)
        assert await shown(alice, machine) == ("stopping", "stop")
        assert (await alice.client.get_all(job, "Job"))["Kind"] == "stop"
        await alice.until(machine, "stopped")
        assert 0.35 < time.monotonic() - begin < 5
        assert await shown(alice, machine) == ("stopped", "stopped")
        assert (await alice.client.get_all(job, "Job"))["State"] == "done"


@scenario
async def test_a_stop_can_be_taken_back(bed: Bed) -> None:
    def deaf(worker: Any) -> None:
        worker.obeys = False

    bed.broker.make_worker = deaf
    async with bed.caller() as alice:
        machine = await running(alice)
        job = await alice(machine, "Machine.Stop", 60_000_000)
        await alice(job, "Job.Cancel")
        assert await alice.state(machine) == "running"
        assert await alice.client.get(job, "Job", "State") == "cancelled"
        await alice(machine, "Machine.Stop", 0)
        await alice.until(machine, "stopped")


@scenario
async def test_a_start_can_be_killed_and_cancelled(bed: Bed) -> None:
    def silent(worker: Any) -> None:
        worker.silent.add("configure")

    bed.broker.make_worker = silent
    async with bed.caller() as alice:
        for how in ("kill", "cancel"):
            machine = await alice.define()
            start = asyncio.ensure_future(alice(machine, "Machine.Start", {}, {}))
            assert await alice.until(machine, "starting")
            await asyncio.sleep(0.2)
            if how == "kill":
                await alice(machine, "Machine.Kill")
            else:
                jobs = [path for path in await alice.client.managed_objects() if "/job/" in path]
                await alice(max(jobs), "Job.Cancel")
            with pytest.raises(VmbusError) as caught:
                await start
            assert caught.value.kind == "Cancelled"
            assert await alice.state(machine) == "stopped"
            assert not bed.broker.workers


@scenario
async def test_starts_of_one_owner_take_turns_and_hold_up_nobody_else(bed: Bed) -> None:
    bed.broker.make_worker = lambda worker: worker.silent.add("hello")
    async with bed.caller() as alice, bed.caller(BOB) as bob:
        machines = [await alice.define() for _ in range(AT_ONCE + 2)]
        starts = [asyncio.ensure_future(alice(machine, "Machine.Start", {}, {})) for machine in machines]
        assert await asyncio.to_thread(eventually, lambda: len(bed.broker.workers) == AT_ONCE)
        bed.broker.make_worker = lambda worker: None
        theirs = await bob.define()
        await bob(theirs, "Machine.Start", {}, {})
        assert await bob.state(theirs) == "running"
        assert len(bed.broker.workers) == AT_ONCE + 1
        assert await shown(alice, machines[-1]) == ("starting", "turn")
        await alice(machines[-1], "Machine.Kill")  # one that waits
        for machine in machines[:2]:
            await alice(machine, "Machine.Kill")
        await starts[-2]  # has its turn now
        assert await alice.state(machines[-2]) == "running"
        for machine in [*machines[2:-2], machines[-2]]:
            await alice(machine, "Machine.Kill")
        await bob(theirs, "Machine.Kill")
        ends = await asyncio.gather(*starts, return_exceptions=True)
        assert [isinstance(end, VmbusError) for end in ends] == [True] * AT_ONCE + [False, True]


@scenario
async def test_a_stuck_worker_shows_and_keeps_its_images(bed: Bed) -> None:
    image = str(bed.file())
    disks = [{"id": "d", "layers": [{"format": "raw", "path": image}]}]
    async with bed.caller() as alice:
        machine, other = await running(alice, disks=disks), await alice.define(disks=disks)
        bed.broker.stuck.add(uuid_of(machine))
        kill = asyncio.ensure_future(alice(machine, "Machine.Kill", timeout=60))
        await asyncio.sleep(0.3)
        assert await alice.state(machine) == "stopping"
        assert await alice.client.get(machine, "Machine", "StatusFlags") == ["stuck"]
        with pytest.raises(VmbusError) as caught:
            await alice(other, "Machine.Start", {}, {})
        assert caught.value.kind == "InUse"
        bed.broker.ended(uuid_of(machine))
        await kill
        assert await shown(alice, machine) == ("stopped", "killed")
        await alice(other, "Machine.Start", {}, {})


@scenario
async def test_after_kill_9_everything_is_shown_again_within_two_seconds(bed: Bed) -> None:
    image = str(bed.file())
    disks = [{"id": "d", "layers": [{"format": "raw", "path": image}]}]
    async with bed.caller() as alice:
        persistent = await running(alice, disks=disks)
        transient = await alice(ROOT, "Manager.CreateTransient", form(), {}, {})
        stopped = await alice.define(disks=disks)
        console = await alice(persistent, "Machine.OpenConsole", {})
    begin = time.monotonic()
    restart(bed)
    async with bed.caller() as alice:
        await alice.until(persistent, "running", within=2)
        await alice.until(transient, "running", within=2)
        assert time.monotonic() - begin < 4
        assert await alice(ROOT, "Manager.ListMachines") == [persistent, transient, stopped]
        with pytest.raises(VmbusError) as caught:  # claims are remembered
            await alice(stopped, "Machine.Start", {}, {})
        assert caught.value.kind == "InUse"
        assert os.read(console, 100) == b"login: "  # it goes past us
        os.close(console)
        await alice(persistent, "Machine.Pause")
        await alice(transient, "Machine.Kill")
        assert transient not in await alice(ROOT, "Manager.ListMachines")


@scenario
async def test_what_ended_while_vmbusd_was_away_is_shown(bed: Bed) -> None:
    async with bed.caller() as alice:
        spoke, silent = await running(alice), await running(alice)
        transient = await alice(ROOT, "Manager.CreateTransient", form(), {}, {})
    bed.system.service.kill()
    bed.broker.workers[uuid_of(spoke)].end("guest-poweroff")
    for machine in (silent, transient):
        bed.broker.ended(uuid_of(machine))
    bed.system.service.start()
    async with bed.caller() as alice:
        await alice.until(spoke, "stopped")
        await alice.until(silent, "crashed")
        assert await shown(alice, spoke) == ("stopped", "guest-poweroff")
        assert await shown(alice, silent) == ("crashed", "worker-lost")
        assert await alice(ROOT, "Manager.ListMachines") == [spoke, silent]
    assert eventually(lambda: uuid_of(transient) not in bed.broker.owners)
    assert not list((bed.system.run_dir / "service").iterdir())


@scenario
async def test_a_broker_that_comes_back_finds_machines_going_on(bed: Bed) -> None:
    async with bed.caller() as alice:
        goes_on, ends = await running(alice), await running(alice)
        bed.broker.stop()
        await alice(goes_on, "Machine.Pause")  # the worker is still ours
        worker = bed.broker.workers.pop(uuid_of(ends))
        worker.end("guest-poweroff")
        await alice.until(ends, "stopping")
        worker.close()
        bed.broker.start()
        await alice.until(ends, "stopped")
        assert await shown(alice, ends) == ("stopped", "guest-poweroff")
        assert await alice.state(goes_on) == "paused"
        assert "hello" in bed.broker.workers[uuid_of(goes_on)].asked


@scenario
async def test_vmbusd_and_broker_both_gone_and_back(bed: Bed) -> None:
    async with bed.caller() as alice:
        machine = await running(alice)
    bed.broker.stop()
    restart(bed)
    async with bed.caller() as alice:
        assert await shown(alice, machine) == ("stopping", "recovery")
        bed.broker.start()
        await alice.until(machine, "running", within=2)
        await alice(machine, "Machine.Shutdown")
        await alice.until(machine, "stopped")


@scenario
async def test_a_start_that_vmbusd_did_not_finish_is_undone_by_the_next_one(bed: Bed) -> None:
    def silent(worker: Any) -> None:
        worker.silent.add("configure")

    bed.broker.make_worker = silent
    async with bed.caller() as alice:
        machine = await alice.define()
        start = asyncio.ensure_future(alice(machine, "Machine.Start", {}, {}))
        assert await asyncio.to_thread(
            eventually, lambda: any("configure" in w.asked for w in bed.broker.workers.values())
        )
        restart(bed)
        start.cancel()
    async with bed.caller() as alice:
        await alice.until(machine, "stopped")
        assert await shown(alice, machine) == ("stopped", "start-failed")
        assert not bed.broker.workers


@scenario
async def test_a_worker_that_hangs_up_is_reached_again(bed: Bed) -> None:
    async with bed.caller() as alice:
        machine = await running(alice)
        worker = bed.broker.workers[uuid_of(machine)]
        worker.hang_up()
        await asyncio.sleep(0.05)
        worker.event("state", state="paused")
        await alice.until(machine, "paused")
        assert worker.asked.count("hello") == 2
        assert await alice.client.get(machine, "Machine", "StatusFlags") == []


@scenario
async def test_a_worker_that_breaks_the_protocol_loses_its_connection_and_sends_no_fd(bed: Bed) -> None:
    async with bed.caller() as alice:
        machine = await running(alice)
        before = bed.fds()
        worker = bed.broker.workers[uuid_of(machine)]
        for data in (b"\x80", b"garbage", b"\xff" * 70000):
            hellos = worker.asked.count("hello")
            with open("/etc/hostname", "rb") as file:
                worker.say_bytes(data[: 64 * 1024 + 1], [file.fileno()])
            assert await asyncio.to_thread(
                eventually,
                lambda n=hellos: worker.asked.count("hello") > n,  # type: ignore[misc]
            )
        await alice(machine, "Machine.Pause")
        assert await asyncio.to_thread(eventually, lambda: bed.fds() == before)


@scenario
async def test_events_come_at_least_once_and_are_acknowledged(bed: Bed) -> None:
    async with bed.caller() as alice:
        machine = await running(alice)
        worker = bed.broker.workers[uuid_of(machine)]
        assert await asyncio.to_thread(eventually, lambda: not worker.events)
        bed.system.service.kill()
        worker.enter("paused")
        assert len(worker.events) == 1
        bed.system.service.start()
    async with bed.caller() as alice:
        await alice.until(machine, "paused")
        assert await asyncio.to_thread(eventually, lambda: not worker.events)


@scenario
async def test_a_worker_that_talks_without_end_is_heard_slowly_and_in_order(bed: Bed) -> None:
    heard: list[str] = []

    def hear(interface: str, member: str, body: list[Any]) -> None:
        heard.append(member)

    async with bed.caller() as alice:
        machine = await running(alice)
        await alice(ROOT, "Manager.Subscribe")
        await alice.client.watch(machine, hear)
        worker = bed.broker.workers[uuid_of(machine)]

        def talk() -> None:
            for _ in range(50):
                worker.event("console")
            for _ in range(250):
                worker.event("reset")
            worker.enter("paused")

        begin = time.monotonic()
        await asyncio.to_thread(talk)
        await alice.until(machine, "paused")
        assert time.monotonic() - begin > 1.5  # 300 events at no more than a hundred a second
        assert heard.count("ConsoleActivity") == 1
        assert heard.count("GuestReset") == 250


@scenario
async def test_a_worker_of_another_version_is_driven_by_the_lifeline_alone(bed: Bed) -> None:
    async with bed.caller() as alice:
        machine = await running(alice)
        bed.broker.workers[uuid_of(machine)].version = 0
        restart(bed)
    async with bed.caller() as alice:
        await alice.until(machine, "running")
        assert await alice.client.get(machine, "Machine", "StatusFlags") == ["restricted"]
        with pytest.raises(VmbusError) as caught:
            await alice(machine, "Machine.GetStats")
        assert caught.value.kind == "Restricted"
        os.close(await alice(machine, "Machine.OpenConsole", {}))
        for method in ("Pause", "Resume", "Reset", "Shutdown"):
            await alice(machine, f"Machine.{method}")
        await alice.until(machine, "stopped")


@scenario
async def test_a_host_restart_is_a_crash_with_that_reason(bed: Bed) -> None:
    async with bed.caller() as alice:
        machine = await running(alice)
        state = bed.system.place / "state" / "machines" / f"{uuid_of(machine)}.json"
        assert await asyncio.to_thread(
            eventually, lambda: json.loads(state.read_text())["last"]["boot"] != ""
        )
    bed.system.service.kill()
    bed.broker.ended(uuid_of(machine))
    stored = json.loads(state.read_text())
    stored["last"]["boot"] = "another"
    state.write_text(json.dumps(stored))
    for file in (bed.system.run_dir / "service" / uuid_of(machine)).iterdir():
        file.unlink()
    (bed.system.run_dir / "service" / uuid_of(machine)).rmdir()
    bed.system.service.start()
    async with bed.caller() as alice:
        assert await shown(alice, machine) == ("crashed", "host-restarted")


@scenario
async def test_a_broken_stored_file_costs_that_machine_alone(bed: Bed) -> None:
    async with bed.caller() as alice:
        good, bad = await alice.define(), await alice.define()
    bed.system.service.kill()
    place = bed.system.place / "state" / "machines"
    (place / f"{uuid_of(bad)}.json").write_text('{"uuid": ')
    bed.system.service.start()
    async with bed.caller() as alice:
        assert await alice(ROOT, "Manager.ListMachines") == [good]
    assert f"{uuid_of(bad)}.json is passed over" in bed.system.logs()["service"]


@scenario
async def test_sigterm_ends_vmbusd_and_no_machine(bed: Bed) -> None:
    async with bed.caller() as alice:
        machine = await running(alice)
    bed.system.service.stop()
    assert bed.broker.workers[uuid_of(machine)].state == "running"
    bed.system.service.start()
    async with bed.caller(ALICE) as alice:
        await alice.until(machine, "running", within=2)
