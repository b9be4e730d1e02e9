# SPDX-License-Identifier: Apache-2.0
"""The workers as the service sees them: connections, events, ends, and finding them again.

The broker's ``Ended`` is the only proof of an end. While there is no broker a machine whose worker said
that it ended stays ``stopping``; the list of living workers, asked at each connection to the broker,
settles it (``recover``). A start that is under way (``starts``) sees to the end of its worker itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from typing import Final

import msgspec

from vmbus.service import descriptors
from vmbus.service.broker_client import BrokerClient
from vmbus.service.claims import Claims
from vmbus.service.machine import CLEAN_ENDS, Machine
from vmbus.service.networks import Networks
from vmbus.service.owned import Owned
from vmbus.service.registry import Registry
from vmbus.service.worker_client import WorkerClient
from vmbus.wire import broker as broker_wire
from vmbus.wire import worker as worker_wire
from vmbus.wire.errors import VmbusError

log = logging.getLogger("vmbus.workers")

END_DEADLINE: Final = 15.0
"""Seconds from a kill to the proof of the end; the broker calls a worker stuck after 5."""
CONSOLE_INTERVAL: Final = 0.95
"""Seconds between two signals of console activity: one, less what a timer may be early."""
WATCHDOG_ACTIONS: Final = frozenset({"none", "reset", "pause", "poweroff"})
RECONNECT: Final = (0.1, 0.5, 2.0, 5.0)
"""Seconds before each attempt to connect to a living worker again; the last is repeated."""


class Workers:
    """All machines' workers. ``on_console``, ``on_reset`` are the bus's, ``on_detached`` Hotplug's."""

    def __init__(
        self, registry: Registry, broker: BrokerClient, owned: Owned, claims: Claims, networks: Networks
    ) -> None:
        self._registry = registry
        self._broker = broker
        self._owned = owned
        self._claims = claims
        self._networks = networks
        self._tasks: set[asyncio.Task[None]] = set()
        self.on_found: Callable[[Machine], Awaitable[None]] = _nothing_more
        """Called when a machine that was running before is reached again."""
        self.on_console: Callable[[Machine], None] = lambda machine: None
        self.on_reset: Callable[[Machine], None] = lambda machine: None
        self.on_finished: list[Callable[[Machine], None]] = []
        """Told of each confirmed end."""
        self.on_detached: Callable[[Machine, worker_wire.Event], None] = lambda machine, event: None

    # -- connections and events

    def connect(self, machine: Machine, fds: list[int]) -> None:
        """Take over the new connection that ``fds`` are, instead of the one that was."""
        if machine.worker is not None:
            machine.worker.close()
        machine.worker = WorkerClient(
            fds,
            last_seq=machine.run.seq if machine.run else 0,
            on_event=lambda event: self._event(machine, event),
            on_closed=lambda: self._disconnected(machine),
        )
        machine.set_flag("disconnected", on=False)

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

    async def reach_again(self, machine: Machine) -> WorkerClient:
        """Connect to the worker of a machine that is being started, whose connection was lost. Raises
        VmbusError."""
        fds = await self._broker.connect_worker(machine.uuid)
        if machine.gone.is_set():
            descriptors.close_all(fds)
            raise VmbusError("Disconnected", "the worker has ended")
        self.connect(machine, fds)
        worker = machine.connection()
        said = await worker.hello()
        machine.set_flag("restricted", on=worker.restricted)
        if not worker.told_state and said.state in ("running", "paused"):
            machine.guest = "running" if said.state == "running" else "paused"
        return worker

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

    # -- ends

    async def make_gone(self, machine: Machine) -> None:
        """Kill the worker and wait for the proof; returns without it when the worker is stuck or there is no
        broker."""
        try:
            await self._broker.kill(machine.uuid)
        except VmbusError as error:
            if error.kind in ("NotFound", "InvalidState"):  # there is no worker
                self.lost(machine)
            else:
                log.warning("%s cannot be killed: %s", machine.uuid, error)
            return
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(machine.gone.wait(), END_DEADLINE)

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
        self.lost(machine)
        if not _being_started(machine):
            self.finish_by_record(machine)

    def lost(self, machine: Machine) -> None:
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

    def finish_by_record(self, machine: Machine) -> None:
        """The end is confirmed; what is written down of the run says which one it was."""
        run = machine.run
        if run is not None and not run.started:
            text = "vmbusd or the broker was restarted during the start"
            if run.receiving and run.end_detail:
                text = f"it did not arrive: {run.end_detail}"
            self.finish(machine, "start-failed", text)
        elif run is not None and run.end_reason:
            self.finish(machine, run.end_reason, run.end_detail)
        elif machine.killed:
            self.finish(machine, "killed", "")
        else:
            self.finish(machine, "worker-lost", "the worker ended without saying why")

    def finish(self, machine: Machine, reason: str, detail: str) -> None:
        """The end is confirmed: nothing of the run is kept."""
        self._claims.drop(machine.uuid)
        self._registry.remove_run(machine)
        machine.on_change(machine, machine.state, ("Merging",))
        clean = reason in CLEAN_ENDS or reason == "start-failed"
        machine.set_state("stopped" if clean else "crashed", reason, detail)
        if machine.persistent:
            self.store_quietly(machine)
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
                self._spin(self.make_gone(machine))
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
        self.connect(machine, fds)
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
            self._registry.write_run(machine, machine.recorded().begun(first_run=False))
        except VmbusError as error:
            log.error("%s: that it has arrived is not stored: %s", machine.uuid, error)
        machine.set_state(machine.guest)
        self.store_quietly(machine)
        self._spin(self.on_found(machine))
        self._spin(self._networks.rejoin(machine))

    # -- small things

    def store_quietly(self, machine: Machine) -> None:
        """Write its state down; a failure is for the log alone."""
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


async def _nothing_more(machine: Machine) -> None:
    """For whoever wants to hear nothing."""


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
