# SPDX-License-Identifier: Apache-2.0
"""vmbus-img beside qemu-img: what one makes the other reads, checks and compares."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests.local.image_bed import MIB, clean, ours, qemu
from vmbus import image

pytestmark = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="qemu-img (package qemu-utils)")


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """8 MiB of noise, text-like data and holes."""
    path = tmp_path / "source.raw"
    numbers = random.Random(7)
    with path.open("wb") as file:
        file.truncate(8 * MIB)
        for start in range(0, 8 * MIB, 512 * 1024):
            kind = numbers.randrange(3)
            file.seek(start)
            if kind == 0:
                file.write(numbers.randbytes(300_000))
            elif kind == 1:
                file.write(b"the same words again and again, " * 9000)
    return path


CREATE = [
    "cluster_size=64k",
    "compat=0.10",
    "cluster_size=512,refcount_bits=1",
    "cluster_size=2M,refcount_bits=64,lazy_refcounts=on",
    "compression_type=zstd",
    "preallocation=metadata",
    "preallocation=falloc,cluster_size=4k",
    "preallocation=full",
    "data_file={dir}/data,data_file_raw=on",
    "preallocation=metadata,data_file={dir}/data",
    "extended_l2=on",
    "extended_l2=on,cluster_size=16k,preallocation=metadata",
]


@pytest.mark.parametrize("options", CREATE)
def test_qemu_finds_nothing_wrong_with_a_new_image(tmp_path: Path, options: str) -> None:
    path = tmp_path / "image"
    ours("create", "-q", "-f", "qcow2", "-o", options.format(dir=tmp_path), path, "20M")
    clean(path)
    theirs = json.loads(qemu("qemu-img", "info", "--output=json", path))
    assert theirs["virtual-size"] == 20 * MIB


@pytest.mark.parametrize(
    "options",
    ["cluster_size=1k", "refcount_bits=8", "compat=0.10", "compression_type=zstd", "extended_l2=on"],
)
def test_info_says_what_qemu_says(tmp_path: Path, capsys: pytest.CaptureFixture[str], options: str) -> None:
    base, path = tmp_path / "base", tmp_path / "image"
    qemu("qemu-img", "create", "-f", "raw", base, "3M")
    qemu("qemu-img", "create", "-f", "qcow2", "-o", options, "-b", base, "-F", "raw", path)
    qemu("qemu-img", "snapshot", "-c", "one", path)
    theirs = json.loads(qemu("qemu-img", "info", "--output=json", path))
    ours("info", "--output=json", path)
    mine = json.loads(capsys.readouterr().out)
    assert mine == theirs
    ours("info", path)
    assert "virtual size: 3 MiB (3145728 bytes)" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["-c"],
        ["-c", "-o", "compression_type=zstd"],
        ["-o", "cluster_size=2k"],
        ["-o", "extended_l2=on"],
        ["-c", "-o", "extended_l2=on,cluster_size=16k"],
    ],
)
def test_convert_goes_both_ways(tmp_path: Path, raw: Path, flags: list[str]) -> None:
    mine, theirs, back = tmp_path / "mine", tmp_path / "theirs", tmp_path / "back"
    ours("convert", "-q", "-f", "raw", "-O", "qcow2", *flags, raw, mine)
    clean(mine)
    qemu("qemu-img", "compare", "-f", "raw", "-F", "qcow2", raw, mine)
    qemu("qemu-img", "convert", "-f", "raw", "-O", "qcow2", *flags, raw, theirs)
    ours("compare", "-q", "-f", "raw", "-F", "qcow2", raw, theirs)
    ours("convert", "-f", "qcow2", "-O", "raw", theirs, back)
    assert back.read_bytes() == raw.read_bytes()
    if "-c" in flags:
        assert mine.stat().st_size < theirs.stat().st_size * 1.1


def test_what_cannot_be_read_is_salvaged_as_zeros(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words, path = tmp_path / "words", tmp_path / "packed"
    words.write_bytes(b"the same words again and again, " * 16384)
    qemu("qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-c", words, path)
    content = path.read_bytes()
    l2 = int.from_bytes(_bytes(path, int.from_bytes(_bytes(path, 40, 8), "big"), 8), "big") & (1 << 56) - 512
    packed = int.from_bytes(content[l2 + 16 : l2 + 24], "big") & (1 << 54) - 1
    _patch(path, packed, b"\xff" * 16)  # the third cluster expands to nothing any more
    mine, theirs = tmp_path / "mine", tmp_path / "theirs"
    ours("convert", "-f", "qcow2", "-O", "raw", path, mine, code=1)
    ours("convert", "-f", "qcow2", "-O", "raw", "--salvage", path, mine)
    assert "65536 bytes could not be read" in capsys.readouterr().err
    qemu("qemu-img", "convert", "-f", "qcow2", "-O", "raw", "--salvage", path, theirs)
    assert mine.read_bytes() == theirs.read_bytes()
    ours("convert", "-f", "qcow2", "-O", "raw", "--salvage", "-C", path, mine, code=1)


def test_a_conversion_keeps_to_its_rate(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"\1" * (4 * MIB))
    begun = time.monotonic()
    ours("convert", "-f", "raw", "-O", "qcow2", "-r", "8M", source, tmp_path / "target")
    assert time.monotonic() - begun > 0.45
    ours("compare", "-q", "-f", "raw", "-F", "qcow2", source, tmp_path / "target")


def test_compare_tells_where_and_how(tmp_path: Path, raw: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other"
    shutil.copy(raw, other)
    with other.open("r+b") as file:
        file.seek(5 * MIB + 700)
        file.write(b"?")
    ours("compare", raw, other, code=1)
    assert capsys.readouterr().out == f"Content mismatch at offset {5 * MIB + 512}!\n"
    shutil.copy(raw, other)
    with other.open("r+b") as file:
        file.truncate(9 * MIB)
    ours("compare", raw, other)
    assert capsys.readouterr().out == "Warning: Image size mismatch!\nImages are identical.\n"
    ours("compare", "-s", raw, other, code=1)
    ours("compare", raw, tmp_path / "none", code=2)


@pytest.mark.parametrize(
    "operands",
    [[], ["bs=1M", "count=3"], ["bs=1000", "skip=77"], ["bs=64k", "skip=20", "count=90"], ["skip=99999"]],
)
def test_dd_copies_what_qemus_copies(tmp_path: Path, raw: Path, operands: list[str]) -> None:
    mine, theirs = tmp_path / "mine", tmp_path / "theirs"
    for format in image.FORMATS:
        ours("dd", "-f", "raw", "-O", format, *operands, f"if={raw}", f"of={mine}")
        qemu("qemu-img", "dd", "-f", "raw", "-O", format, *operands, f"if={raw}", f"of={theirs}")
        assert (
            image.info(str(mine), format)["virtual-size"] == image.info(str(theirs), format)["virtual-size"]
        )
        qemu("qemu-img", "compare", "-f", format, "-F", format, mine, theirs)


def test_map_is_qemus(tmp_path: Path, raw: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, top = tmp_path / "base", tmp_path / "top"
    qemu("qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-c", raw, base)
    qemu("qemu-img", "create", "-f", "qcow2", "-b", base, "-F", "qcow2", top, "9M")
    qemu("qemu-io", "-c", "write 100k 1M", "-c", "write -z 3M 1M", "-c", "discard 5M 64k", top)
    for options in ([], ["-s", "1M", "-l", "2M"]):
        theirs = json.loads(qemu("qemu-img", "map", "--output=json", *options, top))
        ours("map", "--output=json", *options, top)
        assert _joined(json.loads(capsys.readouterr().out)) == _joined(theirs)


def test_a_write_copies_only_the_subclusters_that_it_cuts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, mine, theirs = tmp_path / "base", tmp_path / "mine", tmp_path / "theirs"
    base.write_bytes(b"\x55" * MIB)
    for path in (mine, theirs):
        qemu("qemu-img", "create", "-f", "qcow2", "-o", "extended_l2=on", "-b", base, "-F", "raw", path)
    words = ["-c", "write -P 1 5k 1k", "-c", "write -P 2 30k 512", "-c", "write -z 8k 6k"]
    qemu("qemu-io", *words, theirs)
    with image.open(str(mine), "qcow2") as disk:
        disk.write(5 * 1024, b"\1" * 1024)
        disk.write(30 * 1024, b"\2" * 512)
        disk.write_zeroes(8 * 1024, 6 * 1024)
    clean(mine)
    qemu("qemu-img", "compare", "-f", "qcow2", "-F", "qcow2", mine, theirs)
    ours("map", "--output=json", mine)
    seen = json.loads(capsys.readouterr().out)
    assert seen == json.loads(qemu("qemu-img", "map", "--output=json", theirs))
    assert sum(one["length"] for one in seen if one["depth"] == 0 and one["data"]) == 2 * 2048


def test_subclusters_of_a_preallocated_overlay_are_the_backing_files(tmp_path: Path) -> None:
    base, path = tmp_path / "base", tmp_path / "top"
    base.write_bytes(b"\x55" * MIB)
    words: list[str | Path] = ["-b", base, "-F", "raw", path, "2M"]
    ours("create", "-q", "-f", "qcow2", "-o", "extended_l2=on,preallocation=falloc", *words)
    clean(path)
    assert path.stat().st_blocks * 512 > 2 * MIB
    with image.open(str(path), "qcow2") as disk:
        assert disk.read(0, 2 * MIB) == b"\x55" * MIB + bytes(MIB)
        disk.write(1000 * 1024, b"\1" * 60000)
    clean(path)
    io = ["-c", "read -P 0x55 0 1000k", "-c", "read -P 1 1000k 60000", "-c", "read -P 0 1084000 1000000"]
    assert "failed" not in qemu("qemu-io", *io, path)
    ours("create", "-q", "-f", "qcow2", "-o", "preallocation=full", *words, code=1)


def _joined(ranges: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Compressed ranges have no offset: neighbours may be one range or several."""
    joined: list[dict[str, Any]] = []
    for one in ranges:
        last = joined[-1] if joined else None
        kind = {key: value for key, value in one.items() if key not in {"start", "length"}}
        if (
            last
            and "offset" not in one
            and kind == {k: last[k] for k in last if k not in {"start", "length"}}
        ):
            last["length"] += one["length"]
        else:
            joined.append(dict(one))
    return joined


@pytest.mark.parametrize(
    "options",
    [
        "cluster_size=64k",
        "cluster_size=512,refcount_bits=1",
        "cluster_size=2M",
        "preallocation=full",
        "extended_l2=on",
        "extended_l2=on,cluster_size=16k",
    ],
)
def test_measure_gives_qemus_numbers(
    tmp_path: Path, raw: Path, capsys: pytest.CaptureFixture[str], options: str
) -> None:
    packed = tmp_path / "packed"
    qemu("qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-c", raw, packed)
    for words in (["--size", "3G"], ["--size", "700k"], ["-f", "raw", raw], ["-f", "qcow2", packed]):
        command = ["measure", "-O", "qcow2", "-o", options, *words]
        ours(*command)
        assert capsys.readouterr().out == qemu("qemu-img", *command), words
        ours(*command, "--output=json")
        assert json.loads(capsys.readouterr().out) == json.loads(qemu("qemu-img", *command, "--output=json"))


def test_snapshots_go_both_ways(tmp_path: Path, raw: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "image"
    ours("convert", "-f", "raw", "-O", "qcow2", raw, path)
    ours("snapshot", "-c", "first", path)
    clean(path)
    qemu("qemu-io", "-c", "write -P 9 0 3M", path)
    qemu("qemu-img", "snapshot", "-c", "second", path)
    ours("snapshot", "-l", path)
    listed = capsys.readouterr().out
    assert listed == qemu("qemu-img", "snapshot", "-l", path)
    ours("snapshot", "-a", "first", path)
    clean(path)
    qemu("qemu-img", "compare", "-f", "raw", "-F", "qcow2", raw, path)
    ours("convert", "-f", "qcow2", "-l", "second", "-O", "raw", path, tmp_path / "second")
    assert (tmp_path / "second").read_bytes()[: 3 * MIB] == bytes([9]) * 3 * MIB
    ours("snapshot", "-d", "first", path)
    clean(path)
    qemu("qemu-img", "snapshot", "-a", "second", path)
    ours("snapshot", "-d", "second", path)
    clean(path)
    assert qemu("qemu-img", "snapshot", "-l", path) == ""
    ours("snapshot", "-d", "second", path, code=1)


def test_resize_shows_neither_old_data_nor_the_backing_file(tmp_path: Path) -> None:
    base, path = tmp_path / "base", tmp_path / "image"
    base.write_bytes(b"\x55" * (4 * MIB))
    ours("create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", path, "1M")
    qemu("qemu-io", "-c", "write -P 3 900k 100k", path)
    ours("resize", "-q", path, "950k", code=1)
    ours("resize", "-q", "--shrink", path, "950k")
    clean(path)
    ours("resize", "-q", path, "+3M")
    clean(path)
    qemu("qemu-io", "-c", "read -P 0x55 0 900k", "-c", "read -P 3 900k 50k", "-c", "read -P 0 950k 3M", path)
    text = qemu("qemu-io", "-c", "read -P 3 900k 50k", "-c", "read -P 0 950k 3M", path)
    assert "failed" not in text


def test_discarded_space_goes_back_to_the_host(tmp_path: Path) -> None:
    path = tmp_path / "image"
    image.create(str(path), size=64 * MIB)
    with image.open(str(path), "qcow2") as disk:
        disk.write(0, b"\x11" * (32 * MIB))
        disk.flush()
        full = path.stat().st_blocks * 512
        disk.discard(0, 24 * MIB)
        disk.flush()
    assert full > 32 * MIB
    assert path.stat().st_blocks * 512 < 9 * MIB
    clean(path)
    assert "failed" not in qemu("qemu-io", "-c", "read -P 0 0 24M", "-c", "read -P 0x11 24M 8M", path)


def test_a_grown_image_takes_a_larger_l1_table(tmp_path: Path) -> None:
    path = tmp_path / "image"
    ours("create", "-q", "-f", "qcow2", "-o", "cluster_size=512", path, "1M")
    qemu("qemu-io", "-c", "write -P 7 0 1M", path)
    ours("resize", "-q", path, "700M")
    clean(path)
    assert "failed" not in qemu("qemu-io", "-c", "read -P 7 0 1M", "-c", "write -P 8 699M 1M", path)
    clean(path)


def test_commit_empties_the_overlay_and_fills_the_base(tmp_path: Path, raw: Path) -> None:
    base, top = tmp_path / "base", tmp_path / "top"
    ours("convert", "-f", "raw", "-O", "qcow2", raw, base)
    ours("create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", top, "10M")
    qemu("qemu-io", "-c", "write -P 4 1M 2M", "-c", "write -z 4M 1M", "-c", "write -P 5 9M 1M", top)
    qemu("qemu-img", "convert", "-O", "raw", top, tmp_path / "seen")
    ours("commit", "-q", top)
    clean(base)
    clean(top)
    qemu("qemu-img", "compare", "-f", "raw", "-F", "qcow2", tmp_path / "seen", base)
    qemu("qemu-img", "compare", "-f", "raw", "-F", "qcow2", tmp_path / "seen", top)
    assert all(one["depth"] == 1 for one in json.loads(qemu("qemu-img", "map", "--output=json", top)))


@pytest.mark.parametrize("new", ["other", ""])
def test_rebase_keeps_what_is_seen(tmp_path: Path, raw: Path, new: str) -> None:
    base, other, top = tmp_path / "base", tmp_path / "other", tmp_path / "top"
    ours("convert", "-f", "raw", "-O", "qcow2", raw, base)
    ours("create", "-q", "-f", "qcow2", other, "6M")
    qemu("qemu-io", "-c", "write -P 1 0 6M", other)
    ours("create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", top)
    qemu("qemu-io", "-c", "write -P 4 1M 64k", top)
    qemu("qemu-img", "convert", "-O", "raw", top, tmp_path / "seen")
    ours("rebase", "-q", "-b", tmp_path / new if new else "", "-F", "qcow2", top)
    clean(top)
    qemu("qemu-img", "compare", "-f", "raw", "-F", "qcow2", tmp_path / "seen", top)
    described = json.loads(qemu("qemu-img", "info", "--output=json", top))
    assert described.get("backing-filename") == (str(tmp_path / new) if new else None)


def test_check_finds_and_repairs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "image"
    ours("create", "-q", "-f", "qcow2", path, "4M")
    qemu("qemu-io", "-c", "write -P 6 0 2M", path)
    block = int.from_bytes(_bytes(path, int.from_bytes(_bytes(path, 48, 8), "big"), 8), "big")
    _patch(path, block + 2 * 60, b"\0\1")  # a leak behind the end
    _patch(path, block + 2 * 8, b"\0\0")  # a cluster in use that is not counted
    ours("check", "--output=json", path, code=2)
    found = json.loads(capsys.readouterr().out)
    assert (found["leaks"], found["corruptions"]) == (1, 2)
    theirs = subprocess.run(["qemu-img", "check", "--output=json", path], capture_output=True, check=False)
    assert theirs.returncode == 2
    ours("check", "-q", "-r", "all", path)
    clean(path)
    assert "failed" not in qemu("qemu-io", "-c", "read -P 6 0 2M", path)


def _bytes(path: Path, offset: int, length: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(length)


def _patch(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def test_an_image_that_was_not_closed_is_repaired_before_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "image"
    ours("create", "-q", "-f", "qcow2", "-o", "lazy_refcounts=on", path, "8M")
    words = ["qemu-io", "-c", "write -P 6 1M 2M", "-c", "flush", "-c", "abort", path]
    subprocess.run([str(word) for word in words], capture_output=True, check=False)
    assert json.loads(qemu("qemu-img", "info", "--output=json", path))["dirty-flag"]
    ours("resize", "-q", path, "9M")
    clean(path)
    assert not json.loads(qemu("qemu-img", "info", "--output=json", path))["dirty-flag"]
    assert "failed" not in qemu("qemu-io", "-c", "read -P 6 1M 2M", path)


@pytest.mark.parametrize(
    ("offset", "value", "said"),
    [
        (0, b"QFI\xfa", "not in qcow2 format"),
        (4, b"\0\0\0\x04", "version 4"),
        (20, b"\0\0\0\x40", "cluster size"),
        (36, b"\x7f\xff\xff\xff", "L1 table"),
        (40, b"\0\0\0\0\0\0\0\x01", "L1 table"),
        (48, b"\xff" * 8, "refcount table"),
        (56, b"\xff" * 4, "refcount table"),
        (60, b"\xff" * 4, "snapshots"),
        (72, b"\0\0\0\0\0\0\1\0", "bit 8"),
        (72, b"\0\0\0\0\0\0\0\x20", "bit 5"),
        (96, b"\0\0\0\x07", "refcount width"),
        (100, b"\xff" * 4, "header length"),
    ],
)
def test_a_hostile_header_is_a_named_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], offset: int, value: bytes, said: str
) -> None:
    path = tmp_path / "image"
    ours("create", "-q", "-f", "qcow2", path, "4M")
    _patch(path, offset, value)
    ours("info", "-f", "qcow2", path, code=1)
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(("offset", "value"), [(40, 0xB601003000 & ~0xFFFF), (48, 1 << 40)])
def test_tables_beyond_the_end_of_the_file_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], offset: int, value: int
) -> None:
    path = tmp_path / "image"
    ours("create", "-q", "-f", "qcow2", path, "4M")
    _patch(path, offset, value.to_bytes(8, "big"))
    ours("bench", "-w", "-c", "1", path, code=1)
    assert "cut short" in capsys.readouterr().err
    assert path.stat().st_size < MIB


def test_a_pointer_beyond_the_end_of_the_file_is_not_written_through(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "image"
    ours("create", "-q", "-f", "qcow2", path, "4M")
    l1 = int.from_bytes(_bytes(path, 40, 8), "big")
    _patch(path, l1, (1 << 63 | 1 << 40).to_bytes(8, "big"))
    ours("bench", "-w", "-c", "1", path, code=1)
    assert "beyond the end" in capsys.readouterr().err
    assert path.stat().st_size < MIB


def test_a_chain_that_loops_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    ours("create", "-q", "-f", "qcow2", one, "1M")
    ours("create", "-q", "-f", "qcow2", "-b", one, "-F", "qcow2", other)
    ours("rebase", "-u", "-b", other, "-F", "qcow2", one)
    ours("map", one, code=1)
    assert "loop" in capsys.readouterr().err


def test_a_chain_deeper_than_two_hundred_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image.create(str(tmp_path / "0"), size=MIB)
    for n in range(1, 202):
        image.create(str(tmp_path / str(n)), size=MIB, backing_name=str(n - 1), backing_format="qcow2")
    for command in (["map"], ["info", "--backing-chain"], ["convert", "-O", "raw"], ["compare"]):
        target = [tmp_path / "target"] if command[0] == "convert" else [tmp_path / "0"]
        operands = target if command[0] in {"convert", "compare"} else []
        ours(*command, tmp_path / "201", *operands, code=2 if command[0] == "compare" else 1)
        assert "deeper than 200" in capsys.readouterr().err
    ours("map", tmp_path / "199")
    assert not (tmp_path / "target").exists()


def test_what_is_absent_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours("create", "-f", "qcow2", "-o", "extended_l2=on,cluster_size=8k", tmp_path / "x", "1M", code=1)
    assert "16k" in capsys.readouterr().err
