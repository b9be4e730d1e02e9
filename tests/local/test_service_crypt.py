# SPDX-License-Identifier: Apache-2.0
"""A machine's encrypted disk: the passphrase comes with a start, goes to the worker, and stays nowhere."""

from __future__ import annotations

import os
import pwd
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.lab.system import ALICE, System
from tests.local.service_bed import ROOT, scenario
from tests.local.test_service_real import Stage, console_says
from vmbus import image
from vmbus.bus import Variant
from vmbus.wire.errors import VmbusError

pytestmark = pytest.mark.requires("root", "kvm")
PASSPHRASE = b"Zwiebelkuchen-41 und Federweisser"
MIB = 1 << 20


@pytest.fixture
def stage() -> Iterator[Stage]:
    with System() as system:
        yield Stage(system)


def encrypted(stage: Stage) -> Path:
    """An encrypted image of alice's."""
    path = stage.system.files(ALICE) / "disk.qcow2"
    image.create(str(path), size=4 * MIB, encrypt=image.Encryption(image.Secret(PASSPHRASE), iter_time=1))
    os.chown(path, pwd.getpwnam(ALICE).pw_uid, -1)
    path.chmod(0o600)
    return path


def disks(path: Path) -> list[dict[str, Any]]:
    return [{"id": "d", "layers": [{"format": "qcow2", "path": str(path), "encrypted": True}]}]


def memfd(content: bytes) -> int:
    """As vmbusctl makes it: written, the offset at its end."""
    fd = os.memfd_create("passphrase")
    os.write(fd, content)
    return fd


def holds(pid: int, wanted: bytes) -> bool:
    """Whether a process has these bytes anywhere in memory that it can write to."""
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        found = re.match(r"([0-9a-f]+)-([0-9a-f]+) rw.p", line)
        if found is None:
            continue
        start, end = (int(one, 16) for one in found.groups())
        with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
            for at in range(start, end, 16 * MIB):
                memory.seek(at)
                try:
                    if wanted in memory.read(min(16 * MIB, end - at)):
                        return True
                except OSError:
                    continue  # a guard page, or the guest's memory not there yet
    return False


@scenario
async def test_a_guest_uses_an_encrypted_disk_and_the_passphrase_stays_nowhere(stage: Stage) -> None:
    path = encrypted(stage)
    secret = memfd(PASSPHRASE)
    async with stage.caller() as alice:
        wanted = stage.guest("disk-pattern sector=100 count=8 seed=77", disks=disks(path))
        machine = await alice(ROOT, "Manager.DefineMachine", wanted)
        await alice(machine, "Machine.Start", {"paused": Variant("b", True)}, {"disk/d/0/secret": secret})
        os.close(secret)
        worker = await alice.client.get(machine, "Machine", "WorkerPid")
        for pid in (worker, stage.system.service.pid, stage.system.broker.pid):
            assert not holds(pid, PASSPHRASE)
        assert PASSPHRASE.decode() not in str(await alice.client.get_all(machine, "Machine"))
        console = await alice(machine, "Machine.OpenConsole", {})
        await alice(machine, "Machine.Resume")
        await console_says(console, "pattern: done, 8 sectors from 100")
        os.close(console)
        await alice.until(machine, "stopped", "crashed")
    for text in stage.system.logs().values():
        assert PASSPHRASE.decode() not in text
    for file in stage.system.place.rglob("*"):
        assert not file.is_file() or PASSPHRASE not in file.read_bytes(), file
    written = struct.pack("<64Q", *range(77 + 100 * 64, 77 + 101 * 64))
    with image.open(str(path), "qcow2", read_only=True, secrets=[image.Secret(PASSPHRASE)]) as disk:
        assert disk.read(100 * 512, 512) == written
    assert written[:32] not in path.read_bytes()


@scenario
async def test_without_its_passphrase_a_machine_does_not_start_and_nothing_is_left(stage: Stage) -> None:
    path = encrypted(stage)
    before = stage.system.counts()
    async with stage.caller() as alice:
        machine = await alice(ROOT, "Manager.DefineMachine", stage.guest("hello", disks=disks(path)))
        plain = [{"id": "d", "layers": [{"format": "qcow2", "path": str(path)}]}]
        lies = await alice(ROOT, "Manager.DefineMachine", stage.guest("hello", name="lies", disks=plain))
        cases = [
            (machine, {}, "InvalidArgument", "disk/d/0/secret"),
            (machine, {"disk/d/0/secret": memfd(b"wrong")}, "AccessDenied", "disk/d/0"),
            (machine, {"disk/d/0/secret": memfd(b"")}, "InvalidArgument", "disk/d/0/secret"),
            (machine, {"disk/d/0/secret": memfd(bytes(5000))}, "InvalidArgument", "disk/d/0/secret"),
            (machine, {"disk/d/1/secret": memfd(b"?")}, "InvalidArgument", "disk/d/1/secret"),
            (lies, {}, "InvalidArgument", "disk/d/0"),
            (lies, {"disk/d/0/secret": memfd(PASSPHRASE)}, "InvalidArgument", "disk/d/0/secret"),
        ]
        for which, files, kind, argument in cases:
            with pytest.raises(VmbusError) as refused:
                await alice(which, "Machine.Start", {}, files)
            assert refused.value.kind == kind
            assert str(refused.value).startswith(f"{argument}: "), refused.value
            for fd in files.values():
                os.close(fd)
        await alice(machine, "Machine.Undefine")
        await alice(lies, "Machine.Undefine")
    assert stage.system.settle(before) == before


def test_vmbusctl_finds_that_an_image_is_encrypted_and_takes_its_passphrase(stage: Stage) -> None:
    path = encrypted(stage)
    system = stage.system
    kernel, where = stage.kernel(), f"{path},format=qcow2"
    words = ("--name", "sealed", "--kernel", kernel, "--cmdline", "hello", "--memory", "64M", "--disk", where)
    defined = system.vmbusctl(ALICE, "define", *words)
    assert "(qcow2, encrypted)" in defined.stdout, defined
    for given, said in (
        ((), "disk/disk0/0/secret"),
        (("--secret", "disk/disk0/0"), "SLOT=PATH"),
        (("--secret", "disk/disk0/7=-"), "takes no passphrase"),
    ):
        refused = system.vmbusctl(ALICE, "start", "sealed", *given)
        assert refused.returncode and said in refused.stderr
    start = ("vmbusctl", "start", "sealed", "--secret", "disk/disk0/0=-")
    wrong = system.run_as(ALICE, start, stdin="wrong\n")
    assert wrong.returncode and "key slots" in wrong.stderr
    right = system.run_as(ALICE, start, stdin=PASSPHRASE.decode() + "\n")
    assert right.returncode == 0, right.stderr
