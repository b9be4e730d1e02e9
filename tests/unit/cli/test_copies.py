# SPDX-License-Identifier: Apache-2.0
"""Images that vmbusctl makes for disks that go along: when they are made, and when they go again."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, cast

import pytest

from vmbus import image
from vmbus.cli import copies, migration
from vmbus.cli.remote import Remote
from vmbus.wire.definition import Definition, Disk, Layer
from vmbus.wire.errors import VmbusError

MIB = 1 << 20


class There:
    """A vmbusd that the machine is not known to, and that undefines it, or not."""

    def __init__(self, refuses: bool) -> None:
        self.refuses = refuses

    async def find(self, uuid: str) -> str:
        raise VmbusError("NotFound", "none")

    async def define_as(self, uuid: str, definition: Definition) -> str:
        return "/machine"

    async def act(self, path: str, method: str) -> None:
        assert method == "Undefine"
        if self.refuses:
            raise VmbusError("InvalidState", "it runs")


def definition(**layers: Layer) -> Definition:
    disks = [Disk(id=name, layers=[layer]) for name, layer in layers.items()]
    return Definition(name="web", memory=64 * MIB, disks=disks)


@pytest.fixture
def disks(tmp_path: Path) -> Definition:
    """A raw disk of 3 MiB and a qcow2 one of 5."""
    (tmp_path / "raw").write_bytes(bytes(3 * MIB))
    image.create(str(tmp_path / "qcow2"), "qcow2", size=5 * MIB)
    return definition(
        one=Layer(format="raw", path=str(tmp_path / "raw")),
        other=Layer(format="qcow2", path=str(tmp_path / "qcow2")),
    )


def test_an_image_has_the_disk_s_size_and_the_format_that_is_said(disks: Definition, tmp_path: Path) -> None:
    words = [f"one={tmp_path}/a", f"disk/other={tmp_path}/b,format=raw"]
    with copies.made(copies.wanted(disks, words)) as images:
        pass
    assert image.info(f"{tmp_path}/a", "qcow2")["virtual-size"] == 3 * MIB
    assert (tmp_path / "b").stat().st_size == 5 * MIB
    assert {name: disk.layers[0].format for name, disk in images.disks.items()} == {
        "one": "qcow2",
        "other": "raw",
    }


@pytest.mark.parametrize("runs", [False, True], ids=["undefined", "runs"])
def test_what_was_made_goes_with_the_machine_and_stays_with_one_that_runs(
    disks: Definition, tmp_path: Path, runs: bool
) -> None:
    async def fail() -> None:
        there = cast(Remote, There(runs))
        with copies.made(copies.wanted(disks, [f"one={tmp_path}/a"])) as images:
            defined = migration._defined(there, "uuid", disks, moved="--copy-disk", stays=images.keep)
            async with defined as path:
                assert path == "/machine"
                raise VmbusError("Disconnected", "nobody knows where it runs")

    with pytest.raises(VmbusError, match="nobody knows"):
        asyncio.run(fail())
    assert (tmp_path / "a").exists() == runs


def test_if_one_cannot_be_made_none_is_left_and_what_was_there_stays(
    disks: Definition, tmp_path: Path
) -> None:
    words = [f"one={tmp_path}/a", f"other={tmp_path}/none/b"]
    with pytest.raises(VmbusError, match="No such file"), copies.made(copies.wanted(disks, words)):
        pass
    assert not (tmp_path / "a").exists()
    image.create(str(tmp_path / "a"), "qcow2", size=3 * MIB)
    with pytest.raises(VmbusError, match="No such file"), copies.made(copies.wanted(disks, words)):
        pass
    assert (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({"encrypted": True}, "NotSupported"),
        ({"path": None}, "NotSupported"),
        ({"path": "/nowhere/disk"}, "NotFound"),
        ({"format": "qcow2"}, "ImageInvalid"),
    ],
)
def test_a_size_that_is_not_known_is_an_error(tmp_path: Path, change: dict[str, Any], kind: str) -> None:
    (tmp_path / "raw").write_bytes(bytes(MIB))
    layer = Layer(**{"format": "raw", "path": str(tmp_path / "raw"), **change})
    with (
        pytest.raises(VmbusError) as caught,
        copies.made(copies.wanted(definition(one=layer), [f"one={tmp_path}/a"])),
    ):
        pass
    assert (caught.value.kind, caught.value.argument) == (kind, "--copy-disk")
    assert not (tmp_path / "a").exists()
