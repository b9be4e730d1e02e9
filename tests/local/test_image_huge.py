# SPDX-License-Identifier: Apache-2.0
"""Disks of 2 PiB with next to nothing in them: what goes over a whole disk goes by its tables.

Nothing here looks at a clock: going by bytes, or by clusters, none of it would end within pytest's limit.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.local.image_bed import MIB, ours
from vmbus import image

SIZE = 2 << 50
# A table of a megabyte leads to the others instead of one of 32.
CLUSTER = MIB // 2
PLACES = {0: b"\1" * MIB, (1 << 50) + 4096: b"\2" * 8192, SIZE - 512: b"\3" * 512}


def fill(path: Path) -> Path:
    image.create(str(path), size=SIZE, cluster_size=CLUSTER)
    with image.open(str(path), "qcow2") as disk:
        for at, data in PLACES.items():
            disk.write(at, data)
    return path


def holds(path: Path, places: dict[int, bytes] = PLACES) -> None:
    with image.open(str(path), "qcow2", read_only=True) as disk:
        for at, data in places.items():
            assert disk.read(at, len(data)) == data


def test_a_copy_is_equal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = fill(tmp_path / "source")
    plain, packed = tmp_path / "plain", tmp_path / "packed"
    how = ("-f", "qcow2", "-O", "qcow2", "-o", f"cluster_size={CLUSTER}")
    ours("convert", *how, source, plain)
    ours("convert", "-c", *how, source, packed)
    for copy in (plain, packed):
        holds(copy)
        ours("compare", "-f", "qcow2", "-F", "qcow2", source, copy)
        assert "identical" in capsys.readouterr().out
    with image.open(str(packed), "qcow2") as disk:
        disk.write(SIZE - MIB, b"x")
    ours("compare", "-f", "qcow2", "-F", "qcow2", source, packed, code=1)
    assert f"mismatch at offset {SIZE - MIB}" in capsys.readouterr().out


def test_the_map_has_what_is_there(tmp_path: Path) -> None:
    source = fill(tmp_path / "source")
    with image.open(str(source), "qcow2", read_only=True) as disk:
        found = [(one["start"], one["length"]) for one in disk.map() if one["data"]]
    assert found == [(0, MIB), (1 << 50, CLUSTER), (SIZE - CLUSTER, CLUSTER)]


def test_an_overlay_is_committed_and_rebased(tmp_path: Path) -> None:
    base, other, top = tmp_path / "base", tmp_path / "other", tmp_path / "top"
    fill(base)
    image.create(str(other), size=SIZE, cluster_size=CLUSTER)
    image.create(str(top), size=SIZE, cluster_size=CLUSTER, backing_name=str(base), backing_format="qcow2")
    new = {1 << 40: b"\5" * 4096}
    with image.open(str(top), "qcow2") as disk:
        for at, data in new.items():
            disk.write(at, data)
    ours("rebase", "-f", "qcow2", "-b", other, "-F", "qcow2", top)
    holds(top, PLACES | new)
    ours("commit", "-q", "-f", "qcow2", top)
    holds(other, PLACES | new)
