# SPDX-License-Identifier: Apache-2.0
"""One machine as the service knows it: its definition, its state, and what is written down of both.

States and what leads from one to another (``starts``, ``lifecycle`` and ``workers`` do the leading):

    stopped, crashed ── Start ──► starting ── the guest runs ──► running ◄── Pause, Resume ──► paused
         ▲                           │ failed: undone                │
         └───────── the worker's end is confirmed ◄── stopping ◄─────┴── Stop, Kill, or the guest's own end

``guest`` is what the worker last said (running, paused); ``State`` shows it unless the machine is starting or
stopping. An end is final only when the broker confirms that the worker's process is gone: until then its
images stay claimed.

Two files hold a machine: STATE/machines/UUID.json (``Stored``; none for a transient one) and, from
the start to the end of a run, RUN/service/UUID/run.json (``Run``) with claims.json beside it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Final, Literal

import msgspec

from vmbus.wire.definition import ENDED_TYPE, Definition
from vmbus.wire.errors import VmbusError

if TYPE_CHECKING:
    from vmbus.service.jobs import Job
    from vmbus.service.worker_client import WorkerClient

State = Literal["stopped", "starting", "running", "paused", "stopping", "crashed"]
Guest = Literal["running", "paused"]

ALIVE: Final = frozenset({"starting", "running", "paused", "stopping"})
CLEAN_ENDS: Final = frozenset({"guest-poweroff", "guest-reset", "stopped", "killed", "saved", "migrated"})
"""Reasons after which a machine is stopped; after all others it has crashed."""


class Last(msgspec.Struct, frozen=True):
    """The last state that was reached; ``boot`` is the boot id if the machine was running then."""

    state: State
    reason: str
    detail: str = ""
    since: int = 0
    boot: str = ""


STORED_FORMAT: Final = 1
"""Of the files below, as they are written; 0, which they did not say, is of before definitions named their
machine type."""


class Stored(msgspec.Struct, frozen=True):
    """STATE/machines/UUID.json."""

    uuid: str
    owner: int
    definition: Definition
    last: Last
    generation: int = 1
    order: int = 0  # of definition, for lists
    firmware: dict[str, str] = {}  # slot → SHA-256 (``firmware.py``)
    format: int = 0

    @property
    def meant(self) -> Definition:
        """The definition, with what it meant by what it does not say."""
        return _meant(self.definition, self.format)


class Run(msgspec.Struct, frozen=True):
    """RUN/service/UUID/run.json.

    ``started``: the start was finished. ``first_run``: the guest has not run yet (a start with paused).
    ``seq``: the last event stored. ``detaching``: the devices that the guest was asked to let go of.
    ``merging``: whether its memory is offered to KSM (yes, no, other-domain). ``receiving``: it comes from
    elsewhere, and does so by itself whatever becomes of this service.
    """

    uuid: str
    owner: int
    definition: Definition
    persistent: bool
    generation: int = 1
    order: int = 0
    started: bool = False
    first_run: bool = True
    seq: int = 0
    detaching: frozenset[str] = frozenset()
    merging: str = ""
    end_reason: str = ""
    end_detail: str = ""
    firmware: dict[str, str] = {}
    format: int = 0
    receiving: bool = False

    @property
    def meant(self) -> Definition:
        """As of ``Stored``."""
        return _meant(self.definition, self.format)

    def begun(self, *, first_run: bool) -> Run:
        """The same when its start is finished."""
        return msgspec.structs.replace(self, started=True, receiving=False, first_run=first_run)


def _meant(definition: Definition, stored_format: int) -> Definition:
    if stored_format == 0:  # written before there was a choice of machine types
        return msgspec.structs.replace(definition, machine_type=ENDED_TYPE)
    return definition


class Machine:
    """A machine. ``on_change`` is called with the names of the D-Bus properties that are new."""

    def __init__(
        self,
        uuid: str,
        owner: int,
        definition: Definition,
        *,
        persistent: bool,
        generation: int = 1,
        order: int = 0,
        last: Last | None = None,
        firmware: Mapping[str, str] | None = None,
    ) -> None:
        self.uuid = uuid
        self.owner = owner
        self.definition = definition
        self.persistent = persistent
        self.generation = generation
        self.order = order
        self.firmware: Mapping[str, str] = firmware or {}
        """The files that it was defined with: slot → SHA-256."""
        self.state: State = last.state if last else "stopped"
        self.reason = last.reason if last else "defined"
        self.detail = last.detail if last else ""
        self.since = last.since if last and last.since else now()
        self.flags: frozenset[str] = frozenset()
        self.pid = 0
        self.memory_target = 0
        """Bytes that the guest was asked to get by with; 0 while there is no guest."""
        self.memory_wish = 0
        """What its owner asked for last by SetMemoryTarget; 0 for nothing."""
        self.memory_actual = 0
        """Bytes that it has, by what it said last."""
        self.guest: Guest = "running"
        self.worker: WorkerClient | None = None
        self.job: Job | None = None
        self.run: Run | None = None
        self.killed = False
        self.console_told = 0.0
        """When console activity was last announced, on the loop's clock."""
        self.changing = False
        """Whether a device is being attached."""
        self.busy = ""
        """Why no operation is possible just now, a sentence; empty for none."""
        self.gone = asyncio.Event()
        """Set while no worker process of this machine exists."""
        self.gone.set()
        self.on_change: Callable[[Machine, State, tuple[str, ...]], None] = lambda machine, old, names: None
        self._waiting: list[tuple[frozenset[str], asyncio.Future[None]]] = []

    @property
    def alive(self) -> bool:
        """Whether it is anything but stopped or crashed."""
        return self.state in ALIVE

    def set_state(self, state: State, reason: str = "", detail: str = "") -> None:
        """Enter a state, or the same one for another reason."""
        old = self.state
        if (state, reason, detail) == (old, self.reason, self.detail):
            return
        self.state, self.reason, self.detail = state, reason, detail
        names: tuple[str, ...] = ("StateReason", "StateDetail")
        if state != old:
            self.since = now()
            names = ("State", *names, "StateSince")
        self.on_change(self, old, names)
        for wanted, future in self._waiting:
            if state in wanted and not future.done():
                future.set_result(None)

    def set_flag(self, flag: str, *, on: bool) -> None:
        """Set or clear one of StatusFlags."""
        flags = self.flags | {flag} if on else self.flags - {flag}
        if flags != self.flags:
            self.flags = flags
            self.on_change(self, self.state, ("StatusFlags",))

    def set_definition(self, definition: Definition) -> None:
        """It is another machine from now on, as far as grants go."""
        self.definition = definition
        self.generation += 1
        self.on_change(self, self.state, ("Definition", "Generation"))

    @property
    def merging(self) -> str:
        """Whether its memory is offered to KSM: yes, no (its kind is another, or it does not run), or
        other-domain."""
        return (self.run.merging if self.run else "") or "no"

    def set_pid(self, pid: int) -> None:
        """The worker's process."""
        if pid != self.pid:
            self.pid = pid
            self.on_change(self, self.state, ("WorkerPid",))

    def set_memory(self, target: int, actual: int) -> None:
        """What the guest should get by with, and what it has, in bytes."""
        if not target:
            self.memory_wish = 0
        names = []
        if target != self.memory_target:
            names.append("MemoryTarget")
        if actual != self.memory_actual:
            names.append("MemoryActual")
        self.memory_target, self.memory_actual = target, actual
        if names:
            self.on_change(self, self.state, tuple(names))

    @property
    def memory_ceiling(self) -> int:
        """Bytes that it may have: all, unless its owner wishes for less."""
        return self.memory_wish or self.definition.memory

    async def reaches(self, *states: str, within: float) -> bool:
        """Wait until it is in one of ``states``; False after ``within`` seconds."""
        if self.state in states:
            return True
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = (frozenset(states), future)
        self._waiting.append(entry)
        try:
            await asyncio.wait_for(future, within)
        except TimeoutError:
            return False
        finally:
            self._waiting.remove(entry)
        return True

    def require(self, what: str, *states: str) -> None:
        """Raise InvalidState unless it is in one of ``states`` and not busy."""
        if self.busy:
            raise VmbusError("InvalidState", self.busy)
        if self.state not in states:
            raise VmbusError(
                "InvalidState", f"{what} works while the machine is {' or '.join(states)}; it is {self.state}"
            )

    def require_idle(self) -> None:
        """Raise InvalidState while a job or a change of a device is under way."""
        if self.job is not None or self.changing:
            raise VmbusError("InvalidState", "something else is done with the machine; wait for its job")

    def connection(self) -> WorkerClient:
        """The worker. Raises Disconnected while there is no connection to it."""
        if self.worker is None or not self.worker.open:
            raise VmbusError(
                "Disconnected", "there is no connection to the machine's worker just now; try again"
            )
        return self.worker

    def recorded(self) -> Run:
        """What is written down of its run. Raises InvalidState when that has just ended."""
        if self.run is None:
            raise VmbusError("InvalidState", "the machine has just ended")
        return self.run

    def stored(self) -> Stored:
        """What STATE/machines/UUID.json should say now."""
        running = self.alive
        last = Last(
            "running" if running else self.state,
            self.reason,
            self.detail,
            self.since,
            boot_id() if running else "",
        )
        return Stored(
            self.uuid,
            self.owner,
            self.definition,
            last,
            self.generation,
            self.order,
            dict(self.firmware),
            STORED_FORMAT,
        )


def now() -> int:
    """Microseconds since 1970."""
    return time.time_ns() // 1000


def boot_id() -> str:
    """This boot of the kernel."""
    with open("/proc/sys/kernel/random/boot_id") as file:
        return file.read().strip()
