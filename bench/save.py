# SPDX-License-Identifier: Apache-2.0
"""Saving a machine of 1 GiB of which the guest has touched 300 MiB, beside QEMU's migration to a file.

The same guest (tests/guests, mode fill) writes a word to each page. vmbus: Machine.Save, from the call on the
bus to the end of its job (bench/save_client.py); the file is durable then. QEMU: a stopped machine is
migrated to ``file:``, plainly and by mapped-ram with two multifd channels, from the command to the state
completed, and then its file is synced, which QEMU leaves to others; both times are told. The machines go on
after each save, and all three take turns in one directory. written-to-touched: bytes on the disk by those
that were touched.

    python -m bench.save [ROUNDS]
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from bench import report
from bench.peers import EMULATOR
from bench.system import Measured
from tests.lab.system import ALICE
from tests.local.worker_guest import image

ROUNDS: Final = 5
MEMORY: Final = 1 << 30
TOUCHED: Final = 300  # MiB
MAPPED: Final = {"mapped-ram": True, "multifd": True}


class Qmp:
    """What a QEMU is told, on its socket."""

    def __init__(self, control: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(str(control))
        self._lines = self._socket.makefile("r")
        self._lines.readline()
        self.ask("qmp_capabilities")

    def ask(self, command: str, **arguments: Any) -> Any:
        """The answer to a command; events are passed over."""
        words = json.dumps({"execute": command, "arguments": arguments})
        self._socket.sendall(words.encode())
        while True:
            answer = json.loads(self._lines.readline())
            if "error" in answer:
                raise RuntimeError(f"{command}: {answer['error']}")
            if "return" in answer:
                return answer["return"]


class Qemu:
    """A QEMU with the guest in it, spoken to by QMP."""

    def __init__(self, place: Path) -> None:
        control = place / "qmp"
        words = [EMULATOR, "-M", "q35,accel=kvm", "-m", str(MEMORY >> 20), "-nodefaults", "-display", "none"]
        words += ["-no-reboot", "-serial", "stdio", "-qmp", f"unix:{control},server=on,wait=off"]
        words += ["-kernel", str(image()), "-append", f"fill unlike={TOUCHED}"]
        self.process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if b"filled" in line:
                break
        self.ask = Qmp(control).ask
        self.ask("migrate-set-parameters", **{"max-bandwidth": 1 << 40, "multifd-channels": 2})

    def save(self, place: Path, *, mapped: bool) -> tuple[float, float, int]:
        """Seconds until it is completed, and until the file is synced; bytes on the disk."""
        states = [{"capability": name, "state": mapped} for name in MAPPED]
        self.ask("migrate-set-capabilities", capabilities=states)
        self.ask("stop")
        begin = time.perf_counter()
        self.ask("migrate", uri=f"file:{place}")
        while (status := self.ask("query-migrate")["status"]) not in ("completed", "failed"):
            time.sleep(0.002)
        completed = time.perf_counter() - begin
        if status != "completed":
            raise RuntimeError(f"QEMU's migration has {status}")
        file = os.open(place, os.O_RDWR)
        os.fdatasync(file)
        synced = time.perf_counter() - begin
        written = os.fstat(file).st_blocks * 512
        os.close(file)
        place.unlink()
        self.ask("cont")
        return completed, synced, written


@contextlib.contextmanager
def emulator(place: Path) -> Iterator[Qemu]:
    """One QEMU, ended afterwards."""
    qemu = Qemu(place)
    try:
        yield qemu
    finally:
        qemu.process.kill()
        qemu.process.wait()


def main() -> None:
    """Run and report."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS
    ours: list[list[float]] = []
    plain: list[tuple[float, float, int]] = []
    mapped: list[tuple[float, float, int]] = []
    with Measured() as system, emulator(system.place) as qemu:
        directory = system.files(ALICE)
        for _ in range(rounds):
            words = [str(system.kernel), str(MEMORY), str(TOUCHED), "1", str(directory)]
            ours += json.loads(system.client(ALICE, "bench.save_client", *words))
            system.vmbusctl(ALICE, "undefine", "saved")
            plain.append(qemu.save(directory / "qemu.plain", mapped=False))
            mapped.append(qemu.save(directory / "qemu.mapped", mapped=True))
    touched = TOUCHED << 20
    report.emit(
        "save",
        memory=MEMORY,
        touched=touched,
        **{
            "vmbus-s": report.spread([took for took, _ in ours], digits=3),
            "qemu-file-s": report.spread([done for done, _, _ in plain], digits=3),
            "qemu-file-synced-s": report.spread([synced for _, synced, _ in plain], digits=3),
            "qemu-mapped-s": report.spread([done for done, _, _ in mapped], digits=3),
            "qemu-mapped-synced-s": report.spread([synced for _, synced, _ in mapped], digits=3),
            "written-to-touched": round(max(written for _, written in ours) / touched, 3),
            "qemu-written-to-touched": round(max(written for _, _, written in plain) / touched, 3),
            "speed-to-qemu-file-synced": round(min(s for _, s, _ in plain) / min(t for t, _ in ours), 2),
            "speed-to-qemu-mapped-synced": round(min(s for _, s, _ in mapped) / min(t for t, _ in ours), 2),
        },
        aims={"written-to-touched": 1.05, "speed-to-qemu-file-synced": 2.0},
    )


if __name__ == "__main__":
    main()
