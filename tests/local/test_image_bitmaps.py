# SPDX-License-Identifier: Apache-2.0
"""Persistent bitmaps beside QEMU's: what one records the other reads."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.local.image_bed import MIB, clean, ours, qemu, serves
from vmbus import image
from vmbus.wire.errors import VmbusError

pytestmark = pytest.mark.skipif(
    shutil.which("qemu-img") is None or shutil.which("nbdinfo") is None,
    reason="qemu-img (package qemu-utils) and nbdinfo (package libnbd-bin)",
)
KIB = 1 << 10


def listed(path: Path) -> list[dict[str, Any]]:
    """The bitmaps as QEMU lists them; ours are the same."""
    data = json.loads(qemu("qemu-img", "info", "--output=json", path))["format-specific"]["data"]
    found: list[dict[str, Any]] = data.get("bitmaps", [])
    mine = image.info(str(path), "qcow2")["qcow2"]["bitmaps"]
    assert mine == found
    return found


@contextlib.contextmanager
def served(path: Path, bitmap: str, *words: str) -> Iterator[str]:
    """An NBD server with one bitmap: QEMU's, or with words that one."""
    socket = path.with_suffix(".socket")
    command: list[str | Path] = [*words] or [
        "qemu-nbd",
        "-r",
        "-f",
        "qcow2",
        "-t",
        "-B",
        bitmap,
        "-k",
        str(socket),
        str(path),
    ]
    server = subprocess.Popen([*command])
    try:
        assert serves(server, socket)
        yield f"nbd+unix:///?socket={socket}"
    finally:
        server.terminate()
        server.wait(60)
        socket.unlink(missing_ok=True)


def dirty(path: Path, bitmap: str) -> list[tuple[int, int]]:
    """The dirty ranges as QEMU's server has them; ours and our server's are the same."""
    socket = path.with_suffix(".socket")
    serve = [sys.executable, "-m", "vmbus.cli.img", "serve", "-t", "-r", "-f", "qcow2", "-B", bitmap]
    seen = []
    for words in ([], [*serve, "-k", str(socket), str(path)]):
        with served(path, bitmap, *words) as uri:
            found = json.loads(qemu("nbdinfo", "--json", f"--map=qemu:dirty-bitmap:{bitmap}", uri))
            seen.append([(one["offset"], one["length"]) for one in found if one["type"] == 1])
    with image.open(str(path), "qcow2", read_only=True) as disk:
        seen.append(list(disk.dirty_ranges(bitmap)))
    assert seen[0] == seen[1] == seen[2]
    return seen[0]


def abandon(path: Path) -> None:
    """Write to an image and end without closing it.

    The kernel takes a ring's files, and so the locks, apart after the process has gone.
    """
    script = "import os, sys; from vmbus import image\n"
    script += "image.open(sys.argv[1], 'qcow2').write(0, b'x'); os._exit(0)"
    subprocess.run([sys.executable, "-c", script, path], check=True)
    deadline = time.monotonic() + 10
    while subprocess.run(["qemu-img", "info", path], capture_output=True, check=False).returncode:
        assert time.monotonic() < deadline, "it is still locked"
        time.sleep(0.01)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    made = tmp_path / "image"
    ours("create", "-q", "-f", "qcow2", made, "10M")
    return made


@pytest.mark.parametrize("by", ["ours", "theirs"])
def test_a_bitmap_records_what_both_write(path: Path, by: str) -> None:
    add: list[str | Path] = ["bitmap", "--add", "-g", "4k", path, "b"]
    if by == "ours":
        ours(*add)
    else:
        qemu("qemu-img", *add)
    assert listed(path) == [{"flags": ["auto"], "name": "b", "granularity": 4096}]
    qemu("qemu-io", "-c", "write 1M 5000", path)
    with image.open(str(path), "qcow2") as disk:
        disk.write(3 * MIB, b"x")
        disk.write_zeroes(4 * MIB, 64 * KIB)
        disk.discard(5 * MIB, 64 * KIB)
        assert next(disk.dirty_ranges("b", 2 * MIB)) == (3 * MIB, 4096)
    clean(path)
    ours("bitmap", "--disable", path, "b")
    assert dirty(path, "b") == [
        (MIB, 8 * KIB),
        (3 * MIB, 4 * KIB),
        (4 * MIB, 64 * KIB),
        (5 * MIB, 64 * KIB),
    ]
    ours("bitmap", "--clear", path, "b")
    assert dirty(path, "b") == []
    ours("bitmap", "--remove", path, "b")
    assert listed(path) == []
    clean(path)


def test_merging_keeps_what_both_say_whatever_their_granularity(path: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    ours("create", "-q", "-f", "qcow2", "-o", "cluster_size=512", other, "10M")
    ours("bitmap", "--add", "-g", "512", other, "fine")
    qemu("qemu-io", "-c", "write 7M 512", "-c", "write 100k 200k", other)
    ours("bitmap", "--add", path, "coarse")
    qemu("qemu-io", "-c", "write 1M 1k", path)
    twin = tmp_path / "twin"
    shutil.copy(path, twin)
    merge: list[str | Path] = ["bitmap", "--disable", "--merge", "fine", "-b", other, "-F", "qcow2"]
    ours(*merge, path, "coarse")
    qemu("qemu-img", *merge, twin, "coarse")
    assert dirty(path, "coarse") == dirty(twin, "coarse")
    assert len(dirty(path, "coarse")) == 3
    clean(path)
    ours("bitmap", "--add", "--disable", "--merge", "coarse", "-g", "1M", path, "second")
    assert dirty(path, "second") == [(0, 2 * MIB), (7 * MIB, MIB)]


def test_a_bitmap_that_was_not_closed_can_only_be_removed(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours("bitmap", "--add", path, "b")
    abandon(path)
    assert listed(path)[0]["flags"] == ["in-use", "auto"]
    with image.open(str(path), "qcow2") as disk, pytest.raises(VmbusError, match="inconsistent"):
        list(disk.dirty_ranges("b"))
    for action in ("--clear", "--enable", "--disable"):
        ours("bitmap", action, path, "b", code=1)
        qemu("qemu-img", "bitmap", action, path, "b", code=1)
    ours("bitmap", "--add", "--merge", "b", path, "other", code=1)
    ours("resize", path, "+1M", code=1)
    assert "inconsistent" in capsys.readouterr().err
    ours("bitmap", "--remove", path, "b")
    ours("resize", "-q", path, "+1M")
    assert [one["name"] for one in listed(path)] == ["other"]
    subprocess.run(["qemu-img", "check", "-q", "-r", "leaks", path], check=False)
    clean(path)


def test_bitmaps_change_their_size_with_the_disk(path: Path, tmp_path: Path) -> None:
    ours("bitmap", "--add", "-g", "512", path, "on")
    ours("bitmap", "--add", "--disable", "-g", "64k", path, "off")
    qemu("qemu-io", "-c", "write 0 10M", path)
    twin = tmp_path / "twin"
    shutil.copy(path, twin)
    for length in ("3M", "1G", "100G"):
        ours("resize", "-q", "--shrink", path, length)
        qemu("qemu-img", "resize", "-q", "--shrink", twin, length)
        clean(path)
    ours("resize", "-q", path, "5T", code=1)
    for one in (path, twin):
        ours("bitmap", "--disable", one, "on")
    assert dirty(path, "on") == dirty(twin, "on") == [(0, 3 * MIB)]
    assert dirty(path, "off") == []


def test_a_program_that_knows_no_bitmaps_makes_them_worthless(path: Path) -> None:
    ours("bitmap", "--add", path, "b")
    with path.open("r+b") as file:
        file.seek(88)
        file.write(bytes(8))  # what such a program does to the autoclear bits
    assert listed(path) == []
    ours("check", "-q", path, code=3)
    ours("check", "-q", "-r", "leaks", path)
    clean(path)
    ours("bitmap", "--add", path, "b")
    assert len(listed(path)) == 1
    clean(path)


def test_convert_carries_bitmaps_and_leaves_broken_ones_out(path: Path, tmp_path: Path) -> None:
    ours("bitmap", "--add", path, "b")
    ours("bitmap", "--add", "--disable", "-g", "4k", path, "c")
    qemu("qemu-io", "-c", "write 2M 1M", path)
    mine, theirs = tmp_path / "mine", tmp_path / "theirs"
    words: list[str | Path] = ["convert", "-f", "qcow2", "-O", "qcow2", "--bitmaps"]
    ours(*words, path, mine)
    qemu("qemu-img", *words, path, theirs)
    assert listed(mine) == listed(theirs)
    for one in (mine, theirs):
        ours("bitmap", "--disable", one, "b")
    assert dirty(mine, "b") == dirty(theirs, "b") == [(2 * MIB, MIB)]
    clean(mine)
    abandon(path)
    assert listed(path)[0]["flags"] == ["in-use", "auto"]
    ours(*words, path, mine, code=1)
    ours(*words, "--skip-broken-bitmaps", path, mine)
    assert [one["name"] for one in listed(mine)] == ["c"]
    ours("convert", "-f", "qcow2", "-O", "raw", "--bitmaps", path, mine, code=1)


def test_measure_plans_the_room_of_bitmaps(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, granularity in (("one", "512"), ("a-longer-name", "64k")):
        ours("bitmap", "--add", "-g", granularity, path, name)
    for options in ("cluster_size=64k", "cluster_size=512", "cluster_size=2M"):
        command: list[str | Path] = ["measure", "-O", "qcow2", "-o", options, "-f", "qcow2", str(path)]
        ours(*command)
        assert capsys.readouterr().out == qemu("qemu-img", *command)


def test_going_back_to_a_snapshot_is_refused_while_there_are_bitmaps(path: Path) -> None:
    ours("snapshot", "-c", "one", path)
    ours("bitmap", "--add", path, "b")
    ours("snapshot", "-a", "one", path, code=1)
    qemu("qemu-img", "snapshot", "-a", "one", path, code=1)
    ours("snapshot", "-d", "one", path)
    clean(path)


@pytest.mark.parametrize(
    "words",
    [
        ["--add", "b"],
        ["--add", "-g", "100", "new"],
        ["--add", "-g", "4G", "new"],
        ["--add", "x" * 1024],
        ["--remove", "none"],
        ["--clear", "none"],
        ["--merge", "none", "b"],
        ["-g", "4k", "--clear", "b"],
        ["b"],
        ["-b", "{image}", "--clear", "b"],
        ["-F", "qcow2", "--merge", "b", "b"],
    ],
    ids=str,
)
def test_wrong_words_are_refused_as_qemu_refuses_them(path: Path, words: list[str]) -> None:
    ours("bitmap", "--add", path, "b")
    before = path.read_bytes()
    *options, name = [word.format(image=path) for word in words]
    qemu("qemu-img", "bitmap", *options, path, name, code=1)
    clean(path)
    path.write_bytes(before)
    ours("bitmap", *options, path, name, code=1)
    assert [one["name"] for one in listed(path)] == ["b"]
    clean(path)


def test_random_writes_by_both_are_all_recorded(path: Path) -> None:
    numbers = random.Random(3)
    ours("bitmap", "--add", "-g", "512", path, "b")
    seen = bytearray(10 * MIB // 512)
    for turn in range(6):
        places = [(numbers.randrange(20000), numbers.randrange(1, 400)) for _ in range(20)]
        for first, count in places:
            seen[first : first + count] = b"\1" * count
        if turn % 2:
            words = [f"write {first * 512} {count * 512}" for first, count in places]
            qemu("qemu-io", *(part for word in words for part in ("-c", word)), path)
            continue
        with image.open(str(path), "qcow2") as disk:
            for first, count in places:
                disk.write(first * 512, b"y" * (count * 512))
    ours("bitmap", "--disable", path, "b")
    found = bytearray(len(seen))
    for start, length in dirty(path, "b"):
        found[start // 512 : (start + length) // 512] = b"\1" * (length // 512)
    assert found == seen
    clean(path)
