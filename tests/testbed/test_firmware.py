# SPDX-License-Identifier: Apache-2.0
"""A Debian disk boots by itself to a login: by SeaBIOS and by OVMF, both the distribution's, and GRUB.

Each of OVMF's interrupt handlers ends with a write to CR8, by which a guest of the nested host ends QEMU; so
that test is sent to a nested host in an emulator with that mended (tests/lab/mended.py).
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.lab import efi_loader, guest_disk
from tests.testbed.core_machine import CoreMachine

pytestmark = [pytest.mark.requires("kvm-hardware", "guest-disk"), pytest.mark.timeout(900)]

PATIENCE = 400.0
"""BIOS calls of a nested guest under emulation are slow: GRUB loads kernel and initrd by them."""

SEABIOS = Path("/usr/share/seabios/bios-256k.bin")
OVMF_CODE = Path("/usr/share/OVMF/OVMF_CODE_4M.fd")
OVMF_VARIABLES = Path("/usr/share/OVMF/OVMF_VARS_4M.fd")

EFIVARS = "/sys/firmware/efi/efivars"
VARIABLE = f"{EFIVARS}/VmbusTest-6ba7b812-9dad-11d1-80b4-00c04fd430c8"
NON_VOLATILE = r"\007\000\000\000"
"""What a file of efivarfs begins with: kept, and for boot and run time (UEFI 2.10, 8.2)."""
RESET_VECTOR = "0xfffffff0"


@pytest.fixture
def disk(tmp_path: Path) -> tuple[Path, Path]:
    """An overlay of the cached disk, and that disk."""
    base, top = guest_disk.image(), tmp_path / "disk.qcow2"
    program = Path(sys.executable).with_name("vmbus-img")
    subprocess.run([program, "create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", top], check=True)
    return top, base


@pytest.mark.soak
def test_seabios_grub_and_debian(disk: tuple[Path, Path]) -> None:
    with CoreMachine(firmware=SEABIOS, overlays=[disk], patience=PATIENCE) as machine:
        machine.ask("run")
        machine.until("GRUB on pc")
        printed = machine.until(guest_disk.LOGIN)
        assert "booted by BIOS" in printed
        machine.ask("power-button")


@pytest.mark.soak
@pytest.mark.requires("guest-cr8")
def test_ovmf_grub_and_debian_and_ovmf_keeps_its_variables(disk: tuple[Path, Path], tmp_path: Path) -> None:
    variables = tmp_path / "variables"
    shutil.copyfile(OVMF_VARIABLES, variables)

    with CoreMachine(firmware=OVMF_CODE, variables=variables, overlays=[disk], patience=PATIENCE) as machine:
        log_in(machine)
        machine.say(f"printf '{NON_VOLATILE}kept' >{VARIABLE} && echo written: $?")
        machine.until("written: 0")
        power_off(machine)

    changed = variables.read_bytes()
    assert len(changed) == OVMF_VARIABLES.stat().st_size
    assert changed != OVMF_VARIABLES.read_bytes()
    assert "VmbusTest".encode("utf-16-le") in changed
    # Boot0000 and the like, in UCS-2: what OVMF has written down about the disk.
    assert "Boot00".encode("utf-16-le") in changed

    with CoreMachine(firmware=OVMF_CODE, variables=variables, overlays=[disk], patience=PATIENCE) as machine:
        log_in(machine)
        machine.say(f'echo "it was $(tail -c 4 {VARIABLE})"')
        machine.until("it was kept")
        machine.say(f"before=$(busybox devmem {RESET_VECTOR}); busybox devmem {RESET_VECTOR} 32 0x5a5a5a5a")
        machine.say(f'test "$before" = "$(busybox devmem {RESET_VECTOR})" && echo the code is: "$before"')
        code = OVMF_CODE.read_bytes()[-16:-12]
        machine.until(f"the code is: 0x{int.from_bytes(code, 'little'):08X}")
        power_off(machine)


@pytest.mark.soak
@pytest.mark.requires("guest-cr8")
def test_ovmf_boots_the_cd_that_comes_before_a_disk(disk: tuple[Path, Path], tmp_path: Path) -> None:
    variables = tmp_path / "variables"
    shutil.copyfile(OVMF_VARIABLES, variables)
    cd = efi_loader.cd(
        tmp_path / "cd.iso", efi_loader.program(tmp_path / "loader.efi", "GRUB has come from a CD")
    )
    with CoreMachine(
        firmware=OVMF_CODE, variables=variables, cds=[cd], overlays=[disk], patience=PATIENCE
    ) as machine:
        machine.ask("run")
        machine.until("BdsDxe: starting")
        machine.until("GRUB has come from a CD")
        assert machine.end() == "guest-poweroff"


def log_in(machine: CoreMachine) -> None:
    machine.ask("run")
    machine.until("BdsDxe: starting")
    machine.until("GRUB on efi")
    assert "booted by UEFI" in machine.until(guest_disk.LOGIN)
    machine.say("root")
    machine.say(f"mount -t efivarfs efivarfs {EFIVARS} && echo mounted: $?")
    machine.until("mounted: 0")


def power_off(machine: CoreMachine) -> None:
    machine.say("poweroff -f")
    assert machine.end() == "guest-poweroff"
