# SPDX-License-Identifier: Apache-2.0
"""Slots and their files: filled once, closed when refused."""

from __future__ import annotations

import os

import pytest

from vmbus.wire.errors import VmbusError
from vmbus.worker.files import SLOTS_MAX, Files


def some_fd() -> int:
    return os.eventfd(0)


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def refusal(files: Files, slot: str, fds: list[int]) -> str:
    with pytest.raises(VmbusError) as caught:
        files.add(slot, fds)
    return caught.value.kind


def test_a_slot_is_filled_once_and_the_second_file_is_closed() -> None:
    files = Files()
    first, second = some_fd(), some_fd()
    files.add("kernel", [first])
    assert refusal(files, "kernel", [second]) == "InUse"
    assert files.one("kernel") == first
    assert is_open(first)
    assert not is_open(second)
    files.close()
    assert not is_open(first)


@pytest.mark.parametrize("slot", ["", "Kernel", "disk/../etc", "a" * 65, "kernel\0", "kern el"])
def test_what_is_no_slot_name_is_refused_and_closed(slot: str) -> None:
    fd = some_fd()
    assert refusal(Files(), slot, [fd]) == "InvalidArgument"
    assert not is_open(fd)


def test_a_message_without_a_file_is_refused() -> None:
    assert refusal(Files(), "kernel", []) == "InvalidArgument"


def test_after_the_machine_is_built_only_files_of_devices_are_added() -> None:
    files = Files()
    files.built()
    fd, disk = some_fd(), some_fd()
    assert refusal(files, "kernel", [fd]) == "InvalidState"
    assert not is_open(fd)
    files.add("disk/data/0", [disk])
    assert files.one("disk/data/0") == disk
    files.close()


def test_slots_are_bounded() -> None:
    files = Files()
    fd = some_fd()
    for number in range(SLOTS_MAX):
        files.add(f"disk/a/{number}", [fd])
    assert refusal(files, "kernel", [some_fd()]) == "QuotaExceeded"
    os.close(fd)


def test_what_the_core_takes_stays_open_and_the_rest_is_closed() -> None:
    files = Files()
    kernel, stray = some_fd(), some_fd()
    files.add("kernel", [kernel])
    files.add("disk/x/0", [stray])
    files.hand_over(["kernel"])
    assert is_open(kernel)
    assert not is_open(stray)
    os.close(kernel)


def test_a_missing_slot_is_named() -> None:
    with pytest.raises(VmbusError) as caught:
        Files().one("disk/root/0")
    assert (caught.value.kind, caught.value.argument) == ("InvalidArgument", "disk/root/0")


def test_one_file_is_not_two() -> None:
    files = Files()
    files.add("kernel", [some_fd(), some_fd()])
    with pytest.raises(VmbusError, match="takes one file"):
        files.one("kernel")
    files.close()
