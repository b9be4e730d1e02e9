# SPDX-License-Identifier: Apache-2.0
"""Disks that go bad while a qcow2 image on them is written: the kernel's own, dm-flakey.

An image on the device itself (O_DIRECT), or in a file on ext4 there (through the page cache), is served over
NBD and written to, several requests at a time, with flushes between. In the middle the device begins to fail
writes, or to drop them in silence, as it would be behind a power cut; the server is killed, and the device is
well again. Then the image opens, neither check finds more than leaks, and all is there whose flush was
acknowledged before.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import socket
import struct
import subprocess
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path

import pytest

from tests.local.image_bed import MIB, mine, ours, theirs
from vmbus import image

pytestmark = [
    pytest.mark.requires("device-mapper", "root"),
    pytest.mark.skipif(shutil.which("qemu-img") is None, reason="qemu-img (package qemu-utils)"),
]
OPTION = 0x49484156454F5054
WRITE, FLUSH, WRITE_ZEROES = 1, 3, 6
EIO = 5
BLOCK, SECTOR = 4096, 512
BLOCKS = 8 * MIB // BLOCK
DEVICE = 48 * MIB


def run(*words: str | Path) -> str:
    done = subprocess.run([*map(str, words)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
    return done.stdout.strip()


class FlakyDisk:
    """A device of the device mapper on a loop device, which does what ``turn`` says."""

    def __init__(self, place: Path) -> None:
        file = place / "behind"
        file.touch()
        os.truncate(file, DEVICE)
        self.loop = run("losetup", "-f", "--show", file)
        self.name = f"flaky-{os.getpid()}"
        run("dmsetup", "create", "--noudevsync", self.name, "--table", self._table(""))
        # The kernel's own name: in the nested host there is no udev, which would make the other.
        node = run("dmsetup", "info", "-c", "--noheadings", "-o", "blkdevname", self.name)
        self.path = Path("/dev", node)

    def _table(self, bad: str) -> str:
        # Up for no second and down for the next hour, or the whole time as it should be.
        kind = f"flakey {self.loop} 0 0 3600 1 {bad}" if bad else f"linear {self.loop} 0"
        return f"0 {DEVICE // SECTOR} {kind}"

    def turn(self, bad: str) -> None:
        """``drop_writes``, ``error_writes``, or "" for a good disk; what is under way ends before."""
        run("dmsetup", "load", self.name, "--table", self._table(bad))
        run("dmsetup", "suspend", "--nolockfs", self.name)
        run("dmsetup", "resume", "--noudevsync", self.name)

    def remove(self) -> None:
        run("dmsetup", "remove", "--noudevsync", "--retry", self.name)
        run("losetup", "-d", self.loop)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[FlakyDisk]:
    made = FlakyDisk(tmp_path)
    yield made
    made.turn("")
    made.remove()


class Bed:
    """An image on a flaky disk: on the device, or in a file system."""

    def __init__(self, disk: FlakyDisk, place: Path, on: str) -> None:
        self.disk = disk
        self.mounted = place / "mounted" if on == "ext4" else None
        self.path = self.mounted / "image" if self.mounted else disk.path
        if self.mounted:
            self.mounted.mkdir()
            run("mkfs.ext4", "-q", disk.path)
            self.mount()
        image.create(str(self.path), size=BLOCKS * BLOCK, cluster_size=BLOCK)

    def mount(self) -> None:
        if self.mounted:
            run("mount", self.disk.path, self.mounted)

    def unmount(self) -> None:
        """What the page cache still has goes to the disk as it is now."""
        if self.mounted:
            run("umount", self.mounted)

    def recover(self) -> None:
        """The disk is well again, as after a start of the host."""
        self.unmount()
        self.disk.turn("")
        self.mount()


@pytest.fixture(params=["device", "ext4"])
def bed(disk: FlakyDisk, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Bed]:
    made = Bed(disk, tmp_path, request.param)
    yield made
    disk.turn("")
    with contextlib.suppress(AssertionError):
        made.unmount()


def serve(path: Path, listener: socket.socket, *, direct: bool) -> None:
    with image.open(str(path), "qcow2", direct=direct) as opened:
        opened.serve(listener)


class Writer:
    """Writes blocks over NBD, and knows which content each of their sectors may have after a cut."""

    def __init__(self, bed: Bed, place: Path, seed: int) -> None:
        self.random = random.Random(seed)
        self.number = 0
        self.possible = [{0} for _ in range(BLOCKS)]
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(place / "nbd"))
        listener.listen()
        self.server = get_context("fork").Process(
            target=serve, args=(bed.path, listener), kwargs={"direct": bed.mounted is None}, daemon=True
        )
        self.server.start()
        listener.close()
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(60)
        self.socket.connect(str(place / "nbd"))
        self.exactly(18)
        self.socket.sendall(struct.pack(">IQII", 3, OPTION, 1, 0))
        self.exactly(10)

    def exactly(self, length: int) -> bytes:
        data = self.socket.recv(length, socket.MSG_WAITALL)
        assert len(data) == length, "the server hung up"
        return data

    def answers(self, count: int) -> list[int]:
        """The errors of so many requests."""
        found = [struct.unpack(">IIQ", self.exactly(16)) for _ in range(count)]
        assert all(magic == 0x67446698 for magic, _, _ in found)
        return [int(error) for _, error, _ in found]

    def send(self, kind: int, block: int = 0, length: int = 0, data: bytes = b"") -> None:
        self.socket.sendall(struct.pack(">IHHQQI", 0x25609513, 0, kind, 9, block * BLOCK, length) + data)

    def begin(self) -> dict[int, int]:
        """Some writes, all at once; the content that each block is to have."""
        wanted = {}
        for block in self.random.sample(range(BLOCKS), 12):
            self.number += 1
            content = self.number if self.random.random() < 0.7 else 0
            if content:
                self.send(WRITE, block, BLOCK, struct.pack("<II", block, content) * (BLOCK // 8))
            else:
                self.send(WRITE_ZEROES, block, BLOCK)
            self.possible[block].add(content)
            wanted[block] = content
        return wanted

    def flush(self) -> int:
        self.send(FLUSH)
        return self.answers(1)[0]

    def settle(self, wanted: dict[int, int]) -> None:
        """The disk was well until their flush was acknowledged: so they are there, whatever comes."""
        for block, content in wanted.items():
            self.possible[block] = {content}

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def kill(self) -> None:
        self.server.kill()
        self.server.join()
        self.socket.close()

    def look(self, path: Path) -> None:
        """Each sector has what it may have."""
        with image.open(str(path), "qcow2", read_only=True) as opened:
            content = opened.read(0, BLOCKS * BLOCK)
        for at in range(0, len(content), SECTOR):
            block = at // BLOCK
            sector = content[at : at + SECTOR]
            place, number = struct.unpack_from("<II", sector)
            assert sector == struct.pack("<II", place, number) * (SECTOR // 8), f"block {block} is torn"
            assert place == (block if number else 0) and number in self.possible[block], (
                f"block {block} has {number} of {place}, not one of {sorted(self.possible[block])}"
            )


def work_until_the_disk_goes_bad(writer: Writer, bed: Bed, bad: str) -> None:
    """Rounds of writes and a flush on a good disk; it goes bad while the last ones are under way."""
    for _ in range(20):
        wanted = writer.begin()
        assert writer.answers(len(wanted)) == [0] * len(wanted)
        assert writer.flush() == 0
        writer.settle(wanted)
    under_way = writer.begin()
    bed.disk.turn(bad)
    writer.answers(len(under_way))


def sound_and_as_flushed(writer: Writer, bed: Bed) -> None:
    """It opens, nothing but leaks is wrong, what was flushed is there, and it can be written on."""
    for check in (theirs, mine):
        words = ["check", "-f", "qcow2", str(bed.path)]
        found = check(words)
        assert found.code in {0, 3}, found
    writer.look(bed.path)
    with image.open(str(bed.path), "qcow2") as opened:
        for block in range(0, BLOCKS, 7):
            opened.write(block * BLOCK, b"\x01" * BLOCK)
    assert theirs(["check", "-f", "qcow2", str(bed.path)]).code in {0, 3}
    ours("check", "-q", "-r", "leaks", str(bed.path))


@pytest.mark.parametrize("seed", [1, 2])
def test_a_power_cut_in_the_middle_costs_nothing_that_was_flushed(
    bed: Bed, tmp_path: Path, seed: int
) -> None:
    with Writer(bed, tmp_path, seed) as writer:
        work_until_the_disk_goes_bad(writer, bed, "drop_writes")
        for _ in range(5):
            # The disk says that all of it is done, and even durable.
            assert set(writer.answers(len(writer.begin()))) == {0}
            assert writer.flush() == 0
    bed.recover()
    sound_and_as_flushed(writer, bed)


def test_writes_that_the_disk_fails_are_errors_and_cost_nothing_that_was_flushed(
    bed: Bed, tmp_path: Path
) -> None:
    with Writer(bed, tmp_path, 3) as writer:
        work_until_the_disk_goes_bad(writer, bed, "error_writes")
        errors = [[*writer.answers(len(writer.begin())), writer.flush()] for _ in range(5)]
    # Through the page cache it is the flush that hears of it.
    assert all(one[-1] == EIO for one in errors), errors
    assert {error for one in errors for error in one} <= {0, EIO}, errors
    bed.recover()
    sound_and_as_flushed(writer, bed)


def test_an_image_on_a_disk_that_fails_says_so_by_name(disk: FlakyDisk) -> None:
    image.create(str(disk.path), size=BLOCKS * BLOCK)
    disk.turn("error_writes")
    said = mine(["bench", "-w", "-f", "qcow2", "-t", "none", "-c", "8", str(disk.path)])
    assert said.code == 1 and "Input/output error" in said.err and "Traceback" not in said.err, said
    disk.turn("")
    ours("check", "-q", str(disk.path))
