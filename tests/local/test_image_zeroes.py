# SPDX-License-Identifier: Apache-2.0
"""Writes of zeros that become zeroings, beside QEMU's detect-zeroes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.local.image_bed import qemu
from vmbus import image
from vmbus.cli import img
from vmbus.image import DETECT_ZEROES, DetectZeroes
from vmbus.wire.dbus_form import parse_disk
from vmbus.wire.errors import VmbusError

pytestmark = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="qemu-img (package qemu-utils)")
MIB = 1 << 20
KIB = 1 << 10


def data_clusters(path: Path) -> set[int]:
    """The clusters of the image itself that are mapped as data. (qemu-img map looks for holes in them.)"""
    found: set[int] = set()
    with image.open(str(path), "qcow2", read_only=True) as disk:
        for one in disk.map():
            if one["data"] and one["depth"] == 0:
                found.update(range(one["start"] >> 16, (one["start"] + one["length"] - 1 >> 16) + 1))
    return found


@pytest.mark.parametrize("mode", DETECT_ZEROES)
@pytest.mark.parametrize("backing", [False, True])
def test_a_write_of_zeros_is_what_qemu_makes_of_it(tmp_path: Path, mode: DetectZeroes, backing: bool) -> None:
    mine, theirs, base = (tmp_path / name for name in ("mine", "theirs", "base"))
    base.write_bytes(b"\x55" * (4 * MIB))
    below = ["-b", str(base), "-F", "raw"] if backing else []
    qemu("qemu-img", "create", "-q", "-f", "qcow2", *below, mine, "4M")
    qemu("qemu-io", "-c", "write -P 7 1M 1M", mine)
    shutil.copy(mine, theirs)
    ranges = [(MIB, 128 * KIB), (0, 64 * KIB), (3 * MIB + 4096, 256 * KIB), (2 * MIB - 1000, 2000)]
    with image.open(str(mine), "qcow2", detect_zeroes=mode) as disk:
        for start, length in ranges:
            disk.write(start, bytes(length))
    options = f"driver=qcow2,detect-zeroes={mode},discard=unmap,file.driver=file,file.filename={theirs}"
    words = [part for start, length in ranges for part in ("-c", f"write -P 0 {start} {length}")]
    qemu("qemu-io", "--image-opts", *words, options)
    qemu("qemu-img", "compare", mine, theirs)
    assert data_clusters(mine) == data_clusters(theirs)
    qemu("qemu-img", "check", mine)


def test_one_byte_is_enough_to_be_written(tmp_path: Path) -> None:
    path = tmp_path / "image"
    image.create(str(path), size=MIB)
    with image.open(str(path), "qcow2", detect_zeroes="unmap") as disk:
        disk.write(0, bytes(64 * KIB - 1) + b"\1")
        disk.write(128 * KIB, bytes(64 * KIB))
    assert data_clusters(path) == {0}


def test_raw_images_get_holes(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(b"\1" * (4 * MIB))
    with image.open(str(path), "raw", detect_zeroes="unmap") as disk:
        disk.write(0, bytes(3 * MIB))
        disk.flush()
    assert path.read_bytes() == bytes(3 * MIB) + b"\1" * MIB
    assert path.stat().st_blocks * 512 < 2 * MIB


@pytest.mark.parametrize(("mode", "allocated"), [("off", True), ("on", False), ("unmap", False)])
def test_bench_takes_the_option(tmp_path: Path, mode: str, allocated: bool) -> None:
    path = tmp_path / "image"
    image.create(str(path), size=MIB)
    words = ["bench", "-w", "-c", "16", "-s", "64k", "--detect-zeroes", mode, str(path)]
    assert img.main(words) == 0
    assert bool(data_clusters(path)) == allocated


def test_a_disk_of_a_definition_says_what_becomes_of_zeros() -> None:
    form = {"id": "d", "layers": [{"format": "raw", "path": "/d"}], "detect-zeroes": "unmap"}
    assert parse_disk(form).detect_zeroes == "unmap"
    with pytest.raises(VmbusError, match="detect-zeroes"):
        parse_disk({**form, "detect-zeroes": "perhaps"})
