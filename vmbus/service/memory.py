# SPDX-License-Identifier: Apache-2.0
"""A running machine's memory: how much the guest should get by with, how much it does, and what it costs.

The *target* is a wish that the worker passes on to the guest's balloon; the guest may take its time, or not
heed it. ``actual`` is the machine's memory less what the guest says it has given back: what it said last, for
the service looks only after a new target was set (until the guest is there, or for FOLLOW seconds) and when
somebody asks.

What a worker says of its guest is checked and bounded: it is shown, and decides nothing beyond its own
machine.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any, Final, TypeVar

from vmbus.service.jobs import Job, Jobs
from vmbus.service.machine import Machine
from vmbus.service.worker_client import WorkerClient
from vmbus.wire.definition import has_balloon, memory_floor
from vmbus.wire.errors import VmbusError

log = logging.getLogger("vmbus.memory")

PAGE: Final = 4096
FOLLOW: Final = 120.0
"""Seconds for which a guest is looked at after it was given a target."""
LOOK: Final = (0.1, 0.2, 0.5, 1.0)
"""Seconds between two looks; the last is repeated."""
PROGRESS: Final = 0.2
"""Seconds between two looks at how far a prefault is, or what else takes long."""
_GUEST_FIGURES: Final = 32

T = TypeVar("T")


class Memory:
    """The operations on machines' memory."""

    def __init__(self, jobs: Jobs) -> None:
        self._jobs = jobs
        self._touched: set[str] = set()
        self._followers: dict[str, asyncio.Task[None]] = {}

    async def set_target(self, machine: Machine, target: int) -> None:
        """Ask the guest to get by with ``target`` bytes."""
        check_target(machine, target)
        machine.require("SetMemoryTarget", "running", "paused")
        machine.memory_wish = target
        await self.lend(machine, target)

    async def lend(self, machine: Machine, target: int) -> None:
        """The same for as long as the host is short of memory: its owner's wish stays the ceiling."""
        check_target(machine, target)
        await machine.connection().set_memory_target(target)
        machine.set_memory(target, machine.memory_actual)
        self._follow(machine)

    def prefault(self, machine: Machine) -> Job:
        """Touch all of the machine's memory, as a job."""
        machine.require("Prefault", "running", "paused")
        machine.connection()
        if machine.uuid in self._touched:
            raise VmbusError("InvalidState", "the machine's memory is being touched already; see its job")
        self._touched.add(machine.uuid)
        return self._jobs.start(
            "prefault", machine.owner, machine.uuid, lambda job: self._prefault(machine, job)
        )

    async def _prefault(self, machine: Machine, job: Job) -> None:
        try:
            await touch(machine, job)
        finally:
            self._touched.discard(machine.uuid)

    async def figures(self, machine: Machine) -> dict[str, Any]:
        """Machine.GetMemory: see the XML. Plain values."""
        machine.require("GetMemory", "running", "paused")
        worker = machine.connection()
        balloon = await self.look(machine)
        usage = await worker.figures.usage()
        definition = machine.definition
        found: dict[str, Any] = {
            "kind": definition.memory_kind,
            "size": definition.memory,
            "minimum": memory_floor(definition),
            "target": machine.memory_target,
            "ballooned": definition.memory - machine.memory_actual,
            "reported": _count(balloon.get("reported")),
        }
        if guest := balloon.get("guest"):
            found["guest"] = guest
        if usage is not None:
            mergeable = definition.memory_kind == "mergeable"
            found |= {
                "resident": usage.resident,
                "pss": usage.pss,
                "huge": usage.huge,
                "merged": usage.merged,
                "saved": max(usage.resident - usage.pss, 0) if mergeable else 0,
                "swapped": usage.swapped,
                "locked": usage.locked,
                "overhead": usage.overhead,
            }
        return found

    async def look(self, machine: Machine) -> dict[str, Any]:
        """What the worker says of the balloon, checked; the machine's properties follow. Empty for none."""
        if not has_balloon(machine.definition):
            return {}
        devices = (await machine.connection().stats()).get("devices")
        said = devices.get("balloon") if isinstance(devices, dict) else None
        if not isinstance(said, dict):
            return {}
        memory = machine.definition.memory
        target = _count(said.get("target"), memory)
        machine.set_memory(target or memory, memory - _count(said.get("ballooned"), memory))
        guest = said.get("guest")
        if isinstance(guest, dict):
            pairs = list(guest.items())[:_GUEST_FIGURES]
            said = {**said, "guest": {str(key)[:64].replace("_", "-"): _count(value) for key, value in pairs}}
        else:
            said = {key: value for key, value in said.items() if key != "guest"}
        return said

    async def found(self, machine: Machine) -> None:
        """A machine that was running before this service is reached again."""
        memory = machine.definition.memory
        machine.set_memory(memory, memory)
        try:
            await self.look(machine)
        except VmbusError as error:
            log.info("%s: its balloon is not known: %s", machine.uuid, error)

    def _follow(self, machine: Machine) -> None:
        """Look until the guest is where it should be; one follower a machine."""
        before = self._followers.get(machine.uuid)
        if before is not None:
            before.cancel()
        task = asyncio.ensure_future(self._look_until_there(machine))
        self._followers[machine.uuid] = task
        task.add_done_callback(lambda _: self._followed(machine, task))

    def _followed(self, machine: Machine, task: asyncio.Task[None]) -> None:
        if self._followers.get(machine.uuid) is task:
            del self._followers[machine.uuid]
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("%s: its balloon could not be followed", machine.uuid, exc_info=error)

    async def _look_until_there(self, machine: Machine) -> None:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + FOLLOW
        looks = 0
        while loop.time() < deadline and machine.state in ("running", "paused"):
            try:
                await self.look(machine)
            except VmbusError:
                return  # the worker is away; whoever asks looks again
            if machine.memory_actual == machine.memory_target:
                return
            await asyncio.sleep(LOOK[min(looks, len(LOOK) - 1)])
            looks += 1


async def touch(machine: Machine, job: Job | None) -> None:
    """Have the worker touch all of the machine's memory; ``job`` shows how far it is. Cancelled, it stops."""
    worker = machine.connection()
    await gone_over(machine, job, worker.prefault(), worker.cancel_prefault, worker)


async def gone_over(
    machine: Machine,
    job: Job | None,
    work: Coroutine[Any, Any, None],
    cancel: Callable[[], Awaitable[None]],
    worker: WorkerClient,
) -> None:
    """``watched``, for work that goes over all the machine's memory; ``job`` shows how far it is."""
    size = machine.definition.memory

    def look(stats: Mapping[str, Any]) -> None:
        memory = stats.get("memory")
        if job is not None and isinstance(memory, dict):
            job.tell((_count(memory.get("prefaulted"), size), size))

    await watched(work, cancel, worker, look)
    if job is not None:
        job.tell((size, size))


async def watched(
    work: Coroutine[Any, Any, T],
    cancel: Callable[[], Awaitable[None]],
    worker: WorkerClient,
    look: Callable[[Mapping[str, Any]], None],
) -> T:
    """The result of ``work``, for which the worker takes long; ``look`` sees its statistics meanwhile.

    Cancelled, it is stopped by ``cancel``, and this waits until it has; or is done, if that came too late."""
    asking = asyncio.ensure_future(work)
    try:
        while not (await asyncio.wait({asking}, timeout=PROGRESS))[0]:
            with contextlib.suppress(VmbusError):  # if it has ended meanwhile, its answer is on the way
                look(await worker.stats())
        return await asking
    except asyncio.CancelledError:
        with contextlib.suppress(VmbusError):
            await cancel()
        try:
            return await asking
        except VmbusError:
            raise asyncio.CancelledError from None
    finally:
        asking.cancel()


def check_target(machine: Machine, target: int) -> None:
    """Raise unless the machine may be asked to get by with ``target`` bytes."""
    definition = machine.definition
    if not has_balloon(definition):
        kind = definition.memory_kind
        if definition.locked:
            why = "it is locked in RAM"
        elif kind in ("mergeable", "shareable"):
            why = "it is defined without a balloon; set balloon to true in its definition"
        else:
            why = f"{kind} memory is reserved for its machine: it cannot be ballooned, merged or swapped"
        raise VmbusError("NotSupported", f"the machine's memory stays as it is: {why}")
    floor = memory_floor(definition)
    if target % PAGE or not floor <= target <= definition.memory:
        raise VmbusError(
            "InvalidArgument",
            f"{target} is not a multiple of {PAGE} between the machine's floor (memory-minimum), {floor}, "
            f"and its memory, {definition.memory}",
            argument="target",
        )


def _count(value: object, most: int = (1 << 64) - 1) -> int:
    """What should be a number of bytes or pages, from a worker."""
    return min(max(value, 0), most) if isinstance(value, int) and not isinstance(value, bool) else 0
