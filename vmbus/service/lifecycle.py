# SPDX-License-Identifier: Apache-2.0
"""What leads a machine from one state to another: starts, stops, ends, and finding them again.

A start is a list of named steps (``_steps``), each of which leaves behind something that one undo takes
away again: the run record, the worker. A start that fails, is cancelled or loses its worker undoes them in
reverse, and a machine is ``stopped, start-failed`` only when the worker is confirmed to be gone.

The broker's ``Ended`` is the only proof of an end. While there is no broker a machine whose worker said
that it ended stays ``stopping``; the list of living workers, asked at each connection to the broker,
settles it (``recover``).
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import socket
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

import msgspec

from vmbus.service import descriptors
from vmbus.service.broker_client import BrokerClient
from vmbus.service.claims import Claims
from vmbus.service.files import OwnFile, PassedFile, PassedSocket
from vmbus.service.handover import Handover, check_passed, close_all
from vmbus.service.jobs import Job, Jobs, seen_through
from vmbus.service.machine import CLEAN_ENDS, STORED_FORMAT, Machine, Run
from vmbus.service.memory import gone_over, touch, watched
from vmbus.service.owned import Owned
from vmbus.service.registry import Registry
from vmbus.service.worker_client import WorkerClient
from vmbus.wire import broker as broker_wire
from vmbus.wire import worker as worker_wire
from vmbus.wire.definition import check_machine_type, slots
from vmbus.wire.errors import VmbusError

log = logging.getLogger("vmbus.lifecycle")

END_DEADLINE: Final = 15.0
"""Seconds from a kill to the proof of the end; the broker calls a worker stuck after 5."""
CONSOLE_INTERVAL: Final = 0.95
"""Seconds between two signals of console activity: one, less what a timer may be early."""
WATCHDOG_ACTIONS: Final = frozenset({"none", "reset", "pause", "poweroff"})
RECONNECT: Final = (0.1, 0.5, 2.0, 5.0)
"""Seconds before each attempt to connect to a living worker again; the last is repeated."""

Step = tuple[str, Callable[[], Awaitable[None]]]


@dataclasses.dataclass
class Resumption:
    """A start that goes on from a saved machine: its file, closed with the start, or the socket through which
    it comes. ``changed_disks``: the files of its disks may be others, or were written since. ``revert_to``:
    the disks go back to the internal snapshots of that name, and what they held is kept in those named
    ``aside``. ``on_restored``: called before the guest goes on.
    """

    file: PassedFile | OwnFile | PassedSocket
    changed_disks: bool = False
    revert_to: str = ""
    aside: str = ""
    clone: bool = False
    on_restored: Callable[[], None] = lambda: None

    @property
    def moving(self) -> bool:
        """Whether it runs elsewhere still."""
        return isinstance(self.file, PassedSocket)


class Lifecycle:
    """The operations on machines. ``on_console``, ``on_reset`` are the bus's, ``on_detached`` Hotplug's."""

    def __init__(
        self,
        registry: Registry,
        broker: BrokerClient,
        owned: Owned,
        claims: Claims,
        jobs: Jobs,
        handover: Handover,
    ) -> None:
        self._registry = registry
        self._broker = broker
        self._owned = owned
        self._claims = claims
        self._jobs = jobs
        self._handover = handover
        self._networks = handover.networks
        self._tasks: set[asyncio.Task[None]] = set()
        self.on_moving: Callable[[Job | None], Callable[[Mapping[str, Any]], None]] = lambda job: _ignored
        """What is told of the statistics of a machine that comes from elsewhere."""
        self.on_found: Callable[[Machine], Awaitable[None]] = _nothing_more
        """Called when a machine that was running before is reached again."""
        self.tidy: Callable[[Machine], Awaitable[None]] = _nothing_more
        """Takes away what broken off snapshots have left on the disks of a machine that is built."""
        self.on_console: Callable[[Machine], None] = lambda machine: None
        self.on_reset: Callable[[Machine], None] = lambda machine: None
        self.admit_to_merging: Callable[[Machine], str] = lambda machine: "no"
        """Says whether the memory of a machine that is being built is offered to KSM; see ksm."""
        self.on_finished: list[Callable[[Machine], None]] = []
        """Told of each confirmed end."""
        self.on_detached: Callable[[Machine, worker_wire.Event], None] = lambda machine, event: None

    # -- start

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
            for name, step in self._steps(machine, files, saved, paused=paused):
                machine.set_state("starting", name)
                try:
                    await step()
                except VmbusError as error:
                    if error.kind == "Disconnected":
                        raise _died(machine, name) from None
                    raise
            self._registry.write_run(machine, _begun(_run(machine), first_run=paused and not saved))
        except BaseException as error:
            await self._undo_start(machine, error)
            raise
        finally:
            _close(files, saved)
            machine.job = None
        if machine.gone.is_set():  # the guest was quicker than this start
            self._finish_by_record(machine)
        else:
            self._store_quietly(machine)

    def _steps(
        self, machine: Machine, files: dict[str, PassedFile], saved: Resumption | None, *, paused: bool
    ) -> list[Step]:
        prefault = machine.definition.prefault and saved is None
        restored = saved is not None
        by_file: list[Step] = []
        go_on: list[Step] = [("run", lambda: self._let_go(machine, paused=paused, restored=restored))]
        if saved is not None and saved.moving:
            go_on = [("receive", lambda: self._receive(machine, saved, paused=paused))]
        elif saved is not None:
            by_file = [("file", lambda: self._hand_over_saved(machine, saved))]
            restore: Step = ("restore", lambda: self._restore(machine, saved))
            go_on = [restore, ("tidy", lambda: self.tidy(machine)), *go_on]
        return [
            ("record", lambda: self._record(machine)),
            ("spawn", lambda: self._spawn(machine)),
            ("files", lambda: self._hand_over_files(machine, files)),
            ("firmware", lambda: self._handover.firmware(machine)),
            ("ports", lambda: self._handover.ports(machine)),
            ("network", lambda: self._handover.nics(machine, machine.definition.nics)),
            *by_file,
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
            fds = await asyncio.shield(spawning)
        except asyncio.CancelledError:
            # A worker that is still being made cannot be killed: wait for it, then undo.
            for fd in await spawning:
                descriptors.close(fd)
            raise
        self._connect(machine, fds)

    async def _ask_for_worker(self, machine: Machine) -> list[int]:
        try:
            return await self._broker.spawn(machine.uuid, machine.definition)
        except VmbusError as error:
            if error.kind != "NotFound":
                raise
        await self._broker.own(machine.uuid, machine.owner)  # its record was lost
        return await self._broker.spawn(machine.uuid, machine.definition)

    async def _hand_over_files(self, machine: Machine, files: dict[str, PassedFile]) -> None:
        """While the worker imports what it needs, its files are opened already."""
        meanwhile: list[asyncio.Future[Any]] = [
            asyncio.ensure_future(machine.connection().hello()),
            asyncio.ensure_future(self._note_pid(machine)),
        ]
        try:
            await self._handover.files(machine, slots(machine.definition), files, greeted=meanwhile[0])
            await asyncio.gather(*meanwhile)
        finally:
            for task in meanwhile:
                task.cancel()
            await asyncio.gather(*meanwhile, return_exceptions=True)

    async def _hand_over_saved(self, machine: Machine, saved: Resumption) -> None:
        await machine.connection().add_file("restore", saved.file.fd)

    async def _restore(self, machine: Machine, saved: Resumption) -> None:
        worker = machine.connection()
        work = worker.restore(changed_disks=saved.changed_disks, revert_to=saved.revert_to, aside=saved.aside)
        await gone_over(machine, machine.job, work, worker.cancel_save, worker)
        saved.on_restored()

    async def _receive(self, machine: Machine, saved: Resumption, *, paused: bool) -> None:
        """From here on it comes without us, too."""
        self._registry.write_run(machine, msgspec.structs.replace(_run(machine), receiving=True))
        worker = machine.connection()
        work = worker.receive(saved.file.fd, paused=paused, on_sent=saved.file.close)
        await watched(work, worker.cancel_save, worker, self.on_moving(machine.job))
        machine.set_memory(machine.definition.memory, machine.definition.memory)
        machine.set_state(machine.guest)

    async def _build(self, machine: Machine, saved: Resumption | None) -> None:
        self._registry.write_run(
            machine, msgspec.structs.replace(_run(machine), merging=self.admit_to_merging(machine))
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
            await seen_through(self._make_gone(machine))  # what has failed may be cancelled, too
        if not machine.gone.is_set():
            return  # stuck, or no broker: Ended or recover() finishes it
        reason, detail = "start-failed", str(error)
        if isinstance(error, asyncio.CancelledError):
            reason, detail = ("killed", "") if machine.killed else (reason, "the start was cancelled")
        self._finish(machine, reason, detail)

    async def _make_gone(self, machine: Machine) -> None:
        """Kill the worker and wait for the proof; returns without it when the worker is stuck or there is no
        broker."""
        try:
            await self._broker.kill(machine.uuid)
        except VmbusError as error:
            if error.kind in ("NotFound", "InvalidState"):  # there is no worker
                self._lost(machine)
            else:
                log.warning("%s cannot be killed: %s", machine.uuid, error)
            return
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(machine.gone.wait(), END_DEADLINE)

    # -- the other operations

    async def shutdown(self, machine: Machine) -> None:
        """Press the power button."""
        machine.require("Shutdown", "running", "stopping")
        await machine.connection().shutdown()

    def stop(self, machine: Machine, deadline: float) -> Job:
        """Ask the guest, and end it after ``deadline`` seconds; 0: at once, disks flushed."""
        machine.require("Stop", "running", "paused")
        machine.connection()
        ask = deadline > 0 and machine.state == "running"
        before = machine.job
        machine.set_state("stopping", "stop")
        job = machine.job = self._jobs.start(
            "stop",
            machine.owner,
            machine.uuid,
            lambda job: self._stop(machine, job, deadline if ask else 0, before),
        )
        return job

    async def _stop(self, machine: Machine, job: Job, deadline: float, before: Job | None) -> None:
        try:
            await self._end(machine, deadline, before)
            job.tell(reason=machine.reason)
        except asyncio.CancelledError:
            if machine.state == "stopping" and not machine.killed and not _has_ended(machine):
                machine.set_state(machine.guest)
            raise
        finally:
            machine.job = None

    async def _end(self, machine: Machine, deadline: float, before: Job | None) -> None:
        if before is not None and before.kind in ("save", "snapshot", "migrate"):
            with contextlib.suppress(VmbusError):
                await before.cancel()
        if deadline:
            with contextlib.suppress(VmbusError):  # a worker that cannot press it is ended all the same
                await machine.connection().shutdown()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(machine.gone.wait(), deadline)
                return
        with contextlib.suppress(VmbusError):
            await machine.connection().stop()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(machine.gone.wait(), END_DEADLINE)
        if not machine.gone.is_set():
            await self._make_gone(machine)
        if not machine.gone.is_set():
            raise VmbusError("Timeout", "the worker has not ended; StatusFlags says why")

    async def kill(self, machine: Machine) -> None:
        """End the worker now."""
        machine.require("Kill", "starting", "running", "paused", "stopping")
        machine.killed = True
        if machine.job is not None:
            with contextlib.suppress(VmbusError):
                await machine.job.cancel()
        if machine.gone.is_set():
            return
        machine.set_state("stopping", "kill")
        await self._broker.kill(machine.uuid)
        try:
            await asyncio.wait_for(machine.gone.wait(), END_DEADLINE)
        except TimeoutError:
            raise VmbusError(
                "Timeout", "the worker was killed and has not ended; it waits in the kernel"
            ) from None

    async def reset(self, machine: Machine) -> None:
        """Pull the reset line."""
        machine.require("Reset", "running", "paused")
        await machine.connection().reset()

    async def pause(self, machine: Machine) -> None:
        """Stop the vCPUs."""
        machine.require("Pause", "running")
        await machine.connection().pause()
        await _state_follows(machine, "paused")

    async def resume(self, machine: Machine) -> None:
        """Let a paused machine go on, or begin."""
        machine.require("Resume", "paused")
        worker = machine.connection()
        if _run(machine).first_run:
            await worker.run()
            self._registry.write_run(machine, msgspec.structs.replace(_run(machine), first_run=False))
            machine.guest = "running"
            machine.set_state("running")
            return
        await worker.resume()
        await _state_follows(machine, "running")

    async def open_console(self, machine: Machine, *, write: bool, steal: bool) -> int:
        """One end of a socketpair whose other end is the console hub's; the caller's."""
        machine.require("OpenConsole", "running", "paused", "stopping")
        worker = machine.connection()
        return await _one_end(lambda fd: worker.console(fd, write=write, steal=steal))

    async def open_port(self, machine: Machine, name: str, *, write: bool, steal: bool) -> int:
        """The same for a named port."""
        machine.require("OpenPort", "running", "paused", "stopping")
        worker = machine.connection()
        return await _one_end(lambda fd: worker.open_port(name, fd, write=write, steal=steal))

    async def stats(self, machine: Machine) -> dict[str, Any]:
        """What the machine counts, and its worker's memory."""
        machine.require("GetStats", "running", "paused", "stopping")
        worker = machine.connection()
        return {**await worker.stats(), **worker.figures.totals()}

    # -- the worker's side

    def _connect(self, machine: Machine, fds: list[int]) -> None:
        if machine.worker is not None:
            machine.worker.close()
        machine.worker = WorkerClient(
            fds,
            last_seq=machine.run.seq if machine.run else 0,
            on_event=lambda event: self._event(machine, event),
            on_closed=lambda: self._disconnected(machine),
        )
        machine.set_flag("disconnected", on=False)

    async def _note_pid(self, machine: Machine) -> None:
        for info in await self._broker.workers():
            if info.uuid == machine.uuid:
                machine.set_pid(info.pid)

    def _event(self, machine: Machine, event: worker_wire.Event) -> None:
        worker = machine.worker
        if worker is None:
            return
        if event.kind == "console":
            self._console(machine)
        elif event.kind == "reset":
            self.on_reset(machine)
        elif event.kind == "state":
            self._guest_state(machine, event)
        elif event.kind == "detached":
            self.on_detached(machine, event)
        run = machine.run
        if run is not None and event.kind != "console":
            run = msgspec.structs.replace(run, seq=event.seq)
            if event.kind == "ended":
                run = msgspec.structs.replace(
                    run, end_reason=event.reason or "error", end_detail=event.detail[:1000]
                )
            try:
                self._registry.write_run(machine, run)
            except VmbusError as error:
                log.error("%s: an event is not stored and not acknowledged: %s", machine.uuid, error)
                return
        worker.acknowledge(event.seq)
        if event.kind == "ended" and machine.state in ("running", "paused"):
            machine.set_state("stopping", "ended", event.reason)

    def _console(self, machine: Machine) -> None:
        """An honest worker says it once a second; others are not passed on more often."""
        clock = asyncio.get_running_loop().time()
        if clock - machine.console_told >= CONSOLE_INTERVAL:
            machine.console_told = clock
            self.on_console(machine)

    def _guest_state(self, machine: Machine, event: worker_wire.Event) -> None:
        if event.state not in ("running", "paused"):
            return
        machine.guest = "running" if event.state == "running" else "paused"
        if _arrives_alone(machine):
            self._arrived(machine)
        if machine.state in ("running", "paused"):
            # The worker is not trusted with words.
            watchdog = event.reason == "watchdog" and event.detail in WATCHDOG_ACTIONS
            told = ("watchdog", f"the watchdog did: {event.detail}") if watchdog else ("", "")
            machine.set_state(machine.guest, *told)

    def _disconnected(self, machine: Machine) -> None:
        if machine.gone.is_set():
            return
        machine.set_flag("disconnected", on=True)
        if not _being_started(machine):
            self._spin(self._reconnect(machine))

    async def _reconnect(self, machine: Machine) -> None:
        """Until it is reached, or its end is known. The end may come in a pause, and the next start after it:
        that has its own connection, which another one would replace."""
        attempt = 0
        while self._to_be_reached(machine):
            await asyncio.sleep(RECONNECT[min(attempt, len(RECONNECT) - 1)])
            attempt += 1
            if self._broker.connected and self._to_be_reached(machine):
                try:
                    await self._take_up(machine)
                except VmbusError as error:
                    log.info("%s is not reached: %s", machine.uuid, error)

    def _to_be_reached(self, machine: Machine) -> bool:
        connected = machine.worker is not None and machine.worker.open
        return not (machine.gone.is_set() or connected or _being_started(machine))

    def ended(self, message: broker_wire.Ended) -> None:
        """The broker's word that a worker has ended, or is stuck."""
        machine = self._registry.get(message.uuid)
        if machine is None:
            return
        if message.slot:
            log.warning(
                "%s: the helper of %s has ended; the broker's log may tell why", machine.uuid, message.slot
            )
            return
        if message.stuck:
            machine.set_flag("stuck", on=True)
            if not _being_started(machine):
                machine.set_state("stopping", "kill", "the worker was killed and has not ended")
            return
        self._lost(machine)
        if not _being_started(machine):
            self._finish_by_record(machine)

    def _lost(self, machine: Machine) -> None:
        """The worker's process is no more."""
        if machine.worker is not None:
            machine.worker.close()
            machine.worker = None
        self._networks.leave(machine)
        machine.set_pid(0)
        machine.set_memory(0, 0)
        machine.set_flag("stuck", on=False)
        machine.set_flag("disconnected", on=False)
        machine.gone.set()

    def _finish_by_record(self, machine: Machine) -> None:
        run = machine.run
        if run is not None and not run.started:
            text = "vmbusd or the broker was restarted during the start"
            if run.receiving and run.end_detail:
                text = f"it did not arrive: {run.end_detail}"
            self._finish(machine, "start-failed", text)
        elif run is not None and run.end_reason:
            self._finish(machine, run.end_reason, run.end_detail)
        elif machine.killed:
            self._finish(machine, "killed", "")
        else:
            self._finish(machine, "worker-lost", "the worker ended without saying why")

    def _finish(self, machine: Machine, reason: str, detail: str) -> None:
        """The end is confirmed: nothing of the run is kept."""
        self._claims.drop(machine.uuid)
        self._registry.remove_run(machine)
        machine.on_change(machine, machine.state, ("Merging",))
        clean = reason in CLEAN_ENDS or reason == "start-failed"
        machine.set_state("stopped" if clean else "crashed", reason, detail)
        if machine.persistent:
            self._store_quietly(machine)
        else:
            self._registry.remove(machine)
            self._spin(self._owned.drop(machine.uuid))
        for tell in self.on_finished:
            tell(machine)

    def forget(self, machine: Machine) -> None:
        """Remove a transient machine that has no worker; one that has goes when its worker is gone."""
        if machine.gone.is_set() and self._registry.get(machine.uuid) is machine:
            self._registry.remove(machine)
            self._spin(self._owned.drop(machine.uuid))

    # -- recovery

    async def recover(self) -> None:
        """Called at each connection to the broker: match what runs with what we know."""
        living = {info.uuid: info for info in await self._broker.workers()}
        for machine in self._registry.all():
            if machine.gone.is_set():
                continue
            info = living.get(machine.uuid)
            if info is None:
                self.ended(broker_wire.Ended(uuid=machine.uuid))
                continue
            machine.set_pid(info.pid)
            if _being_started(machine):
                continue
            if machine.worker is None or not machine.worker.open:
                self._claims.load(machine.uuid)
                self._spin(self._reach(machine))
            elif _unwanted(machine):
                self._spin(self._make_gone(machine))
        for uuid in living.keys() - {machine.uuid for machine in self._registry.all()}:
            log.error("worker of %s is nobody's: its run record is missing. It is ended", uuid)
            with contextlib.suppress(VmbusError):
                await self._broker.kill(uuid)
        await self._owned.clear()

    async def _reach(self, machine: Machine) -> None:
        try:
            await self._take_up(machine)
        except VmbusError as error:
            log.info("%s is not reached: %s", machine.uuid, error)
            machine.set_flag("disconnected", on=True)
            self._spin(self._reconnect(machine))

    async def _take_up(self, machine: Machine) -> None:
        """Connect to a living worker and show what it says."""
        fds = await self._broker.connect_worker(machine.uuid)
        if not self._to_be_reached(machine):
            descriptors.close_all(fds)
            return
        self._connect(machine, fds)
        worker = machine.connection()
        said = await worker.hello()
        if machine.worker is not worker:  # it has ended meanwhile
            return
        machine.set_flag("restricted", on=worker.restricted)
        if _unwanted(machine):
            machine.set_state("stopping", "kill")
            await self._broker.kill(machine.uuid)
            return
        if not worker.told_state:
            machine.guest = "running" if said.state == "running" else "paused"
        if _arrives_alone(machine) and said.state in ("ready", "configured"):
            machine.set_state("starting", "receive")
            return
        if said.state in ("running", "paused"):
            if _arrives_alone(machine):
                self._arrived(machine)
            else:
                self._spin(self.on_found(machine))
                self._spin(self._networks.rejoin(machine))
        if said.state != "ended" and (machine.state != "stopping" or machine.reason == "recovery"):
            machine.set_state(machine.guest)

    def _arrived(self, machine: Machine) -> None:
        """One that came from elsewhere without us is there."""
        try:
            self._registry.write_run(machine, _begun(_run(machine), first_run=False))
        except VmbusError as error:
            log.error("%s: that it has arrived is not stored: %s", machine.uuid, error)
        machine.set_state(machine.guest)
        self._store_quietly(machine)
        self._spin(self.on_found(machine))
        self._spin(self._networks.rejoin(machine))

    # -- small things

    def _store_quietly(self, machine: Machine) -> None:
        try:
            self._registry.store(machine)
        except VmbusError as error:
            log.error("%s: its state is not stored: %s", machine.uuid, error)

    def _spin(self, work: Awaitable[None]) -> None:
        task: asyncio.Task[None] = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._spun)

    def _spun(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("what was done on the side failed", exc_info=error)


def _close(files: Mapping[str, PassedFile], saved: Resumption | None) -> None:
    close_all(files)
    if saved is not None:
        saved.file.close()


def _ignored(stats: Mapping[str, Any]) -> None:
    """For whoever wants to see nothing."""


async def _nothing_more(machine: Machine) -> None:
    """For whoever wants to hear nothing."""


def _begun(run: Run, *, first_run: bool) -> Run:
    return msgspec.structs.replace(run, started=True, receiving=False, first_run=first_run)


def _run(machine: Machine) -> Run:
    if machine.run is None:
        raise VmbusError("InvalidState", "the machine has just ended")
    return machine.run


def _being_started(machine: Machine) -> bool:
    """Whether a start is under way, which then sees to the end of the worker too."""
    return machine.job is not None and machine.job.kind in ("start", "receive")


def _arrives_alone(machine: Machine) -> bool:
    """Whether it comes from elsewhere, and the vmbusd that began with that is gone."""
    run = machine.run
    return run is not None and run.receiving and not run.started and not _being_started(machine)


def _unwanted(machine: Machine) -> bool:
    """Whether its worker is what is left of a start that failed, or of a kill that did not get through."""
    return machine.run is None or not (machine.run.started or machine.run.receiving) or machine.killed


def _has_ended(machine: Machine) -> bool:
    return machine.run is None or bool(machine.run.end_reason)


async def _state_follows(machine: Machine, wanted: str) -> None:
    """The worker has said done; its event with the new state is on the way."""
    await machine.reaches(wanted, "stopping", "stopped", "crashed", within=5)


def _died(machine: Machine, step: str) -> VmbusError:
    """What to say of a start whose worker went away."""
    if machine.run is not None and machine.run.end_reason:
        why = f"{machine.run.end_reason} {machine.run.end_detail}".strip()
    else:
        why = "without saying why; the broker's log may tell"
    return VmbusError("Disconnected", f"the machine's worker ended in step {step}: {why}")


async def _one_end(give: Callable[[int], Awaitable[None]]) -> int:
    """One end of a socketpair whose other end somebody is given; the caller's."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with theirs:
        mine = descriptors.keep(ours.detach())
        try:
            await give(theirs.fileno())
        except BaseException:
            descriptors.close(mine)
            raise
    return mine
