# SPDX-License-Identifier: Apache-2.0
"""Images: vmbus-img beside qemu-img on the same file system, runs in turn.

Each line of JSON is one kind of work: seconds of ours, of QEMU's and, where that means something, of a raw
file (by qemu-img), as the least and the median of a few runs, and the ratios of the least. Loads of small
requests are made by the two programs' own ``bench``, with io_uring and O_DIRECT; with a step that is odd in
clusters they go all over the disk. The rest is whole commands from start to end.

    python -m bench.images [DIRECTORY [WORK...]]      (default: in this checkout's .cache; all works)

It needs about 3 GB of room, and a file system with O_DIRECT.
"""

from __future__ import annotations

import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from bench import report

CHECKOUT = Path(__file__).parents[1]
OURS = str(CHECKOUT / ".venv/bin/vmbus-img")
QEMU = "qemu-img"
ROUNDS = 3
PAIRS, PAIR_WRITES = 60, 500
MIB, GIB, TIB = 1 << 20, 1 << 30, 1 << 40
# An odd number of clusters and a page: the whole disk is gone over in no obvious order.
JUMP = 4099 * 65536 + 4096


def run(*words: str | Path) -> float:
    """Seconds of a command from start to end."""
    start = time.perf_counter()
    subprocess.run([*map(str, words)], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def load(program: str, path: Path, format: str, *options: str | int) -> float:
    """Seconds that a program's ``bench`` reports."""
    words = [program, "bench", "-f", format, *map(str, options)]
    words += ["-i", "io_uring"] if program == QEMU else []
    done = subprocess.run([*words, str(path)], check=True, capture_output=True, text=True)
    found = re.search(r"completed in ([0-9.]+) seconds", done.stdout)
    assert found, done.stdout
    return float(found[1])


def compare(name: str, works: dict[str, Callable[[], float]], *, rounds: int = ROUNDS) -> None:
    """Run the works in turn and print their line."""
    samples: dict[str, list[float]] = {who: [] for who in works}
    for _ in range(rounds):
        for who, work in works.items():
            samples[who].append(work())
    least = {who: min(times) for who, times in samples.items()}
    figures: dict[str, object] = {
        who: {"least": round(least[who], 4), "median": round(statistics.median(times), 4)}
        for who, times in samples.items()
    }
    figures["qemu/ours"] = round(least["qemu"] / least["ours"], 2)
    for other in ("raw", "full"):
        if other in least:
            figures[f"ours/{other}"] = round(least["ours"] / least[other], 2)
            figures[f"qemu/{other}"] = round(least["qemu"] / least[other], 2)
    report.emit(f"images: {name}", unit="seconds", **figures)


def new_clusters(place: Path) -> None:
    """4 KiB writes, each into a cluster that was never written; then packed one behind the other.

    Durable ones also beside a raw file that is all written before ("full").
    """
    for cache, count, rounds in (("none", 16000, ROUNDS), ("directsync", 1500, 2 * ROUNDS)):
        for step in (65536, 4096):
            options = ("-w", "-c", count, "-d", 16, "-s", 4096, "-S", step, "-t", cache)

            def work(
                program: str,
                format: str,
                preallocation: str = "off",
                options: tuple[str | int, ...] = options,
            ) -> float:
                path = place / "new"
                path.unlink(missing_ok=True)
                size = GIB if preallocation == "off" else 128 * MIB
                run(
                    QEMU,
                    "create",
                    "-q",
                    "-f",
                    format,
                    "-o",
                    f"preallocation={preallocation}",
                    path,
                    str(size),
                )
                run("sync", path)
                return load(program, path, format, *options)

            works = {
                "ours": lambda work=work: work(OURS, "qcow2"),
                "qemu": lambda work=work: work(QEMU, "qcow2"),
                "raw": lambda work=work: work(QEMU, "raw"),
            }
            if cache == "directsync":
                works["full"] = lambda work=work: work(QEMU, "raw", "full")
            name = f"{count} writes of 4 KiB, step {step}, depth 16, cache={cache}"
            compare(name, works, rounds=rounds)
    (place / "new").unlink()


def durable_pairs(place: Path) -> None:
    """Durable 4 KiB writes, each into a cluster never written, beside a sparse raw file; then two of those.

    What else the disk is asked to sync meanwhile, by this host or by others, changes from second to second:
    only runs right behind each other can be compared, in many short pairs. Who goes first takes turns. Two
    raw files cost the same, so what their pairs show is the disk, and how far a median can be believed.
    """
    ours, raw = (OURS, "qcow2"), (QEMU, "raw")
    pairs(place, "new clusters", {"ours": ours, "raw": raw})
    pairs(place, "control", {"a raw file": raw, "raw": raw})


def pairs(place: Path, name: str, works: dict[str, tuple[str, str]]) -> None:
    """Run the two works, a program on a format each, in pairs and print their line."""
    path = place / "new"
    options = ("-w", "-c", PAIR_WRITES, "-d", 16, "-s", 4096, "-S", 65536, "-t", "directsync")

    def seconds(program: str, format: str) -> float:
        path.unlink(missing_ok=True)
        run(QEMU, "create", "-q", "-f", format, path, str(GIB))
        run("sync", path)
        return load(program, path, format, *options)

    samples: dict[str, list[float]] = {who: [] for who in works}
    for number in range(PAIRS):
        for who in list(works) if number % 2 == 0 else reversed(works):
            samples[who].append(seconds(*works[who]))
    path.unlink()
    first, second = works
    ratios = sorted(one / other for one, other in zip(samples[first], samples[second], strict=True))
    figures: dict[str, object] = {
        who: {"least": round(min(times), 4), "median": round(statistics.median(times), 4)}
        for who, times in samples.items()
    }
    quarters = statistics.quantiles(ratios)
    figures[f"{first}/{second}, of a pair"] = {
        "least": round(ratios[0], 2),
        "quarter": round(quarters[0], 2),
        "median": round(quarters[1], 2),
        "three quarters": round(quarters[2], 2),
        "most": round(ratios[-1], 2),
    }
    shape = f"{PAIRS} pairs of {PAIR_WRITES} writes of 4 KiB, step 65536, depth 16, cache=directsync"
    report.emit(f"images: {name}, {shape}", unit="seconds", **figures)


def reads(place: Path, image: Path, name: str) -> None:
    """4 KiB reads all over an image, depth 32."""
    options = ("-c", 20000, "-d", 32, "-s", 4096, "-S", JUMP, "-t", "none", "-U")
    compare(
        f"20000 reads of 4 KiB, depth 32, {name}",
        {
            "ours": lambda: load(OURS, image, "qcow2", *options),
            "qemu": lambda: load(QEMU, image, "qcow2", *options),
        },
    )


def chain(place: Path) -> None:
    """Reads through 32 images; the data lies in the lowest."""
    lowest = place / "layer0"
    run(QEMU, "create", "-q", "-f", "qcow2", lowest, str(GIB))
    load(QEMU, lowest, "qcow2", "-w", "-c", 1024, "-s", MIB, "-d", 4, "-t", "none")
    reads(place, lowest, "1 GiB, no backing file")
    for n in range(1, 33):
        below, path = place / f"layer{n - 1}", place / f"layer{n}"
        run(QEMU, "create", "-q", "-f", "qcow2", "-b", below, "-F", "qcow2", path)
    reads(place, place / "layer32", "1 GiB, through 32 backing files")
    for path in place.glob("layer*"):
        path.unlink()


def after_snapshot(place: Path) -> None:
    """Writes into clusters that a snapshot shares."""

    def work(program: str) -> float:
        path = place / "shared"
        path.unlink(missing_ok=True)
        run(QEMU, "create", "-q", "-f", "qcow2", path, str(512 * MIB))
        load(QEMU, path, "qcow2", "-w", "-c", 512, "-s", MIB, "-d", 4, "-t", "none")
        run(QEMU, "snapshot", "-c", "before", path)
        return load(program, path, "qcow2", "-w", "-c", 4000, "-d", 16, "-s", 4096, "-S", 65536, "-t", "none")

    compare(
        "4000 writes of 4 KiB after a snapshot, depth 16",
        {"ours": lambda: work(OURS), "qemu": lambda: work(QEMU)},
    )
    (place / "shared").unlink()


def convert(place: Path) -> None:
    """512 MiB of noise and of text."""
    noise, target = place / "noise.raw", place / "target"
    with noise.open("wb") as file:
        for _ in range(512):
            file.write(os.urandom(MIB))
    for name, flags in (
        ("raw to qcow2", ["-O", "qcow2"]),
        ("raw to qcow2, -c zlib", ["-O", "qcow2", "-c"]),
        ("raw to qcow2, -c zstd", ["-O", "qcow2", "-c", "-o", "compression_type=zstd"]),
    ):

        def work(program: str, flags: list[str] = flags) -> float:
            target.unlink(missing_ok=True)
            return run(program, "convert", "-f", "raw", *flags, noise, target)

        compare(
            f"convert 512 MiB of noise, {name}",
            {"ours": lambda work=work: work(OURS), "qemu": lambda work=work: work(QEMU)},
            rounds=2 if "-c" in flags else 2 * ROUNDS,
        )
    target.unlink()
    source = place / "source"
    run(QEMU, "convert", "-f", "raw", "-O", "qcow2", noise, source)

    def back(program: str) -> float:
        target.unlink(missing_ok=True)
        return run(program, "convert", "-f", "qcow2", "-O", "raw", source, target)

    compare("convert 512 MiB, qcow2 to raw", {"ours": lambda: back(OURS), "qemu": lambda: back(QEMU)})
    for path in (noise, source, target):
        path.unlink()


def large(place: Path) -> None:
    """A disk of 1 TiB with all its tables."""
    images = {"ours": place / "large.ours", "qemu": place / "large.qemu"}
    programs = {"ours": OURS, "qemu": QEMU}
    run(OURS, "create", "-q", "-f", "qcow2", "-o", "preallocation=metadata", images["ours"], str(TIB))
    run("cp", "--sparse=always", images["ours"], images["qemu"])
    reads(place, images["ours"], "1 TiB with all tables")
    for name, words in (
        ("check", ["check", "-q"]),
        ("snapshot -c", ["snapshot", "-c", "a"]),
        ("snapshot -d", ["snapshot", "-d", "a"]),
    ):
        works = {who: lambda who=who, words=words: run(programs[who], *words, images[who]) for who in images}
        compare(f"{name}, 1 TiB with all tables", works, rounds=3 if name == "check" else 1)
    for path in images.values():
        path.unlink()


def start(place: Path) -> None:
    """A program's whole run for next to nothing."""
    path = place / "small"
    run(QEMU, "create", "-q", "-f", "qcow2", path, str(GIB))
    compare(
        "info, start to end",
        {"ours": lambda: run(OURS, "info", path), "qemu": lambda: run(QEMU, "info", path)},
        rounds=10,
    )
    path.unlink()


WORKS = {
    "start": start,
    "clusters": new_clusters,
    "durable": durable_pairs,
    "chain": chain,
    "snapshot": after_snapshot,
    "convert": convert,
    "large": large,
}


def main() -> int:
    """All of it, or the works that are named."""
    if shutil.which(QEMU) is None:
        print("bench.images: qemu-img is missing (package qemu-utils)", file=sys.stderr)
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
