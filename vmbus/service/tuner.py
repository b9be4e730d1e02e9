# SPDX-License-Identifier: Apache-2.0
"""The tuner of KSM: scans fast while that saves memory, slowly when it does not, not at all without machines.

Off unless vmbusd.toml says otherwise. Where the kernel has an advisor (6.8 and newer) the tuner sets that up
and only stops and starts KSM; elsewhere, or with ``advisor = false``, it decides itself, by a sample every
few seconds (``Plan``, which knows no clock and no file and is tested against a recording):

    stopped ── a machine is offered ──► fast ── a full scan without growth ─────► slow
       ▲                                  ▲                                         │
       └── no machine is offered          └── a machine started, or saving grows ───┘

A page merges when a scan finds it as the scan before it did. So the first scan of *fast* brings nothing, and
that it does not counts only from the second on. *Fast* begins at a sixteenth of its rate and doubles while
ksmd stays below its bound; whatever the state, the rate follows the share of a CPU that ksmd was measured to
take, so that it stays below ``most-cpu``.

The advisor reckons a scan's CPU time from what ksmd had at the scan before it, and at its first one from the
boot (scan_time_advisor() of mm/ksm.c, seen on Linux 6.18). Where ksmd has run for a minute before, that seems
to be several CPUs, and pages_to_scan falls to 20 or so, far below advisor_min_pages_to_scan, until the next
scan has ended, which may then be hours. So while it is below that, ksmd sleeps as much less.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

from vmbus.service.broker_client import BrokerClient
from vmbus.service.config import TunerConfig
from vmbus.service.ksm import Ksm, Value
from vmbus.wire.errors import VmbusError

log = logging.getLogger("vmbus.tuner")

State = Literal["off", "advisor", "stopped", "fast", "slow"]

TICK: Final = {"fast": 1.0, "slow": 10.0, "advisor": 10.0, "stopped": 10.0, "off": 60.0}
"""Seconds until the next sample; a machine that starts brings it forward."""
GROWTH: Final = 0.005
"""Saving grows when a sample has so much more of it than the one before."""
GROWTH_LEAST: Final = 64
"""Pages; a growth that is less is none."""
QUIET_SCANS: Final = 2
"""Full scans without growth before there was any, after which there will be none; later, one is enough."""
AIM: Final = 0.75
"""Of the bound on ksmd's CPU: what the rate is steered to."""


@dataclass(frozen=True)
class Sample:
    """What is known at one moment."""

    time: float
    """Seconds, on any clock that does not jump."""
    sharing: int
    """Pages saved."""
    full_scans: int
    ksmd_seconds: float
    """CPU time since boot."""
    offered: int
    """Machines."""


class Plan:
    """What to do, sample by sample, where the kernel has no advisor."""

    def __init__(self, wanted: TunerConfig) -> None:
        self._wanted = wanted
        self.state: State = "stopped"
        self.share = 0.0
        """Of one CPU, what ksmd took between the last two samples."""
        self._pages = 0
        self._quiet = 0
        self._grown = False
        self._last: Sample | None = None

    def decide(self, sample: Sample) -> dict[str, Value]:
        """The settings from now on."""
        last, self._last = self._last, sample
        self.share = _share(last, sample)
        if not sample.offered:
            self.state = "stopped"
            return {"run": 0}
        if self.state == "stopped":
            self._enter_fast()
        elif last is not None and (sample.offered > last.offered or _grows(last, sample)):
            self._quiet, self._grown = 0, sample.offered <= last.offered
            if self.state == "slow":
                self._enter_fast()
        elif last is not None:
            self._quiet += sample.full_scans - last.full_scans
            if self._quiet >= (1 if self._grown else QUIET_SCANS):
                self.state = "slow"
        self._steer()
        sleep = 20 if self.state == "fast" else 200
        return {"pages-to-scan": self._pages, "sleep-millisecs": sleep, "run": 1}

    def _enter_fast(self) -> None:
        self.state, self._quiet, self._grown = "fast", 0, False
        self._pages = max(self._wanted.slow_pages, self._wanted.fast_pages // 16)

    def _steer(self) -> None:
        most = self._wanted.fast_pages if self.state == "fast" else self._wanted.slow_pages
        bound = self._wanted.most_cpu / 100 * AIM
        factor = min(2.0, bound / self.share) if self.share > 0.001 else 2.0
        self._pages = max(1, min(most, int(self._pages * factor)))


def _share(last: Sample | None, sample: Sample) -> float:
    if last is None or sample.time <= last.time:
        return 0.0
    return max(0.0, sample.ksmd_seconds - last.ksmd_seconds) / (sample.time - last.time)


def _grows(last: Sample, sample: Sample) -> bool:
    return sample.sharing - last.sharing > max(GROWTH_LEAST, int(last.sharing * GROWTH))


class Tuner:
    """Carries a plan out."""

    def __init__(self, ksm: Ksm, broker: BrokerClient, wanted: TunerConfig) -> None:
        self._ksm, self._broker, self._wanted = ksm, broker, wanted
        self._plan = Plan(wanted)
        self._wake = asyncio.Event()
        self._in_force: dict[str, Value] = {}
        self._complaint = ""
        self.state: State = "off"
        self.share = 0.0

    def wake(self) -> None:
        """A machine starts, or has ended: look soon."""
        self._wake.set()

    async def run(self) -> None:
        """For ever, if the tuner is on and the kernel has KSM."""
        if not self._wanted.on or not self._ksm.available:
            return
        while True:
            try:
                await self._step()
                self._complaint = ""
            except VmbusError as error:
                self.state, self._in_force = "off", {}
                if str(error) != self._complaint:
                    self._complaint = str(error)
                    log.warning("KSM is not tuned: %s", error)
            self._wake.clear()
            try:
                await asyncio.wait_for(self._wake.wait(), 2.0 if self._complaint else TICK[self.state])
                await asyncio.sleep(0.5)  # the machine is being built
            except TimeoutError:
                pass

    async def _step(self) -> None:
        offered = len(list(self._ksm.offered()))
        settings = self._ksm.settings()
        advisor = settings.get("advisor-mode")
        if self._wanted.advisor and advisor is not None:
            usual = self._ksm.found.get("sleep-millisecs", settings["sleep-millisecs"])
            await self._put(advised(self._wanted, settings, int(usual)) if offered else {"run": 0})
            self.state = "advisor" if offered else "stopped"
            return
        seen = await self._broker.look()
        figures = self._ksm.figures()
        now = asyncio.get_running_loop().time()
        sample = Sample(now, figures["sharing"], figures["full-scans"], seen.ksmd_seconds, offered)
        if advisor not in (None, "none"):
            await self._ksm.set({"advisor-mode": "none"})  # somebody has set it up; the rate is ours now
        await self._put(self._plan.decide(sample))
        self.state, self.share = self._plan.state, self._plan.share

    async def _put(self, settings: dict[str, Value]) -> None:
        news = {name: value for name, value in settings.items() if self._in_force.get(name) != value}
        if news:
            await self._ksm.set(news)
            self._in_force.update(news)


def advised(wanted: TunerConfig, settings: Mapping[str, Value], sleep: int) -> dict[str, Value]:
    """What sets the advisor up, by the settings as they are; ``sleep`` milliseconds are the usual."""
    pages, least = int(settings["pages-to-scan"]), int(settings.get("advisor-min-pages-to-scan", 1))
    if settings["advisor-mode"] != "none" and pages < least:
        sleep = max(1, sleep * pages // least)
    return {
        "advisor-max-cpu": wanted.most_cpu,
        "advisor-target-scan-time": wanted.scan_time,
        "advisor-mode": "scan-time",
        "sleep-millisecs": sleep,
        "run": 1,
    }
