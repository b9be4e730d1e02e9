# SPDX-License-Identifier: Apache-2.0
"""Stock Debian guests merge: what is equal in them by nature, and content that they were given."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.lab import ksm
from tests.lab.guest import StockGuest
from tests.lab.system import ALICE, System

pytestmark = [pytest.mark.requires("kvm-hardware", "ksm"), pytest.mark.timeout(900)]

RULE = """polkit.addRule(function(action, subject) {
    if (action.id == "org.vmbus1.ksm.manage" && subject.user == "vmbus-alice") return polkit.Result.YES;
});"""
POLICY = "[ksm]\nmanage = true\n[quota]\nmachines = 10\n"
FAST = ("pages-to-scan=20000", "sleep-millisecs=5", "run=1")
SCRIPT = "cat /content >/dev/null\necho settled\nwhile :; do sleep 60; done\n"
PAGES = 2048  # of content that all of them have and nobody else


@pytest.fixture
def system() -> Iterator[System]:
    with ksm.alone(), System(policy=POLICY) as whole:
        whole.rule(RULE)
        yield whole


def ctl(system: System, *words: str) -> Any:
    done = system.vmbusctl(ALICE, *words, "--json", timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def resident(pid: int) -> int:
    """Pages."""
    return int(Path(f"/proc/{pid}/smaps_rollup").read_text().partition("\nRss:")[2].split()[0]) // 4


def share(system: System, many: int, memory: int) -> None:
    """``many`` guests start, settle and merge; the content at least is shared, and the figures say so."""
    content = {"content": os.urandom(PAGES * 4096)}
    guests = []
    for number in range(many):
        guest = StockGuest(system, f"d{number}", script=SCRIPT, memory=memory, files=content)
        guest.make_disk("8M")
        guest.define()
        guest.start()
        guest.console.wait_for("settled", 60)
        guest.leave_console()
        guests.append(guest)
    pids = [int(guest.show()["worker-pid"]) for guest in guests]
    whole = sum(map(resident, pids))
    ctl(system, "ksm", "set", *FAST)
    merged = ksm.at_rest(pids, PAGES, seconds=60)
    saved = int(ksm.read("pages_sharing"))
    ctl(system, "ksm", "restore")
    print(f"{many} guests of {memory} MiB: {saved} of {whole} pages saved, {100 * saved / whole:.0f} %")
    assert saved >= PAGES * (many - 1)
    assert min(merged) >= PAGES
    for guest in guests:
        guest.ctl("kill", guest.name)


def test_two_debian_guests_share_what_is_equal_in_them(system: System) -> None:
    share(system, 2, 192)


@pytest.mark.soak
def test_eight_debian_guests_share_what_is_equal_in_them(system: System) -> None:
    share(system, 8, 144)
