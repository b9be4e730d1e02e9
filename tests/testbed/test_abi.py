# SPDX-License-Identifier: Apache-2.0
"""What a stock Debian kernel reads of its machine is what `vmbusctl abi dump` says: CPUID and MSRs of a named
model on real KVM, PCI functions, ACPI tables, SMBIOS."""

from __future__ import annotations

import re

import pytest

from tests.lab import initramfs, kernels
from tests.testbed.core_machine import CoreMachine
from vmbus import abi
from vmbus.wire import dbus_form

pytestmark = [pytest.mark.requires("kvm-hardware"), pytest.mark.long, pytest.mark.timeout(600)]

UUID = "6ba7b811-9dad-11d1-80b4-00c04fd430c8"
MODEL = "x86-64-v2-amd-1"
# Leaf 1: the APIC ID and OSXSAVE are the guest's own doing. XSAVE is not in this model.
OWN = {("00000001", 1): 0xFF000000, ("00000001", 2): 1 << 27}
FIXED = {"000000fe": "MTRRCAP", "00000179": "MCG_CAP", "0000008b": "PATCH_LEVEL", "c0010055": "INT_PENDING"}
READ = """\
hex() { od -An -v -tx1 "$@" | tr -d ' \\n'; }
at() { dd if=/dev/cpu/0/$1 bs=$2 count=1 iflag=skip_bytes skip=$(($3)) 2>/dev/null | hex; }
for device in /sys/bus/pci/devices/*; do echo "pci ${device##*:} $(hex $device/config)"; done
for table in FACP APIC MCFG DSDT; do echo "acpi $table $(hex /sys/firmware/acpi/tables/$table)"; done
echo "smbios structures $(hex /sys/firmware/dmi/tables/DMI)"
"""


def test_debian_reads_what_the_description_says() -> None:
    form = {
        "name": "one",
        "memory": 384 << 20,
        "cpu-model": MODEL,
        "kernel": {"path": "/k"},
        "balloon": False,
    }
    wanted = abi.describe(dbus_form.parse(form), UUID)
    lines = [f'echo "cpuid {key} $(at cpuid 16 0x{key[:8]})"' for key in wanted["cpuid"] if "." not in key]
    lines += [f'echo "msr {key} $(at msr 8 0x{key})"' for key in [*FIXED, "0000003b"]]
    kernel = kernels.stock()
    script = READ + "\n".join(lines) + "\npoweroff -f\n"
    initrd = initramfs.guest(script, kernel=kernel, modules=("cpuid", "msr"))
    with CoreMachine(kernel.image, initrd, cpu_model=MODEL, patience=300) as machine:
        machine.ask("run")
        assert machine.end() == "guest-poweroff", machine.printed
        printed = machine.printed.decode(errors="replace")

    def said(word: str) -> dict[str, str]:
        return dict(re.findall(rf"{word} (\S+) ?(\S*)\r?\n", printed))

    for leaf, registers in said("cpuid").items():
        for place in range(4):
            value = int.from_bytes(bytes.fromhex(registers[8 * place : 8 * place + 8]), "little")
            mask = ~OWN.get((leaf, place), 0)
            assert value & mask == int(wanted["cpuid"][leaf][place], 16) & mask, (leaf, place, registers)
    found = said("msr")
    for number, name in FIXED.items():
        value = int.from_bytes(bytes.fromhex(found[number]), "little")
        assert value == int(wanted["msrs"][number], 16), name
    assert found["0000003b"] == ""  # TSC_ADJUST, which the model has not
    tables = "".join(piece["bytes"] for piece in wanted["acpi"])
    for name, table in said("acpi").items():
        assert table and table in tables, name
    assert said("smbios")["structures"] == wanted["smbios"]["structures"]
    functions = said("pci")
    assert sorted(functions) == sorted(function["place"] for function in wanted["pci"])
    for function in wanted["pci"]:
        # Identity, class, header, the first BAR, and where capabilities begin; the rest is the driver's.
        for start, end in ((0, 4), (8, 12), (14, 15), (0x10, 0x14), (0x34, 0x35)):
            shown = functions[function["place"]][2 * start : 2 * end]
            assert shown == function["configuration"][2 * start : 2 * end], (function["name"], start)
