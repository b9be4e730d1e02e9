# SPDX-License-Identifier: Apache-2.0
"""What a guest can see follows from the definition alone."""

from __future__ import annotations

import json
import os
import pwd
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.abi import machines
from vmbus import abi
from vmbus.wire import dbus_form
from vmbus.wire.errors import VmbusError

LEAST: dict[str, Any] = {
    "name": "one",
    "memory": 1 << 30,
    "cpu-model": "x86-64-v2-intel-1",
    "kernel": {"path": "/boot/vmlinuz"},
}
DISK = {"id": "root", "layers": [{"format": "raw", "path": "/images/root"}]}
NIC = {"id": "lan", "mac": "52:54:00:00:00:01", "bridge": "br0"}


GOLDEN = Path(__file__).parents[1] / "abi"


def describe(**changes: Any) -> dict[str, Any]:
    return abi.describe(dbus_form.parse({**LEAST, **changes}))


def test_what_the_host_does_for_a_machine_shows_nowhere() -> None:
    plain = describe(disks=[DISK], nics=[NIC])
    elsewhere = {**DISK, "layers": [{"format": "qcow2", "path": "/other"}]}
    other = describe(
        disks=[elsewhere], nics=[{**NIC, "bridge": "br1"}], **{"memory-kind": "shareable", "name": "two"}
    )
    assert abi.canonical(plain) == abi.canonical(other)


def test_what_the_guest_sees_does() -> None:
    plain = abi.canonical(describe(disks=[DISK]))
    assert plain != abi.canonical(describe(disks=[{**DISK, "serial": "s"}]))
    assert plain != abi.canonical(describe(disks=[DISK], vcpus=2))
    assert plain != abi.canonical(describe(disks=[DISK], vsock=3))
    assert plain != abi.canonical(describe(disks=[DISK], **{"cpu-model": "x86-64-v1-amd-1"}))


def test_a_device_in_a_slot_is_behind_its_root_port() -> None:
    found = describe(disks=[{**DISK, "slot": 3}], nics=[{**NIC, "slot": 8}])
    places = {function["name"]: function["place"] for function in found["pci"]}
    assert (places["disk/root"], places["nic/lan"]) == ("slot 3", "slot 8")
    empty = describe()["pci"]
    changed = [function["name"] for function in found["pci"] if function not in empty]
    # A root port shows that its slot is in use.
    assert changed == ["disk/root", "nic/lan", "root port, slot 3", "root port, slot 8"]


def test_a_machine_by_firmware_has_option_roms_whenever_its_interface_comes() -> None:
    firmware: dict[str, Any] = {**LEAST, "firmware": "bios"}
    del firmware["kernel"]

    def roms(definition: dict[str, Any]) -> dict[str, int]:
        found = abi.describe(dbus_form.parse(definition))
        return {function["name"]: function["rom-size"] for function in found["pci"] if function["rom-size"]}

    for nic in (NIC, {**NIC, "slot": 1}):
        assert roms({**firmware, "disks": [DISK], "nics": [nic]}) == {"nic/lan": 256 << 10}
        assert roms({**LEAST, "disks": [DISK], "nics": [nic]}) == {}


@pytest.mark.parametrize("model", ["x86-64-v4-intel-1", "x86-64-v4-amd-1", "x86-64-v2-intel-tsc-1"])
def test_registers_are_the_models(model: str) -> None:
    found = describe(**{"cpu-model": model})
    assert found["msrs"]["00000277"] == "0x7040600070406"
    assert found["msrs"]["00000010"] is None
    assert ("c0010015" in found["msrs"]) == ("amd" in model)
    assert (int(found["cpuid"]["80000007"][3], 16) >> 8) == ("tsc" in model)
    assert describe(**{"cpu-model": "host"})["msrs"] is None


def test_a_model_that_is_none_is_refused() -> None:
    with pytest.raises(VmbusError) as caught:
        describe(**{"cpu-model": "486"})
    assert (caught.value.kind, caught.value.argument) == ("InvalidArgument", "cpu_model")


@pytest.mark.parametrize("machine_type", ["vmbus-1", "vmbus-2"])
def test_a_type_shows_what_it_always_showed(machine_type: str) -> None:
    # These files are never edited: what has to look different is a machine type of its own, beside them.
    assert machines.golden(machine_type) == (GOLDEN / f"{machine_type}.json").read_text()


def test_vmbus_2_differs_in_its_name_and_in_what_the_lpc_bridge_decodes() -> None:
    first, second = (
        json.loads((GOLDEN / f"{machine_type}.json").read_text())["machines"]["uefi"]["shows"]
        for machine_type in ("vmbus-1", "vmbus-2")
    )
    differ = {key for key in first if first[key] != second[key]}
    assert differ == {"machine-type", "smbios", "fw-cfg", "pci"}
    changed = [one["name"] for one, two in zip(first["pci"], second["pci"], strict=True) if one != two]
    assert changed == ["LPC bridge"]


def test_vmbusctl_dumps_it_without_service_and_without_kvm() -> None:
    program = Path(sys.executable).with_name("vmbusctl")
    argv = [str(program), "abi", "dump", "--name", "x", "--memory", "64M", "--firmware", "bios"]
    nobody = pwd.getpwnam("nobody").pw_uid if os.geteuid() == 0 else os.geteuid()
    done = subprocess.run(
        [*argv, "--cpu-model", "x86-64-v3-amd-1"],
        env={"DBUS_SYSTEM_BUS_ADDRESS": "unix:path=/nonexistent", "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        user=nobody,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["machine-type"] == "vmbus-2"
    assert found["pci"][0]["place"] == "00.0"
    assert done.stdout == abi.canonical(found)
