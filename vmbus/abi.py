# SPDX-License-Identifier: Apache-2.0
"""What a guest can see of a machine, from its definition alone.

No service, no /dev/kvm and no file of the machine is needed: all of it follows from the machine type and the
definition. The description is the core's (native/vmm/src/abi/); two hosts and two versions of vmbus show a
guest the same where these texts are the same.
"""

from __future__ import annotations

import json
from typing import Any, Final

import msgspec

from vmbus._native import ffi, lib
from vmbus.wire.definition import Definition, boot_order, has_balloon, is_read_only
from vmbus.wire.errors import VmbusError

NOBODY: Final = "00000000-0000-0000-0000-000000000000"
"""The UUID of a machine that has none yet: the service makes it."""


def describe(definition: Definition, uuid: str = NOBODY) -> dict[str, Any]:
    """All of it. What images and the host add is left out.

    Raises VmbusError as building the machine would.
    """
    request = msgspec.json.encode(
        {
            "machine_type": definition.machine_type,
            "uuid": uuid,
            "vcpus": definition.vcpus,
            "memory": definition.memory,
            "cpu_model": definition.cpu_model,
            "disks": [
                {
                    "id": disk.id,
                    "read_only": is_read_only(disk),
                    "serial": disk.serial,
                    "queues": disk.queues,
                    "slot": disk.slot,
                    "bus": disk.bus,
                    "cdrom": disk.cdrom,
                }
                for disk in definition.disks
            ],
            "nics": [
                {"id": nic.id, "mac": nic.mac, "queues": nic.queues, "slot": nic.slot}
                for nic in definition.nics
            ],
            "ports": definition.ports,
            "vsock": definition.vsock or None,
            "watchdog": definition.watchdog != "off",
            "rng": definition.rng,
            "balloon": has_balloon(definition),
            "boot": None if definition.kernel else boot_order(definition),
            "menu": definition.boot_menu,
        }
    )
    text = _call(request, _call(request, 0)[0])[1]
    found: dict[str, Any] = json.loads(text)
    # No register has them: the driver asks by a request (virtio 1.2, 5.2.6, VIRTIO_BLK_T_GET_ID).
    found["serials"] = {disk.id: disk.serial for disk in definition.disks}
    return found


def canonical(description: dict[str, Any]) -> str:
    """The same as a text that compares byte by byte: sorted keys, one entry a line."""
    return json.dumps(description, sort_keys=True, indent=1) + "\n"


def _call(request: bytes, room: int) -> tuple[int, bytes]:
    text = ffi.new("uint8_t[]", room or 1)
    length = lib.vmbus_abi_describe(request, len(request), text, room)
    if length < 0:
        error = msgspec.json.decode(ffi.string(lib.vmbus_error()))
        raise VmbusError(error["kind"], error["message"], argument=error["argument"])
    return length, bytes(ffi.buffer(text, min(length, room)))
