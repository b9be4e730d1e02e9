# SPDX-License-Identifier: Apache-2.0
"""Shares memory out among machines while the host has too little: the policy ``[pressure]`` of vmbusd.toml.

The measure is the kernel's (PSI): the per cent of the last ten seconds in which some task waited for memory.
Every ``interval`` seconds one *round* looks at it:

| pressure | the round |
|---|---|
| at ``high`` and above | takes ``step`` of all the machines' memory from them |
| up to ``low`` | gives as much back to those that have less than they may |
| between | nothing |

What is taken is shared out by what each can spare: what its guest says is available, else what it has above
its floor, and never more than that. What is given is shared out by what each lacks. No target is ever below a
machine's floor (memory-minimum) or above its *ceiling*, which is its memory or what its owner asked for by
SetMemoryTarget. Machines without a balloon (huge or locked memory) and paused ones, whose guests cannot give,
are left alone, and so are those that have not got where they were asked to be last time: they have nothing to
spare just now.

A guest's word about what is available decides about nothing but its own share: one that lies low keeps
its memory, one that lies high gives more than the others.

Left out: swapping and killing, which are the kernel's; machines' weights.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

import msgspec

from vmbus.service.host_memory import Pressure as Reading
from vmbus.service.machine import Machine
from vmbus.service.memory import PAGE, Memory
from vmbus.wire.definition import has_balloon, memory_floor
from vmbus.wire.errors import VmbusError

log = logging.getLogger("vmbus.pressure")

LEAST: Final = 1 << 20
"""Bytes; a share that is smaller is not worth asking for."""


class Share(msgspec.Struct, frozen=True):
    """One machine in a round; all in bytes. ``spare``: what it can do without, at most."""

    uuid: str
    floor: int
    ceiling: int
    target: int
    spare: int


def take(shares: Iterable[Share], amount: int) -> dict[str, int]:
    """New targets that are together up to ``amount`` lower, in proportion to what each can spare."""
    can = {share: min(share.spare, share.target - share.floor) for share in shares}
    parts = _parts({share: spare for share, spare in can.items() if spare >= LEAST}, amount)
    return {share.uuid: share.target - part for share, part in parts.items()}


def give(shares: Iterable[Share], amount: int) -> dict[str, int]:
    """New targets that are together up to ``amount`` higher, in proportion to what each lacks."""
    lacks = {share: share.ceiling - share.target for share in shares}
    parts = _parts({share: lack for share, lack in lacks.items() if lack > 0}, amount)
    return {share.uuid: share.target + part for share, part in parts.items()}


def _parts(most: Mapping[Share, int], amount: int) -> dict[Share, int]:
    """``amount`` cut up in proportion to ``most``: whole pages, at least LEAST, at most what it is of."""
    whole = sum(most.values())
    if not whole:
        return {}
    wanted = {share: max(part * min(amount, whole) // whole, LEAST) for share, part in most.items()}
    return {share: min(part, most[share]) // PAGE * PAGE for share, part in wanted.items()}


class PressurePolicy:
    """Runs the rounds. ``read`` gives the pressure now, None where the kernel does not measure it."""

    def __init__(
        self,
        memory: Memory,
        machines: Callable[[], Iterable[Machine]],
        read: Callable[[], Reading | None],
        *,
        low: float,
        high: float,
        step: float,
        interval: float,
    ) -> None:
        self._memory = memory
        self._machines = machines
        self._read = read
        self._low, self._high, self._step = low, high, step
        self._interval = interval

    async def run(self) -> None:
        """A round every interval, for ever."""
        if self._read() is None:
            log.warning("the kernel does not measure memory pressure (CONFIG_PSI, psi=1): the policy rests")
        while True:
            await asyncio.sleep(self._interval)
            try:
                await self.round()
            except Exception:
                log.exception("a round of the pressure policy failed")

    async def round(self) -> dict[str, int]:
        """One round; the new targets by machine."""
        reading = self._read()
        if reading is None or self._low < reading.some < self._high:
            return {}
        machines = {
            machine.uuid: machine
            for machine in self._machines()
            if machine.state == "running" and has_balloon(machine.definition)
        }
        if reading.some <= self._low and all(not _lacks(machine) for machine in machines.values()):
            return {}
        looks = await asyncio.gather(*(self._look(machine) for machine in machines.values()))
        shares = [share for share in looks if share is not None]
        amount = int(self._step * sum(machines[share.uuid].definition.memory for share in shares))
        squeezed = reading.some >= self._high
        targets = take(shares, amount) if squeezed else give(shares, amount)
        for uuid, target in targets.items():
            await self._ask(machines[uuid], target)
        if targets:
            done = "asked to give memory" if squeezed else "given memory back"
            log.info("memory pressure %.1f %%: %d machines are %s", reading.some, len(targets), done)
        return targets

    async def _look(self, machine: Machine) -> Share | None:
        try:
            said = await self._memory.look(machine)
        except VmbusError:
            return None  # it has just ended, or its worker is away
        floor, target = memory_floor(machine.definition), machine.memory_target
        spare = _available(said, target - floor)
        if machine.memory_actual > target:  # it has not given yet what it was asked for
            spare = 0
        return Share(machine.uuid, floor, machine.memory_ceiling, target, spare)

    async def _ask(self, machine: Machine, target: int) -> None:
        try:
            await self._memory.lend(machine, target)
        except VmbusError as error:
            log.info("%s: its target stays: %s", machine.uuid, error)


def _lacks(machine: Machine) -> bool:
    return machine.memory_target < machine.memory_ceiling


def _available(said: Mapping[str, Any], otherwise: int) -> int:
    guest = said.get("guest")
    if not isinstance(guest, dict):
        return otherwise
    found = guest.get("available", guest.get("free", otherwise))
    return found if isinstance(found, int) else otherwise
