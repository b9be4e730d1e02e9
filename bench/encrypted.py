# SPDX-License-Identifier: Apache-2.0
"""Encrypted images: vmbus-img serve beside qemu-nbd, and ours on a plain one, runs in turn.

Each line of JSON is one kind of work on 512 MiB that are all allocated: MiB or requests a second of ours
and of QEMU's on a LUKS image each (AES-256, XTS, plain64), and of ours on a plain image, the best and the
median of a few runs, and the ratios of the best. The loads come over NBD from ``qemu-img bench`` (which
itself cannot open an encrypted image); the servers use io_uring and O_DIRECT.

    python -m bench.encrypted [DIRECTORY]      (default: beside this checkout's .cache; 2 GB of room)
"""

from __future__ import annotations

import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from bench import report
from bench.images import CHECKOUT, JUMP, MIB, OURS, QEMU, run

SIZE = 512 * MIB
ROUNDS = 5
SECRET = ("--object", "secret,id=s0,data=passphrase")
KEY = "encrypt.key-secret=s0"
LUKS = "encrypt.format=luks,encrypt.key-secret=s0,encrypt.iter-time=10"
# Requests, depth, bytes of one, step.
WORKS = {
    "sequential, 1 MiB, depth 8": (512, 8, MIB, MIB),
    "random, 4 KiB, depth 32": (20000, 32, 4096, JUMP),
}


def load(address: str, shape: tuple[int, int, int, int], *, write: bool) -> float:
    """Bytes a second of one run."""
    count, depth, size, step = shape
    options = ["-f", "raw", "-c", str(count), "-d", str(depth), "-s", str(size), "-S", str(step)]
    words = [QEMU, "bench", *options, *(["-w"] if write else []), address]
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    found = re.search(r"completed in ([0-9.]+) seconds", done.stdout)
    assert found, done.stdout
    return count * size / float(found[1])


@contextmanager
def serving(
    words: Sequence[str | Path], place: Path, name: str
) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A server on a socket of its own, while it is needed; gives it and the address."""
    path = place / f"{name}.socket"
    server = subprocess.Popen([*map(str, words), "-k", str(path)])
    try:
        while not path.exists():
            assert server.poll() is None, f"{words[0]} ended"
            time.sleep(0.02)
        yield server, f"nbd+unix:///?socket={path}"
    finally:
        server.terminate()
        server.wait()


def compare(name: str, shape: tuple[int, int, int, int], addresses: dict[str, str], *, write: bool) -> None:
    """Run the three in turn and print their line."""
    rates: dict[str, list[float]] = {who: [] for who in addresses}
    for _ in range(ROUNDS):
        for who, address in addresses.items():
            rates[who].append(load(address, shape, write=write))
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
        place = Path(name)
        for image in ("ours", "qemu"):
            run(QEMU, "create", "-q", *SECRET, "-f", "qcow2", "-o", LUKS, place / image, str(SIZE))
        run(QEMU, "create", "-q", "-f", "qcow2", place / "plain", str(SIZE))
        ours = [OURS, "serve", "-t", "--cache", "none", *SECRET, "--image-opts"]
        qemu = ["qemu-nbd", "-t", "--cache=none", "--aio=io_uring", *SECRET, "--image-opts"]
        opened = {who: f"driver=qcow2,file.filename={place / who}" for who in ("ours", "qemu", "plain")}
        with ExitStack() as stack:
            addresses = {
                "ours": stack.enter_context(serving([*ours, f"{opened['ours']},{KEY}"], place, "ours"))[1],
                "qemu": stack.enter_context(serving([*qemu, f"{opened['qemu']},{KEY}"], place, "qemu"))[1],
                "plain": stack.enter_context(serving([*ours, opened["plain"]], place, "plain"))[1],
            }
            for address in addresses.values():
                load(address, (SIZE // MIB, 4, MIB, MIB), write=True)
            for work, shape in WORKS.items():
                for write in (False, True):
                    compare(work, shape, addresses, write=write)
    return 0


if __name__ == "__main__":
    sys.exit(main())
