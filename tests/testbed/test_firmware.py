# SPDX-License-Identifier: Apache-2.0
"""A Debian disk boots by itself to a login: by SeaBIOS and by OVMF, both the distribution's, and GRUB.

OVMF cannot run in the nested host. Each of its interrupt handlers ends with a write to CR8, and a guest that
writes CR8 while another interrupt waits makes QEMU abort ("cpu_interrupt: assertion failed: (bql_locked())",
QEMU 10.0 and 11.1, emulated SVM): a bare-metal guest that does only that is enough. So that test needs a
processor with virtualization that nobody emulates.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.lab import guest_disk
from tests.testbed.core_machine import CoreMachine

pytestmark = [pytest.mark.requires("kvm-hardware"), pytest.mark.timeout(900)]

PATIENCE = 400.0
"""BIOS calls of a nested guest under emulation are slow: GRUB loads kernel and initrd by them."""

SEABIOS = Path("/usr/share/seabios/bios-256k.bin")
OVMF_CODE = Path("/usr/share/OVMF/OVMF_CODE_4M.fd")
OVMF_VARIABLES = Path("/usr/share/OVMF/OVMF_VARS_4M.fd")


@pytest.fixture
def disk(tmp_path: Path) -> tuple[Path, Path]:
    """An overlay of the cached disk, and that disk."""
    try:
        base, top = guest_disk.image(), tmp_path / "disk.qcow2"
    except (guest_disk.GuestDiskFailed, OSError) as error:  # it cannot be made in the nested host
        pytest.skip(f"needs guest-disk: python -m tests.lab.guest_disk makes it ({error})")
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
@pytest.mark.skipif(
    os.environ.get("VMBUS_LAB") == "nested",
    reason="needs kvm-hardware: a processor; the emulation of one aborts when OVMF writes CR8",
)
def test_ovmf_grub_and_debian_and_ovmf_keeps_its_variables(disk: tuple[Path, Path], tmp_path: Path) -> None:
    variables = tmp_path / "variables"
    shutil.copyfile(OVMF_VARIABLES, variables)
    with CoreMachine(firmware=OVMF_CODE, variables=variables, overlays=[disk], patience=PATIENCE) as machine:
        machine.ask("run")
        machine.until("GRUB on efi")
        printed = machine.until(guest_disk.LOGIN)
        assert "booted by UEFI" in printed
    changed = variables.read_bytes()
    assert len(changed) == OVMF_VARIABLES.stat().st_size
    assert changed != OVMF_VARIABLES.read_bytes()
    # Boot0000 and the like, in UCS-2: what OVMF has written down about the disk.
    assert "Boot00".encode("utf-16-le") in changed
