# SPDX-License-Identifier: Apache-2.0
"""Migration of a machine whose guest dirties 50 MB/s, beside QEMU's: how long it stands still.

The same guest (tests/guests, mode dirty) goes over 32 MiB again and again, at 50 MB a second as far as the
host gives it that much; what it reaches is told. vmbus: two instances on one host, the machine goes there and
back, and vmbusctl says what the cores counted, from the last vCPU's stop to the destination's word that it
runs. QEMU: two of it and a UNIX socket, with the same limit and auto-converge; its own figure. In turns.

    python -m bench.migration [ROUNDS]
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from bench import report
from bench.peers import EMULATOR
from bench.save import Qmp
from bench.system import Measured
from tests.lab.system import ALICE
from tests.local.migration_bed import SHARED, model
from tests.local.worker_guest import image

ROUNDS: Final = 5
MEMORY: Final = 128 << 20
LIMIT: Final = 100  # ms
GUEST: Final = "dirty mib=32 rate=48 beat=1"


def moved(here: Measured, there: Measured) -> dict[str, Any]:
    """What vmbusctl says of one migration."""
    words = ["migrate", "moving", "--to", there.bus_address, "--downtime", str(LIMIT), "--undefine-source"]
    done = here.vmbusctl(ALICE, *words, "--json", timeout=300)
    if done.returncode:
        raise RuntimeError(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@contextlib.contextmanager
def emulator(place: Path, name: str, *more: str) -> Iterator[tuple[Qmp, subprocess.Popen[bytes]]]:
    """One QEMU with the guest, ended afterwards."""
    control = place / f"{name}.qmp"
    words = [EMULATOR, "-M", "q35,accel=kvm", "-m", str(MEMORY >> 20), "-nodefaults", "-display", "none"]
    words += ["-no-reboot", "-serial", "stdio", "-qmp", f"unix:{control},server=on,wait=off"]
    words += ["-kernel", str(image()), "-append", GUEST, *more]
    process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    try:
        while not control.exists():
            time.sleep(0.01)
        yield Qmp(control), process
    finally:
        process.kill()
        process.wait()


def qemu(place: Path) -> dict[str, float]:
    """What QEMU says of one migration."""
    way = f"unix:{place}/incoming"
    with (
        emulator(place, "source") as (source, process),
        emulator(place, "destination", "-incoming", way) as (destination, _),
    ):
        assert process.stdout is not None
        for line in process.stdout:
            if b"pass 3" in line:
                break
        capabilities = [{"capability": "auto-converge", "state": True}]
        for one in (source, destination):
            one.ask("migrate-set-capabilities", capabilities=capabilities)
        source.ask("migrate-set-parameters", **{"downtime-limit": LIMIT, "max-bandwidth": 1 << 40})
        source.ask("migrate", uri=way)
        while (found := source.ask("query-migrate"))["status"] not in ("completed", "failed"):
            time.sleep(0.01)
        if found["status"] != "completed":
            raise RuntimeError(f"QEMU's migration has {found['status']}")
    (place / "incoming").unlink(missing_ok=True)
    for name in ("source", "destination"):
        (place / f"{name}.qmp").unlink(missing_ok=True)
    return {"downtime": found["downtime"], "seconds": found["total-time"] / 1000}


def passes(system: Measured) -> float:
    """MB that the guest dirties in a second just now, by its own count."""
    console = system.popen(ALICE, ["vmbusctl", "console", "moving", "--read-only"], stdout=subprocess.PIPE)
    assert console.stdout is not None
    try:
        times = []
        for line in console.stdout:  # its history comes at once; from its end on each line has its time
            if b"pass" in line:
                times.append(time.perf_counter())
                fresh = [at for at in times if at - times[0] > 0.5]
                if len(fresh) > 4:
                    return (len(fresh) - 1) * 32 * 1.048576 / (fresh[-1] - fresh[0])
        raise RuntimeError("the guest has ended")
    finally:
        console.kill()
        console.wait()


def main() -> None:
    """Run and report."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS
    ours: list[dict[str, Any]] = []
    theirs: list[dict[str, float]] = []
    with Measured() as here, Measured(policy=SHARED.format(place=here.place)) as there:
        words = ["--memory", "128M", "--cpu-model", model(), "--kernel", str(here.kernel), "--cmdline", GUEST]
        for verb in (["define", "--name", "moving", *words], ["start", "moving"]):
            done = here.vmbusctl(ALICE, *verb)
            if done.returncode:
                raise RuntimeError(done.stderr)
        dirtied = passes(here)
        for _ in range(rounds):
            ours += [moved(here, there), moved(there, here)]
            theirs.append(qemu(here.place))
        here.vmbusctl(ALICE, "kill", "moving")
    report.emit(
        "migration",
        memory=MEMORY,
        **{
            "dirtied-mb-s": round(dirtied, 1),
            "vmbus-downtime-ms": report.spread([one["downtime"] for one in ours], digits=1),
            "vmbus-s": report.spread([one["seconds"] for one in ours], digits=2),
            "vmbus-rounds": report.spread([one["rounds"] for one in ours], digits=0),
            "qemu-downtime-ms": report.spread([one["downtime"] for one in theirs], digits=1),
            "qemu-s": report.spread([one["seconds"] for one in theirs], digits=2),
        },
        aims={"vmbus-downtime-ms": LIMIT},
    )


if __name__ == "__main__":
    main()
