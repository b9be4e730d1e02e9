# SPDX-License-Identifier: Apache-2.0
"""The disk that holds an image becomes full in the middle of each sub-command that writes, at several places:
an error, the image as it was, no metadata wrong beyond leaks, no half-made file; with room it succeeds."""

from __future__ import annotations

import contextlib
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from tests.local.image_bed import mine, qemu

pytestmark = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="qemu-img (package qemu-utils)")
KIB = 1024
# Bytes that are free when it begins.
ROOM = [0, 40 * KIB, 200 * KIB, 700 * KIB]


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of 12 MiB."""
    place = tmp_path / "small"
    place.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=12M", "none", str(place)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no tmpfs can be mounted: {done.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", place], check=True)


def make(place: Path) -> None:
    """What the lines below work on."""
    lines = """
qemu-img create -f qcow2 -o cluster_size=4k base 2M
qemu-io -f qcow2 -c "write -P 3 0 600k" base
qemu-img create -f qcow2 -o cluster_size=4k -b base -F qcow2 top
qemu-io -f qcow2 -c "write -P 1 600k 300k" -c "write -z 0 64k" -c "write -P 2 1500k 500k" top
qemu-img create -f qcow2 other 2M
qemu-io -f qcow2 -c "write -P 9 0 700k" other
qemu-img create -f qcow2 -o cluster_size=4k -b base -F qcow2 zeroed
qemu-io -f qcow2 -c "write -P 1 0 100k" -c "write -z 100k 1500k" zeroed
"""
    for line in lines.strip().splitlines():
        with contextlib.chdir(place):
            qemu(*shlex.split(line))


def seen(path: Path, to: Path) -> bytes:
    """The disk's bytes, by QEMU."""
    qemu("qemu-img", "convert", "-U", "-f", "qcow2", "-O", "raw", path, to)
    return to.read_bytes()


def wait_for_locks(names: Iterable[str]) -> None:
    """A ring that held a file is taken apart by the kernel, after its process has gone on."""
    deadline = time.monotonic() + 5
    for name in names:
        while subprocess.run(["qemu-img", "info", name], capture_output=True, check=False).returncode:
            assert time.monotonic() < deadline, name
            time.sleep(0.02)


# The image whose content must stay, and the line; {source} is a raw file elsewhere.
LINES = [
    ("", "create -q -f qcow2 -o preallocation=full new 2M"),
    ("", "create -q -f raw -o preallocation=falloc new 2M"),
    ("", "convert -f raw -O qcow2 {source} new"),
    ("", "convert -f raw -O qcow2 -c -o cluster_size=4k {source} new"),
    ("", "convert -f raw -O raw {source} new"),
    ("", "convert -O qcow2 top new"),
    ("", "dd -f raw -O qcow2 if={source} of=new bs=64k"),
    ("top", "commit -q top"),
    ("top", "rebase -b other -F qcow2 top"),
    ("top", "rebase -c -b other -F qcow2 top"),
    ("top", "rebase -b '' top"),
    ("base", "snapshot -c one base"),
    ("base", "resize -q --preallocation=falloc base +2M"),
    ("base", "amend -q -o refcount_bits=64 base"),
    ("base", "bitmap --add -g 512 base b"),
    ("zeroed", "amend -q -o compat=0.10 zeroed"),
]


@pytest.mark.parametrize(("kept", "line"), LINES)
def test_a_disk_that_is_full_in_the_middle_costs_nothing(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: str, line: str
) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"".join(bytes([n % 255 + 1]) * 4096 for n in range(512)))
    make(small)
    before = {path.name: path.read_bytes() for path in small.iterdir()}
    monkeypatch.chdir(small)
    words = shlex.split(line.format(source=source))
    failed = 0
    for room in ROOM:
        for path in small.iterdir():
            path.unlink()
        for name, content in before.items():
            Path(name).write_bytes(content)
        content = seen(Path(kept), tmp_path / "seen") if kept else b""
        fill(Path("filler"), room)
        ran = mine(words)
        what = f"{room >> 10} KiB free: {ran}"
        assert ran.code in {0, 1} and "Traceback" not in ran.err, what
        Path("filler").unlink()
        wait_for_locks(before)
        if ran.code == 0:
            break
        failed += 1
        assert ran.err.startswith("vmbus-img: "), what
        if kept:
            now = seen(Path(kept), tmp_path / "seen")
            assert now[: len(content)] == content[: len(now)], what
            assert len(now) == len(content), what
        assert set(before) == {path.name for path in small.iterdir()}, what
        for name in before:
            done = subprocess.run(["qemu-img", "check", "-q", name], capture_output=True, check=False)
            assert done.returncode in {0, 3}, (what, name, done.stderr)
        again = mine(words)
        assert again.code == 0, (what, again)
        if kept:
            assert seen(Path(kept), tmp_path / "seen")[: len(content)] == content, what
            done = subprocess.run(["qemu-img", "check", "-q", kept], capture_output=True, check=False)
            assert done.returncode in {0, 3}, (what, done.stderr)
    assert failed, "there was always room"


def fill(path: Path, room: int) -> None:
    """Take all space but ``room`` bytes."""
    with path.open("wb", buffering=0) as file:
        with contextlib.suppress(OSError):
            while True:
                file.write(bytes(4 * KIB))
        file.truncate(max(0, path.stat().st_blocks * 512 - room))
