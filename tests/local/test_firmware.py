# SPDX-License-Identifier: Apache-2.0
"""Machines that boot by firmware, from their definition on; a whole system boots in the nested host."""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.lab.system import System
from tests.local import boot_sector
from tests.local.service_bed import ROOT, Caller, scenario, uuid_of
from tests.local.test_service_real import Stage, console_says
from vmbus.bus import Variant, variants
from vmbus.wire.dbus_form import build, parse
from vmbus.wire.errors import VmbusError

pytestmark = [pytest.mark.requires("root", "kvm"), pytest.mark.long]

SEABIOS = "usr/share/seabios/bios-256k.bin"
NIC_ROM = "usr/lib/ipxe/qemu/efi-virtio.rom"
OVMF = ("usr/share/OVMF/OVMF_CODE_4M.fd", "usr/share/OVMF/OVMF_VARS_4M.fd")


@pytest.fixture
def packages() -> Iterator[Path]:
    """The packages' files, below a root that user vmbus can read, as it cannot pytest's own directories."""
    with tempfile.TemporaryDirectory(prefix="vmbus-firmware-") as place:
        root = Path(place)
        root.chmod(0o755)
        for path in (SEABIOS, NIC_ROM, *OVMF):
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(Path("/") / path, root / path)
        yield root


@pytest.fixture
def stage(packages: Path) -> Iterator[Stage]:
    """A system whose firmware packages may be changed."""
    with System(firmware=packages) as system:
        yield Stage(system)


def bootable(stage: Stage, text: str) -> dict[str, Any]:
    path = stage.disk()
    Path(path).write_bytes(boot_sector.disk(text))
    return {"id": text, "layers": [{"format": "raw", "path": path}]}


def machine(**changes: Any) -> dict[str, Any]:
    plain = {"name": "web", "memory": 64 << 20, "firmware": "bios", **changes}
    return variants(build(parse({key.replace("_", "-"): value for key, value in plain.items()})))


async def boots(alice: Caller, path: str, wanted: str) -> None:
    """Start it: it says ``wanted`` and powers off."""
    await alice(path, "Machine.Start", {"paused": Variant("b", True)}, {})
    console = await alice(path, "Machine.OpenConsole", {})
    try:
        await alice(path, "Machine.Resume")
        await console_says(console, wanted)
    finally:
        os.close(console)
    assert await alice.until(path, "stopped", "crashed", within=30) == "stopped"


async def quiet(stage: Stage) -> dict[str, int]:
    """What the system has once the broker's first child has ended."""
    while (counts := stage.system.counts())["broker children"]:
        await asyncio.sleep(0.02)
    return counts


def state(stage: Stage, directory: str) -> set[str]:
    return {file.name for file in (stage.system.place / "state" / directory).iterdir()}


@scenario
async def test_it_boots_what_comes_first_and_an_upgrade_of_the_package_changes_nothing(
    stage: Stage, packages: Path
) -> None:
    before = await quiet(stage)
    async with stage.caller() as alice:
        disks = [bootable(stage, "first"), bootable(stage, "second")]
        path = await alice(ROOT, "Manager.DefineMachine", machine(disks=disks, boot=["second", "disk"]))
        (packages / SEABIOS).write_bytes(b"\0" * (256 << 10))
        await boots(alice, path, "second")
        stage.system.service.kill()
        stage.system.service.start()
        await alice.until(path, "stopped")
        await boots(alice, path, "second")
        assert len(state(stage, "firmware")) == 2  # and the option ROM
        await alice(path, "Machine.Undefine")
        assert state(stage, "firmware") == set()
    assert stage.system.settle(before) == before


@scenario
async def test_a_machine_by_uefi_has_variables_of_its_own_as_long_as_it_is_defined(stage: Stage) -> None:
    async with stage.caller() as alice:
        paths = [
            await alice(ROOT, "Manager.DefineMachine", machine(name=name, firmware="uefi"))
            for name in ("one", "two")
        ]
        assert state(stage, "variables") == {uuid_of(path) for path in paths}
        assert len(state(stage, "firmware")) == 3  # and the option ROM
        # OVMF itself is for the nested host; here its files get as far as the machine.
        await alice(paths[0], "Machine.Start", {"paused": Variant("b", True)}, {})
        await alice(paths[0], "Machine.Kill")
        await alice.until(paths[0], "stopped")
        await alice(paths[0], "Machine.Undefine")
        assert state(stage, "variables") == {uuid_of(paths[1])}
        options = {"paused": Variant("b", True)}
        transient = await alice(ROOT, "Manager.CreateTransient", machine(firmware="uefi"), {}, options)
        assert uuid_of(transient) in state(stage, "variables")
        await alice(transient, "Machine.Kill")
        await alice(paths[1], "Machine.Undefine")
    await_empty = [directory for directory in ("variables", "firmware") if state(stage, directory)]
    assert await_empty == []


@scenario
async def test_a_package_that_is_missing_is_named_and_nothing_is_left(stage: Stage, packages: Path) -> None:
    (packages / SEABIOS).unlink()
    before = await quiet(stage)
    async with stage.caller() as alice:
        with pytest.raises(VmbusError, match=r"firmware: .*install the package seabios") as caught:
            await alice(ROOT, "Manager.DefineMachine", machine())
        assert caught.value.kind == "Unavailable"
        assert await alice(ROOT, "Manager.ListMachines") == []
    assert state(stage, "firmware") == set()
    assert stage.system.settle(before) == before


@scenario
async def test_a_firmware_file_that_was_tampered_with_is_refused_by_its_slot(stage: Stage) -> None:
    async with stage.caller() as alice:
        path = await alice(ROOT, "Manager.DefineMachine", machine())
        code = hashlib.sha256((Path("/") / SEABIOS).read_bytes()).hexdigest()
        stored = stage.system.place / "state" / "firmware" / code
        stored.chmod(0o600)
        stored.write_bytes(b"short")
        with pytest.raises(VmbusError, match=r"firmware: .*no firmware") as caught:
            await alice(path, "Machine.Start", {}, {})
        assert caught.value.kind == "ImageInvalid"
        assert await alice.until(path, "stopped") == "stopped"
