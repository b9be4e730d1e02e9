# SPDX-License-Identifier: Apache-2.0
"""Requests over NBD: vmbus-img serve beside qemu-nbd and a raw file, fio's runs in turn.

Each line of JSON is one kind of work: requests a second of ours and of QEMU's, each on a qcow2 image of its
own over a unix socket (fio's ioengine=nbd, which is libnbd), and where that means something of the same load
on a raw file without a server (ioengine=io_uring), as the best and the median of a few runs, the ratios of
the best; and the CPU time that the servers took for a request, the least of the runs, which a busy host
disturbs less. All use io_uring and O_DIRECT. Compressed and encrypted images are read at random and in
order, in small requests and large ones, which both servers may do on all processors.

    python -m bench.nbd [DIRECTORY [WORK...]]   (default: .cache of this checkout; 4 GB; all works)
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench import report
from bench.encrypted import KEY, LUKS, SECRET, serving
from bench.images import CHECKOUT, GIB, MIB, OURS, QEMU, TIB, load, run

ROUNDS = 5
DEPTH = 32
CODED = 256 * MIB
NEEDED = ("fio", "qemu-img", "qemu-nbd")


@dataclass
class Load:
    """What fio does: its name of it, bytes of a request, and how many."""

    kind: str
    size: int = 4096
    requests: int = 30000

    def __str__(self) -> str:
        return f"{self.kind} of {self.size >> 10} KiB, depth {DEPTH}"


RANDOM_READ, RANDOM_WRITE = Load("randread"), Load("randwrite")


@dataclass
class Target:
    """What fio works on, and the server whose CPU time counts."""

    options: Sequence[str]
    server: int | None = None

    def cpu(self) -> float:
        """Seconds that the server has run."""
        if self.server is None:
            return 0.0
        fields = Path(f"/proc/{self.server}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def fio(target: Target, work: Load, seed: int) -> tuple[float, float]:
    """Requests a second, and the server's CPU seconds, of one run."""
    amount = [f"--bs={work.size}", f"--io_size={work.requests * work.size}"]
    shape = [f"--rw={work.kind}", f"--iodepth={DEPTH}", "--direct=1", *amount]
    words = ["fio", "--name=bench", "--output-format=json", f"--randseed={seed}", "--norandommap", *shape]
    before = target.cpu()
    done = subprocess.run([*words, *target.options], check=True, capture_output=True, text=True)
    # What fio has to say comes before its JSON.
    job = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
    return job["read"]["iops"] + job["write"]["iops"], target.cpu() - before


def compare(name: str, work: Load, targets: dict[str, Target]) -> None:
    """Run all in turn and print their line."""
    rates: dict[str, list[float]] = {who: [] for who in targets}
    costs: dict[str, list[float]] = {who: [] for who in targets}
    for seed in range(ROUNDS):
        for who, target in targets.items():
            rate, cost = fio(target, work, seed)
            rates[who].append(rate)
            costs[who].append(cost)
    best = {who: max(one) for who, one in rates.items()}
    figures: dict[str, object] = {
        who: {"best": round(best[who]), "median": round(statistics.median(rates[who]))} for who in targets
    }
    for who, target in targets.items():
        if target.server is not None:
            figures[f"{who}, server's CPU µs a request"] = round(min(costs[who]) / work.requests * 1e6, 1)
    figures["ours/qemu"] = round(best["ours"] / best["qemu"], 2)
    if "raw" in best:
        figures["ours/raw"] = round(best["ours"] / best["raw"], 2)
        figures["qemu/raw"] = round(best["qemu"] / best["raw"], 2)
    report.emit(f"nbd: {work}, {name}", unit="requests/s", **figures)


@contextmanager
def served(place: Path, images: dict[str, Path], secret: Sequence[str] = ()) -> Iterator[dict[str, Target]]:
    """Both servers on their images; with a secret these are encrypted."""
    ours = [OURS, "serve", "-t", "--cache", "none", *secret]
    qemu = ["qemu-nbd", "-t", "--cache=none", "--aio=io_uring", *secret]
    with ExitStack() as stack:
        targets = {}
        for who, words in (("ours", ours), ("qemu", qemu)):
            opened = ["-f", "qcow2", images[who]]
            if secret:
                opened = ["--image-opts", f"driver=qcow2,file.filename={images[who]},{KEY}"]
            server, address = stack.enter_context(serving([*words, *opened], place, who))
            targets[who] = Target(["--ioengine=nbd", f"--uri={address}"], server.pid)
        yield targets


def allocated(place: Path) -> None:
    """1 GiB, all written before."""
    images = {who: place / f"small.{who}" for who in ("ours", "qemu")}
    raw = place / "small.raw"
    for path, format in (*((path, "qcow2") for path in images.values()), (raw, "raw")):
        run(QEMU, "create", "-q", "-f", format, path, str(GIB))
        load(QEMU, path, format, "-w", "-c", 1024, "-s", MIB, "-d", 4, "-t", "none")
    with served(place, images) as targets:
        targets["raw"] = Target(["--ioengine=io_uring", f"--filename={raw}"])
        for work in (RANDOM_READ, RANDOM_WRITE):
            compare("1 GiB all allocated", work, targets)
    for path in (*images.values(), raw):
        path.unlink()


def chain(place: Path) -> None:
    """Reads through 32 images; the data lies in the lowest."""
    lowest = place / "layer0"
    run(QEMU, "create", "-q", "-f", "qcow2", lowest, str(GIB))
    load(QEMU, lowest, "qcow2", "-w", "-c", 1024, "-s", MIB, "-d", 4, "-t", "none")
    for n in range(1, 32):
        below, path = place / f"layer{n - 1}", place / f"layer{n}"
        run(QEMU, "create", "-q", "-f", "qcow2", "-b", below, "-F", "qcow2", path)
    for who in ("ours", "qemu"):
        top = place / f"top.{who}"
        run(QEMU, "create", "-q", "-f", "qcow2", "-b", place / "layer31", "-F", "qcow2", top)
    with served(place, {who: place / f"top.{who}" for who in ("ours", "qemu")}) as targets:
        compare("1 GiB through 32 backing files", RANDOM_READ, targets)
    for path in (*place.glob("layer*"), *place.glob("top.*")):
        path.unlink()


def large(place: Path) -> None:
    """A disk of 1 TiB with all its tables."""
    images = {who: place / f"large.{who}" for who in ("ours", "qemu")}
    run(OURS, "create", "-q", "-f", "qcow2", "-o", "preallocation=metadata", images["ours"], str(TIB))
    run("cp", "--sparse=always", images["ours"], images["qemu"])
    with served(place, images) as targets:
        compare("1 TiB with all tables", RANDOM_READ, targets)
    for path in images.values():
        path.unlink()


def half_random(path: Path) -> None:
    """Bytes of which each has four random bits: they pack to half."""
    table = bytes(byte & 15 for byte in range(256))
    with path.open("wb") as file:
        for _ in range(CODED // MIB):
            file.write(os.urandom(MIB).translate(table))


def coded(place: Path, name: str, make: Sequence[str | Path], secret: Sequence[str] = ()) -> None:
    """Reads at random and from start to end of an image with content, and writes if it is not compressed."""
    plain = place / "plain"
    half_random(plain)
    images = {who: place / f"coded.{who}" for who in ("ours", "qemu")}
    run(QEMU, "convert", "-f", "raw", *make, plain, images["qemu"])
    plain.unlink()
    run("cp", images["qemu"], images["ours"])
    with served(place, images, secret) as targets:
        compare(name, Load("randread", requests=10000), targets)
        compare(name, Load("read", requests=10000), targets)
        compare(name, Load("read", size=64 << 10, requests=CODED >> 16), targets)
        compare(name, Load("read", size=MIB, requests=CODED // MIB), targets)
        if secret:
            compare(name, Load("randwrite", requests=10000), targets)
            compare(name, Load("write", size=MIB, requests=CODED // MIB), targets)
    for path in images.values():
        path.unlink()


def compressed(place: Path) -> None:
    """256 MiB packed to half, by each method."""
    for codec in ("zlib", "zstd"):
        make = ["-O", "qcow2", "-c", "-o", f"compression_type={codec}"]
        coded(place, f"256 MiB packed by {codec}", make)


def encrypted(place: Path) -> None:
    """256 MiB under LUKS."""
    coded(place, "256 MiB under LUKS", [*SECRET, "-O", "qcow2", "-o", LUKS], SECRET)


WORKS = {
    "allocated": allocated,
    "chain": chain,
    "large": large,
    "compressed": compressed,
    "encrypted": encrypted,
}


def main() -> int:
    """All of it, or the works that are named."""
    for program in NEEDED:
        if shutil.which(program) is None:
            print(f"bench.nbd: {program} is missing (packages fio, qemu-utils)", file=sys.stderr)
            return 2
    parent = Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else CHECKOUT / ".cache"
    parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent, prefix="bench-") as name:
        place = Path(name)
        for work in sys.argv[2:] or WORKS:
            WORKS[work](place)
    return 0


if __name__ == "__main__":
    sys.exit(main())
