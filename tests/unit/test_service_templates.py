# SPDX-License-Identifier: Apache-2.0
"""Templates: a copy is whole or not there, and holes stay holes."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vmbus.service import templates
from vmbus.service.files import Files, PassedFile
from vmbus.service.jobs import Job, Jobs
from vmbus.service.templates import Templates
from vmbus.wire.errors import VmbusError

ALICE, BOB = 1000, 1001
MIB = 1 << 20


def file_of(length: int, *pieces: tuple[int, bytes]) -> int:
    """A file with these bytes at these places, and holes."""
    fd = os.memfd_create("saved")
    os.truncate(fd, length)
    for place, content in pieces:
        os.pwrite(fd, content, place)
    return fd


class Shelf:
    """Templates in a directory, and what imports a file into them."""

    def __init__(self, place: Path, *, quota: int = 64 * MIB) -> None:
        self.place = place / "templates"
        self.all = Templates(place, Jobs(), Any, Any, quota=quota)  # type: ignore[arg-type]
        self.files = Files()

    def begin(self, owner: int, name: str, fd: int) -> Job:
        [file] = self.files.admit([os.dup(fd)], "alice")
        assert isinstance(file, PassedFile)
        return self.all.make(owner, name, file, "/org/vmbus1")

    async def add(self, owner: int, name: str, fd: int) -> None:
        await self.begin(owner, name, fd).wait()

    def stored(self) -> list[Path]:
        return [path for path in self.place.iterdir() if path.name != "index.json"]


def told(scenario: Callable[[Shelf], Any], place: Path, **options: int) -> None:
    """Run a scenario; nothing of the client's stays open."""
    before = len(os.listdir("/proc/self/fd"))

    async def run() -> None:
        await scenario(Shelf(place, **options))

    asyncio.run(run())
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_copy_has_the_same_bytes_and_the_same_holes(tmp_path: Path) -> None:
    async def scenario(shelf: Shelf) -> None:
        fd = file_of(200 * MIB, (0, b"head"), (70 * MIB + 5, b"x" * 10000), (200 * MIB - 4, b"tail"))
        await shelf.add(ALICE, "one", fd)
        [copy] = shelf.stored()
        with copy.open("rb") as other:
            for place in (0, 70 * MIB, 200 * MIB - 4096):
                assert os.pread(other.fileno(), 16384, place) == os.pread(fd, 16384, place)
        assert copy.stat().st_size == 200 * MIB
        assert copy.stat().st_blocks * 512 < MIB
        assert copy.stat().st_mode & 0o777 == 0o400
        assert [one.name for one in shelf.all.of(ALICE)] == ["one"] and shelf.all.of(BOB) == []
        os.close(fd)

    told(scenario, tmp_path)


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    async def scenario(shelf: Shelf) -> None:
        fd = file_of(MIB, (0, b"head"))
        monkeypatch.setattr(os, "pwrite", full)
        with pytest.raises(VmbusError, match="No space left") as caught:
            await shelf.add(ALICE, "one", fd)
        assert caught.value.kind == "Unavailable"
        assert shelf.stored() == [] and shelf.all.of(ALICE) == []
        monkeypatch.undo()
        await shelf.add(ALICE, "one", fd)
        os.close(fd)

    told(scenario, tmp_path)


def test_an_import_that_is_cancelled_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = asyncio.Event()

    async def never(*_: object) -> None:
        begun.set()
        await asyncio.Event().wait()

    async def scenario(shelf: Shelf) -> None:
        fd = file_of(MIB, (0, b"head"))
        monkeypatch.setattr(templates, "aside", never)
        job = shelf.begin(ALICE, "one", fd)
        await begun.wait()
        await job.cancel()
        assert (job.state, shelf.stored(), shelf.all.of(ALICE)) == ("cancelled", [], [])
        monkeypatch.undo()
        await shelf.add(ALICE, "one", fd)
        os.close(fd)

    told(scenario, tmp_path)


def test_a_file_that_is_cut_off_meanwhile_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(shelf: Shelf) -> None:
        fd = file_of(MIB, (0, b"head"))
        monkeypatch.setattr(os, "pread", lambda *_: b"")
        with pytest.raises(VmbusError, match="cut off"):
            await shelf.add(ALICE, "one", fd)
        assert shelf.stored() == []
        os.close(fd)

    told(scenario, tmp_path)


def test_snapshots_and_templates_have_one_quota(tmp_path: Path) -> None:
    async def scenario(shelf: Shelf) -> None:
        fd = file_of(4 * MIB, (0, b"x" * 3 * MIB))
        await shelf.add(ALICE, "one", fd)
        with pytest.raises(VmbusError) as caught:
            await shelf.add(ALICE, "two", fd)
        assert caught.value.kind == "QuotaExceeded"
        await shelf.add(BOB, "one", fd)
        shelf.all.remove(ALICE, "one")
        shelf.all.used = lambda owner: 3 * MIB
        with pytest.raises(VmbusError):
            await shelf.add(ALICE, "two", fd)
        os.close(fd)

    told(scenario, tmp_path, quota=5 * MIB)


def test_what_is_being_imported_counts(tmp_path: Path) -> None:
    async def scenario(shelf: Shelf) -> None:
        fd = file_of(4 * MIB, (0, b"x" * 3 * MIB))
        first = shelf.begin(ALICE, "one", fd)
        for name, kind in (("two", "QuotaExceeded"), ("one", "AlreadyExists")):
            with pytest.raises(VmbusError) as caught:
                shelf.begin(ALICE, name, fd)
            assert caught.value.kind == kind
        await shelf.add(BOB, "one", fd)
        await first.wait()
        os.close(fd)

    told(scenario, tmp_path, quota=5 * MIB)


def test_a_file_that_grows_while_it_is_imported_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(shelf: Shelf) -> None:
        fd = file_of(8 * MIB, (0, b"x" * MIB))
        begin = templates._copy

        def copy(source: int, target: int, start: int, end: int) -> None:
            os.pwrite(fd, b"y" * 6 * MIB, MIB)
            begin(source, target, start, end)

        monkeypatch.setattr(templates, "_copy", copy)
        with pytest.raises(VmbusError) as caught:
            await shelf.add(ALICE, "one", fd)
        assert caught.value.kind == "QuotaExceeded"
        assert shelf.stored() == [] and shelf.all.of(ALICE) == []
        os.close(fd)

    told(scenario, tmp_path, quota=5 * MIB)


def test_the_kernel_is_asked_for_verity_and_what_it_says_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def ioctl(fd: int, request: int, argument: bytes) -> int:
        # struct fsverity_enable_arg of linux/fsverity.h: version, algorithm, block size; its size is in the
        # number.
        asked.append((len(argument), request >> 16 & 0x3FFF, struct.unpack_from("<III", argument)))
        with pytest.raises(OSError, match="Bad file"):  # it is asked of a file that nobody can write to
            os.write(fd, b"x")
        return 0

    async def scenario(shelf: Shelf) -> None:
        fd = file_of(MIB, (0, b"head"))
        monkeypatch.setattr(fcntl, "ioctl", ioctl)
        await shelf.add(ALICE, "one", fd)
        assert asked == [(128, 128, (1, 1, 4096))]
        assert [one.verity for one in shelf.all.of(ALICE)] == [True]
        os.close(fd)

    told(scenario, tmp_path)
