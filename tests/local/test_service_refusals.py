# SPDX-License-Identifier: Apache-2.0
"""Everything that is refused, on a whole system: the named error with its argument, and nothing is left.

Each test leaves the descriptors and children of broker and service, workers, cgroups, taps, and every file
and directory of the instance's run and state directories as it found them.
"""

from __future__ import annotations

import os
import pwd
import shutil
import stat
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.lab.system import ALICE, BOB, SLOW, System
from tests.local import worker_guest
from tests.local.broker_fuse import Fuse
from tests.local.service_bed import ROOT, Caller, connect, form, scenario
from vmbus.bus import Variant
from vmbus.wire.definition import MEMORY_MOST
from vmbus.wire.errors import VmbusError

pytestmark = pytest.mark.requires("root", "kvm")

QUOTA = """
[quota]
memory = "64M"
vcpus = 2
machines = 2
"""


@pytest.fixture(scope="module")
def system() -> Iterator[System]:
    with System(policy=QUOTA) as made:
        own(made, "kernel", lambda path: shutil.copy(worker_guest.image(), path))
        yield made


@pytest.fixture(autouse=True)
def _nothing_is_left(system: System) -> Iterator[None]:
    before = everything(system)
    yield
    assert settled(system, before) == before


def everything(system: System) -> dict[str, Any]:
    """What a refusal must not change: the counts, and the names below the run and state directories."""
    places = [system.run_dir, system.place / "state", system.place / "state-broker"]
    names = sorted(str(path) for place in places for path in place.rglob("*"))
    # The next worker uid never used, and the root's mount point: they belong to no machine.
    return {**system.counts(), "names": [name for name in names if not name.endswith(("/next-uid", "/root"))]}


def settled(system: System, wanted: dict[str, Any]) -> dict[str, Any]:
    """``everything``, once it is as wanted or after ten seconds."""
    deadline = time.monotonic() + 10 * SLOW
    while (now := everything(system)) != wanted and time.monotonic() < deadline:
        time.sleep(0.05)
    return now


def own(system: System, name: str, fill: Callable[[Path], Any], user: str = ALICE) -> str:
    """A file of ``user``, mode 0600."""
    path = system.files(user) / name
    fill(path)
    account = pwd.getpwnam(user)
    os.chown(path, account.pw_uid, account.pw_gid, follow_symlinks=False)
    if not path.is_symlink():
        path.chmod(0o700 if path.is_dir() else 0o600)
    return str(path)


def qcow2(
    path: Path, *, size: int = 1 << 20, l1_at: int = 3 << 16, backing: bytes = b"", length: int = 4 << 16
) -> None:
    """A version 3 image (docs/interop/qcow2.txt of QEMU) of 64 KiB clusters: an empty disk."""
    header = struct.pack(
        ">4sIQIIQIIQQIIQQQQII",
        *(b"QFI\xfb", 3, 0x200 if backing else 0, len(backing), 16, size, 0, 1, l1_at, 1 << 16, 1, 0, 0),
        *(0, 0, 0, 4, 104),
    )
    image = bytearray(4 << 16)
    image[: len(header)] = header
    image[0x200 : 0x200 + len(backing)] = backing
    image[1 << 16 : (1 << 16) + 8] = struct.pack(">Q", 2 << 16)
    image[2 << 16 : (2 << 16) + 8] = struct.pack(">4H", 1, 1, 1, 1)
    path.write_bytes(image[:length])


async def refused(work: Any, kind: str, argument: str) -> str:
    with pytest.raises(VmbusError) as caught:
        await work
    text = str(caught.value)
    assert (caught.value.kind, text.partition(":")[0]) == (kind, argument), text
    assert "Traceback" not in text
    return text


async def start_refused(alice: Caller, kind: str, argument: str, **changes: Any) -> str:
    """Define, start in vain, undefine."""
    machine = await alice.define(**changes)
    try:
        text = await refused(alice(machine, "Machine.Start", {}, {}), kind, argument)
        found = await alice.client.get_all(machine, "Machine")
        assert (found["State"], found["StateReason"]) == ("stopped", "start-failed")
    finally:
        await alice(machine, "Machine.Undefine")
    return text


@pytest.mark.parametrize(
    ("change", "kind", "argument"),
    [
        ({"memory": Variant("t", 0)}, "InvalidArgument", "memory"),
        ({"memory": Variant("t", MEMORY_MOST + (1 << 20))}, "InvalidArgument", "memory"),
        ({"memory": Variant("t", 65 << 20)}, "QuotaExceeded", "memory"),
        ({"vcpus": Variant("u", 0)}, "InvalidArgument", "vcpus"),
        ({"vcpus": Variant("u", 1000)}, "InvalidArgument", "vcpus"),
        ({"vcpus": Variant("u", 3)}, "QuotaExceeded", "vcpus"),
        ({"name": Variant("s", "a/b")}, "InvalidArgument", "name"),
        ({"colour": Variant("s", "red")}, "InvalidArgument", "colour"),
        ({"memory": Variant("s", "64M")}, "InvalidArgument", "memory"),
        ({"machine-type": Variant("s", "vmbus-9")}, "InvalidArgument", "machine-type"),
        ({"machine-type": Variant("s", "vmbus-0")}, "NotSupported", "machine-type"),
    ],
)
@scenario
async def test_a_definition(system: System, change: dict[str, Any], kind: str, argument: str) -> None:
    async with connect(system, ALICE) as alice:
        bad = {**form(), **change}
        await refused(alice(ROOT, "Manager.DefineMachine", bad), kind, argument)
        await refused(alice(ROOT, "Manager.CreateTransient", bad, {}, {}), kind, argument)


@scenario
async def test_a_wrong_signature(system: System) -> None:
    async with connect(system, ALICE) as alice:
        call = alice.client.bus.call("org.vmbus1", ROOT, "org.vmbus1.Manager", "DefineMachine", "s", ["one"])
        with pytest.raises(VmbusError, match=r"takes .*definition a\{sv\}; not") as caught:
            await call
        assert caught.value.kind == "InvalidArgument"


def device(path: Path) -> None:
    os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 5))  # /dev/zero


@pytest.mark.parametrize(
    ("name", "fill", "kind"),
    [
        ("nothing", lambda path: None, "NotFound"),
        ("directory", Path.mkdir, "InvalidArgument"),
        ("device", device, "InvalidArgument"),
        ("pipe", os.mkfifo, "InvalidArgument"),
        ("link-out", lambda path: path.symlink_to("/etc/hostname"), "AccessDenied"),
        ("text", lambda path: path.write_text("#!/bin/sh\n"), "ImageInvalid"),
    ],
)
@scenario
async def test_a_kernel_that_is_none(
    system: System, name: str, fill: Callable[[Path], Any], kind: str
) -> None:
    path = str(system.files(ALICE) / name) if name == "nothing" else own(system, name, fill)
    async with connect(system, ALICE) as alice:
        await start_refused(alice, kind, "kernel", kernel={"path": path})


@scenario
async def test_a_path_that_the_caller_may_not_read(system: System) -> None:
    hers = own(system, "closed", lambda path: path.write_bytes(b"x"))
    os.chmod(hers, 0)
    his = own(system, "his", lambda path: path.write_bytes(b"x"), BOB)
    async with connect(system, ALICE) as alice:
        await start_refused(alice, "AccessDenied", "kernel", kernel={"path": hers})
        await refused(alice.define(kernel={"path": his}), "AccessDenied", "kernel")


@scenario
async def test_a_path_outside_the_granted_prefixes(system: System) -> None:
    async with connect(system, ALICE) as alice:
        await refused(alice.define(kernel={"path": "/etc/hostname"}), "AccessDenied", "kernel")


@pytest.mark.parametrize(
    ("name", "fill"),
    [
        ("empty", lambda path: path.write_bytes(b"")),
        ("short", lambda path: path.write_bytes(b"QFI\xfb\0\0\0\3")),
        ("header-alone", lambda path: qcow2(path, length=4096)),
        ("cut-in-its-table", lambda path: qcow2(path, length=(3 << 16) + 4)),
        ("far-table", lambda path: qcow2(path, l1_at=(1 << 60) + (1 << 16))),
        ("odd-table", lambda path: qcow2(path, l1_at=(3 << 16) + 512)),
        ("huge", lambda path: qcow2(path, size=(1 << 63))),
    ],
)
@scenario
async def test_a_truncated_or_hostile_image(system: System, name: str, fill: Callable[[Path], Any]) -> None:
    disk = {"id": "d", "layers": [{"format": "qcow2", "path": own(system, name, fill)}]}
    async with connect(system, ALICE) as alice:
        kernel = {"path": str(system.files(ALICE) / "kernel")}
        await start_refused(alice, "ImageInvalid", "disk/d/0", kernel=kernel, disks=[disk])


@scenario
async def test_a_header_whose_backing_name_is_not_the_recorded_one(system: System) -> None:
    overlay = own(system, "overlay", lambda path: qcow2(path, backing=b"base.raw"))
    base = own(system, "base.raw", lambda path: path.write_bytes(bytes(1 << 20)))
    layers = [
        {"format": "qcow2", "path": overlay, "backing-name": "base.raw"},
        {"format": "raw", "path": base},
    ]
    kernel = {"path": str(system.files(ALICE) / "kernel"), "cmdline": "hello"}
    async with connect(system, ALICE) as alice:
        machine = await alice.define(kernel=kernel, disks=[{"id": "d", "layers": layers}])
        await alice(machine, "Machine.Start", {}, {})  # as recorded
        await alice.until(machine, "stopped")
        qcow2(Path(overlay), backing=b"/etc/shadow")
        text = await refused(alice(machine, "Machine.Start", {}, {}), "BackingChanged", "disk/d/0")
        assert "/etc/shadow" in text and "base.raw" in text
        await alice(machine, "Machine.Undefine")


@scenario
async def test_a_duplicate_and_a_start_of_what_runs(system: System) -> None:
    kernel = {"path": str(system.files(ALICE) / "kernel"), "cmdline": "idle"}
    async with connect(system, ALICE) as alice:
        machine = await alice.define(name="twice", kernel=kernel)
        await refused(alice.define(name="twice"), "AlreadyExists", "name")
        await alice(machine, "Machine.Start", {}, {})
        before = everything(system)
        with pytest.raises(VmbusError) as caught:
            await alice(machine, "Machine.Start", {}, {})
        assert caught.value.kind == "InvalidState"
        assert everything(system) == before
        await alice(machine, "Machine.Kill")
        await alice.until(machine, "stopped")
        await alice(machine, "Machine.Undefine")


@scenario
async def test_without_polkitd_another_s_machine_and_without_a_broker_any(system: System) -> None:
    async with connect(system, ALICE) as alice, connect(system, BOB) as bob:
        kernel = {"path": str(system.files(ALICE) / "kernel")}
        machine = await alice.define(kernel=kernel)
        system.polkitd.kill()
        try:
            with pytest.raises(VmbusError) as caught:
                await bob(machine, "Machine.Start", {}, {})
            assert caught.value.kind == "Unavailable"
        finally:
            system.polkitd.start()
        system.broker.kill()
        try:
            for call in (alice.define(kernel=kernel), alice(machine, "Machine.Start", {}, {})):
                with pytest.raises(VmbusError) as caught:
                    await call
                assert caught.value.kind == "Unavailable"
            assert await alice(ROOT, "Manager.ListMachines") == [machine]
        finally:
            system.broker.start()
        deadline = time.monotonic() + 5 * SLOW
        while not (await alice("/org/vmbus1/host", "Host.GetCapabilities"))["broker"]:
            assert time.monotonic() < deadline
        await alice(machine, "Machine.Undefine")


def test_the_image_of_these_tests_is_sound(system: System, tmp_path: Path) -> None:
    """What is refused above is refused for its one mistake."""
    qcow2(tmp_path / "sound")
    done = subprocess.run(["qemu-img", "check", "-f", "qcow2", tmp_path / "sound"], check=False)
    assert done.returncode == 0


@pytest.fixture
def fuse_system() -> Iterator[tuple[System, Fuse]]:
    """A system in which alice has a FUSE file system whose server never answers."""
    made = System()
    place = made.files(ALICE) / "fuse"
    place.mkdir()
    fuse = Fuse(place, silent=True, owner=pwd.getpwnam(ALICE).pw_uid)
    try:
        with made:
            try:
                yield made, fuse
            finally:
                fuse.close()  # or whoever walks its directories at the end hangs
    finally:
        fuse.close()
        subprocess.run(["umount", "-l", place], check=True)
        shutil.rmtree(made.place)


@pytest.mark.requires("fuse")
@scenario
async def test_a_path_to_a_fuse_file_whose_server_never_answers(fuse_system: tuple[System, Fuse]) -> None:
    system, fuse = fuse_system
    own(system, "kernel", lambda path: shutil.copy(worker_guest.image(), path))
    before = everything(system)
    async with connect(system, ALICE) as alice:
        began = time.monotonic()
        text = await start_refused(alice, "AccessDenied", "kernel", kernel={"path": str(fuse.place / "disk")})
        assert "FUSE" in text
        kernel = {"path": str(system.files(ALICE) / "kernel"), "cmdline": "hello"}
        machine = await alice.define(kernel=kernel)
        await alice(machine, "Machine.Start", {}, {})
        await alice.until(machine, "stopped")
        await alice(machine, "Machine.Undefine")
        assert time.monotonic() - began < 10 * SLOW
    assert fuse.asked() == b""
    assert settled(system, before) == before
