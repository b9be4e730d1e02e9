# SPDX-License-Identifier: Apache-2.0
"""The tuner's decisions, sample by sample: on a model of ksmd, and on values recorded from a kernel."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest

from vmbus.service.config import TunerConfig
from vmbus.service.ksm import Value
from vmbus.service.tuner import TICK, Plan, Sample, advised

WANTED = TunerConfig(on=True, most_cpu=20, fast_pages=8000, slow_pages=100)


class Host:
    """Memory that saves when it is scanned; ksmd takes ``cost`` seconds of CPU a page."""

    def __init__(self, possible: int, cost: float) -> None:
        self.possible, self.cost = possible, cost
        self.sample = Sample(0, 0, 0, 0, 0)
        self._scanned = 0.0

    def pass_time(self, settings: dict[str, Value], seconds: float) -> Sample:
        pages = 0.0
        if settings["run"] == 1:
            at_a_time, sleep = float(settings["pages-to-scan"]), float(settings["sleep-millisecs"]) / 1000
            pages = seconds / (sleep + at_a_time * self.cost) * at_a_time
        self._scanned += pages
        whole = max(1, self.possible * 2)
        self.sample = replace(
            self.sample,
            time=self.sample.time + seconds,
            sharing=min(self.possible, int(self._scanned / 2)),
            full_scans=int(self._scanned / whole),
            ksmd_seconds=self.sample.ksmd_seconds + pages * self.cost,
        )
        return self.sample

    def machines(self, number: int) -> None:
        self.sample = replace(self.sample, offered=number)


def play(plan: Plan, host: Host, seconds: float) -> list[tuple[str, float]]:
    """State and ksmd's share at each sample."""
    seen: list[tuple[str, float]] = []
    end = host.sample.time + seconds
    settings = plan.decide(host.sample)
    while host.sample.time < end:
        host.pass_time(settings, TICK[plan.state])
        settings = plan.decide(host.sample)
        seen.append((plan.state, plan.share))
    return seen


def test_without_machines_it_is_stopped() -> None:
    plan, host = Plan(WANTED), Host(10_000, 1e-6)
    assert plan.decide(host.sample) == {"run": 0}
    assert {state for state, _ in play(plan, host, 60)} == {"stopped"}


def test_it_is_fast_while_saving_grows_and_slow_afterwards() -> None:
    plan, host = Plan(WANTED), Host(400_000, 1e-6)
    host.machines(2)
    states = [state for state, _ in play(plan, host, 120)]
    assert states[0] == "fast"
    assert states[-1] == "slow"
    assert host.sample.sharing == host.possible
    assert "".join("f" if state == "fast" else "s" for state in states).count("fs") == 1


def test_a_machine_that_starts_makes_it_fast_again_and_the_last_s_end_stops_it() -> None:
    plan, host = Plan(WANTED), Host(50_000, 1e-6)
    host.machines(2)
    settled = play(plan, host, 120)[-1][0]
    assert settled == "slow"
    host.machines(3)
    host.possible = 90_000
    assert play(plan, host, 0.1)[0][0] == "fast"
    host.machines(0)
    assert plan.decide(host.sample) == {"run": 0}
    assert plan.state == "stopped"


def test_the_first_scan_brings_nothing_and_after_the_last_growth_one_is_enough() -> None:
    plan = Plan(WANTED)
    rows = [  # sharing, full scans, machines: what is decided
        (0, 0, 2, "fast"),
        (0, 1, 2, "fast"),  # every page was seen once
        (9000, 1, 2, "fast"),
        (20000, 2, 2, "fast"),
        (20000, 3, 2, "slow"),
        (20000, 3, 3, "fast"),  # another machine begins anew
        (20000, 4, 3, "fast"),
        (20000, 5, 3, "slow"),
    ]
    for second, (sharing, scans, machines, state) in enumerate(rows):
        plan.decide(Sample(second, sharing, scans, second / 100, machines))
        assert plan.state == state, rows[second]


@pytest.mark.parametrize("cost", [2e-7, 1e-6, 5e-6, 2e-5])
def test_ksmd_s_share_stays_below_its_bound_once_it_has_been_measured(cost: float) -> None:
    plan, host = Plan(WANTED), Host(3_000_000, cost)
    host.machines(8)
    shares = [share for _, share in play(plan, host, 60)]
    assert max(shares[2:]) <= 0.20, shares
    assert sum(shares) / len(shares) <= 0.20


def test_a_fast_host_is_scanned_at_the_full_rate() -> None:
    plan, host = Plan(WANTED), Host(50_000_000, 1e-8)
    host.machines(2)
    play(plan, host, 20)
    assert plan.decide(host.sample)["pages-to-scan"] == WANTED.fast_pages


def test_while_the_advisor_scans_fewer_pages_than_its_least_ksmd_sleeps_less() -> None:
    settings: dict[str, Value] = {"advisor-mode": "scan-time", "advisor-min-pages-to-scan": 500}
    sleeps = [
        advised(WANTED, {**settings, "pages-to-scan": n}, 20)["sleep-millisecs"] for n in (20, 250, 500)
    ]
    assert sleeps == [1, 10, 20]
    before = {**settings, "advisor-mode": "none", "pages-to-scan": 100}
    assert advised(WANTED, before, 20) == {
        **{"advisor-max-cpu": 20, "advisor-target-scan-time": 60, "advisor-mode": "scan-time"},
        **{"sleep-millisecs": 20, "run": 1},
    }


def test_figures_that_go_backwards_do_no_harm() -> None:
    plan = Plan(WANTED)
    plan.decide(Sample(10, 5000, 9, 7.0, 2))
    settings = plan.decide(Sample(10, 10, 0, 0.0, 2))
    assert settings["run"] == 1
    assert int(settings["pages-to-scan"]) >= 1


def test_on_values_recorded_from_a_kernel_it_is_fast_while_these_grow_and_slow_when_they_rest() -> None:
    """/sys/kernel/mm/ksm and ksmd's time on Linux 6.18: two machines start, rest, two more start, all end.

    A row: seconds, pages_sharing, full_scans, ksmd's seconds, machines. Other processes merged beside them.
    """
    rows = json.loads(Path(__file__).with_name("ksm_trace.json").read_text())
    plan, states = Plan(WANTED), []
    for row in rows:
        settings = plan.decide(Sample(*row))
        states.append(plan.state)
        assert plan.share <= 0.20
        assert settings == {"run": 0} if not row[4] else 1 <= int(settings["pages-to-scan"]) <= 8000
    assert [state for state, _ in itertools.groupby(states)] == [
        *("stopped", "fast", "slow", "fast", "slow", "stopped")
    ]
    rested = {state for state, row in zip(states, rows, strict=True) if 33 < row[0] < 46 or 93 < row[0] < 104}
    assert rested == {"slow"}
