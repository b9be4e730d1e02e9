# SPDX-License-Identifier: Apache-2.0
"""Debian's stock kernel goes on in another vmbusd while it runs: its file system, its network, its clocks."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator

import pytest

from tests.lab.bridge import RULE, bridge, grant
from tests.lab.guest import Console, StockGuest
from tests.lab.system import ALICE, SLOW, System
from tests.local.migration_bed import SHARED
from tests.testbed.test_save import BUTTON, HOST, WORK, beats

pytestmark = [pytest.mark.requires("kvm-hardware", "tap", "bridge"), pytest.mark.timeout(900)]

BRIDGE = f"vmbm{os.getpid()}"
MODEL = "x86-64-v2-amd-1"


@pytest.fixture
def systems() -> Iterator[tuple[System, System]]:
    """Two on one bridge, which may open the same files."""
    with bridge(BRIDGE, f"{HOST}/24"), System(policy=grant(BRIDGE)) as here:
        here.rule(RULE)
        with System(policy=grant(BRIDGE) + SHARED.format(place=here.place)) as there:
            there.rule(RULE)
            yield here, there


def test_debian_goes_on_there_with_disk_network_and_clocks(systems: tuple[System, System]) -> None:
    here, there = systems
    with StockGuest(here, "moved", script=WORK, files=BUTTON, vcpus=2, bridge=f"{BRIDGE},id=lan") as guest:
        guest.make_disk()
        guest.define("--cpu-model", MODEL)
        guest.start()
        guest.console.wait_for("clock source", 120)
        first = beats(guest.console, 2)
        said = guest.ctl("migrate", guest.name, "--to", there.bus_address, "--json", timeout=60 * SLOW)
        assert json.loads(said)["downtime"] > 0
        assert guest.show()["state-reason"] == "migrated"
        console = Console(there, ALICE, guest.name)
        try:
            later = beats(console, first[-1][0] + 3)
            assert [n for n, *_ in later] == list(range(later[0][0], later[0][0] + len(later)))
            for one, other in zip(first + later, (first + later)[1:], strict=False):
                assert other[2] >= one[2] or other[0] <= one[0], f"a clock ran backwards: {one}, {other}"
            assert abs(time.time() - later[-1][2]) < 20 * SLOW, "the guest's time is the host's"
            assert [reached for _, reached, _, _ in later] == ["yes"] * len(later)
            assert there.vmbusctl(ALICE, "shutdown", guest.name).returncode == 0
            console.wait_for("unmounted", 60)
            for bad in ("DAMAGED", "COMPLAINTS", "cannot mount"):
                assert bad not in console.text, console.text[-3000:]
            limit = str(60 * SLOW)
            there.vmbusctl(ALICE, "wait", guest.name, "--timeout", limit, timeout=60)
        finally:
            console.close()
        guest.check_disk()
        assert guest.read_back("/log").startswith("end after beat")
