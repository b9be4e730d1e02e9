# SPDX-License-Identifier: Apache-2.0
"""Raw bytes through pipes into images and out of them, and what a signal shows meanwhile."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.local.image_bed import MIB, clean, ours, qemu

pytestmark = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="qemu-img (package qemu-utils)")
VMBUS_IMG = [sys.executable, "-m", "vmbus.cli.img"]


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """Noise, a hole of more than one chunk, and words that end within a sector."""
    path = tmp_path / "raw"
    noise = random.Random(3).randbytes(3 * MIB)
    with path.open("wb") as file:
        file.write(noise)
        file.seek(70 * MIB)
        file.write(b"the same words again and again, " * 40_000 + b"end")
    return path


def piped(*words: str | Path, given: bytes = b"", code: int = 0) -> bytes:
    """What vmbus-img writes to stdout when it reads this from a pipe."""
    done = subprocess.run([*VMBUS_IMG, *map(str, words)], input=given, capture_output=True, check=False)
    assert done.returncode == code, done.stderr
    return done.stdout


def whole(path: Path) -> bytes:
    """The file's bytes, in whole sectors."""
    content = path.read_bytes()
    return content + bytes(-len(content) % 512)


@pytest.mark.parametrize(
    "flags",
    [
        ["-O", "raw"],
        ["-O", "qcow2"],
        ["-O", "qcow2", "-c", "-o", "compression_type=zstd"],
        ["-O", "qcow2", "-o", "cluster_size=2M"],
        ["-O", "qcow2", "-o", "preallocation=metadata,extended_l2=on"],
    ],
)
def test_what_comes_through_a_pipe_is_in_the_image(tmp_path: Path, raw: Path, flags: list[str]) -> None:
    target = tmp_path / "target"
    piped("convert", "-f", "raw", *flags, "-", target, given=raw.read_bytes())
    format = flags[1]
    if format == "qcow2":
        clean(target)
    qemu("qemu-img", "compare", "-f", "raw", "-F", format, raw, target)
    qemu("qemu-img", "convert", "-f", format, "-O", "raw", target, tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == whole(raw)
    if "-c" in flags or len(flags) == 2:
        assert target.stat().st_blocks * 512 < 12 * MIB


def test_an_image_comes_out_through_a_pipe(tmp_path: Path, raw: Path) -> None:
    packed = tmp_path / "packed"
    qemu("qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-c", raw, packed)
    assert piped("convert", "-O", "raw", packed, "-") == whole(raw)
    assert piped("convert", packed, "/dev/stdout") == whole(raw)
    assert piped("convert", "-f", "raw", raw, raw, "-") == whole(raw) * 2


def test_a_reader_that_leaves_is_no_traceback(raw: Path) -> None:
    with subprocess.Popen(
        [*VMBUS_IMG, "convert", "-f", "raw", str(raw), "-"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as running:
        assert running.stdout is not None and running.stderr is not None
        running.stdout.read(1000)
        running.stdout.close()
        assert b"Traceback" not in running.stderr.read()
    assert running.returncode == 1


@pytest.mark.parametrize(
    "words",
    [
        ["-f", "qcow2", "-", "target"],
        ["-O", "qcow2", "base", "-"],
        ["-", "raw", "target"],
        ["-", "-"],
        ["--bitmaps", "-O", "qcow2", "-", "target"],
    ],
)
def test_what_no_stream_can_be_is_refused(tmp_path: Path, raw: Path, words: list[str]) -> None:
    qemu("qemu-img", "create", "-q", "-f", "qcow2", tmp_path / "base", "1M")
    known = {"base", "raw", "target"}
    piped("convert", *(tmp_path / word if word in known else word for word in words), given=b"x", code=1)
    assert not (tmp_path / "target").exists()


def test_a_stream_longer_than_the_target_is_refused(tmp_path: Path) -> None:
    target = tmp_path / "target"
    ours("create", "-q", "-f", "qcow2", target, "1M")
    piped("convert", "-n", "-O", "qcow2", "-", target, given=b"x" * (MIB + 1), code=1)
    piped("convert", "-n", "-O", "qcow2", "-", target, given=b"y" * 1000)
    clean(target)
    assert "failed" not in qemu("qemu-io", "-f", "qcow2", "-c", "read -P 0x79 0 1000", target)


def test_several_sources_are_compressed_across_their_seams(tmp_path: Path) -> None:
    parts = [tmp_path / name for name in ("one", "two", "three")]
    for number, path in enumerate(parts):
        path.write_bytes(bytes([number + 1]) * (100_352 + 512 * number))
    target = tmp_path / "target"
    ours("convert", "-f", "raw", "-O", "qcow2", "-c", *parts, target)
    clean(target)
    qemu("qemu-img", "convert", "-f", "qcow2", "-O", "raw", target, tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == b"".join(path.read_bytes() for path in parts)
    assert target.stat().st_size < 400_000


def test_a_signal_asks_how_far_it_is(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"\1" * (4 * MIB))
    words = ["convert", "-f", "raw", "-O", "qcow2", "-r", "4M", source, tmp_path / "target"]
    with subprocess.Popen([*VMBUS_IMG, *map(str, words)], stdout=subprocess.PIPE) as running:
        assert running.stdout is not None
        os.set_blocking(running.stdout.fileno(), False)
        seen = None
        while not seen and running.poll() is None:
            # Before the target is there nobody listens to the signal.
            if (tmp_path / "target").exists():
                time.sleep(0.1)
                running.send_signal(signal.SIGUSR1)
            time.sleep(0.05)
            seen = running.stdout.read()
        assert seen is not None
        assert b"/100%)" in seen
        running.wait(timeout=20)
    assert running.returncode == 0
