# SPDX-License-Identifier: Apache-2.0
"""Machines saved to files and restored, as their owner sees it: by the bus and by vmbusctl."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import time
from typing import Any

import pytest

from tests.lab.system import ALICE, BOB, SLOW
from tests.local.service_bed import ROOT, Caller, scenario
from tests.local.test_service_real import Stage, console_says, stage
from vmbus.bus import Variant
from vmbus.wire.errors import VmbusError

__all__ = ["stage"]
pytestmark = [pytest.mark.requires("root", "kvm"), pytest.mark.long]

LOOP = "disk-loop sector=0 count=64 beat=50"


def options(**values: bool) -> dict[str, Any]:
    """The a{sv} of a method."""
    return {key.replace("_", "-"): Variant("b", value) for key, value in values.items()}


async def finish(alice: Caller, job: str) -> dict[str, Any]:
    """Wait for a job, whose result this is; raises as it failed."""
    while (state := await alice.client.get(job, "Job", "State")) == "running":
        await asyncio.sleep(0.02)
    if state != "done":
        error = str(await alice.client.get(job, "Job", "Error"))
        raise VmbusError(
            error.rpartition(".")[2] or "Cancelled", await alice.client.get(job, "Job", "Message")
        )
    return dict(await alice.client.get(job, "Job", "Result"))


async def save(alice: Caller, machine: str, file: int, **values: bool) -> dict[str, Any]:
    """Save it, and wait until it is done."""
    return await finish(alice, await alice(machine, "Machine.Save", file, options(**values)))


async def said(alice: Caller, machine: str, wanted: str) -> str:
    """What a console that is opened now says, history included, until ``wanted``."""
    console = await alice(machine, "Machine.OpenConsole", {})
    try:
        return await console_says(console, wanted)
    finally:
        os.close(console)


async def defined_looping(stage: Stage, alice: Caller) -> str:
    """A machine that, once it runs, writes to its disk all the time."""
    disks = [{"id": "root", "layers": [{"format": "raw", "path": stage.disk()}]}]
    return str(await alice(ROOT, "Manager.DefineMachine", stage.guest(LOOP, disks=disks)))


async def looping(stage: Stage, alice: Caller) -> str:
    """One that runs and has written."""
    machine = await defined_looping(stage, alice)
    await alice(machine, "Machine.Start", {}, {})
    await said(alice, machine, "loop: beat")
    return machine


async def saved_looping(stage: Stage, alice: Caller) -> tuple[str, int]:
    """One that was saved, and the file."""
    machine = await looping(stage, alice)
    file = os.memfd_create("saved")
    await save(alice, machine, file)
    return machine, file


@scenario
async def test_a_machine_goes_on_with_its_disk_after_it_was_saved(stage: Stage) -> None:
    before = stage.system.counts()
    async with stage.caller() as alice:
        machine, file = await saved_looping(stage, alice)
        found = await alice.client.get_all(machine, "Machine")
        assert (found["State"], found["StateReason"]) == ("stopped", "saved")
        assert os.fstat(file).st_size > 16 << 20
        assert os.fstat(file).st_blocks * 512 < 8 << 20

        await alice(machine, "Machine.Restore", file, {}, {})
        assert await alice.state(machine) == "running"
        assert "begins" not in await said(alice, machine, "loop: beat")
        await finish(alice, await alice(machine, "Machine.Stop", 0))
        # Its disk is not what it was.
        with pytest.raises(VmbusError) as caught:
            await alice(machine, "Machine.Restore", file, {}, {})
        assert caught.value.kind == "Changed"
        assert "disk/root" in str(caught.value)
        assert await alice.state(machine) == "stopped"
        anyway = options(changed_disks=True, paused=True)
        await alice(machine, "Machine.Restore", file, anyway, {})
        assert await alice.state(machine) == "paused"
        await alice(machine, "Machine.Resume")
        await said(alice, machine, "loop: beat")
        await alice(machine, "Machine.Kill")
        await alice(machine, "Machine.Undefine")
        os.close(file)
    assert stage.system.settle(before) == before


@scenario
async def test_what_cannot_be_saved_or_restored_has_a_name_and_changes_nothing(stage: Stage) -> None:
    before = stage.system.counts()
    async with stage.caller() as alice:
        machine = await looping(stage, alice)
        null, foreign = os.open("/dev/null", os.O_RDWR), os.memfd_create("foreign")
        os.write(foreign, b"no machine" * 1000)

        async def refused(method: str, *arguments: Any) -> str:
            with pytest.raises(VmbusError) as caught:
                job = await alice(machine, f"Machine.{method}", *arguments)
                await finish(alice, job)
            return caught.value.kind

        assert await refused("Save", null, options()) == "InvalidArgument"
        assert await refused("Save", foreign, options()) == "InvalidArgument"
        assert await refused("Save", foreign, options(colour=True)) == "InvalidArgument"
        assert await refused("Restore", foreign, {}, {}) == "InvalidState"
        await said(alice, machine, "loop: beat")
        await finish(alice, await alice(machine, "Machine.Stop", 0))
        assert await refused("Save", foreign, options()) == "InvalidState"
        assert await refused("Restore", null, {}, {}) == "InvalidArgument"
        assert await refused("Restore", foreign, {}, {}) == "ImageInvalid"
        assert await alice.client.get(machine, "Machine", "StateReason") == "start-failed"
        assert os.fstat(foreign).st_size == 10000
        async with stage.caller(BOB) as bob:
            with pytest.raises(VmbusError) as caught:
                await bob(machine, "Machine.Save", foreign, {})
            assert caught.value.kind == "NotAuthorized"
        await alice(machine, "Machine.Start", {}, {})
        await alice(machine, "Machine.Kill")
        await alice(machine, "Machine.Undefine")
        os.close(null)
        os.close(foreign)
    assert stage.system.settle(before) == before


@scenario
async def test_one_that_stays_goes_on_and_others_begin_where_it_was(stage: Stage) -> None:
    async with stage.caller() as alice:
        guest = stage.guest("flood")
        machine = await alice(ROOT, "Manager.DefineMachine", guest)
        await alice(machine, "Machine.Start", {}, {})
        await said(alice, machine, "line 5\n")
        file = os.memfd_create("saved")
        result = await save(alice, machine, file, keep=True)
        assert result["bytes"] == os.fstat(file).st_blocks * 512
        assert await alice.state(machine) == "running"
        twin = await alice(ROOT, "Manager.DefineMachine", stage.guest("flood"))
        await alice(twin, "Machine.Restore", file, {}, {})
        await said(alice, twin, "line ")
        for one in (machine, twin):
            await alice(one, "Machine.Kill")
        os.close(file)


@scenario
async def test_a_save_whose_caller_leaves_is_cancelled_and_the_machine_goes_on(stage: Stage) -> None:
    async with stage.caller() as alice:
        machine = await alice(ROOT, "Manager.DefineMachine", stage.guest("flood", memory=4 << 30))
        await alice(machine, "Machine.Start", {}, {})
        await said(alice, machine, "line 5\n")
        file = os.memfd_create("saved")
        async with stage.caller() as another:
            job = await another(machine, "Machine.Save", file, options())
        deadline = time.monotonic() + 30 * SLOW
        while await alice.client.get(job, "Job", "State") == "running":
            assert time.monotonic() < deadline
            await asyncio.sleep(0.02)
        assert await alice.client.get(job, "Job", "State") == "cancelled"
        await alice.until(machine, "running")
        assert os.fstat(file).st_size == 0
        await alice(machine, "Machine.Kill")
        os.close(file)


def test_vmbusctl_saves_under_a_name_or_not_at_all(stage: Stage) -> None:
    system, files = stage.system, stage.system.files(ALICE)
    kernel = stage.kernel()

    def vmbusctl(*words: str, fails: bool = False) -> str:
        done = system.run_as(ALICE, ["vmbusctl", *words], timeout=60 * SLOW)
        assert bool(done.returncode) == fails, done.stderr
        return done.stderr

    vmbusctl("define", "--name", "web", "--memory", "512M", "--kernel", kernel, "--cmdline", "flood")
    vmbusctl("start", "web")
    vmbusctl("save", "web", "web.saved")
    assert (files / "web.saved").stat().st_mode & 0o777 == 0o600
    vmbusctl("restore", "web", "web.saved")
    assert "exists" in vmbusctl("save", "web", "web.saved", fails=True)
    assert "does not exist" in vmbusctl("restore", "web", "none", fails=True)
    # Interrupted at some moment: either it was saved, or there is nothing and it runs.
    for moment in (0.0, 0.3, 0.4, 0.5):
        saving = system.popen(ALICE, ["vmbusctl", "save", "web", "again"], stderr=subprocess.PIPE)
        time.sleep(moment * SLOW)
        saving.send_signal(signal.SIGINT)
        saving.communicate(timeout=30 * SLOW)
        if (files / "again").exists():
            vmbusctl("restore", "web", "again")
            (files / "again").unlink()
        state = system.run_as(ALICE, ["vmbusctl", "list"]).stdout
        assert "running" in state, state
        assert [path.name for path in files.iterdir() if "again" in path.name] == []
    vmbusctl("kill", "web")
