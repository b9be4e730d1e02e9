# SPDX-License-Identifier: Apache-2.0
"""Machines that earlier versions of vmbus saved, kept for ever: every later version goes on from them.

A file is named for its machine type, CPU model and save format; the JSON beside it says what the guest had
printed last. The guest is that of tests/guests as it was then: it is in the file. One for each vendor, since
a host runs models of its own vendor only:

    python -m tests.abi.saved x86-64-v1-intel-1        # on a host that runs it
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

from tests.local.worker_guest import Guest
from vmbus.wire.definition import NEWEST_TYPE, Layer
from vmbus.wire.worker import Save

PLACE: Final = Path(__file__).with_name("saved")
FORMAT: Final = 1
MODE: Final = "disk-loop sector=0 count=64 beat=20"
BEAT: Final = re.compile(rb"loop: beat (\d+)\n")
DEVICES: Final[dict[str, Any]] = {"memory": 4 << 20, "vcpus": 1, "watchdog": "none"}


def machine(cpu_model: str, disk: Path, machine_type: str = NEWEST_TYPE, restore: int = -1) -> Guest:
    """Such a machine, which goes on from ``restore``."""
    disks = {"root": ([Layer("raw")], [disk])}
    told: dict[str, Any] = {"machine_type": machine_type, "cpu_model": cpu_model}
    return Guest(MODE, disks=disks, restore=restore, **told, **DEVICES)


def empty_disk(place: Path) -> Path:
    """The disk that its guest reads and writes; what is on it does not matter."""
    disk = place / "disk"
    disk.write_bytes(bytes(1 << 20))
    return disk


def keep(cpu_model: str) -> Path:
    """Save one; the file."""
    PLACE.mkdir(exist_ok=True)
    path = PLACE / f"{NEWEST_TYPE}-{cpu_model}-{FORMAT}.saved"
    with tempfile.TemporaryDirectory() as place, machine(cpu_model, empty_disk(Path(place))) as guest:
        guest.start()
        printed = b""
        while len(BEAT.findall(printed)) < 5:
            printed += guest.said(b"\n", 60)
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        result = guest.service.do(Save, file)
        assert result.error is None, result
        while more := guest.console.recv(4096):
            printed += more
    last = int(BEAT.findall(printed)[-1])
    path.with_suffix(".json").write_text(json.dumps({"cpu-model": cpu_model, "beat": last}) + "\n")
    return path


if __name__ == "__main__":
    print(keep(sys.argv[1]))
