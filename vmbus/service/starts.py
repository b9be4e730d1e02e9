# SPDX-License-Identifier: Apache-2.0
"""Starts: from stopped or crashed to running, paused, or where a saved machine was.

A start is a list of named steps, each of which leaves behind something that one undo takes
away again: the run record, the worker. A start that fails, is cancelled or loses its worker undoes them in
reverse, and a machine is ``stopped, start-failed`` only when the worker is confirmed to be gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any, Final

import msgspec

from vmbus.service import descriptors
from vmbus.service.arrivals import Arrival
from vmbus.service.broker_client import BrokerClient
from vmbus.service.files import OwnFile, PassedFile, PassedSocket
from vmbus.service.handover import Handover, check_passed, close_all
from vmbus.service.jobs import Job, Jobs, seen_through
from vmbus.service.machine import STORED_FORMAT, Machine, Run
from vmbus.service.memory import gone_over, touch, watched
from vmbus.service.registry import Registry
from vmbus.service.workers import Workers
from vmbus.wire.definition import check_machine_type, slots
from vmbus.wire.errors import VmbusError

log = logging.getLogger("vmbus.starts")

AT_ONCE: Final = 8
"""Starts of one owner that the broker is asked about at a time: more would not be quicker, and would wait
there with a deadline."""

Step = tuple[str, Callable[[], Awaitable[None]]]


@dataclasses.dataclass
class Resumption:
    """A start that goes on from a saved machine: its file, closed with the start, or the socket through which
    it comes. ``changed_disks``: the files of its disks may be others, or were written since. ``revert_to``:
    the disks go back to the internal snapshots of that name, and what they held is kept in those named
    ``aside``. ``on_restored``: called before the guest goes on. ``copy``: disks that are written with what
    comes; ``separate``: disks whose files are others, and right.
    """

    file: PassedFile | OwnFile | PassedSocket
    changed_disks: bool = False
    revert_to: str = ""
    aside: str = ""
    clone: bool = False
    on_restored: Callable[[], None] = lambda: None
    copy: list[str] = dataclasses.field(default_factory=list)
    separate: list[str] = dataclasses.field(default_factory=list)

    @property
    def moving(self) -> bool:
        """Whether it runs elsewhere still."""
        return isinstance(self.file, PassedSocket)


class Starts:
    """The starts of all machines."""

    def __init__(
        self, registry: Registry, broker: BrokerClient, jobs: Jobs, handover: Handover, workers: Workers
    ) -> None:
        self._registry = registry
        self._broker = broker
        self._jobs = jobs
        self._handover = handover
        self._networks = handover.networks
        self._workers = workers
        self._turns: dict[int, asyncio.Semaphore] = {}
        self.on_moving: Callable[[Job | None], Callable[[Mapping[str, Any]], None]] = lambda job: _ignored
        """What is told of the statistics of a machine that comes from elsewhere."""
        self.tidy: Callable[[Machine], Awaitable[None]] = _nothing_more
        """Takes away what broken off snapshots have left on the disks of a machine that is built."""
        self.admit_to_merging: Callable[[Machine], str] = lambda machine: "no"
        """Says whether the memory of a machine that is being built is offered to KSM; see ksm."""

    async def start(
        self,
        machine: Machine,
        files: dict[str, PassedFile],
        *,
        paused: bool,
        saved: Resumption | None = None,
    ) -> None:
        """From stopped or crashed to running (or paused: at the first instruction, or where it was saved).

        Takes over ``files`` (by slot), ``saved``. Raises what the failing step raised; nothing is left then.
        """
        await self.begin(machine, files, paused=paused, saved=saved).wait()

    def begin(
        self,
        machine: Machine,
        files: dict[str, PassedFile],
        *,
        paused: bool,
        saved: Resumption | None = None,
        caller: str = "",
    ) -> Job:
        """The same, as the job that it is; with a ``caller`` it is cancelled when that leaves the bus."""
        try:
            machine.require("Restore" if saved else "Start", "stopped", "crashed")
            check_machine_type(machine.definition)
            check_passed(slots(machine.definition), files)
        except VmbusError:
            _close(files, saved)
            raise
        machine.killed = False
        machine.set_state("starting")
        job = machine.job = self._jobs.start(
            "receive" if saved and saved.moving else "start",
            machine.owner,
            machine.uuid,
            self._start(machine, files, saved, paused=paused),
            caller=caller,
        )
        return job

    async def _start(
        self, machine: Machine, files: dict[str, PassedFile], saved: Resumption | None, *, paused: bool
    ) -> None:
        try:
            machine.set_state("starting", "turn")
            async with self._turns.setdefault(machine.owner, asyncio.Semaphore(AT_ONCE)):
                await _take(machine, self._first_steps(machine, files, saved))
            await _take(machine, self._further_steps(machine, saved, paused=paused))
            self._note_begun(machine, saved, paused=paused)
        except BaseException as error:
            await self._undo_start(machine, error)
            raise
        finally:
            _close(files, saved)
            machine.job = None
        if machine.gone.is_set():  # the guest was quicker than this start
            self._workers.finish_by_record(machine)
        else:
            self._workers.store_quietly(machine)

    def _note_begun(self, machine: Machine, saved: Resumption | None, *, paused: bool) -> None:
        try:
            self._registry.write_run(machine, machine.recorded().begun(first_run=paused and not saved))
        except VmbusError as error:
            if saved is None or not saved.moving:
                raise
            # It is nowhere else: whoever finds it later believes its worker.
            log.error("%s: that it has arrived is not stored: %s", machine.uuid, error)

    def _first_steps(
        self, machine: Machine, files: dict[str, PassedFile], saved: Resumption | None
    ) -> list[Step]:
        """Those in which the broker does something."""
        by_file: list[Step] = []
        if saved is not None and not saved.moving:
            by_file = [("file", lambda: self._hand_over_saved(machine, saved))]
        return [
            ("record", lambda: self._record(machine)),
            ("spawn", lambda: self._spawn(machine)),
            ("files", lambda: self._hand_over_files(machine, files)),
            ("firmware", lambda: self._handover.firmware(machine)),
            ("ports", lambda: self._handover.ports(machine)),
            ("network", lambda: self._handover.nics(machine, machine.definition.nics)),
            *by_file,
        ]

    def _further_steps(self, machine: Machine, saved: Resumption | None, *, paused: bool) -> list[Step]:
        prefault = machine.definition.prefault and saved is None
        restored = saved is not None
        go_on: list[Step] = [("run", lambda: self._let_go(machine, paused=paused, restored=restored))]
        if saved is not None and saved.moving:
            go_on = [("receive", lambda: self._receive(machine, saved, paused=paused))]
        elif saved is not None:
            restore: Step = ("restore", lambda: self._restore(machine, saved))
            go_on = [restore, ("tidy", lambda: self.tidy(machine)), *go_on]
        return [
            ("build", lambda: self._build(machine, saved)),
            ("tidy", lambda: self.tidy(machine)),
            *([("prefault", lambda: touch(machine, machine.job))] if prefault else []),
            ("links", lambda: self._networks.join(machine, machine.definition.nics)),
            *go_on,
        ]

    async def _record(self, machine: Machine) -> None:
        run = Run(
            machine.uuid,
            machine.owner,
            machine.definition,
            machine.persistent,
            machine.generation,
            machine.order,
            firmware=dict(machine.firmware),
            format=STORED_FORMAT,
        )
        self._broker.check_there()
        self._registry.write_run(machine, run)

    async def _spawn(self, machine: Machine) -> None:
        machine.gone.clear()
        machine.console_told = float("-inf")  # the first output of a run is told at once
        spawning = asyncio.ensure_future(self._ask_for_worker(machine))
        try:
            pid, fds = await asyncio.shield(spawning)
        except asyncio.CancelledError:
            # A worker that is still being made cannot be killed: wait for it, then undo.
            _, fds = await spawning
            descriptors.close_all(fds)
            raise
        self._workers.connect(machine, fds)
        machine.set_pid(pid)

    async def _ask_for_worker(self, machine: Machine) -> tuple[int, list[int]]:
        try:
            return await self._broker.spawn(machine.uuid, machine.definition)
        except VmbusError as error:
            if error.kind != "NotFound":
                raise
        await self._broker.own(machine.uuid, machine.owner)  # its record was lost
        return await self._broker.spawn(machine.uuid, machine.definition)

    async def _hand_over_files(self, machine: Machine, files: dict[str, PassedFile]) -> None:
        """While the worker imports what it needs, its files are opened already."""
        greeted = asyncio.ensure_future(machine.connection().hello())
        try:
            await self._handover.files(machine, slots(machine.definition), files, greeted=greeted)
            await greeted
        finally:
            greeted.cancel()
            await asyncio.gather(greeted, return_exceptions=True)

    async def _hand_over_saved(self, machine: Machine, saved: Resumption) -> None:
        await machine.connection().add_file("restore", saved.file.fd)

    async def _restore(self, machine: Machine, saved: Resumption) -> None:
        worker = machine.connection()
        work = worker.restore(changed_disks=saved.changed_disks, revert_to=saved.revert_to, aside=saved.aside)
        await gone_over(machine, machine.job, work, worker.cancel_save, worker)
        saved.on_restored()

    async def _receive(self, machine: Machine, saved: Resumption, *, paused: bool) -> None:
        """From here on it comes without us, too."""
        self._registry.write_run(machine, msgspec.structs.replace(machine.recorded(), receiving=True))
        worker = machine.connection()
        disks = {"copy": saved.copy, "separate": saved.separate}
        asked = worker.receive(saved.file.fd, disks, paused=paused, on_sent=saved.file.close)
        arrival = Arrival(machine, self._workers)
        await watched(arrival.wait(asked), arrival.cancel, worker, self.on_moving(machine.job))
        machine.set_memory(machine.definition.memory, machine.definition.memory)
        machine.set_state(machine.guest)

    async def _build(self, machine: Machine, saved: Resumption | None) -> None:
        self._registry.write_run(
            machine, msgspec.structs.replace(machine.recorded(), merging=self.admit_to_merging(machine))
        )
        machine.on_change(machine, machine.state, ("Merging",))
        await machine.connection().configure(
            machine.uuid,
            machine.definition,
            merge=machine.merging != "other-domain",
            restore=saved is not None,
            clone=saved is not None and saved.clone,
        )

    async def _let_go(self, machine: Machine, *, paused: bool, restored: bool) -> None:
        machine.set_memory(machine.definition.memory, machine.definition.memory)
        if paused:
            machine.guest = "paused"
            machine.set_state("paused")
            return
        worker = machine.connection()
        await (worker.resume() if restored else worker.run())
        machine.guest = "running"
        machine.set_state("running")

    async def _undo_start(self, machine: Machine, error: BaseException) -> None:
        if machine.run is not None and machine.run.receiving:  # whoever finds it then ends it
            with contextlib.suppress(VmbusError):
                run = msgspec.structs.replace(machine.run, receiving=False)
                self._registry.write_run(machine, run)
        if machine.worker is not None or not machine.gone.is_set():
            machine.set_state("stopping", "start-failed", str(error))
            await seen_through(self._workers.make_gone(machine))  # what has failed may be cancelled, too
        if not machine.gone.is_set():
            return  # stuck, or no broker: Ended or recover() finishes it
        reason, detail = "start-failed", str(error)
        if isinstance(error, asyncio.CancelledError):
            reason, detail = ("killed", "") if machine.killed else (reason, "the start was cancelled")
        self._workers.finish(machine, reason, detail)


async def _take(machine: Machine, steps: Iterable[Step]) -> None:
    """One step after the other."""
    for name, step in steps:
        machine.set_state("starting", name)
        try:
            await step()
        except VmbusError as error:
            if error.kind == "Disconnected":
                raise _died(machine, name) from None
            raise


def _close(files: Mapping[str, PassedFile], saved: Resumption | None) -> None:
    close_all(files)
    if saved is not None:
        saved.file.close()


def _ignored(stats: Mapping[str, Any]) -> None:
    """For whoever wants to see nothing."""


async def _nothing_more(machine: Machine) -> None:
    """For whoever wants to hear nothing."""


def _died(machine: Machine, step: str) -> VmbusError:
    """What to say of a start whose worker went away."""
    if machine.run is not None and machine.run.end_reason:
        why = f"{machine.run.end_reason} {machine.run.end_detail}".strip()
    else:
        why = "without saying why; the broker's log may tell"
    return VmbusError("Disconnected", f"the machine's worker ended in step {step}: {why}")
