# SPDX-License-Identifier: Apache-2.0
"""Migration of a machine that takes its disk along, while its guest writes to it all the time.

A raw disk with data in half of it goes into a new qcow2 image there (``vmbusctl migrate --copy-disk``); the
guest of tests/guests, mode disk-loop, writes as fast as it can to 32 KiB of it. Beside it ``cp``, which
copies as many bytes between two files that nobody writes to, and syncs them: what the host gives at that
time. In turns.

    python -m bench.migration_disk [ROUNDS]
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Final

from bench import report
from bench.system import Measured
from tests.lab.system import ALICE
from tests.local.migration_bed import LOOP, SHARED, model

ROUNDS: Final = 3
SIZE: Final = 512 << 20
PIECE: Final = 1 << 20


def filled(here: Measured, path: Path) -> None:
    """A disk of alice's, every other MiB of which has data."""
    made = here.run_as(ALICE, ["truncate", "-s", str(SIZE), path])
    if made.returncode:
        raise RuntimeError(made.stderr)
    with path.open("r+b") as disk:
        for place in range(PIECE, SIZE, 2 * PIECE):
            os.pwrite(disk.fileno(), os.urandom(PIECE), place)
        os.fsync(disk.fileno())


def moved(here: Measured, there: Measured, target: Path) -> dict[str, Any]:
    """What vmbusctl says of one migration."""
    words = [
        "migrate",
        "moving",
        "--to",
        there.bus_address,
        "--copy-disk",
        f"root={target}",
        "--undefine-source",
    ]
    begin = time.perf_counter()
    done = here.vmbusctl(ALICE, *words, "--json", timeout=300)
    if done.returncode:
        raise RuntimeError(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout)
    return {**found, "whole": time.perf_counter() - begin}


def copied(source: Path) -> float:
    """MB a second of cp and sync."""
    target = source.with_name("copied")
    begin = time.perf_counter()
    subprocess.run(["cp", "--sparse=always", source, target], check=True)
    subprocess.run(["sync", target], check=True)
    took = time.perf_counter() - begin
    target.unlink()
    return SIZE / 2 / took / 1e6


def main() -> None:
    """Run and report."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS
    ours: list[dict[str, Any]] = []
    theirs: list[float] = []
    with Measured() as here, Measured(policy=SHARED.format(place=here.place)) as there:
        for _ in range(rounds):
            disk, target = here.files(ALICE) / "disk", here.files(ALICE) / "target"
            filled(here, disk)
            words = [
                "--memory",
                "20M",
                "--cpu-model",
                model(),
                "--kernel",
                str(here.kernel),
                "--cmdline",
                LOOP,
            ]
            words += ["--disk", f"id=root,format=raw,path={disk}"]
            for verb in (["define", "--name", "moving", *words], ["start", "moving"]):
                done = here.vmbusctl(ALICE, *verb)
                if done.returncode:
                    raise RuntimeError(done.stderr)
            ours.append(moved(here, there, target))
            theirs.append(copied(disk))
            there.vmbusctl(ALICE, "kill", "moving")
            there.vmbusctl(ALICE, "undefine", "moving")
            disk.unlink()
            target.unlink()
    report.emit(
        "migration-disk",
        disk=SIZE,
        **{
            "vmbus-mb-s": report.spread([one["disk-sent"] / one["seconds"] / 1e6 for one in ours], digits=0),
            "vmbus-downtime-ms": report.spread([one["downtime"] for one in ours], digits=1),
            "vmbus-rounds": report.spread([one["rounds"] for one in ours], digits=0),
            "cp-mb-s": report.spread(theirs, digits=0),
        },
    )


if __name__ == "__main__":
    main()
