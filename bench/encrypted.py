# SPDX-License-Identifier: Apache-2.0
"""Encrypted images: vmbus-img beside qemu-img on the same file, and ours on a plain one, runs in turn.

Each line of JSON is one kind of work on 512 MiB that are all allocated: MiB or requests a second of ours
and of QEMU's on a LUKS image (AES-256, XTS, plain64), and of ours on a plain image, the best and the median
of a few runs, and the ratios of the best. Loads are made by the two programs' own ``bench``, with io_uring
and O_DIRECT; unlocking is not in the time.

    python -m bench.encrypted [DIRECTORY]      (default: beside this checkout's .cache; 2 GB of room)
"""

from __future__ import annotations

import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from bench import report
from bench.images import CHECKOUT, JUMP, MIB, OURS, QEMU, run

SIZE = 512 * MIB
ROUNDS = 5
SECRET = ("--object", "secret,id=s0,data=passphrase")
LUKS = "encrypt.format=luks,encrypt.key-secret=s0,encrypt.iter-time=10"
# Requests, depth, bytes of one, step.
WORKS = {
    "sequential, 1 MiB, depth 8": (512, 8, MIB, MIB),
    "random, 4 KiB, depth 32": (20000, 32, 4096, JUMP),
}


def load(program: str, image: str, shape: tuple[int, int, int, int], *, write: bool) -> float:
    """Bytes a second of one run."""
    count, depth, size, step = shape
    options = ["-t", "none", "-c", str(count), "-d", str(depth), "-s", str(size), "-S", str(step)]
    words = [program, "bench", *SECRET, "--image-opts", *options, *(["-w"] if write else [])]
    words += ["-i", "io_uring"] if program == QEMU else []
    done = subprocess.run([*words, image], check=True, capture_output=True, text=True)
    found = re.search(r"completed in ([0-9.]+) seconds", done.stdout)
    assert found, done.stdout
    return count * size / float(found[1])


def compare(name: str, shape: tuple[int, int, int, int], images: dict[str, str], *, write: bool) -> None:
    """Run the three in turn and print their line."""
    programs = {"ours": OURS, "qemu": QEMU, "plain": OURS}
    rates: dict[str, list[float]] = {who: [] for who in programs}
    for _ in range(ROUNDS):
        for who, program in programs.items():
            rates[who].append(load(program, images[who], shape, write=write))
    unit, divisor = ("MiB/s", MIB) if shape[2] >= MIB else ("requests/s", shape[2])
    best = {who: max(one) for who, one in rates.items()}
    figures: dict[str, object] = {
        who: {"best": round(best[who] / divisor), "median": round(statistics.median(one) / divisor)}
        for who, one in rates.items()
    }
    figures["ours/qemu"] = round(best["ours"] / best["qemu"], 2)
    figures["ours/plain"] = round(best["ours"] / best["plain"], 2)
    report.emit(f"encrypted: {'write' if write else 'read'} {name}", unit=unit, **figures)


def main() -> int:
    """All of it."""
    if shutil.which(QEMU) is None:
        print("bench.encrypted: qemu-img is missing (package qemu-utils)", file=sys.stderr)
        return 2
    parent = Path(sys.argv[1]) if len(sys.argv) > 1 else CHECKOUT / ".cache"
    parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent, prefix="bench-") as name:
        sealed, plain = Path(name, "sealed"), Path(name, "plain")
        run(QEMU, "create", "-q", *SECRET, "-f", "qcow2", "-o", LUKS, sealed, str(SIZE))
        run(QEMU, "create", "-q", "-f", "qcow2", plain, str(SIZE))
        locked = f"driver=qcow2,file.filename={sealed},encrypt.key-secret=s0"
        images = {"ours": locked, "qemu": locked, "plain": f"driver=qcow2,file.filename={plain}"}
        for image in (images["ours"], images["plain"]):
            load(OURS, image, (SIZE // MIB, 4, MIB, MIB), write=True)
        for work, shape in WORKS.items():
            for write in (False, True):
                compare(work, shape, images, write=write)
    return 0


if __name__ == "__main__":
    sys.exit(main())
