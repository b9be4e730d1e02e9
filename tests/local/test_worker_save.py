# SPDX-License-Identifier: Apache-2.0
"""Machines that a closed worker writes to a file, and others that go on from it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.local.worker_guest import Guest
from vmbus.wire.definition import Layer
from vmbus.wire.worker import CancelSave, Pause, Restore, Resume, Run, Save, Stats

pytestmark = pytest.mark.requires("kvm")


@pytest.fixture
def file() -> Iterator[int]:
    fd = os.memfd_create("saved")
    yield fd
    os.close(fd)


def save(guest: Guest, file: int) -> int:
    """Save it and see it end; the bytes written."""
    result = guest.service.do(Save, os.dup(file))
    assert result.error is None, result
    assert guest.service.event("ended").reason == "saved"
    written: int = result.stats["bytes"]
    return written


def test_a_guest_goes_on_in_another_worker(file: int, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(1 << 20))
    disks = {"root": ([Layer("raw")], [disk])}
    mode = "disk-loop sector=0 count=64 beat=20"
    with Guest(mode, disks=disks) as guest:
        guest.start()
        guest.said(b"loop: beat")
        assert 0 < save(guest, file) < 8 << 20
    with Guest(mode, disks=disks, restore=file) as guest:
        assert guest.configured.error is None
        assert guest.service.do(Run).error == "InvalidState"
        assert guest.service.do(Restore).error is None
        assert guest.service.event("state", state="paused")
        assert guest.service.do(Resume).error is None
        guest.said(b"loop: beat")


def test_a_damaged_file_ends_the_worker_and_nothing_else(file: int) -> None:
    with Guest("flood") as guest:
        guest.start()
        guest.said(b"line 5\n")
        save(guest, file)
    place = os.fstat(file).st_size // 2 // 4096 * 4096 + 7
    os.pwrite(file, bytes([os.pread(file, 1, place)[0] ^ 1]), place)
    with Guest("flood", restore=file) as guest:
        result = guest.service.do(Restore)
        assert (result.error, result.argument) == ("ImageInvalid", "file")
        assert guest.service.event("ended").reason == "error"


def test_a_save_that_is_refused_or_cancelled_leaves_the_machine_running(file: int) -> None:
    with Guest("flood", memory=1 << 30) as guest:
        guest.start()
        guest.said(b"line 5\n")
        assert guest.service.do(Save).error == "InvalidArgument"
        null = os.open("/dev/null", os.O_RDWR)
        assert guest.service.do(Save, null).argument == "file"
        assert guest.service.do(CancelSave).error is None
        guest.said(b"line")
        assert guest.service.do(Save, os.dup(file), end=False).error is None
        guest.said(b"line")
        assert guest.service.do(Stats).stats["memory"]["total"] == 1 << 30
        assert guest.service.do(Pause).error is None
        save(guest, os.memfd_create("again"))


def test_the_clock_interrupts_where_a_guest_goes_on(file: int) -> None:
    with Guest("rtc-seconds") as guest:
        guest.start()
        guest.said(b"rtc-seconds: 1, 90", 30)
        save(guest, file)
    with Guest("rtc-seconds", restore=file) as guest:
        assert guest.service.do(Restore).error is None
        assert guest.service.do(Resume).error is None
        guest.said(b"rtc-seconds: 3, 90", 30)
