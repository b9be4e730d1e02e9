# SPDX-License-Identifier: Apache-2.0
"""Instant clones, as their owner sees them: by the bus and by vmbusctl."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest

from tests.lab.bridge import granted
from tests.lab.system import BOB, System
from tests.local.ctl_bed import ctl, place_guest, refused
from tests.local.service_bed import ROOT, Caller, scenario
from tests.local.test_save import defined_looping, finish, options, said, save, saved_looping
from tests.local.test_service_real import Stage, stage
from vmbus.wire.errors import VmbusError

__all__ = ["stage"]
pytestmark = [pytest.mark.requires("root", "kvm"), pytest.mark.long]

NIC = {"id": "lan", "kind": "isolated", "network": "lab", "mac": "52:54:00:00:00:07"}


async def template(alice: Caller, name: str, file: int) -> None:
    await finish(alice, await alice(ROOT, "Manager.ImportTemplate", name, file))


async def flooding(stage: Stage, alice: Caller) -> tuple[str, int]:
    """A machine that was saved amid its lines, and the file; it is the template ``flood``."""
    machine: str = await alice(ROOT, "Manager.DefineMachine", stage.guest("flood"))
    await alice(machine, "Machine.Start", {}, {})
    await said(alice, machine, "line 5\n")
    file = os.memfd_create("saved")
    await save(alice, machine, file)
    await template(alice, "flood", file)
    return machine, file


def kept(system: System) -> list[str]:
    """What the service has of templates."""
    found = (system.place / "state" / "templates").iterdir()
    return [path.name for path in found if path.name != "index.json"]


def mapping(system: System, machine: str, pid: int) -> list[str]:
    """The permissions of the worker's mappings of a template."""
    with open(f"/proc/{pid}/maps") as maps:
        return [line.split()[1] for line in maps if "/templates/" in line]


@scenario
async def test_machines_begin_as_a_template_whatever_becomes_of_it(stage: Stage) -> None:
    before = stage.system.counts()
    async with stage.caller() as alice:
        machine, file = await saved_looping(stage, alice)
        await template(alice, "loop", file)
        [listed] = await alice(ROOT, "Manager.ListTemplates")
        assert (listed["name"], 0 < listed["size"] < 8 << 20) == ("loop", True)
        [path] = [stage.system.place / "state" / "templates" / name for name in kept(stage.system)]
        assert path.stat().st_mode & 0o777 == 0o400
        content = path.read_bytes()
        # What the caller has is not what vmbus has.
        os.ftruncate(file, 0)
        os.close(file)
        clones = []
        for _ in range(2):
            clone = await defined_looping(stage, alice)
            await alice(clone, "Machine.Clone", "loop", options(paused=True), {})
            assert await alice.state(clone) == "paused"
            pid = await alice.client.get(clone, "Machine", "WorkerPid")
            assert mapping(stage.system, clone, pid) == ["rw-p"]
            clones.append(clone)
        await alice(ROOT, "Manager.DeleteTemplate", "loop")
        assert kept(stage.system) == []
        for clone in clones:
            await alice(clone, "Machine.Resume")
            assert "begins" not in await said(alice, clone, "loop: beat")
        # One is saved like any machine, and goes on from that.
        again = os.memfd_create("again")
        await save(alice, clones[0], again)
        await alice(clones[0], "Machine.Restore", again, {}, {})
        await said(alice, clones[0], "loop: beat")
        memory = await alice(clones[1], "Machine.GetMemory")
        assert memory["resident"] > 0 and memory["overhead"] < 64 << 20
        os.close(again)
        assert len(content) > 16 << 20
        for one in (machine, *clones):
            if await alice.state(one) == "running":
                await alice(one, "Machine.Kill")
            await alice(one, "Machine.Undefine")
    assert stage.system.settle(before) == before


@scenario
async def test_what_cannot_be_cloned_has_a_name_and_changes_nothing(stage: Stage) -> None:
    async with stage.caller() as alice, stage.caller(BOB) as bob:
        machine, file = await flooding(stage, alice)
        foreign = os.memfd_create("foreign")
        os.write(foreign, b"no machine" * 1000)
        await template(alice, "foreign", foreign)

        async def said_no(caller: Caller, path: str, method: str, *arguments: Any) -> str:
            with pytest.raises(VmbusError) as caught:
                job = await caller(path, method, *arguments)
                if isinstance(job, str):
                    await finish(caller, job)
            return caught.value.kind

        assert await said_no(alice, ROOT, "Manager.ImportTemplate", "flood", file) == "AlreadyExists"
        assert await said_no(alice, ROOT, "Manager.ImportTemplate", "a/b", file) == "InvalidArgument"
        null = os.open("/dev/null", os.O_RDWR)
        assert await said_no(alice, ROOT, "Manager.ImportTemplate", "null", null) == "InvalidArgument"
        os.close(null)
        assert await said_no(alice, ROOT, "Manager.DeleteTemplate", "none") == "NotFound"
        assert await said_no(alice, machine, "Machine.Clone", "foreign", {}, {}) == "ImageInvalid"
        assert await said_no(alice, machine, "Machine.Clone", "none", {}, {}) == "NotFound"
        for change, kind in (
            ({"memory": 17 << 20}, "InvalidArgument"),
            ({"rng": False}, "InvalidArgument"),
            ({"memory_kind": "shareable"}, "NotSupported"),
        ):
            other = await alice(ROOT, "Manager.DefineMachine", stage.guest("flood", **change))
            assert await said_no(alice, other, "Machine.Clone", "flood", {}, {}) == kind, change
            assert await alice.state(other) == "stopped"
        # Another user's templates are not there.
        assert await bob(ROOT, "Manager.ListTemplates") == []
        assert await said_no(bob, ROOT, "Manager.DeleteTemplate", "flood") == "NotFound"
        assert await said_no(bob, machine, "Machine.Clone", "flood", {}, {}) == "NotAuthorized"
        await alice(machine, "Machine.Clone", "flood", {}, {})
        await said(alice, machine, "line ")
        assert await said_no(alice, machine, "Machine.Clone", "flood", {}, {}) == "InvalidState"
        assert len(kept(stage.system)) == 2
        await alice(machine, "Machine.Kill")
        os.close(file)
        os.close(foreign)


@scenario
async def test_a_restarted_service_has_its_templates_and_nothing_half_made(stage: Stage) -> None:
    system = stage.system
    async with stage.caller() as alice:
        machine, file = await flooding(stage, alice)
        os.close(file)
    [known] = kept(system)
    system.service.stop()
    (system.place / "state" / "templates" / "half").write_bytes(b"half of a machine")
    system.service.start()
    assert kept(system) == [known]
    async with stage.caller() as alice:
        await alice(machine, "Machine.Clone", "flood", {}, {})
        await said(alice, machine, "line ")
        await alice(machine, "Machine.Kill")


@pytest.mark.requires("tap", "bridge")
def test_the_cables_of_a_clone_on_a_bridge_are_pulled() -> None:
    name = f"vmbc{os.getpid() % 10000}"
    with granted(name) as system:
        kernel = place_guest(system)
        words = ["--memory", "16M", "--kernel", str(kernel), "--cmdline", "flood"]
        words += ["--nic", f"{name},id=lan,mac=52:54:00:00:00:07"]
        words += ["--nic", "kind=isolated,network=own,id=own,mac=52:54:00:00:00:08"]
        ctl(system, "define", "--name", "web", *words)
        ctl(system, "start", "web")
        ctl(system, "save", "web", "web.saved")
        ctl(system, "template", "import", "worker", "web.saved")
        ctl(system, "clone", "web", "worker")
        assert carriers(system) == {"lan": False, "own": True}
        ctl(system, "set-link", "web", "lan", "up")
        assert carriers(system) == {"lan": True, "own": True}
        # Its twin has the same address.
        ctl(system, "define", "--name", "twin", *words)
        assert "52:54:00:00:00:07" in refused(system, "clone", "twin", "worker")
        assert carriers(system, "twin") == {"lan": True, "own": True}, "it is no clone"
        ctl(system, "kill", "web")
        ctl(system, "clone", "twin", "worker")
        ctl(system, "kill", "twin")


def carriers(system: System, name: str = "web") -> dict[str, bool]:
    """What a definition says of its cables."""
    nics = json.loads(ctl(system, "show", name, "--json"))["definition"]["nics"]
    return {nic["id"]: nic.get("carrier", True) for nic in nics}


def test_vmbusctl_imports_templates_and_starts_clones(stage: Stage) -> None:
    system = stage.system
    words = ["--memory", "16M", "--kernel", stage.kernel(), "--cmdline", "flood"]
    ctl(system, "define", "--name", "web", *words)
    ctl(system, "start", "web")
    ctl(system, "save", "web", "web.saved")
    ctl(system, "template", "import", "worker", "web.saved")
    assert "worker" in ctl(system, "template", "list")
    assert '"name": "worker"' in ctl(system, "template", "list", "--json")
    assert "FILE" in refused(system, "template", "import", "worker")
    assert "No such file" in refused(system, "template", "import", "other", "none.saved")
    for name in ("web-1", "web-2"):
        ctl(system, "define", "--name", name, *words)
        ctl(system, "clone", name, "worker")
    ctl(system, "template", "delete", "worker")
    assert "'worker'" in refused(system, "clone", "web", "worker")
    assert ctl(system, "template", "list") == ""
    for name in ("web-1", "web-2"):
        ctl(system, "kill", name)
        ctl(system, "undefine", name)
