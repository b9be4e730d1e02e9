# SPDX-License-Identifier: Apache-2.0
"""Machines that go on in another vmbusd while they run: one sends, another receives.

A client makes a connection between the two, passes each its end (Machine.Receive there, Migrate here) and
watches two jobs. Each end goes straight to a worker, and the two cores have the rest between them
(native/vmm/src/migrate/mod.rs): what this service does is to start one and to end the other.

| what happens | source | destination |
|---|---|---|
| it is done | stopped, ``migrated`` | running, or paused as the source was |
| it is refused or cancelled, or breaks before it was handed on | as it was | stopped, nothing left |
| it breaks after that, and nobody can know | paused, ``migration-unsure`` | as it has got |
| the worker there and its vmbusd lose each other | the same | as the worker says, once it is reached |
| a vmbusd dies in the middle | goes on by itself; the next vmbusd sees what came of it | the same |

Disks that both sides name go along; the worker at the destination refuses others that its guest may write
and whose files are not the source's, unless the caller answers for them (``separate``).

Both jobs end with the connection to the bus that asked for them, since that holds whatever carries the
bytes. A destination that a new vmbusd finds in the middle is ``starting`` until its worker says that it runs,
or that it does not (``Lifecycle``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from vmbus.service.files import PassedFile, PassedSocket
from vmbus.service.handover import close_all
from vmbus.service.jobs import Figure, Job, Jobs
from vmbus.service.machine import Machine
from vmbus.service.memory import watched
from vmbus.service.saving import until_gone
from vmbus.service.starts import Resumption, Starts
from vmbus.wire.definition import Definition, check_machine_type
from vmbus.wire.errors import VmbusError

DOWNTIME: Final = 100
"""Milliseconds that a guest may stand still, if its owner says nothing."""
DOWNTIME_MOST: Final = 60_000
WHERE: Final = "unsure"
"""What a worker says an error is about when it does not know where the machine runs."""
UNSURE: Final = "migration-unsure"
"""The reason of a machine that was handed on to somebody who did not answer any more."""
_COUNTED: Final = {
    **{name: name for name in ("total", "sent", "remaining", "round", "throughput", "slowed")},
    **{f"disk_{name}": f"disk-{name}" for name in ("total", "sent", "remaining")},
}
_FOUND: Final = {
    "downtime_ms": "downtime",
    "disk_sent": "disk-sent",
    **{name: name for name in ("sent", "rounds", "throughput")},
}


class Migration:
    """For all machines."""

    def __init__(self, jobs: Jobs, starts: Starts) -> None:
        self._jobs = jobs
        self._starts = starts
        starts.on_moving = progress

    def send(
        self,
        machine: Machine,
        sender: str,
        socket: PassedSocket,
        copy: list[str],
        *,
        downtime: int,
        bandwidth: int,
    ) -> Job:
        """Send a machine through ``socket``, which is taken over, with the disks ``copy``. ``downtime``:
        milliseconds that its guest may stand still; ``bandwidth``: bytes a second, 0 for as many as go."""
        try:
            machine.require("Migrate", "running", "paused")
            check_movable(machine.definition)
            machine.connection()
            machine.require_idle()
        except VmbusError:
            socket.close()
            raise
        job = machine.job = self._jobs.start(
            "migrate",
            machine.owner,
            machine.uuid,
            lambda job: self._send(machine, job, socket, copy, downtime=downtime, bandwidth=bandwidth),
            caller=sender,
        )
        return job

    async def _send(
        self,
        machine: Machine,
        job: Job,
        socket: PassedSocket,
        copy: list[str],
        *,
        downtime: int,
        bandwidth: int,
    ) -> None:
        worker = machine.connection()
        work = worker.send(socket.fd, copy, downtime=downtime, bandwidth=bandwidth, on_sent=socket.close)
        try:
            found = await watched(work, worker.cancel_save, worker, progress(job))
            job.tell((job.progress[1], job.progress[1]), **_known(found, _FOUND))
            await until_gone(machine)
        except VmbusError as error:
            if error.argument == WHERE and machine.state == "paused":
                machine.set_state("paused", UNSURE, error.message)
            raise
        finally:
            socket.close()
            machine.job = None

    def receive(
        self,
        machine: Machine,
        sender: str,
        socket: PassedSocket,
        files: dict[str, PassedFile],
        *,
        copy: list[str],
        separate: list[str],
        paused: bool,
    ) -> Job:
        """Start a machine with what comes through ``socket``, which is written to the disks ``copy``, too.
        Takes over that and ``files``."""
        try:
            check_movable(machine.definition)
            _check_disks(machine.definition, copy=copy, separate=separate)
        except VmbusError:
            socket.close()
            close_all(files)
            raise
        saved = Resumption(socket, copy=copy, separate=separate)
        return self._starts.begin(machine, files, paused=paused, saved=saved, caller=sender)


def check_movable(definition: Definition) -> None:
    """Raise NotSupported for a machine that is not the same on every host."""
    check_machine_type(definition)
    if definition.cpu_model == "host":
        text = "its processor is this host's, whatever that is; define it with a named model to migrate it"
        raise VmbusError("NotSupported", text, argument="cpu-model")


def _check_disks(definition: Definition, **named: list[str]) -> None:
    """Raise InvalidArgument for what is no disk that the guest may write."""
    known = {f"disk/{disk.id}" for disk in definition.disks if not (disk.read_only or disk.cdrom)}
    for option, names in named.items():
        for name in names:
            if name not in known:
                text = f"{name!r} is no disk of the machine's that its guest may write"
                raise VmbusError("InvalidArgument", text, argument=option)
    if twice := set(named["copy"]) & set(named["separate"]):
        text = f"{min(twice)!r} is copied: its file need not hold anything"
        raise VmbusError("InvalidArgument", text, argument="separate")


def progress(job: Job | None) -> Callable[[Mapping[str, Any]], None]:
    """What tells ``job`` how far a machine is that moves, by its worker's statistics."""

    def look(stats: Mapping[str, Any]) -> None:
        said = stats.get("migration")
        if job is not None and isinstance(said, dict):
            counted = _known(said, _COUNTED)
            sent = int(counted.get("sent", 0))
            left = int(counted.get("remaining", 0)) + int(counted.get("disk-remaining", 0))
            job.tell((sent, sent + left), **counted)

    return look


def _known(said: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Figure]:
    """What a worker has counted, as far as it is known and a number."""
    return {
        name: value
        for key, name in names.items()
        if isinstance(value := said.get(key), int | float) and 0 <= value < 1 << 63
    }
