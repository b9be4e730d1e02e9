# SPDX-License-Identifier: Apache-2.0
"""The service with the real broker, real workers and bare-metal guests, as ordinary users see it."""

from __future__ import annotations

import asyncio
import os
import pwd
import re
import select
import shutil
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.lab.system import ALICE, BOB, SLOW, System
from tests.local import worker_guest
from tests.local.service_bed import ROOT, Caller, connect, form, scenario
from vmbus.bus import Variant
from vmbus.wire.errors import VmbusError

pytestmark = pytest.mark.requires("root", "kvm")


class Stage:
    """A whole system and what tests do with it."""

    def __init__(self, system: System) -> None:
        self.system = system

    @asynccontextmanager
    async def caller(self, user: str = ALICE) -> AsyncIterator[Caller]:
        """A connection of ``user``."""
        async with connect(self.system, user) as caller:
            yield caller

    def kernel(self, user: str = ALICE) -> str:
        """The user's own copy of the guests' ELF file."""
        return str(self._own(user, "guest", lambda path: shutil.copy(worker_guest.image(), path)))

    def disk(self, size: int = 1 << 20, user: str = ALICE) -> str:
        """An empty raw image, mode 0600."""
        name = f"disk-{len(list(self.system.files(user).iterdir()))}"
        return str(self._own(user, name, lambda path: os.truncate(path, size)))

    def _own(self, user: str, name: str, fill: Any) -> Path:
        path = self.system.files(user) / name
        path.touch()
        fill(path)
        os.chown(path, pwd.getpwnam(user).pw_uid, -1)
        path.chmod(0o600)
        return path

    def guest(self, mode: str, **changes: Any) -> dict[str, Any]:
        """A definition that boots the guest in a mode."""
        return form(kernel={"path": self.kernel(), "cmdline": mode}, **changes)


@pytest.fixture
def stage() -> Iterator[Stage]:
    with System() as system:
        yield Stage(system)


@pytest.fixture
def roomy() -> Iterator[Stage]:
    """The same, with room for many machines."""
    with System(policy='[quota]\nmemory = "4G"\nvcpus = 64\nmachines = 64\n') as system:
        yield Stage(system)


def read_until(console: int, wanted: str, within: float = 20) -> str:
    """What the console says, until ``wanted`` is in it."""
    said = ""
    deadline = time.monotonic() + within * SLOW
    while wanted not in said:
        left = deadline - time.monotonic()
        assert left > 0 and select.select([console], [], [], left)[0], f"no {wanted!r} in {said!r}"
        data = os.read(console, 65536)
        assert data, f"the console ended: {said!r}"
        said += data.decode(errors="replace")
    return said


async def console_says(console: int, wanted: str) -> str:
    return await asyncio.to_thread(read_until, console, wanted)


@scenario
async def test_a_guest_runs_from_its_owner_s_files(stage: Stage) -> None:
    before = stage.system.counts()
    async with stage.caller() as alice:
        machine = await alice(ROOT, "Manager.DefineMachine", stage.guest("hello"))
        await alice(machine, "Machine.Start", {"paused": Variant("b", True)}, {})
        assert await alice.state(machine) == "paused"
        console = await alice(machine, "Machine.OpenConsole", {})
        await alice(machine, "Machine.Resume")
        await console_says(console, "\n")
        os.close(console)
        await alice.until(machine, "stopped", "crashed")
        found = await alice.client.get_all(machine, "Machine")
        assert (found["State"], found["StateReason"]) == ("stopped", "guest-poweroff")
        await alice(machine, "Machine.Undefine")
    assert stage.system.settle(before) == before


@pytest.mark.long
@scenario
async def test_many_machines_start_and_end_at_once(roomy: Stage) -> None:
    before = roomy.system.counts()
    async with roomy.caller() as alice:
        machines = [
            await alice(ROOT, "Manager.DefineMachine", roomy.guest("idle", name=f"many{number}"))
            for number in range(24)
        ]
        for member in ("Machine.Start", "Machine.Kill", "Machine.Start", "Machine.Kill"):
            words: list[Any] = [{}, {}] if member == "Machine.Start" else []
            await asyncio.gather(*(alice(machine, member, *words) for machine in machines))
        for machine in machines:
            await alice(machine, "Machine.Undefine")
    assert roomy.system.settle(before) == before


@scenario
async def test_every_operation_on_a_running_guest(stage: Stage) -> None:
    async with stage.caller() as alice:
        machine = await alice(ROOT, "Manager.DefineMachine", stage.guest("wait-power-button"))
        await alice(machine, "Machine.Start", {}, {})
        stats = await alice(machine, "Machine.GetStats")
        assert stats["memory-pss"] > 1 << 20
        assert list(stats["vcpus"]) == ["0"]
        deadline = time.monotonic() + 5 * SLOW
        while not (await alice(machine, "Machine.GetStats"))["vcpus"]["0"]["exits"]:
            assert time.monotonic() < deadline
        pid = await alice.client.get(machine, "Machine", "WorkerPid")
        assert pid in stage.system.workers()
        await alice(machine, "Machine.Pause")
        assert await alice.state(machine) == "paused"
        await alice(machine, "Machine.Resume")
        assert await alice.state(machine) == "running"
        await alice(machine, "Machine.Shutdown")
        await alice.until(machine, "stopped")
        assert await alice.client.get(machine, "Machine", "StateReason") == "guest-poweroff"
        for ending, reason in (("Machine.Kill", "killed"), ("Machine.Stop", "stopped")):
            await alice(machine, "Machine.Start", {}, {})
            await alice(machine, ending, *([0] if ending == "Machine.Stop" else []))
            await alice.until(machine, "stopped")
            assert await alice.client.get(machine, "Machine", "StateReason") == reason


@scenario
async def test_a_transient_machine_on_passed_files_leaves_nothing(stage: Stage) -> None:
    before = stage.system.counts()
    async with stage.caller() as alice:
        definition = form(
            kernel={"source": "fd", "cmdline": "disk-pattern"},
            disks=[{"id": "d", "source": "fd", "layers": [{"format": "raw"}]}],
        )
        image = stage.disk()
        with open(stage.kernel(), "rb") as kernel, open(image, "r+b") as disk:
            files = {"kernel": kernel.fileno(), "disk/d/0": disk.fileno()}
            machine = await alice(ROOT, "Manager.CreateTransient", definition, files, {})
        for _ in range(500):
            if machine not in await alice(ROOT, "Manager.ListMachines"):
                break
            await asyncio.sleep(0.02)
        assert machine not in await alice(ROOT, "Manager.ListMachines")
        assert any(Path(image).read_bytes())
    assert stage.system.settle(before) == before


@pytest.mark.parametrize("victims", [("service",), ("broker",), ("service", "broker")])
@scenario
async def test_a_writing_guest_goes_on_when_daemons_are_killed(
    stage: Stage, victims: tuple[str, ...]
) -> None:
    disks = [{"id": "d", "layers": [{"format": "raw", "path": stage.disk()}]}]
    async with stage.caller() as alice:
        machine = await alice(ROOT, "Manager.DefineMachine", stage.guest("disk-loop", disks=disks))
        await alice(machine, "Machine.Start", {}, {})
        console = await alice(machine, "Machine.OpenConsole", {})
        await console_says(console, "\n")
    for name in victims:
        getattr(stage.system, name).kill()
    for name in reversed(victims):
        getattr(stage.system, name).start()
    async with stage.caller() as alice:
        await alice.until(machine, "running", within=2)
        os.read(console, 65536)
        await console_says(console, "\n")  # it has gone on, and the console with it
        again = await alice(machine, "Machine.OpenConsole", {"write": Variant("b", False)})
        history = await console_says(again, "\n")
        assert re.search(r"\d", history)
        for fd in (console, again):
            os.close(fd)
        deadline = time.monotonic() + 5 * SLOW
        while not (await alice(f"{ROOT}/host", "Host.GetCapabilities"))["broker"]:
            assert time.monotonic() < deadline
        with pytest.raises(VmbusError) as caught:
            other = await alice(ROOT, "Manager.DefineMachine", stage.guest("disk-loop", disks=disks))
            await alice(other, "Machine.Start", {}, {})
        assert caught.value.kind == "InUse"
        await alice(machine, "Machine.Stop", 0)
        await alice.until(machine, "stopped")
        assert await alice.client.get(machine, "Machine", "StateReason") == "stopped"


@scenario
async def test_an_end_while_both_daemons_are_away_is_shown(stage: Stage) -> None:
    async with stage.caller() as alice:
        machine = await alice(ROOT, "Manager.DefineMachine", stage.guest("echo"))
        await alice(machine, "Machine.Start", {}, {})
        pid = await alice.client.get(machine, "Machine", "WorkerPid")
    stage.system.service.kill()
    stage.system.broker.kill()
    os.kill(pid, 9)
    stage.system.broker.start()
    stage.system.service.start()
    async with stage.caller() as alice:
        await alice.until(machine, "crashed")
        assert await alice.client.get(machine, "Machine", "StateReason") == "worker-lost"
        await alice(machine, "Machine.Start", {}, {})


@pytest.mark.parametrize(
    ("changes", "kind", "argument"),
    [
        ({"kernel": {"path": "/etc/shadow"}}, "AccessDenied", "kernel"),
        ({"kernel": {"path": "{own}/nothing"}}, "NotFound", "kernel"),
        ({"kernel": {"path": "{own}/directory"}}, "InvalidArgument", "kernel"),
        ({"kernel": {"path": "{others}/secret"}}, "AccessDenied", "kernel"),
        ({"kernel": {"path": "{own}/link"}}, "AccessDenied", "kernel"),
    ],
)
@scenario
async def test_a_path_that_its_owner_may_not_use_is_refused_and_nothing_is_left(
    stage: Stage, changes: dict[str, Any], kind: str, argument: str
) -> None:
    (stage.system.files(BOB) / "secret").write_text("his")
    (stage.system.files(ALICE) / "directory").mkdir(mode=0o755)
    (stage.system.files(ALICE) / "link").symlink_to("/etc/hostname")
    path = changes["kernel"]["path"].format(own=stage.system.files(ALICE), others=stage.system.files(BOB))
    before = stage.system.counts()
    async with stage.caller() as alice:
        with pytest.raises(VmbusError) as caught:
            machine = await alice(ROOT, "Manager.DefineMachine", form(kernel={"path": path}))
            await alice(machine, "Machine.Start", {}, {})
        assert caught.value.kind == kind, caught.value
        assert str(caught.value).startswith(argument)
    assert stage.system.settle(before) == before


@scenario
async def test_a_hostile_image_is_refused_by_its_slot_and_nothing_is_left(stage: Stage) -> None:
    image = stage.disk(512)
    disks = [{"id": "d", "layers": [{"format": "qcow2", "path": image}]}]
    before = stage.system.counts()
    async with stage.caller() as alice:
        machine = await alice(ROOT, "Manager.DefineMachine", stage.guest("hello", disks=disks))
        with pytest.raises(VmbusError) as caught:
            await alice(machine, "Machine.Start", {}, {})
        assert caught.value.kind == "ImageInvalid"
        found = await alice.client.get_all(machine, "Machine")
        assert (found["State"], found["StateReason"]) == ("stopped", "start-failed")
    assert stage.system.settle(before) == before


@scenario
async def test_root_owns_no_machine(stage: Stage) -> None:
    async with stage.caller("root") as root:
        with pytest.raises(VmbusError) as caught:
            await root.define()
        assert caught.value.kind == "AccessDenied"
