# SPDX-License-Identifier: Apache-2.0
"""Same-page merging: the host's settings and figures, and which machines may merge with each other.

Settings are written by the broker's child, which remembers what it found; at the end of the service, or when
asked, that is put back. A change of several settings is made as a whole or not at all.

The kernel has no merge domains: every page that is offered can merge with every other, and the time that a
write takes tells whether a page was merged, so that one guest can find out what another has in its memory.
Hence *domains*: owners whom the administrator trusts with each other, or one owner alone. The domain of the
machines that are offered now is the active one; a machine of another domain is not offered for as long as it
runs, and says so (``other-domain``). Processes that are not ours are beyond this; ``others`` shows them.
"""

from __future__ import annotations

import asyncio
import logging
import os
import pwd
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vmbus.service.broker_client import BrokerClient
from vmbus.service.config import KsmConfig
from vmbus.service.machine import Machine
from vmbus.service.registry import Registry
from vmbus.wire.errors import VmbusError
from vmbus.wire.memory import Merger

log = logging.getLogger("vmbus.ksm")

KSM: Final = Path("/sys/kernel/mm/ksm")
PAGE: Final = os.sysconf("SC_PAGESIZE")
ENDING: Final = 5.0
"""Seconds for putting settings back when the service ends."""
_UINT: Final = 0xFFFFFFFF

Value = int | str


@dataclass(frozen=True)
class Knob:
    """A setting: a number in a range, or one of some words."""

    least: int = 0
    most: int = 1
    words: tuple[str, ...] = ()

    def check(self, name: str, value: object) -> str:
        """The value as the kernel takes it. Raises InvalidArgument."""
        if self.words:
            if value not in self.words:
                message = f"{value!r} is not one of {', '.join(self.words)}"
                raise VmbusError("InvalidArgument", message, argument=name)
            return str(value)
        if isinstance(value, bool) and self.most == 1:
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool):
            raise VmbusError("InvalidArgument", f"{value!r} is not an integer", argument=name)
        if not self.least <= value <= self.most:
            raise VmbusError("InvalidArgument", f"{value} is not in {self.least}–{self.most}", argument=name)
        return str(value)


# Documentation/admin-guide/mm/ksm.rst; in the order in which they are put back: pages_to_scan while the
# advisor is off, for it sets that itself, and run last, when the rest is as it was.
KNOBS: Final[dict[str, Knob]] = {
    "advisor-max-cpu": Knob(0, 100),
    "advisor-target-scan-time": Knob(1, _UINT),
    "advisor-min-pages-to-scan": Knob(1, _UINT),
    "advisor-max-pages-to-scan": Knob(1, _UINT),
    "pages-to-scan": Knob(1, _UINT),
    "sleep-millisecs": Knob(0, _UINT),
    "smart-scan": Knob(),
    "merge-across-nodes": Knob(),
    "use-zero-pages": Knob(),
    "max-page-sharing": Knob(2, 0x7FFFFFFF),
    "stable-node-chains-prune-millisecs": Knob(0, _UINT),
    "advisor-mode": Knob(words=("none", "scan-time")),
    "run": Knob(0, 2),
}
_FIGURES: Final = {
    "shared": "pages_shared",
    "sharing": "pages_sharing",
    "unshared": "pages_unshared",
    "volatile": "pages_volatile",
    "skipped": "pages_skipped",
    "scanned": "pages_scanned",
    "zero": "ksm_zero_pages",
    "full-scans": "full_scans",
    "profit": "general_profit",
}


class Ksm:
    """The host's KSM and the machines that are offered to it."""

    def __init__(
        self, registry: Registry, broker: BrokerClient, wanted: KsmConfig, place: Path = KSM
    ) -> None:
        self._registry, self._broker, self._place = registry, broker, place
        self._domains = _by_uid(wanted)
        self._wanted = wanted.settings
        self.on_offered: Callable[[], None] = lambda: None
        """Called when a machine is about to be offered."""
        self._settling: asyncio.Future[None] | None = None
        self.found: dict[str, Value] = {}
        """Settings that were changed, as they were found."""

    # -- the host

    @property
    def available(self) -> bool:
        """Whether the kernel has KSM."""
        return (self._place / "run").exists()

    def settings(self) -> dict[str, Value]:
        """The settings that this kernel has, as they are."""
        found = {name: self._read(name.replace("-", "_")) for name in KNOBS}
        return {name: _value(name, text) for name, text in found.items() if text}

    def figures(self) -> dict[str, int]:
        """Pages shared (that stand for several), sharing (saved by it), unshared, volatile, …; full-scans;
        profit in bytes. Those that this kernel has."""
        found = {name: self._read(file) for name, file in _FIGURES.items()}
        return {name: int(text) for name, text in found.items() if text}

    async def set(self, values: Mapping[str, object]) -> None:
        """Change settings, all or none. Raises InvalidArgument, NotSupported, InUse, AccessDenied."""
        before = self.settings()
        for name in values:
            if name not in KNOBS:
                message = f"there is no such setting; known are {', '.join(sorted(KNOBS))}"
                raise VmbusError("InvalidArgument", message, argument=name)
            if name not in before:
                raise VmbusError("NotSupported", "this kernel's KSM does not have it", argument=name)
        wanted = {name: KNOBS[name].check(name, value) for name, value in values.items()}
        advised = wanted.get("advisor-mode", before.get("advisor-mode", "none")) != "none"
        if advised and "pages-to-scan" in wanted:
            message = "the kernel's advisor sets it; it needs advisor-mode none"
            raise VmbusError("InvalidArgument", message, argument="pages-to-scan")
        if "advisor-mode" in wanted and before["advisor-mode"] == "none":
            # It will be changed by the advisor: have it remembered as it is.
            wanted = {"pages-to-scan": str(before["pages-to-scan"]), **wanted}
        first = wanted.get("run") in ("0", "2")  # what is merged is in the way of some of the others
        order = sorted(wanted, key=lambda name: (name == "run") is not first)
        written: list[str] = []
        try:
            for name in order:
                await self._tune(name, wanted[name])
                written.append(name)
        except VmbusError:
            for name in reversed(written):
                await self._tune(name, str(before[name]))
            raise

    async def restore(self) -> None:
        """Put back every setting that was changed. Raises the first error, after all were tried."""
        failed = None
        if "advisor-mode" in self.found:
            await self._tune("advisor-mode", "none")
        for name in [name for name in KNOBS if name in self.found]:
            try:
                await self._tune(name, "")
            except VmbusError as error:
                failed = failed or error
        if failed is not None:
            raise failed

    def connected(self) -> None:
        """After each connection to the broker: learn what was found, set what vmbusd.toml wants."""
        self._settling = asyncio.ensure_future(self._settle())

    async def _settle(self) -> None:
        try:
            await self._learn({})
            if self._wanted:
                await self.set(self._wanted)
        except VmbusError as error:
            log.warning("KSM's settings are not as vmbusd.toml wants them: %s", error)

    async def ending(self) -> None:
        """The service ends: what was found is put back."""
        try:
            await asyncio.wait_for(self.restore(), ENDING)
        except (VmbusError, TimeoutError) as error:
            log.warning("settings of KSM stay as they are: %s", error)

    async def _tune(self, name: str, value: str) -> None:
        try:
            await self._learn({f"kernel/mm/ksm/{name.replace('-', '_')}": value})
        except VmbusError as error:
            raise VmbusError(error.kind, error.message, argument=error.argument or name) from None

    async def _learn(self, settings: dict[str, str]) -> None:
        found = (await self._broker.tune(settings)).found
        names = {name: found.get(f"kernel/mm/ksm/{name.replace('-', '_')}") for name in KNOBS}
        self.found = {name: _value(name, text) for name, text in names.items() if text is not None}

    def _read(self, file: str) -> str:
        """The text of a file, of "[none] scan-time" the one in brackets; "" where the kernel has none."""
        try:
            text = (self._place / file).read_text().strip()
        except OSError:
            return ""
        return text.partition("[")[2].partition("]")[0] or text

    # -- machines

    def domain(self, owner: int) -> str:
        """The name of the domain that ``owner``'s machines belong to."""
        return self._domains.get(owner, f"uid {owner}")

    @property
    def active(self) -> str:
        """The domain of the machines that are offered now; "" for none."""
        return next((self.domain(machine.owner) for machine in self.offered()), "")

    def offered(self) -> Iterable[Machine]:
        """Living machines whose memory is offered to KSM."""
        return (m for m in self._registry.all() if not m.gone.is_set() and m.merging == "yes")

    def admit(self, machine: Machine) -> str:
        """What a machine that is about to be built shall say: yes (offer its memory), no, other-domain."""
        if machine.definition.memory_kind != "mergeable" or not self.available:
            return "no"
        if self.active not in ("", self.domain(machine.owner)):
            return "other-domain"
        self.on_offered()
        return "yes"

    async def others(self) -> list[Merger]:
        """Processes that use KSM and are no workers of this instance."""
        ours = {machine.pid for machine in self._registry.all()}
        return [merger for merger in (await self._broker.look()).mergers if merger.pid not in ours]


def machine_figures(stat: Mapping[str, int]) -> dict[str, int]:
    """What /proc/PID/ksm_stat says, in bytes: merged, unshared (looked at, and like no other), zero, profit.

    Of all machines and others together, ``merged`` is the host's shared and sharing.
    """
    merged = stat.get("ksm_merging_pages", 0)
    return {
        "merged": merged * PAGE,
        "unshared": max(0, stat.get("ksm_rmap_items", 0) - merged) * PAGE,
        "zero": stat.get("ksm_zero_pages", 0) * PAGE,
        "profit": stat.get("ksm_process_profit", 0),
    }


def _value(name: str, text: str) -> Value:
    return text if KNOBS[name].words else int(text)


def _by_uid(wanted: KsmConfig) -> dict[int, str]:
    found: dict[int, str] = {}
    for domain in wanted.domain:
        for user in domain.users:
            try:
                uid = pwd.getpwnam(user).pw_uid
            except KeyError:
                log.error("vmbusd.toml: domain %s: there is no user %s", domain.name, user)
                continue
            if found.setdefault(uid, domain.name) != domain.name:
                text = f"vmbusd.toml: {user} is in two merge domains, {found[uid]} and {domain.name}"
                raise VmbusError("InvalidArgument", text)
    return found
