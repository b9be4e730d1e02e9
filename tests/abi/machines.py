# SPDX-License-Identifier: Apache-2.0
"""Machines that have, together, everything that a machine type shows a guest.

TYPE.json beside this file is all of it, as ``vmbusctl abi dump`` describes it, and every CPU model. It was
written once, when the type was frozen:

    python -m tests.abi.machines vmbus-1 > tests/abi/vmbus-1.json

A device that a definition has to ask for may come later: then a machine with it is put into MACHINES of a
further file, and this one stays as it is.
"""

from __future__ import annotations

import json
import sys
from typing import Any, Final

from vmbus import abi
from vmbus.wire import dbus_form

GIB: Final = 1 << 30
UUID: Final = "6ba7b810-9dad-11d1-80b4-00c04fd430c8"
MODELS: Final = [
    f"x86-64-{level}-{vendor}{mark}-1"
    for vendor in ("intel", "amd")
    for mark in ("", "-tsc")
    for level in ("v1", "v2", "v3", "v4")
    if (level, mark) != ("v1", "-tsc")
]
KERNEL: Final = {"path": "/boot/vmlinuz"}
NOTE: Final = "A device that a definition asks for, and that no machine here has, may be added to the type."


def disk(identifier: str, **more: Any) -> dict[str, Any]:
    """A disk; where its image is shows nowhere."""
    return {"id": identifier, "layers": [{"format": "raw", "path": "/images/disk"}], **more}


def nic(number: int, **more: Any) -> dict[str, Any]:
    """A network interface."""
    return {"id": f"nic{number}", "mac": f"52:54:00:00:00:{number:02x}", "kind": "user", **more}


MACHINES: Final[dict[str, dict[str, Any]]] = {
    "least": {"memory": GIB // 16, "kernel": KERNEL, "rng": False, "balloon": False},
    "kernel": {"memory": GIB, "vcpus": 2, "kernel": KERNEL, "disks": [disk("root")], "nics": [nic(1)]},
    "bios": {
        "memory": 3 * GIB,
        "vcpus": 3,
        "firmware": "bios",
        "boot-menu": True,
        "boot": ["network", "cd", "last"],
        "watchdog": "reset",
        "ports": ["org.example.agent", "log"],
        "vsock": 3,
        "disks": [
            disk("first", serial="0123456789", queues=2),
            disk("second", **{"read-only": True}),
            disk("last", bus="scsi", serial="scsi"),
            disk("cd", cdrom=True),
        ],
        "nics": [nic(1), nic(2, queues=2)],
    },
    "uefi": {
        "memory": 510 * GIB,
        "vcpus": 16,
        "firmware": "uefi",
        "disks": [disk(f"disk{number}") for number in range(14)]
        + [disk("one", slot=1), disk("seven", slot=7, serial="plugged")],
        "nics": [nic(number) for number in range(15)] + [nic(15, slot=8, queues=8)],
    },
}


def golden(machine_type: str) -> str:
    """The text of TYPE.json."""
    described = {}
    for name, changes in MACHINES.items():
        form = {"name": name, "machine-type": machine_type, **changes}
        described[name] = {"definition": form, "shows": abi.describe(dbus_form.parse(form), UUID)}
    models = {}
    for model in MODELS:
        form = {"name": model, "memory": GIB, "vcpus": 2, "kernel": KERNEL, "cpu-model": model}
        shown = abi.describe(dbus_form.parse(form), UUID)
        models[model] = {"cpuid": shown["cpuid"], "msrs": shown["msrs"]}
    everything = {"note": NOTE, "machine-type": machine_type, "machines": described, "cpu-models": models}
    return json.dumps(everything, sort_keys=True, indent=1) + "\n"


if __name__ == "__main__":
    sys.stdout.write(golden(sys.argv[1]))
