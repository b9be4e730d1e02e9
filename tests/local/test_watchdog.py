# SPDX-License-Identifier: Apache-2.0
"""A watchdog, through the whole system: the guest, bare metal, sets it a few times and no more."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.lab.guest import Console
from tests.lab.system import ALICE, System
from tests.local.broker_bed import wait_until
from tests.local.ctl_bed import ctl, nothing_is_left, system

__all__ = ["nothing_is_left", "system"]
pytestmark = [pytest.mark.requires("root", "kvm"), pytest.mark.long]

NAME = "watched"


def show(system: System) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(ctl(system, "show", NAME, "--json"))
    return found


def started(system: System, action: str, mode: str = "watchdog count=3") -> Console:
    kernel = str(system.files(ALICE) / "guest")
    words = ["--memory", "16M", "--kernel", kernel, "--cmdline", mode, "--watchdog", action]
    ctl(system, "define", "--name", NAME, *words)
    ctl(system, "start", NAME)
    return Console(system, ALICE, NAME, "--read-only")


@pytest.mark.parametrize(
    ("action", "state"),
    [("reset", "running"), ("pause", "paused"), ("poweroff", "crashed"), ("none", "running")],
)
def test_what_happens_is_what_the_definition_says(system: System, action: str, state: str) -> None:
    console = started(system, action)
    if action != "poweroff":  # which may be quicker than the console
        console.wait_for("(?s)ended before: 0.*(watchdog: set.*){3}watchdog: no more", 30)
    wait_until(lambda: show(system)["state-reason"] == "watchdog" and show(system)["state"] == state)
    if action == "reset":
        console.wait_for("(?s)no more.*ended before: 1", 30)
    if action == "pause":
        ctl(system, "resume", NAME)
        assert show(system)["state-reason"] == ""
    console.close()


def test_without_one_there_is_none(system: System) -> None:
    console = started(system, "off")
    console.wait_for("watchdog: none", 20)
    console.close()


def test_a_guest_that_plays_with_it_harms_nobody(system: System) -> None:
    console = started(system, "none", "watchdog hostile count=1")
    console.wait_for("(?s)watchdog: played.*watchdog: no more", 60)
    wait_until(lambda: show(system)["state-reason"] == "watchdog")
    assert show(system)["state"] == "running"
    console.close()
