# SPDX-License-Identifier: Apache-2.0
"""The store of firmware: copied once, kept as long as it is named, unmoved by what becomes of its source."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.local.service_bed import scenario
from vmbus.service.firmware import Firmware
from vmbus.wire import dbus_form
from vmbus.wire.definition import Definition
from vmbus.wire.errors import VmbusError

NIC = {"id": "lan", "mac": "52:54:00:00:00:01", "bridge": "br0"}
FILES = {
    "usr/share/seabios/bios-256k.bin": b"bios",
    "usr/share/OVMF/OVMF_CODE_4M.fd": b"code",
    "usr/share/OVMF/OVMF_VARS_4M.fd": b"variables",
    "usr/lib/ipxe/qemu/efi-virtio.rom": b"rom",
}


def machine(**changes: object) -> Definition:
    return dbus_form.parse({"name": "web", "memory": 64 << 20, "firmware": "bios", **changes})


class Bed:
    """A store, what machines name, and the packages."""

    def __init__(self, place: Path) -> None:
        self.root, self.state = place / "root", place / "state"
        self.state.mkdir()
        for path, content in FILES.items():
            self.write(path, content)
        self.machines: dict[str, Mapping[str, str]] = {}
        self.firmware = Firmware(self.state, self.root)
        self.firmware.named = self.machines.items

    def write(self, path: str, content: bytes) -> None:
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)

    async def define(self, uuid: str, definition: Definition) -> None:
        async with self.firmware.taken(uuid, definition) as hashes:
            self.machines[uuid] = hashes

    def read(self, uuid: str) -> dict[str, bytes]:
        return {slot: os.pread(fd, 100, 0) for slot, fd in self.firmware.opened(uuid, self.machines[uuid])}

    def stored(self) -> set[str]:
        return {file.name for file in (self.state / "firmware").iterdir()}


@pytest.fixture
def bed(tmp_path: Path) -> Bed:
    return Bed(tmp_path)


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@scenario
async def test_an_upgraded_package_changes_new_machines_alone(bed: Bed) -> None:
    await bed.define("old", machine())
    bed.write("usr/share/seabios/bios-256k.bin", b"newer")
    await bed.define("new", machine())
    # The option ROM is there before any interface is: one may come while the machine runs.
    assert bed.read("old") == {"firmware": b"bios", "firmware/nic-rom": b"rom"}
    assert bed.read("new") == {"firmware": b"newer", "firmware/nic-rom": b"rom"}
    assert bed.stored() == {digest(b"bios"), digest(b"newer"), digest(b"rom")}


@scenario
async def test_what_no_machine_names_is_removed(bed: Bed) -> None:
    await bed.define("one", machine(firmware="uefi", nics=[NIC]))
    await bed.define("two", machine())
    uefi, bios = {digest(b"code"), digest(b"variables")}, {digest(b"bios")}
    assert bed.stored() == uefi | bios | {digest(b"rom")}
    del bed.machines["one"]
    bed.firmware.forget("one")
    assert bed.stored() == bios | {digest(b"rom")}
    del bed.machines["two"]
    bed.firmware.load()  # as after a restart
    assert bed.stored() == set()
    assert list((bed.state / "variables").iterdir()) == []


@scenario
async def test_variables_are_each_machine_s_own_and_only_they_can_be_written(bed: Bed) -> None:
    for uuid in ("one", "two"):
        await bed.define(uuid, machine(firmware="uefi", nics=[NIC]))
    for slot, fd in bed.firmware.opened("one", bed.machines["one"]):
        if slot == "firmware/variables":
            os.pwrite(fd, b"changed", 0)
        else:
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.pwrite(fd, b"changed", 0)
    assert bed.read("one")["firmware/variables"] == b"changedes"
    assert bed.read("two") == {
        "firmware": b"code", "firmware/variables": b"variables", "firmware/nic-rom": b"rom",
    }  # fmt: skip


@scenario
async def test_a_definition_that_fails_leaves_nothing(bed: Bed) -> None:
    with pytest.raises(VmbusError, match="no"):
        async with bed.firmware.taken("one", machine(firmware="uefi")):
            raise VmbusError("Internal", "no")
    assert bed.stored() == set()
    assert list((bed.state / "variables").iterdir()) == []


@scenario
async def test_a_missing_package_is_named(bed: Bed) -> None:
    (bed.root / "usr/share/OVMF/OVMF_VARS_4M.fd").unlink()
    with pytest.raises(VmbusError, match="install the package ovmf") as caught:
        await bed.define("one", machine(firmware="uefi"))
    assert (caught.value.kind, caught.value.argument) == ("Unavailable", "firmware")
    assert bed.stored() == set()
    bed.write("usr/share/seabios/bios-256k.bin", b"")
    with pytest.raises(VmbusError, match="empty"):
        await bed.define("two", machine())


@scenario
async def test_a_stored_file_that_is_gone_is_said_by_its_slot(bed: Bed) -> None:
    await bed.define("one", machine())
    (bed.state / "firmware" / digest(b"bios")).unlink()
    with pytest.raises(VmbusError) as caught:
        bed.read("one")
    assert (caught.value.kind, caught.value.argument) == ("NotFound", "firmware")


def test_what_a_crash_left_half_written_goes_at_start(bed: Bed) -> None:
    half = bed.state / "firmware" / ".abc.new"
    half.write_bytes(b"ha")
    half.chmod(0o400)
    bed.firmware.load()
    assert not half.exists()
