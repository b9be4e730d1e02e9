# SPDX-License-Identifier: Apache-2.0
"""Debian's own balloon driver: it gives memory back when it is asked, reports what it does not use, and takes
memory back when the guest is in need."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.lab.guest import StockGuest
from tests.lab.system import SLOW, System

pytestmark = [pytest.mark.requires("kvm-hardware"), pytest.mark.timeout(600)]

MIB = 1 << 20

STEPS = """\
mkdir -p /big && mount -t tmpfs -o size=240m none /big
dd if=/dev/zero of=/big/fill bs=1M count=80 2>/dev/null && echo "filled"
read word
rm /big/fill && echo "freed"
read word
dd if=/dev/zero of=/big/fill bs=1M count=130 2>/dev/null && echo "enough: $(ls -s /big/fill)"
dmesg | grep -E "Out of memory|Oops|BUG:" && echo "complaints"
echo "done"
poweroff -f
"""


@pytest.fixture(scope="module")
def system() -> Iterator[System]:
    with System() as whole:
        yield whole


def memory_of(guest: StockGuest) -> dict[str, Any]:
    """``vmbusctl memory --json``: the figures of this machine."""
    found: dict[str, Any] = json.loads(guest.ctl("memory", guest.name, "--json"))["machines"][guest.name]
    return found


def until(guest: StockGuest, condition: Callable[[dict[str, Any]], bool], seconds: float) -> dict[str, Any]:
    deadline = time.monotonic() + seconds * SLOW
    while not condition(found := memory_of(guest)):
        assert time.monotonic() < deadline, f"{found}\n{guest.console.text[-2000:]}"
        time.sleep(0.2)
    return found


def test_a_stock_guest_gives_memory_back_reports_what_is_free_and_helps_itself(system: System) -> None:
    with StockGuest(system, "balloon", script=STEPS, memory=256) as guest:
        guest.make_disk()
        guest.define()
        guest.start()
        guest.console.wait_for("filled\n", 60)
        full = memory_of(guest)
        assert full["resident"] > 80 * MIB, full

        # What is free it reports by itself, after some seconds.
        guest.console.send("x")
        guest.console.wait_for("freed\n", 30)
        freed = until(guest, lambda found: full["resident"] - found["resident"] > 64 * MIB, 30)
        assert freed["reported"] > 64 * MIB and freed["ballooned"] == 0, freed

        # What it is asked for it gives, and says how it is.
        guest.ctl("set-memory", guest.name, "96M", "--wait", str(60 * SLOW), timeout=60 * SLOW)
        then = time.monotonic()
        given = until(guest, lambda found: found["guest"]["age-ms"] < 1000 * (time.monotonic() - then), 30)
        assert given["ballooned"] == 160 * MIB, given
        assert 0 < given["guest"]["available"] < given["guest"]["total"] <= 256 * MIB, given

        # In need it takes it back, without an out-of-memory killing.
        guest.console.send("x")
        guest.console.wait_for("done\n", 60)
        text = guest.console.text
        assert "enough: 133120 " in text and "complaints" not in text, text[-2000:]
        ended = guest.wait_stopped()
        assert (ended["state"], ended["state-reason"]) == ("stopped", "guest-poweroff")
        guest.ctl("undefine", guest.name)
