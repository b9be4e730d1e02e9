# SPDX-License-Identifier: Apache-2.0
"""Debian's stock kernel goes on from a file, and goes back: its file system, its network, its clocks."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator

import pytest

from tests.lab.bridge import granted
from tests.lab.guest import Console, StockGuest
from tests.lab.system import SLOW, System

pytestmark = [pytest.mark.requires("kvm-hardware", "tap", "bridge"), pytest.mark.timeout(900)]

BRIDGE = f"vmbs{os.getpid()}"
HOST = "10.96.0.1"

# Each beat: a file is written with its checksum, those of before are read anew, the host is pinged.
WORK = f"""\
mount -t ext4 /dev/vda /mnt || echo "cannot mount"
ip link set eth0 up; ip address add 10.96.0.2/24 dev eth0
acpid -d -c /etc/acpi >/dev/null 2>&1 &
echo "clock source $(cat /sys/devices/system/clocksource/clocksource0/current_clocksource)"
cd /mnt
n=0
while [ ! -e /run/power-button ]; do
    n=$((n + 1))
    dd if=/dev/urandom of=data.$((n % 8)) bs=64k count=4 conv=fsync 2>/dev/null
    sha256sum data.$((n % 8)) >sum.$((n % 8))
    echo 3 >/proc/sys/vm/drop_caches
    for sum in sum.*; do sha256sum -c $sum >/dev/null || echo "DAMAGED $sum"; done
    ping -c 1 -W 20 {HOST} >/dev/null && reached=yes || reached=no
    echo "beat $n $reached $(date +%s) $(cut -d ' ' -f 1 /proc/uptime)"
done
echo "end after beat $n" >log
cd /; umount /mnt && echo "unmounted"
dmesg | grep -E 'BUG|stall|lockup|Oops' && echo "COMPLAINTS"
poweroff -f
"""
BUTTON = {"etc/acpi/PWRF/00000080": b"#!/bin/sh\ntouch /run/power-button\n"}
BEAT = re.compile(r"beat (\d+) (\w+) (\d+) ([\d.]+)\n")


@pytest.fixture(scope="module")
def system() -> Iterator[System]:
    """A whole system, and a bridge with an address that broker.toml grants."""
    with granted(BRIDGE, f"{HOST}/24") as whole:
        yield whole


def beats(console: Console, least: int, within: float = 120) -> list[tuple[int, str, int, float]]:
    """All beats on a console, once there are so many."""
    deadline = time.monotonic() + within * SLOW
    while len(found := BEAT.findall(console.text)) < least:
        assert time.monotonic() < deadline, f"the guest stands still:\n{console.text[-2000:]}"
        time.sleep(0.1)
    return [(int(n), reached, int(date), float(up)) for n, reached, date, up in found]


def test_debian_goes_on_with_disk_network_and_clocks(system: System) -> None:
    before = system.counts()
    with StockGuest(system, "kept", script=WORK, files=BUTTON, vcpus=2, bridge=f"{BRIDGE},id=lan") as guest:
        guest.make_disk()
        guest.define()
        guest.start()
        guest.console.wait_for("clock source", 120)
        first = beats(guest.console, 3)
        guest.ctl("save", guest.name, "saved.now", timeout=60 * SLOW)
        assert guest.show()["state-reason"] == "saved"
        time.sleep(3)
        guest.ctl("restore", guest.name, "saved.now", timeout=60 * SLOW)
        console = guest.open_console()
        later = beats(console, 3)
        assert later[0][0] >= first[-1][0], "it began anew"
        assert [n for n, *_ in later] == list(range(later[0][0], later[0][0] + len(later)))
        for one, other in zip(first + later, (first + later)[1:], strict=False):
            assert other[2] >= one[2] and other[3] >= one[3], f"a clock ran backwards: {one}, {other}"
        assert abs(time.time() - later[-1][2]) < 20 * SLOW, "the guest's time is the host's"
        assert [reached for _, reached, _, _ in later] == ["yes"] * len(later)
        guest.ctl("shutdown", guest.name)
        console.wait_for("unmounted", 60)
        assert guest.wait_stopped()["state-reason"] == "guest-poweroff"
        for bad in ("DAMAGED", "COMPLAINTS", "cannot mount"):
            assert bad not in console.text, console.text[-3000:]
        guest.check_disk()
        assert guest.read_back("/log").startswith("end after beat")
        guest.ctl("undefine", guest.name)
    assert system.settle(before) == before


def test_debian_goes_back_with_its_disk(system: System) -> None:
    with StockGuest(system, "back", script=WORK, files=BUTTON, bridge=f"{BRIDGE},id=lan") as guest:
        guest.make_disk()
        guest.define()
        guest.start()
        guest.console.wait_for("clock source", 120)
        beats(guest.console, 2)
        guest.ctl("snapshot", "create", guest.name, "then", timeout=60 * SLOW)
        then = beats(guest.console, 1)[-1][0]
        later = beats(guest.console, then + 4)[-1]
        guest.ctl("snapshot", "revert", guest.name, "then", timeout=60 * SLOW)
        console = guest.open_console()
        again = beats(console, 3)
        assert again[0][0] <= then + 2 < later[0], "it is where it was"
        assert again[0][2] >= later[2], "its clock is not"
        assert [reached for _, reached, _, _ in again] == ["yes"] * len(again)
        guest.ctl("shutdown", guest.name)
        console.wait_for("unmounted", 60)
        guest.wait_stopped()
        for bad in ("DAMAGED", "COMPLAINTS", "cannot mount"):
            assert bad not in console.text, console.text[-3000:]
        guest.check_disk()
        guest.ctl("snapshot", "delete", guest.name, "then", timeout=60 * SLOW)
        guest.check_disk()
        guest.ctl("undefine", guest.name)
