# SPDX-License-Identifier: Apache-2.0
"""Images on block devices: as qemu-img has them, up to their end and not beyond, and with nothing of what
they held before showing through. The devices are the host's loop devices, full of old bytes."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.local.image_bed import MIB, clean, mine, ours, plain, qemu, serves, theirs
from vmbus import image
from vmbus.wire.errors import VmbusError

pytestmark = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="qemu-img (package qemu-utils)")
SIZE = 8 * MIB
OLD = b"\xa5"


def attached(file: Path) -> str:
    made = subprocess.run(["losetup", "-f", "--show", file], capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"no loop device: {made.stderr.strip()}")
    return made.stdout.strip()


def device(place: Path) -> Iterator[Path]:
    """``disk`` in this directory: a device of 8 MiB, written all over."""
    place.mkdir(exist_ok=True)
    file = place / "behind"
    file.write_bytes(OLD * SIZE)
    loop = attached(file)
    (place / "disk").symlink_to(loop)
    try:
        yield place / "disk"
    finally:
        subprocess.run(["losetup", "-d", loop], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    yield from device(tmp_path / "one")


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """Two of them, for QEMU's tool and ours, with the same sources beside them."""
    yield from ((one, other) for one in device(tmp_path / "theirs") for other in device(tmp_path / "mine"))


# Each line by both, on a device of its own; the last column is why they may differ.
LINES = [
    ("create -f raw disk 4M", ""),
    ("create -f raw disk 9M", ""),
    ("create -f raw -o preallocation=full disk 4M", "err: QEMU's names the step that failed"),
    ("create -f qcow2 disk 16M", ""),
    ("create -f qcow2 disk 16M; info disk", ""),
    ("create -f qcow2 disk 16M; info --output=json disk", ""),
    ("create -f qcow2 disk 16M; check disk", ""),
    ("create -f qcow2 disk 16M; resize disk 90M; resize --shrink disk 2M", ""),
    ("create -f qcow2 disk 4M; snapshot -c one disk; snapshot -d one disk; check -q disk", ""),
    ("create -f qcow2 disk 4M; amend -o compat=0.10 disk", ""),
    ("create -f qcow2 -o preallocation=metadata disk 4M; check disk", "content: QEMU's shows what was there"),
    ("convert -f raw -O raw raw disk", ""),
    ("convert -f raw -O raw -n raw disk", ""),
    ("convert -f raw -O raw big disk", ""),
    ("convert -f raw -O raw -n big disk", ""),
    ("convert -f raw -O qcow2 raw disk; check -q disk; compare -f raw -F qcow2 raw disk", ""),
    ("convert -f raw -O qcow2 -c raw disk; check disk; compare -f raw -F qcow2 raw disk", ""),
    ("create -f qcow2 disk 8M; convert -f raw -n -O qcow2 raw disk; compare -f raw -F qcow2 raw disk", ""),
    ("convert -f raw -O qcow2 raw disk; convert -O raw disk back", ""),
    ("convert -f raw -t none -O qcow2 raw disk; check -q -T none disk", ""),
    ("dd -f raw if=raw of=disk bs=1M", ""),
    ("dd -f raw -O qcow2 if=raw of=disk; check -q disk", ""),
    ("info -f raw disk", ""),
    ("map -f raw disk", ""),
    ("resize -f raw disk +1M", "err: it says how large the device is"),
    ("resize -f raw disk 4M", ""),
    ("resize -f raw --shrink disk 4M", "err: it says how large the device is"),
    ("measure -O qcow2 -f raw disk", ""),
]


@pytest.mark.parametrize(("line", "because"), LINES)
def test_a_device_is_what_it_is_to_qemu_img(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, line: str, because: str
) -> None:
    said = []
    for path, tool in zip(pair, (theirs, mine), strict=True):
        monkeypatch.chdir(path.parent)
        content = b"".join(bytes([n + 1]) * 300_000 + bytes(100_000) for n in range(8))
        Path("raw").write_bytes(content + bytes(4 * MIB - len(content)))
        with Path("big").open("wb") as file:
            file.truncate(SIZE + MIB)
        ran = [tool(shlex.split(words)) for words in line.split(";")]
        errors = not because.startswith("err")
        said.append([(one.code, plain(one.out), plain(one.err) if errors else "") for one in ran])
    if "--output=json" in line:
        texts = [json.loads(one.pop()[1]) for one in said]
        assert texts[1] == texts[0]
    assert said[1] == said[0]
    for name in ("disk", "back"):
        one, other = (path.parent / name for path in pair)
        if one.exists() and not because:
            qemu("qemu-img", "compare", one, other)


def test_what_a_device_held_does_not_show_through(disk: Path) -> None:
    image.create(str(disk), size=4 * MIB)
    with image.open(str(disk), "qcow2") as one:
        one.write(70_000, b"\x11" * 512)
        one.write(MIB, b"\x22" * 100)
        one.write_zeroes(2 * MIB, 65536, unmap=False)
        expected = bytearray(4 * MIB)
        expected[70_000:70_512] = b"\x11" * 512
        expected[MIB : MIB + 100] = b"\x22" * 100
        assert one.read(0, 4 * MIB) == bytes(expected)
    clean(disk)
    words = ["-c", "read -P 0 0 70000", "-c", "read -P 0x11 70000 512", "-c", "read -P 0 70512 60000"]
    assert "failed" not in qemu("qemu-io", "-f", "qcow2", *words, disk)


@pytest.mark.parametrize("metadata", [False, True])
def test_a_full_device_is_an_error_and_holds_what_was_written(disk: Path, metadata: bool) -> None:
    image.create(str(disk), size=64 * MIB)
    done = 0
    with image.open(str(disk), "qcow2") as one:
        if metadata:
            with pytest.raises(VmbusError):
                one.resize(128 * MIB, preallocation="metadata")
            assert one.size == 64 * MIB
        with pytest.raises(VmbusError) as caught:
            for number in range(1024):
                one.write(number * 65536, bytes([number % 250 + 1]) * 65536)
                one.flush()
                done += 1
        assert "the block device that holds the image is full" in str(caught.value)
    assert 100 < done < 128
    clean(disk)
    assert disk.stat().st_size == 0 and os.stat(disk.parent / "behind").st_size == SIZE
    with image.open(str(disk), "qcow2") as one:
        for number in range(done):
            assert one.read(number * 65536, 65536) == bytes([number % 250 + 1]) * 65536
        one.discard(0, 10 * 65536)
        one.write(60 * MIB, b"\x77" * 65536)  # flushes itself until there is room
    clean(disk)


def test_a_raw_disk_is_not_written_beyond_its_end(disk: Path) -> None:
    with image.open(str(disk), "raw") as one:
        assert one.size == SIZE
        one.write(SIZE - 512, b"\x33" * 512)
        for at, length in ((SIZE, 512), (SIZE - 512, 1024), (SIZE + MIB, 1)):
            with pytest.raises(VmbusError):
                one.write(at, b"\x44" * length)
            with pytest.raises(VmbusError):
                one.write_zeroes(at, length)
    assert (disk.parent / "behind").read_bytes() == OLD * (SIZE - 512) + b"\x33" * 512


@pytest.mark.parametrize("cache", ["none", "writeback"])
def test_an_image_on_a_device_is_served(disk: Path, cache: str) -> None:
    ours("create", "-q", "-f", "qcow2", disk, "32M")
    socket = disk.parent / "socket"
    words = ["serve", "-f", "qcow2", "--cache", cache, "-k", str(socket), str(disk)]
    with subprocess.Popen([sys.executable, "-m", "vmbus.cli.img", *words]) as serving:
        assert serves(serving, socket)
        io = ["-c", "write -P 7 3M 1M", "-c", "write -P 8 20M 4k", "-c", "flush", "-c", "read -P 7 3M 1M"]
        assert "failed" not in qemu("qemu-io", "-f", "raw", *io, f"nbd+unix:///?socket={socket}")
        serving.wait(timeout=20)
    assert serving.returncode == 0
    clean(disk)
    read = ["-c", "read -P 7 3M 1M", "-c", "read -P 8 20M 4k", "-c", "read -P 0 20484k 60k"]
    assert "failed" not in qemu("qemu-io", "-f", "qcow2", *read, disk)


def test_a_device_that_is_shorter_than_its_image_is_read_as_far_as_it_goes(
    tmp_path: Path, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image.create(str(disk), size=4 * MIB)
    with image.open(str(disk), "qcow2") as one:
        one.write(0, b"\x11" * (2 * MIB))
    made = subprocess.run(
        ["losetup", "-f", "--show", "-r", "--sizelimit", str(MIB), disk.parent / "behind"],
        capture_output=True,
        text=True,
        check=True,
    )
    short = made.stdout.strip()
    try:
        monkeypatch.chdir(tmp_path)
        for line in (
            f"info {short}",
            f"check -f qcow2 {short}",
            f"convert -f qcow2 -O raw {short} new",
            f"convert -f qcow2 -O raw --salvage {short} saved",
            f"resize -f qcow2 {short} 8M",
        ):
            ours, qemus = mine(shlex.split(line)), theirs(shlex.split(line.replace("new", "newer")))
            assert "Traceback" not in ours.err, ours
            assert (ours.code == 0) == (qemus.code == 0), (line, ours, qemus)
    finally:
        subprocess.run(["losetup", "-d", short], check=True)
