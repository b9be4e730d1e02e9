# SPDX-License-Identifier: Apache-2.0
"""Snapshots of whole machines, as their owner sees them: by the bus and by vmbusctl."""

from __future__ import annotations

import asyncio
import os
import pwd
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.lab.system import ALICE, BOB, System
from tests.local.ctl_bed import ctl, refused
from tests.local.service_bed import ROOT, Caller, scenario, uuid_of
from tests.local.test_save import finish, options, said
from tests.local.test_service_real import Stage, read_until, stage
from vmbus import image
from vmbus.cli.snapshots import tree
from vmbus.wire.errors import VmbusError

__all__ = ["stage"]
pytestmark = [pytest.mark.requires("root", "kvm"), pytest.mark.long]

LOOP = "disk-loop sector=0 count=64 beat=50"
BEAT = re.compile(r"loop: beat (\d+)\n")


def qcow2(system: System, name: str, user: str = ALICE) -> str:
    """An empty qcow2 image of 1 MiB, the user's."""
    path = system.files(user) / name
    done = system.run_as(user, ["vmbus-img", "create", "-q", "-f", "qcow2", str(path), "1M"])
    assert done.returncode == 0, done.stderr
    return str(path)


def internal(path: str) -> list[str]:
    """The names of an image's internal snapshots."""
    with image.open(path, "qcow2", read_only=True, locks=False) as one:
        return [snapshot["name"] for snapshot in one.snapshots()]


def newest(path: str, snapshot: str) -> int:
    """The highest number that the guest had written when an internal snapshot was taken."""
    with image.open(path, "qcow2", read_only=True, locks=False, snapshot=snapshot) as one:
        words = [one.read(sector * 512, 8) for sector in range(64)]
    return max(int.from_bytes(word, "little") for word in words)


def kept(system: System, machine: str) -> list[str]:
    """The files of memory that the service has of a machine's snapshots."""
    directory = system.place / "state" / "snapshots" / uuid_of(machine)
    return [path.name for path in directory.glob("*") if path.name != "index.json"]


async def looping(stage: Stage, alice: Caller, **disks: str) -> str:
    """A machine that writes to its first disk all the time; ``disks``: id and path, of qcow2 images."""
    given = [
        {"id": name, "layers": [{"format": "raw" if "raw" in path else "qcow2", "path": path}]}
        for name, path in disks.items()
    ]
    machine: str = await alice(ROOT, "Manager.DefineMachine", stage.guest(LOOP, disks=given))
    await alice(machine, "Machine.Start", {}, {})
    await said(alice, machine, "loop: beat")
    return machine


async def create(alice: Caller, machine: str, name: str) -> None:
    await finish(alice, await alice(machine, "Machine.CreateSnapshot", name, options()))


async def listed(alice: Caller, machine: str) -> list[tuple[str, str, bool]]:
    """Name, parent, whether it is current."""
    found = await alice(machine, "Machine.ListSnapshots")
    return [(one["name"], one["parent"], one["current"]) for one in found]


async def beyond(alice: Caller, machine: str, least: int) -> None:
    """Wait until the guest says that it has written more than so many sectors."""
    console = await alice(machine, "Machine.OpenConsole", {})
    try:
        text = ""
        while max((int(number) for number in BEAT.findall(text)), default=0) <= least:
            text += await asyncio.to_thread(read_until, console, "\n")
    finally:
        os.close(console)


@scenario
async def test_a_machine_goes_back_with_its_disks_and_its_snapshots_are_a_tree(stage: Stage) -> None:
    before = stage.system.counts()
    root, data = qcow2(stage.system, "root.qcow2"), qcow2(stage.system, "data.qcow2")
    async with stage.caller() as alice:
        machine = await looping(stage, alice, root=root, data=data)
        await create(alice, machine, "one")
        assert await alice.state(machine) == "running"
        [one] = internal(root)
        then = newest(root, one)
        await beyond(alice, machine, then + 100)
        await create(alice, machine, "two")
        await beyond(alice, machine, then + 200)
        assert len(internal(root)) == len(internal(data)) == len(kept(stage.system, machine)) == 2

        await alice(machine, "Machine.RevertToSnapshot", "one", options(paused=True), {})
        assert await alice.state(machine) == "paused"
        assert len(internal(root)) == len(internal(data)) == 2, "nothing is left of what was aside"
        await alice(machine, "Machine.Resume")
        # It goes on in the middle of its loop, where it was.
        text = await said(alice, machine, "loop: beat")
        assert "begins" not in text
        first = int(BEAT.findall(text)[0])
        assert then - 64 < first <= then + 50
        await create(alice, machine, "three")
        assert await listed(alice, machine) == [
            ("one", "", False),
            ("two", "one", False),
            ("three", "one", True),
        ]
        found = await alice(machine, "Machine.ListSnapshots")
        assert tree(found) == ["one", "├── two", "└── three *"]
        assert all(0 < one["memory"] < 8 << 20 for one in found)

        await finish(alice, await alice(machine, "Machine.DeleteSnapshot", "one", {}))
        assert await listed(alice, machine) == [("two", "", False), ("three", "", True)]
        await finish(alice, await alice(machine, "Machine.Stop", 0))
        await finish(alice, await alice(machine, "Machine.DeleteSnapshot", "three", {}))
        assert await alice.state(machine) == "stopped"
        assert await listed(alice, machine) == [("two", "", False)]
        await alice(machine, "Machine.RevertToSnapshot", "two", {}, {})
        await beyond(alice, machine, 0)
        assert await listed(alice, machine) == [("two", "", True)]
        await finish(alice, await alice(machine, "Machine.DeleteSnapshot", "two", {}))
        assert internal(root) == internal(data) == kept(stage.system, machine) == []
        await alice(machine, "Machine.Kill")
        await alice(machine, "Machine.Undefine")
    assert stage.system.settle(before) == before
    assert list((stage.system.place / "state" / "snapshots").iterdir()) == []


@scenario
async def test_what_cannot_be_has_a_name_and_leaves_nothing(stage: Stage) -> None:
    system = stage.system
    root, raw = qcow2(system, "root.qcow2"), stage.disk()
    raw = str(Path(raw).rename(Path(raw).with_name("data.raw")))
    async with stage.caller() as alice:
        machine = await looping(stage, alice, root=root, data=raw)

        async def said_no(method: str, *arguments: Any, caller: Caller = alice) -> VmbusError:
            with pytest.raises(VmbusError) as caught:
                job = await caller(machine, f"Machine.{method}", *arguments)
                await finish(caller, job)
            return caught.value

        error = await said_no("CreateSnapshot", "one", options())
        assert (error.kind, "disk/data" in str(error)) == ("NotSupported", True)
        assert (
            await said_no("CreateSnapshot", "one", {})
        ).kind == "NotSupported"  # a type that is not frozen
        for name in ("", "-one", "a/b", "x" * 64, "one\n"):
            assert (await said_no("CreateSnapshot", name, options())).kind == "InvalidArgument", name
        assert (await said_no("CreateSnapshot", "one", options(colour=True))).kind == "InvalidArgument"
        assert (await said_no("RevertToSnapshot", "one", {}, {})).kind == "NotFound"
        assert (await said_no("DeleteSnapshot", "one", {})).kind == "NotFound"
        await said(alice, machine, "loop: beat")
        assert internal(root) == kept(system, machine) == []
        async with stage.caller(BOB) as bob:
            for method, rest in (
                ("CreateSnapshot", [options()]),
                ("RevertToSnapshot", [{}, {}]),
                ("DeleteSnapshot", [{}]),
            ):
                assert (await said_no(method, "one", *rest, caller=bob)).kind == "NotAuthorized"
            with pytest.raises(VmbusError):
                await bob(machine, "Machine.ListSnapshots")
        await finish(alice, await alice(machine, "Machine.Stop", 0))
        assert (await said_no("CreateSnapshot", "one", options())).kind == "InvalidState"
        await alice(machine, "Machine.Undefine")


async def start_again(alice: Caller, machine: str) -> None:
    """Start it after its worker was killed: the kernel closes files that were in its io_uring later."""
    while True:
        try:
            await alice(machine, "Machine.Start", {}, {})
            return
        except VmbusError as error:
            if error.kind != "InUse":
                raise
            await asyncio.sleep(0.1)


@scenario
async def test_a_worker_that_is_killed_in_the_middle_leaves_nothing(stage: Stage) -> None:
    system = stage.system
    root = qcow2(system, "root.qcow2")
    async with stage.caller() as alice:
        disks = [{"id": "root", "layers": [{"format": "qcow2", "path": root}]}]
        guest = stage.guest(LOOP, disks=disks, memory=2 << 30)
        machine = await alice(ROOT, "Manager.DefineMachine", guest)
        # Before it has begun, and at some moment: then there is all of the snapshot or nothing.
        for moment in (-1.0, 0.0, 0.1, 0.2):
            await start_again(alice, machine)
            await said(alice, machine, "loop: beat")
            pid = await alice.client.get(machine, "Machine", "WorkerPid")
            if moment < 0:
                os.kill(pid, signal.SIGSTOP)
            job = await alice(machine, "Machine.CreateSnapshot", f"at{moment}", options())
            await asyncio.sleep(max(moment, 0))
            os.kill(pid, signal.SIGKILL)
            await alice.until(machine, "crashed")
            try:
                await finish(alice, job)
                taken = 1
            except VmbusError:
                taken = 0
            assert moment >= 0 or taken == 0
            assert len(await listed(alice, machine)) == len(kept(system, machine)) == taken
            await start_again(alice, machine)
            assert len(internal(root)) == taken
            if taken:
                await finish(alice, await alice(machine, "Machine.DeleteSnapshot", f"at{moment}", {}))
            await alice(machine, "Machine.Kill")


@scenario
async def test_what_a_crash_has_left_on_the_disks_goes_at_the_next_start(stage: Stage) -> None:
    system = stage.system
    root, data = qcow2(system, "root.qcow2"), qcow2(system, "data.qcow2")
    async with stage.caller() as alice:
        machine = await looping(stage, alice, root=root, data=data)
        await create(alice, machine, "one")
        await finish(alice, await alice(machine, "Machine.Stop", 0))
    # One disk has a snapshot that was to be; a way back was broken off, for which both had one aside.
    for path, name in ((root, "vmbus-halves"), (root, "vmbus-aside"), (data, "vmbus-aside")):
        assert system.run_as(ALICE, ["vmbus-img", "snapshot", "-c", name, path]).returncode == 0
    [one] = [name for name in internal(data) if name not in ("vmbus-halves", "vmbus-aside")]
    assert system.run_as(ALICE, ["vmbus-img", "snapshot", "-a", one, root]).returncode == 0
    directory = system.place / "state" / "snapshots" / uuid_of(machine)
    system.service.stop()
    text = (directory / "index.json").read_text()
    assert '"undo": []' in text
    text = text.replace('"undo": []', '"undo": ["vmbus-aside"]').replace(
        '"drop": []', '"drop": ["vmbus-halves"]'
    )
    (directory / "index.json").write_text(text)
    (directory / "halves").write_bytes(b"half of a machine")
    system.service.start()
    async with stage.caller() as alice:
        assert await listed(alice, machine) == [("one", "", True)]
        assert kept(system, machine) == [one.removeprefix("vmbus-")]
        await alice(machine, "Machine.Start", options(paused=True), {})
        assert internal(root) == internal(data) == [one]
        await alice(machine, "Machine.RevertToSnapshot", "one", {}, {})
        await said(alice, machine, "loop: beat")
        await alice(machine, "Machine.Kill")


@scenario
async def test_a_snapshot_does_not_wait_for_whoever_asked_for_it(stage: Stage) -> None:
    root = qcow2(stage.system, "root.qcow2")
    async with stage.caller() as alice:
        machine = await looping(stage, alice, root=root)
        async with stage.caller() as another:
            await another(machine, "Machine.CreateSnapshot", "one", options())
        while await listed(alice, machine) != [("one", "", True)]:
            await asyncio.sleep(0.02)
        await alice(machine, "Machine.Kill")


def test_vmbusctl_takes_lists_and_deletes_snapshots(stage: Stage) -> None:
    system = stage.system
    root = qcow2(system, "root.qcow2")
    words = ["--name", "web", "--memory", "16M", "--kernel", stage.kernel(), "--cmdline", LOOP]
    ctl(system, "define", *words, "--disk", f"{root},format=qcow2")
    ctl(system, "start", "web")
    ctl(system, "snapshot", "create", "web", "one")
    ctl(system, "snapshot", "create", "web", "two")
    assert "'two'" in refused(system, "snapshot", "create", "web", "two")
    assert "NAME" in refused(system, "snapshot", "create", "web")
    assert "NAME" in refused(system, "snapshot", "list", "web", "one")
    ctl(system, "snapshot", "revert", "web", "one")
    assert ctl(system, "snapshot", "tree", "web") == "one *\n└── two\n"
    assert '"name": "two"' in ctl(system, "snapshot", "list", "web", "--json")
    ctl(system, "snapshot", "delete", "web", "one")
    assert ctl(system, "snapshot", "tree", "web") == "two\n"
    assert pwd.getpwnam(ALICE).pw_uid == os.stat(root).st_uid
    ctl(system, "kill", "web")
    ctl(system, "undefine", "web")


def test_the_memory_of_an_owner_s_snapshots_has_a_quota() -> None:
    with System(config="[snapshots]\nmost = 16\n") as system:
        stage = Stage(system)
        words = ["--memory", "16M", "--kernel", stage.kernel(), "--cmdline", "echo"]
        for name in ("web", "mail"):
            ctl(system, "define", "--name", name, *words)
            ctl(system, "start", name)
        ctl(system, "snapshot", "create", "web", "one")
        assert "allowed" in refused(system, "snapshot", "create", "web", "two")
        assert "allowed" in refused(system, "snapshot", "create", "mail", "one")
        ctl(system, "snapshot", "delete", "web", "one")
        ctl(system, "snapshot", "create", "mail", "one")
