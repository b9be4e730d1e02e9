# SPDX-License-Identifier: Apache-2.0
"""Debian's stock kernels on the core's machine: what they find, and how they end or start again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.lab import initramfs, kernels
from tests.testbed.core_machine import CoreMachine
from vmbus.wire.errors import VmbusError

pytestmark = pytest.mark.requires("kvm-hardware")

LOOK_AROUND = """
echo "processors: $(nproc)"
sed -n 's/^model name.*: /model: /p; s/^flags.*: /flags: /p' /proc/cpuinfo
echo "clock: $(cat /sys/devices/system/clocksource/clocksource0/current_clocksource)"
grep MemTotal /proc/meminfo
echo "written by the guest" | dd of=/dev/vda bs=512 conv=sync,fsync 2>/dev/null
echo "msi: $(grep -c 'MSI.*virtio' /proc/interrupts)"
dmesg | grep -E 'BUG:|WARNING:|Call Trace|Firmware Bug|ACPI (BIOS )?(Error|Warning)' | sed 's/^/complaint: /'
echo looked
poweroff -f
"""

WAIT_FOR_BUTTON = """
exec 3</dev/input/event0
echo waiting
head -c 24 <&3 >/dev/null
echo "button pressed"
poweroff -f
"""

RESTART_ONCE = """
if head -c 6 /dev/vda | grep -q before; then echo "second start"; poweroff -f; fi
echo before | dd of=/dev/vda bs=512 conv=sync,fsync 2>/dev/null
echo "first start"
reboot -f
"""


@contextmanager
def booted(script: str, series: str = "6.12", cmdline: str = "", **options: Any) -> Iterator[CoreMachine]:
    kernel = kernels.stock(series)
    initrd = initramfs.guest(script, kernel=kernel)
    with CoreMachine(kernel.image, initrd, cmdline, **options) as machine:
        machine.ask("run")
        yield machine


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk"
    path.write_bytes(bytes(1 << 20))
    return path


@pytest.mark.parametrize(("series", "vcpus"), [("6.1", 1), ("6.12", 2), ("6.12", 4)])
def test_it_finds_its_processors_its_disk_and_its_clock(series: str, vcpus: int, disk: Path) -> None:
    with booted(LOOK_AROUND, series, vcpus=vcpus, disks=[disk]) as machine:
        text = machine.until("looked")
        assert machine.end() == "guest-poweroff"
    assert f"processors: {vcpus}\r" in text
    assert "clock: kvm-clock" in text
    assert "msi: 0" not in text
    assert "complaint:" not in text, text
    assert disk.read_bytes().startswith(b"written by the guest\n\0")


def test_memory_above_four_gib_is_there_and_the_model_is_what_was_asked_for(disk: Path) -> None:
    with booted(LOOK_AROUND, memory_mib=2560, cpu_model="x86-64-v3-amd-1", disks=[disk]) as machine:
        text = machine.until("looked")
        assert machine.end() == "guest-poweroff"
    total = int(text.split("MemTotal:")[1].split()[0])
    assert total > 2300 << 10
    assert "model: x86-64-v3-amd-1" in text
    flags = set(text.split("flags: ")[1].split("\r")[0].split())
    assert {"avx2", "bmi2", "fma", "movbe", "pni", "hypervisor"} <= flags
    # The host has these (see TCG's "max" model), the model has not.
    assert not {"adx", "sha_ni", "fsgsbase", "svm", "xsaveopt", "rdrand"} & flags


def test_a_model_of_the_other_vendor_is_refused_by_name(disk: Path) -> None:
    with pytest.raises(VmbusError) as error, booted(LOOK_AROUND, cpu_model="x86-64-v1-intel-1"):
        pass
    assert (error.value.kind, error.value.argument) == ("NotSupported", "cpu_model")
    assert "GenuineIntel" in error.value.message


def test_the_power_button_is_a_key() -> None:
    with booted(WAIT_FOR_BUTTON) as machine:
        machine.until("waiting")
        machine.ask("power-button")
        machine.until("button pressed")
        assert machine.end() == "guest-poweroff"


# a: the ACPI reset register, k: the keyboard controller
@pytest.mark.parametrize("means", ["a", "k"])
def test_it_restarts_in_place(means: str, disk: Path) -> None:
    with booted(RESTART_ONCE, cmdline=f"reboot={means}", vcpus=2, disks=[disk]) as machine:
        machine.until("second start")
        assert machine.end() == "guest-poweroff"
    assert machine.seen == ["running", "reset", "ended"]


def test_a_restart_by_triple_fault_is_one(disk: Path) -> None:
    with booted(RESTART_ONCE, cmdline="reboot=t", disks=[disk]) as machine:
        machine.until("first start")
        assert machine.end() == "triple-fault"
