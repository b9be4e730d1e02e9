# SPDX-License-Identifier: Apache-2.0
"""From a call on the bus to the first output of a guest of 256 MiB, of which it has filled 200: as an instant
clone and as a full restore, with spare workers and without, beside QEMU's migration from a file.

The guest prints all the time, so its first output comes with its first exit. vmbus: bench/clone_client.py
says what is timed. QEMU: the same guest, saved by mapped-ram; from the exec of a new QEMU to the first byte
on its serial line.

    chrt -f 10 python -m bench.clone [ROUNDS]
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Final

from bench import report
from bench.peers import EMULATOR
from bench.save import Qmp
from bench.system import Measured
from tests.lab.system import ALICE
from tests.local.worker_guest import image

ROUNDS: Final = 4
BLOCK: Final = 5
MEMORY: Final = 256 << 20
FILLED: Final = 200  # MiB
MAPPED: Final = [{"capability": name, "state": True} for name in ("mapped-ram", "multifd")]


class Emulator:
    """A QEMU with the guest in it, or one that waits for a migration."""

    def __init__(self, place: Path, *more: str) -> None:
        control = place / "qmp"
        control.unlink(missing_ok=True)
        words = [EMULATOR, "-M", "q35,accel=kvm", "-m", str(MEMORY >> 20), "-nodefaults", "-display", "none"]
        words += ["-no-reboot", "-serial", "stdio", "-qmp", f"unix:{control},server=on,wait=off"]
        words += ["-kernel", str(image()), "-append", f"fill unlike={FILLED} flood", *more]
        self.process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
        while not control.exists():
            time.sleep(0.001)
        self.control = Qmp(control)

    def first(self, wanted: bytes) -> None:
        """Wait until the guest prints it."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if wanted in line:
                return

    def end(self) -> None:
        """At once."""
        self.process.kill()
        self.process.communicate()


def saved(place: Path) -> Path:
    """The guest in a file, by QEMU."""
    emulator = Emulator(place)
    emulator.first(b"filled")
    emulator.control.ask("migrate-set-capabilities", capabilities=MAPPED)
    emulator.control.ask("stop")
    file = place / "qemu.template"
    emulator.control.ask("migrate", uri=f"file:{file}")
    while emulator.control.ask("query-migrate")["status"] != "completed":
        time.sleep(0.002)
    emulator.end()
    return file


def restored(place: Path, file: Path) -> float:
    """Seconds from the exec of a QEMU to what its guest prints first."""
    begin = time.perf_counter()
    emulator = Emulator(place, "-incoming", "defer")
    emulator.control.ask("migrate-set-capabilities", capabilities=MAPPED)
    emulator.control.ask("migrate-incoming", uri=f"file:{file}")
    while emulator.control.ask("query-status")["status"] == "inmigrate":
        time.sleep(0.001)
    emulator.control.ask("cont")
    emulator.first(b"line")
    took = time.perf_counter() - begin
    emulator.end()
    return took


def main() -> None:
    """Run in turns and report."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS
    samples: dict[str, list[float]] = {}
    with Measured() as plain, Measured(spares=2) as ready:
        file = saved(plain.place)
        for _ in range(rounds):
            for name, system in (("cold", plain), ("spare", ready)):
                words = [str(system.kernel), str(MEMORY), str(FILLED), str(BLOCK)]
                words += [str(system.files(ALICE)), "1"]
                found = json.loads(system.client(ALICE, "bench.clone_client", *words))
                for kind, times in found.items():
                    samples.setdefault(f"{kind}-{name}-s", []).extend(first for first, _ in times)
            samples.setdefault("qemu-mapped-s", []).extend(restored(plain.place, file) for _ in range(BLOCK))
    report.emit(
        "clone",
        memory=MEMORY,
        filled=FILLED << 20,
        **{name: report.spread(times) for name, times in samples.items()},
        aims={"clone-spare-s": 0.03},
    )


if __name__ == "__main__":
    main()
