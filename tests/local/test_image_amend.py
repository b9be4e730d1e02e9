# SPDX-License-Identifier: Apache-2.0
"""Changing an image's options, beside qemu-img amend."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.local.image_bed import MIB, clean, ours, qemu
from vmbus import image

pytestmark = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="qemu-img (package qemu-utils)")


def described(path: Path) -> dict[str, Any]:
    """What QEMU says of the image, without its view of the file below."""
    found: dict[str, Any] = json.loads(qemu("qemu-img", "info", "--output=json", path))
    for name in ("children", "filename", "actual-size"):
        del found[name]
    return found


def make(place: Path, options: str = "", backing: str | None = None) -> tuple[Path, Path]:
    """An image with data, zeros and holes, and its twin."""
    mine, theirs = place / "mine", place / "theirs"
    words: list[str | Path] = ["qemu-img", "create", "-q", "-f", "qcow2"]
    words += ["-o", options] if options else []
    if backing:
        (place / "base").write_bytes(b"\x55" * (4 * MIB))
        words += ["-b", place / "base", "-F", "raw"]
    qemu(*words, mine, "4M")
    io = ["write -P 7 100k 1M", "write -z 200k 300k", "write -z -u 2M 128k", "write -P 8 3M 10k"]
    qemu("qemu-io", *(part for word in io for part in ("-c", word)), mine)
    shutil.copy(mine, theirs)
    return mine, theirs


@pytest.mark.parametrize(
    "changes",
    [
        ["compat=0.10"],
        ["compat=0.10", "compat=1.1"],
        ["lazy_refcounts=on", "lazy_refcounts=off"],
        ["lazy_refcounts=on", "compat=0.10"],
        ["refcount_bits=1"],
        ["refcount_bits=64", "refcount_bits=2"],
        ["size=6M", "size=3M"],
        ["refcount_bits=8,lazy_refcounts=on,size=5M"],
        ["refcount_bits=8", "compat=0.10,refcount_bits=16"],
    ],
    ids=str,
)
@pytest.mark.parametrize("backing", [None, "raw"])
def test_an_amended_image_is_as_qemus(tmp_path: Path, changes: list[str], backing: str | None) -> None:
    mine, theirs = make(tmp_path, backing=backing)
    seen = tmp_path / "seen"
    qemu("qemu-img", "convert", "-O", "raw", mine, seen)
    for change in changes:
        ours("amend", "-q", "-o", change, mine)
        qemu("qemu-img", "amend", "-o", change, theirs)
        clean(mine)
        assert described(mine) == described(theirs)
        qemu("qemu-img", "compare", mine, theirs)
    if not any("size" in change for change in changes):
        qemu("qemu-img", "compare", "-f", "raw", "-F", "qcow2", seen, mine)
    qemu("qemu-io", "-c", "write -P 9 1M 1M", mine)
    clean(mine)


REFUSED = [
    ("", "cluster_size=4k"),
    ("", "preallocation=full"),
    ("", "backing_file=x"),
    ("", "backing_fmt=raw"),
    ("", "data_file=x"),
    ("", "data_file_raw=on"),
    ("", "refcount_bits=7"),
    ("", "refcount_bits=128"),
    ("", "compat=9"),
    ("", "lazy_refcounts=maybe"),
    ("", "foo=bar"),
    ("", "extended_l2=on"),
    ("", "compression_type=zstd"),
    ("", "compat=0.10,lazy_refcounts=on"),
    ("compat=0.10", "lazy_refcounts=on"),
    ("compat=0.10", "refcount_bits=8"),
    ("refcount_bits=8", "compat=0.10"),
    ("extended_l2=on", "compat=0.10"),
]


@pytest.mark.parametrize(("options", "change"), REFUSED)
def test_what_qemu_refuses_is_refused_and_changes_nothing(tmp_path: Path, options: str, change: str) -> None:
    mine, theirs = make(tmp_path, options)
    before = described(mine)
    qemu("qemu-img", "amend", "-o", change, theirs, code=1)
    ours("amend", "-q", "-o", change, mine, code=1)
    assert described(mine) == before
    clean(mine)


def test_zstd_has_no_place_in_version_2(tmp_path: Path) -> None:
    # QEMU writes such an image, and then takes its clusters for zlib's.
    mine, _ = make(tmp_path, "compression_type=zstd")
    before = described(mine)
    ours("amend", "-q", "-o", "compat=0.10", mine, code=1)
    assert described(mine) == before


def test_refcounts_too_narrow_for_what_is_counted_are_refused(tmp_path: Path) -> None:
    mine, _ = make(tmp_path)
    ours("snapshot", "-c", "one", mine)
    ours("amend", "-q", "-o", "refcount_bits=1", mine, code=1)
    ours("amend", "-q", "-o", "refcount_bits=2", mine)
    clean(mine)
    ours("snapshot", "-d", "one", mine)
    clean(mine)


def test_snapshots_stand_in_the_way_of_a_downgrade_only_where_they_must(tmp_path: Path) -> None:
    mine, _ = make(tmp_path)
    ours("snapshot", "-c", "with zeros", mine)
    ours("amend", "-q", "-o", "compat=0.10", mine, code=1)
    clean(mine)
    other = tmp_path / "other"
    ours("create", "-q", "-f", "qcow2", other, "1M")
    qemu("qemu-io", "-c", "write -P 3 0 1M", other)
    ours("snapshot", "-c", "data", other)
    ours("amend", "-q", "-o", "compat=0.10", other)
    clean(other)
    ours("snapshot", "-a", "data", other)
    assert "failed" not in qemu("qemu-io", "-c", "read -P 3 0 1M", other)


def test_a_downgrade_takes_bitmaps_along_without_a_leak(tmp_path: Path) -> None:
    mine, _ = make(tmp_path)
    ours("bitmap", "--add", mine, "b")
    ours("amend", "-q", "-o", "compat=0.10", mine)
    clean(mine)
    assert "bitmaps" not in described(mine)["format-specific"]["data"]


def test_the_data_file_gets_another_name_and_gives_up_rawness(tmp_path: Path) -> None:
    path = tmp_path / "image"
    options = f"data_file={tmp_path}/old,data_file_raw=on"
    ours("create", "-q", "-f", "qcow2", "-o", options, path, "1M")
    qemu("qemu-io", "-c", "write -P 5 0 1M", path)
    shutil.copy(tmp_path / "old", tmp_path / "new")
    ours("amend", "-q", "-o", f"data_file={tmp_path}/new,data_file_raw=off", path)
    (tmp_path / "old").unlink()
    data = described(path)["format-specific"]["data"]
    assert (data["data-file"], data["data-file-raw"]) == (f"{tmp_path}/new", False)
    assert "failed" not in qemu("qemu-io", "-c", "read -P 5 0 1M", path)


def test_progress_is_shown_when_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine, _ = make(tmp_path)
    ours("amend", "-p", "-o", "lazy_refcounts=on", mine)
    assert "(100.00/100%)" in capsys.readouterr().out


def test_lazy_refcounts_survive_being_opened_and_repaired(tmp_path: Path) -> None:
    mine, _ = make(tmp_path, "lazy_refcounts=on")
    words = ["qemu-io", "-c", "write -P 6 1M 2M", "-c", "flush", "-c", "abort", str(mine)]
    subprocess.run(words, capture_output=True, check=False)
    assert described(mine)["dirty-flag"]
    with image.open(str(mine), "qcow2") as disk:
        assert disk.read(MIB, 2 * MIB) == b"\6" * (2 * MIB)
        disk.write(0, b"\1" * 512)
    clean(mine)
    seen = described(mine)
    assert not seen["dirty-flag"] and seen["format-specific"]["data"]["lazy-refcounts"]
    # Ours counts at once: an image of it that was not closed needs no repair.
    qemu("qemu-io", "-c", "write -P 2 0 1M", mine)
    clean(mine)
