# SPDX-License-Identifier: Apache-2.0
"""Long random sequences over one image with snapshots, resizes and packed clusters, each step done by ours or
by QEMU's tools: after every step both read what the model says, and check finds nothing.

VMBUS_SEED runs a sequence again.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from vmbus import image
from vmbus.wire.errors import VmbusError

pytestmark = [
    pytest.mark.skipif(shutil.which("qemu-img") is None, reason="qemu-img (package qemu-utils)"),
    pytest.mark.long,
]
MIB = 1 << 20
SECTOR = 512


class Sequence:
    """An image, a model of it and of its snapshots, and the steps."""

    def __init__(self, place: Path, seed: int, options: dict[str, int]) -> None:
        self.path = place / "image"
        self.scratch = place / "now.raw"
        self.random = random.Random(seed)
        self.disk = bytearray(3 * MIB)
        self.snapshots: dict[str, bytes] = {}
        self.number = 0
        self.narrow = options.get("refcount_bits", 16) < 16
        self.v2 = options.get("version") == 2
        self.cluster = options.get("cluster_size", 1 << 16)
        image.create(str(self.path), size=len(self.disk), **options)  # type: ignore[arg-type]

    def step(self) -> str:
        """One step by one of the two; gives what it was."""
        by_us = self.random.random() < 0.6
        choices: list[tuple[int, Callable[[bool], str]]] = [
            (8, self.write),
            (3, self.zero),
            (2, self.resize),
            (2, self.take),
            (1, self.apply),
            (1, self.delete),
            (2, self.pack),
        ]
        weights = [weight for weight, _ in choices]
        chosen = self.random.choices([one for _, one in choices], weights)[0]
        return ("ours: " if by_us else "qemu: ") + chosen(by_us)

    def range(self) -> tuple[int, int]:
        length = self.random.choice([1, 8, 130, 1500]) * SECTOR
        length = min(length, len(self.disk))
        return self.random.randrange((len(self.disk) - length) // SECTOR + 1) * SECTOR, length

    def write(self, by_us: bool) -> str:
        offset, length = self.range()
        byte = self.random.randrange(1, 256)
        if by_us:
            with self.open() as disk:
                disk.write(offset, bytes([byte]) * length)
        else:
            self.io(f"write -P {byte} {offset} {length}")
        self.disk[offset : offset + length] = bytes([byte]) * length
        return f"write {byte} at {offset} {length}"

    def zero(self, by_us: bool) -> str:
        offset, length = self.range()
        unmap = self.random.random() < 0.5
        if by_us:
            with self.open() as disk:
                disk.write_zeroes(offset, length, unmap=unmap)
        else:
            self.io(f"write -z {'-u ' if unmap else ''}{offset} {length}")
        self.disk[offset : offset + length] = bytes(length)
        return f"zero {offset} {length}"

    def resize(self, by_us: bool) -> str:
        if self.v2 and self.snapshots:
            return "no resize of version 2 with snapshots"
        length = self.random.randrange(1, 12 * MIB // SECTOR) * SECTOR
        if by_us:
            with self.open() as disk:
                disk.resize(length, shrink=True)
        else:
            # Shrinking leaves what the last cluster has behind the end. Growing, we zero it; QEMU shows it.
            if len(self.disk) % self.cluster:
                return "no resize over the rest of a cluster"
            length += -length % self.cluster
            self.tool("resize", "--shrink", "-f", "qcow2", self.path, str(length))
        del self.disk[length:]
        self.disk.extend(bytes(length - len(self.disk)))
        return f"resize {length}"

    def take(self, by_us: bool) -> str:
        self.number += 1
        name = f"s{self.number}"
        if by_us or self.narrow:
            try:
                with self.open() as disk:
                    disk.snapshot(name)
            except VmbusError as error:
                # Packed clusters share a host cluster, which 8 bits soon cannot count; nothing has changed.
                assert self.narrow and "refcount width" in str(error)
                return "no snapshot: too many references"
        else:
            self.tool("snapshot", "-c", name, self.path)
        self.snapshots[name] = bytes(self.disk)
        return f"snapshot {name}"

    def apply(self, by_us: bool) -> str:
        if not self.snapshots:
            return "nothing to apply"
        name = self.random.choice(sorted(self.snapshots))
        if self.v2 and len(self.snapshots[name]) != len(self.disk):
            return "no apply of another size"
        if by_us or self.narrow:
            try:
                with self.open() as disk:
                    disk.apply_snapshot(name)
            except VmbusError as error:
                assert self.narrow and "refcount width" in str(error)
                return "no apply: too many references"
        else:
            self.tool("snapshot", "-a", name, self.path)
        self.disk = bytearray(self.snapshots[name])
        return f"apply {name}"

    def delete(self, by_us: bool) -> str:
        if not self.snapshots:
            return "nothing to delete"
        name = self.random.choice(sorted(self.snapshots))
        if by_us:
            with self.open() as disk:
                disk.delete_snapshot(name)
        else:
            self.tool("snapshot", "-d", name, self.path)
        del self.snapshots[name]
        return f"delete {name}"

    def pack(self, _by_us: bool) -> str:
        """All of the disk again, compressed where that helps. QEMU does not compress over what is there."""
        words = b"".join(bytes([n]) * 700 for n in range(256))
        content = bytearray(self.disk)
        offset, length = self.range()
        content[offset : offset + length] = (words * (length // len(words) + 1))[:length]
        self.scratch.write_bytes(content)
        with image.open(str(self.scratch), "raw", read_only=True) as source, self.open() as disk:
            source.copy_to(disk, compress=True, target_is_zero=False)
        self.disk = content
        return f"pack {offset} {length}"

    def verify(self, what: str) -> None:
        """Both read the model's content, and neither finds anything wrong."""
        done = subprocess.run(
            ["qemu-img", "check", "-f", "qcow2", self.path], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{what}: {done.stdout[-500:]} {done.stderr[-500:]}"
        found = image.check(str(self.path))
        assert not found["corruptions"] and not found["leaks"], f"{what}: {found}"
        with self.open(read_only=True) as disk:
            assert disk.size == len(self.disk), what
            ours = disk.read(0, disk.size)
        self.same(ours, self.disk, f"{what}: ours")
        self.tool("convert", "-f", "qcow2", "-O", "raw", self.path, self.scratch)
        self.same(self.scratch.read_bytes(), self.disk, f"{what}: qemu")
        for name, content in self.snapshots.items():
            with image.open(str(self.path), "qcow2", read_only=True, snapshot=name) as disk:
                self.same(disk.read(0, disk.size), content, f"{what}: snapshot {name}")

    @staticmethod
    def same(seen: bytes, wanted: bytes | bytearray, what: str) -> None:
        if seen != wanted:
            at = next((n for n, (a, b) in enumerate(zip(seen, wanted, strict=False)) if a != b), "the end")
            pytest.fail(f"{what}: differs at {at}, lengths {len(seen)} and {len(wanted)}")

    def open(self, *, read_only: bool = False) -> image.Image:
        return image.open(str(self.path), "qcow2", read_only=read_only)

    def io(self, command: str) -> None:
        done = subprocess.run(
            ["qemu-io", "-f", "qcow2", "-d", "unmap", "-c", command, self.path],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert "failed" not in done.stdout + done.stderr, done

    def tool(self, *words: str | Path) -> None:
        done = subprocess.run(["qemu-img", *words], capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{words}: {done.stderr}"


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cluster_size": 512},
        {"cluster_size": 4096, "refcount_bits": 8},
        {"version": 2, "cluster_size": 8192},
        {"cluster_size": 2 * MIB, "refcount_bits": 64},
        {"extended_l2": True, "cluster_size": 16384},
        {"extended_l2": True, "cluster_size": 2 * MIB},
    ],
    ids=str,
)
def test_ours_and_qemus_tools_work_on_one_image_in_turns(tmp_path: Path, options: dict[str, int]) -> None:
    seed = int(os.environ.get("VMBUS_SEED", time.time_ns()))
    print(f"VMBUS_SEED={seed}")
    sequence = Sequence(tmp_path, seed, options)
    for number in range(int(os.environ.get("VMBUS_STEPS", "25"))):
        what = f"step {number}, {sequence.step()}"
        print(what)
        sequence.verify(what)


def test_a_snapshot_whose_clusters_qemu_made_its_own_stays_as_it_is(tmp_path: Path) -> None:
    # Two snapshots share their tables, the disk has its own. QEMU deletes one, and flags what is only the
    # other's then.
    path = tmp_path / "image"
    image.create(str(path), size=MIB)
    with image.open(str(path), "qcow2") as disk:
        disk.write(0, b"\x11" * MIB)
        disk.snapshot("kept")
        disk.snapshot("gone")
        disk.write(0, b"\x22" * MIB)
    subprocess.run(["qemu-img", "snapshot", "-d", "gone", path], check=True)
    with image.open(str(path), "qcow2") as disk:
        disk.apply_snapshot("kept")
        disk.write(0, b"\x33" * (MIB // 2))
    subprocess.run(["qemu-img", "check", "-q", path], check=True)
    with image.open(str(path), "qcow2", read_only=True, snapshot="kept") as disk:
        assert disk.read(0, MIB) == b"\x11" * MIB
    with image.open(str(path), "qcow2", read_only=True) as disk:
        assert disk.read(0, MIB) == b"\x33" * (MIB // 2) + b"\x11" * (MIB // 2)
