# SPDX-License-Identifier: Apache-2.0
"""Disks and CD-ROM drives on the SCSI host adapter, through the whole system.

The guest is the bare-metal one in mode ``scsi``: it says what its targets are and what becomes of the media.
"""

from __future__ import annotations

import json
import os
import pwd
from pathlib import Path
from typing import Any

import pytest

from tests.lab.guest import Console
from tests.lab.system import ALICE, BOB, System
from tests.local.ctl_bed import ctl, nothing_is_left, refused, system

__all__ = ["nothing_is_left", "system"]
pytestmark = [pytest.mark.requires("root", "kvm"), pytest.mark.long]

NAME = "scsi"
FIRST = 16 * 2048
"""Where the guest reads from a medium."""


def image(system: System, name: str, mark: bytes = b"") -> Path:
    """A file of alice's, 1 MiB, with ``mark`` where the guest reads."""
    path = system.files(ALICE) / name
    content = bytearray(1 << 20)
    content[FIRST : FIRST + len(mark)] = mark
    path.write_bytes(content)
    os.chown(path, pwd.getpwnam(ALICE).pw_uid, -1)
    path.chmod(0o600)
    return path


def define(system: System, *disks: str, mode: str = "scsi") -> None:
    kernel = str(system.files(ALICE) / "guest")
    words = ["--memory", "16M", "--kernel", kernel, "--cmdline", mode]
    for disk in disks:
        words += ["--disk", disk]
    ctl(system, "define", "--name", NAME, *words)


def started(system: System) -> Console:
    ctl(system, "start", NAME)
    return Console(system, ALICE, NAME, "--read-only")


def drive(system: System) -> dict[str, Any]:
    """The drive in the definition."""
    disks = json.loads(ctl(system, "show", NAME, "--json"))["definition"]["disks"]
    found: dict[str, Any] = next(disk for disk in disks if disk["cdrom"])
    return found


def test_disks_on_the_bus_are_written_and_grow(system: System) -> None:
    data = image(system, "data.img")
    define(system, f"{data},format=raw,bus=scsi,id=data", "id=cd,cdrom")
    console = started(system)
    console.wait_for("scsi: target 0 is a disk of 2048 blocks, written: 0", 20)
    console.wait_for("scsi: target 1 has no medium, 23a", 20)
    assert data.read_bytes()[:5] == b"vmbus"
    ctl(system, "resize-disk", NAME, "data", "2M")
    assert data.stat().st_size == 2 << 20
    assert "no disk whose size" in refused(system, "resize-disk", NAME, "cd", "2M")
    stats = json.loads(ctl(system, "show", NAME, "--stats", "--json"))["stats"]
    assert stats["devices"]["disk/data"]["writes"] == 1
    console.close()


def test_a_medium_is_put_in_changed_and_taken_out(system: System) -> None:
    one, two = image(system, "one.iso", b"1111"), image(system, "two.iso", b"2222")
    define(system, "id=cd,cdrom")
    console = started(system)
    console.wait_for("scsi: target 0 has no medium, 23a", 20)
    ctl(system, "change-media", NAME, "cd", f"{one},format=raw")
    console.wait_for("scsi: target 0 has a medium, 31313131", 20)
    assert drive(system)["layers"][0]["path"] == str(one)
    ctl(system, "change-media", NAME, "cd", f"{two},format=raw", "--pass-files")
    console.wait_for("scsi: target 0 has a medium, 32323232", 20)
    ctl(system, "change-media", NAME, "cd")
    console.wait_for("(?s)32323232.*scsi: target 0 has no medium, 23a", 20)
    assert drive(system)["layers"] == []
    console.close()


def test_the_guests_lock_is_respected_and_the_guest_is_asked(system: System) -> None:
    one, two = image(system, "one.iso", b"1111"), image(system, "two.iso", b"2222")
    define(system, f"{one},format=raw,id=cd,cdrom", mode="scsi lock")
    console = started(system)
    console.wait_for("scsi: target 0 has a medium, 31313131", 20)
    assert "the guest has locked the drive" in refused(
        system, "change-media", NAME, "cd", f"{two},format=raw"
    )
    assert drive(system)["layers"][0]["path"] == str(one)
    console.wait_for("scsi: target 0: the medium is asked for", 20)
    ctl(system, "change-media", NAME, "cd", f"{two},format=raw")
    console.wait_for("scsi: target 0 has a medium, 32323232", 20)
    # It is locked again.
    assert "locked" in refused(system, "change-media", NAME, "cd")
    ctl(system, "change-media", NAME, "cd", "--force")
    console.wait_for("scsi: target 0 has no medium, 23a", 20)
    console.close()


def test_what_cannot_be_put_in_leaves_what_is_there(system: System) -> None:
    one, data = image(system, "one.iso", b"1111"), image(system, "data.img")
    define(system, f"{one},format=raw,id=cd,cdrom", f"{data},format=raw,id=data")
    console = started(system)
    console.wait_for("scsi: target 0 has a medium, 31313131", 20)
    before, counts = drive(system), system.counts()
    for words, said in (
        (("cd", f"{one}.missing,format=raw"), "does not exist"),
        (("cd", "/etc/shadow,format=raw"), "shadow"),
        (("cd", f"{data},format=raw"), "writes to it"),
        (("cd", f"{one},format=qcow2"), "qcow2"),
        (("data", f"{one},format=raw"), "no CD-ROM drive"),
        (("dvd",), "it has disk/cd, disk/data"),
    ):
        assert said in refused(system, "change-media", NAME, *words), words
        assert drive(system) == before
    assert system.settle(counts) == counts
    # The medium that was there is still claimed, and what was refused is not.
    ctl(system, "change-media", NAME, "cd")
    ctl(system, "change-media", NAME, "cd", f"{one},format=raw")
    uuid = json.loads(ctl(system, "show", NAME, "--json"))["uuid"]
    assert "change-any" in refused(system, "change-media", uuid, "cd", user=BOB)
    console.close()


def test_the_medium_of_a_stopped_machine_is_that_of_its_next_start(system: System) -> None:
    one = image(system, "one.iso", b"1111")
    define(system, "id=cd,cdrom")
    ctl(system, "change-media", NAME, "cd", f"{one},format=raw")
    console = started(system)
    console.wait_for("scsi: target 0 has a medium, 31313131", 20)
    console.close()


def test_a_driver_that_breaks_the_rules_resets_its_own_device(system: System) -> None:
    data = image(system, "data.img")
    define(system, f"{data},format=raw,bus=scsi,id=data", mode="scsi-hostile")
    console = started(system)
    console.wait_for("and then it works: 0", 60)
    for line in (
        "no whole command: reset",
        "no room for the answer: reset",
        "nothing to write to: reset",
        "a loop: reset",
        "no whole function: reset",
        "no room for its answer: reset",
        "an answer to nowhere: reset",
        "behind the end: 521",
        "more than there is room for: 10000",
        "no such target: 30000",
    ):
        assert f"scsi-hostile: {line}" in console.text, line
    console.close()


def test_seventeen_disks_fit_when_they_are_on_the_bus(system: System) -> None:
    disks = [f"{image(system, f'd{number}.img')},format=raw" for number in range(17)]
    kernel = str(system.files(ALICE) / "guest")
    words = ["--memory", "16M", "--kernel", kernel, "--cmdline", "scsi"]
    for disk in disks:
        words += ["--disk", disk]
    assert "16 fit; give the others bus scsi" in refused(system, "define", "--name", NAME, *words)
    define(system, *disks[:16], f"{disks[16]},bus=scsi")
    console = started(system)
    console.wait_for("scsi: target 0 is a disk of 2048 blocks, written: 0", 20)
    console.close()
