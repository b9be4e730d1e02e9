# SPDX-License-Identifier: Apache-2.0
"""The harness for whole systems: what tests rely on when they use it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.kernels import CHECKOUT
from tests.lab.system import ALICE, BOB, SLOW, System

CHECK = ["sh", "-c", "pkcheck --action-id org.freedesktop.policykit.exec --process $$"]


@pytest.fixture(scope="module")
def bus() -> Iterator[System]:
    with System(parts="bus") as system:
        yield system


def test_a_user_reaches_the_bus_at_its_usual_address(bus: System) -> None:
    done = bus.run_as(ALICE, ["busctl", "list", "--no-legend"])
    assert "org.freedesktop.PolicyKit1" in done.stdout


def test_a_user_has_one_group_and_no_capability(bus: System) -> None:
    assert len(bus.run_as(ALICE, ["id", "-G"]).stdout.split()) == 1
    status = bus.run_as(ALICE, ["cat", "/proc/self/status"]).stdout
    sets = dict(line.split(":\t") for line in status.splitlines() if line.startswith("Cap"))
    assert set(sets) == {"CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"}
    assert {int(value, 16) for value in sets.values()} == {0}


def test_a_users_files_are_closed_to_others(bus: System) -> None:
    assert bus.run_as(ALICE, ["touch", "mine"]).returncode == 0
    assert bus.run_as(BOB, ["cat", bus.files(ALICE) / "mine"]).returncode == 1


def test_polkit_rules_change_live(bus: System) -> None:
    assert bus.run_as(ALICE, CHECK).returncode != 0
    bus.rule("polkit.addRule(function(action, subject) { return polkit.Result.YES; });")
    assert bus.run_as(ALICE, CHECK).returncode == 0
    bus.rule("")
    assert bus.run_as(ALICE, CHECK).returncode != 0


def test_two_systems_have_nothing_in_common(bus: System) -> None:
    with System(parts="bus") as other:
        assert not set(bus.uids) & set(other.uids)
        assert bus.place != other.place
        other.rule("polkit.addRule(function(action, subject) { return polkit.Result.YES; });")
        assert bus.run_as(ALICE, CHECK).returncode != 0
        other.bus.kill()
        assert bus.run_as(ALICE, ["busctl", "list"]).returncode == 0


def test_nothing_is_left_of_a_system_whose_starter_is_killed() -> None:
    program = """
import subprocess, sys
from tests.lab import namespace
namespace.enter()
from tests.lab.system import System
system = System(parts="bus")
system.start()
worker = subprocess.Popen(["setpriv", "--reuid", str(system.uids.start), "--clear-groups", "sleep", "1000"])
print(system.place, system.bus.pid, system.polkitd.pid, worker.pid, flush=True)
sys.stdin.read()
"""
    starter = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=CHECKOUT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(CHECKOUT)},
    )
    with starter:
        assert starter.stdout
        place, *pids = starter.stdout.readline().split()
        assert Path(place).is_dir()
        starter.send_signal(signal.SIGKILL)

    deadline = time.monotonic() + 20 * SLOW
    left = [Path(place), *(Path("/proc") / pid for pid in pids)]
    while any(path.exists() for path in left) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert [path for path in left if path.exists()] == []
