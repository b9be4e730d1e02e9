# SPDX-License-Identifier: Apache-2.0
"""The workers of this instance: made, handed out, ended, and found again after a restart of the broker.

A worker's record (``RUN/workers/UUID/record.json``) is written before it may go on, so a restarted broker
finds every living one: same boot, a pidfd, then the same start time and uid, so that a reused pid is never
taken for it. Connections are not touched by adoption: the service's goes on, and only Connect makes a new
one, with the next epoch.

    starting ──► spare ──► live ──► (killed ──► stuck) ──► ended
                  └─ without a machine yet; renamed when it gets one, used once

A uid, a directory and a cgroup are free again only when the pidfd has signalled and the cgroup is empty.
"""

from __future__ import annotations

import functools
import os
import re
import resource
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec

from vmbus.broker import cgroup, kvm, root, spawn, steps, tap
from vmbus.broker.children import Channel, Child, Crew, in_background
from vmbus.broker.loop import Loop, Task, Timer, start, wait
from vmbus.broker.policy import Policy, size
from vmbus.broker.steps import Step, log
from vmbus.broker.uids import Uids
from vmbus.wire import packet
from vmbus.wire.broker import Ended, WorkerInfo
from vmbus.wire.errors import VmbusError
from vmbus.wire.inlet import Greeting

STUCK_AFTER: Final = 5.0  # seconds from SIGKILL
_LOG_LIMIT: Final = 64 * 1024  # bytes of a worker's own words that reach the log
_RETRY: Final = 0.1  # seconds between two looks at a cgroup that is not empty yet


class Record(msgspec.Struct, frozen=True):
    """What is kept of a worker. ``owner`` -1: a spare one."""

    pid: int
    start_time: int
    boot_id: str
    worker_uid: int
    owner: int
    epoch: int
    memory: int
    vcpus: int
    cgroup: str


class Worker:
    """A living worker process."""

    def __init__(self, name: str, record: Record, directory: spawn.WorkerDirectory) -> None:
        self.made_for = name
        self.name = name  # the machine's uuid, or "spare-UID"
        self.record = record
        self.directory = directory
        self.group = cgroup.WorkerCgroup(Path(record.cgroup)) if record.cgroup else None
        self.pidfd = os.pidfd_open(record.pid)
        self.killed: Timer | None = None
        self.ended = False
        self.taps = 0
        self.stager: Child[spawn.Started] | None = None

    def save(self, **changes: int) -> None:
        """Write the record, with ``changes``, atomically."""
        self.record = msgspec.structs.replace(self.record, **changes)
        _write(self.directory.path, self.record)

    def steps(self) -> list[Step]:
        """What its end undoes."""
        return [self.directory, *([self.group] if self.group is not None else [])]


def _write(directory: Path, record: Record) -> None:
    draft = directory / ".record.json"
    draft.write_bytes(msgspec.json.encode(record))
    draft.replace(directory / "record.json")


class Workers:
    """All workers of one instance."""

    def __init__(
        self, loop: Loop, crew: Crew, uids: Uids, *, run: Path, instance: str, base: Path | None, spares: int
    ) -> None:
        self._loop, self._crew, self._uids = loop, crew, uids
        self._instance = instance
        self._directory = run / "workers"
        self._place = run / "root"
        self._image = root.Image()
        self.cgroups = cgroup.Cgroups(base)
        self._boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        self._wanted_spares = spares
        self._spares: list[Worker] = []
        self._making_spares = 0
        self._live: dict[str, Worker] = {}
        self._starting: dict[str, Record] = {}
        self.ended: Callable[[Ended], None] = lambda _: None
        for directory in (self._directory, self._place):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)

    # -- what is there ------------------------------------------------------------------------------

    def get(self, uuid: str) -> Worker:
        """The worker of ``uuid``. Raises InvalidState when it has none."""
        worker = self._live.get(uuid)
        if worker is None:
            raise VmbusError("InvalidState", f"machine {uuid} has no worker; start it first", argument="uuid")
        return worker

    def has(self, uuid: str) -> bool:
        """Whether ``uuid`` has a worker, be it one that is being made or is stuck."""
        return uuid in self._live or uuid in self._starting

    def listed(self) -> list[WorkerInfo]:
        """The living workers that belong to a machine."""
        return [
            WorkerInfo(uuid, w.record.pid, w.record.worker_uid, w.record.owner, w.group is not None)
            for uuid, w in sorted(self._live.items())
        ]

    def used_by(self, owner: int) -> tuple[int, int, int]:
        """Memory, vCPUs and number of the machines that ``owner`` has running or starting."""
        records = [w.record for w in self._live.values()] + list(self._starting.values())
        mine = [record for record in records if record.owner == owner]
        return sum(r.memory for r in mine), sum(r.vcpus for r in mine), len(mine)

    # -- a start ------------------------------------------------------------------------------------

    def provide(self, uuid: str, owner: int, memory: int, vcpus: int, policy: Policy) -> Task[list[int]]:
        """A worker for ``uuid``: reply fds as wire.broker.Spawn says, the caller's. Quota was checked.

        Counts against the owner from the first moment, so that two requests at once cannot both pass.
        """
        wanted = Record(0, 0, self._boot, 0, owner, 0, memory, vcpus, "")
        self._starting[uuid] = wanted
        try:
            overhead = size(policy.workers.overhead)
            worker = self._spares.pop() if self._spares else None
            if worker is None:
                worker = yield from self._make(uuid, wanted, memory + overhead)
            else:
                self._rename(worker, uuid)
            try:
                self._bound(worker, memory, vcpus, overhead)
                worker.save(owner=owner, memory=memory, vcpus=vcpus)
                self._live[uuid] = worker
                return self.connect(worker)
            except BaseException:
                self._live[uuid] = worker
                self.kill(worker)
                raise
        finally:
            del self._starting[uuid]
            self._loop.later(0.5, self.replenish)

    def _make(self, name: str, wanted: Record, memory: int) -> Task[Worker]:
        uid = self._uids.take()
        directory = spawn.WorkerDirectory(self._directory / name)
        base = self.cgroups.base
        group = cgroup.WorkerCgroup(base / f"worker-{uid}") if base is not None else None
        made: list[Step] = [directory, *([group] if group is not None else [])]
        fds: list[int] = []
        try:
            fds.append(kvm.open_kvm())
            steps.carry_out(made)
            assert directory.listener is not None
            plan = spawn.Plan(
                uid=uid,
                image=self._image,
                place=str(self._place),
                limits=cgroup.limits(memory, wanted.vcpus, address_space=group is None and wanted.owner >= 0),
                cgroup=group.path if group is not None else None,
                context=spawn.selinux_context(self._uids.index(uid)),
            )
            log(f"spawn {name}: {steps.describe(made)}; {plan.describe()}")
            log_read, log_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
            os.set_blocking(log_write, True)
            fds.extend((directory.listener.fileno(), log_write))
            kvm_fd, listener, words = fds

            stage = functools.partial(spawn.stage, plan)
            child = Child(self._loop, stage, spawn.Started, [listener, kvm_fd, words], spawn.IMPORT_DEADLINE)
            self._follow(log_read, name)
            started = yield from wait(child.reported)
            record = msgspec.structs.replace(
                wanted,
                pid=started.pid,
                start_time=spawn.start_time(started.pid),
                worker_uid=uid,
                cgroup=str(group.path) if group is not None else "",
            )
            _write(directory.path, record)
            worker = Worker(name, record, directory)
        except BaseException as error:
            steps.take_back(made)
            if not (isinstance(error, VmbusError) and error.kind == "Timeout"):
                self._uids.free(
                    uid
                )  # after a timeout a process may still be there: that uid is not used again
            raise
        finally:
            if directory.listener is not None:
                directory.listener.close()
            for fd in (fds[0], fds[2]) if len(fds) == 3 else fds[:1]:
                os.close(fd)
        worker.stager = child
        child.gone.when_settled(lambda: self._staged(worker, child))
        self._loop.watch(worker.pidfd, lambda: self._died(worker))
        child.socket.send(b"go")
        return worker

    def _staged(self, worker: Worker, child: Child[spawn.Started]) -> None:
        if child.gone.result() != 0 and not worker.ended:
            log(f"worker {worker.name}: its root was not taken away; ending it")
            self.kill(worker)

    def _rename(self, worker: Worker, uuid: str) -> None:
        target = self._directory / uuid
        worker.directory.path.rename(target)
        worker.directory.path, worker.name = target, uuid

    def _bound(self, worker: Worker, memory: int, vcpus: int, overhead: int) -> None:
        if worker.group is not None:
            worker.group.limit(memory + overhead, vcpus)
            return
        if worker.made_for == worker.name:
            return  # it was born with its limits
        bounds = cgroup.limits(memory + overhead, vcpus, address_space=True)
        try:
            cgroup.apply_limits(worker.record.pid, {resource.RLIMIT_AS: bounds[resource.RLIMIT_AS]})
        except PermissionError:  # a broker without CAP_SYS_RESOURCE
            log(f"worker {worker.name}: RLIMIT_AS stays as it was at its start")

    def connect(self, worker: Worker) -> list[int]:
        """A new control connection with the next epoch, and the figures. The fds are the caller's."""
        connection = spawn.connect(worker.directory.path)
        try:
            worker.save(epoch=worker.record.epoch + 1)
            packet.send(connection, Greeting(role="control", epoch=worker.record.epoch))
            figures = spawn.open_figures(worker.record.pid)
        except OSError as error:
            connection.close()
            raise VmbusError("Disconnected", f"the worker is not there any more ({error.strerror})") from None
        return [connection.detach(), *figures]

    def inlet(self, worker: Worker) -> socket.socket:
        """A connection that will bring one file; the caller's. Raises Disconnected."""
        connection = spawn.connect(worker.directory.path)
        try:
            packet.send(connection, Greeting(role="inlet"))
        except OSError as error:
            connection.close()
            raise VmbusError("Disconnected", f"the worker is not there any more ({error.strerror})") from None
        return connection

    def replenish(self) -> None:
        """Make spare workers until there are as many as wanted, one after the other."""
        if len(self._spares) + self._making_spares >= self._wanted_spares:
            return
        self._making_spares += 1
        start(self._make_spare())

    def _make_spare(self) -> Task[None]:
        again = 0.0
        try:
            name = f"spare-{os.urandom(8).hex()}"
            worker = yield from self._make(name, Record(0, 0, self._boot, 0, -1, 0, 0, 1, ""), 0)
            self._spares.append(worker)
        except (VmbusError, OSError) as error:
            log(f"no spare worker: {error}")
            again = 10.0
        finally:
            self._making_spares -= 1
        self._loop.later(again, self.replenish)

    # -- an end -------------------------------------------------------------------------------------

    def kill(self, worker: Worker) -> None:
        """End it now; ``Ended`` follows, with ``stuck`` first if the kernel does not let go of it."""
        if worker.ended:
            return
        if worker.group is not None:
            try:
                worker.group.kill()
            except OSError as error:
                log(f"worker {worker.name}: {error}")
        try:
            signal.pidfd_send_signal(worker.pidfd, signal.SIGKILL)
        except ProcessLookupError:
            return
        if worker.killed is None:
            worker.killed = self._loop.later(STUCK_AFTER, lambda: self._stuck(worker))

    def _stuck(self, worker: Worker) -> None:
        log(f"worker {worker.name} (pid {worker.record.pid}) was killed and goes on: stuck in the kernel")
        if worker.name in self._live:
            self.ended(Ended(uuid=worker.name, stuck=True))

    def _died(self, worker: Worker) -> None:
        worker.ended = True
        self._loop.unwatch(worker.pidfd)
        if worker.killed is not None:
            worker.killed.cancel()
        self._reap(worker)
        self._tidy(worker)

    def _reap(self, worker: Worker) -> None:
        try:
            ended = os.waitid(os.P_PIDFD, worker.pidfd, os.WEXITED | os.WNOHANG)
        except ChildProcessError:  # the stager's, until that ends; or a former broker's
            if worker.stager is not None and not worker.stager.gone.settled:
                worker.stager.gone.when_settled(lambda: self._reap(worker))
                return
            ended = None
        how = f"code {ended.si_code}, status {ended.si_status}" if ended is not None else "how is not known"
        log(f"worker {worker.name} (pid {worker.record.pid}, uid {worker.record.worker_uid}) ended: {how}")
        os.close(worker.pidfd)

    def _tidy(self, worker: Worker) -> None:
        try:
            if worker.group is not None:
                worker.group.undo()
        except OSError:
            self._loop.later(_RETRY, lambda: self._tidy(worker))
            return
        steps.take_back(worker.steps())
        self._uids.free(worker.record.worker_uid)
        if worker in self._spares:
            self._spares.remove(worker)
            self._loop.later(10.0, self.replenish)
        if self._live.pop(worker.name, None) is not None:
            self.ended(Ended(uuid=worker.name))
        if worker.taps:
            self.sweep_taps()

    def sweep_taps(self) -> None:
        """Delete every tap of this instance whose machine has no worker."""
        keep = set(self._live)

        def run(channel: Channel) -> None:
            tap.delete(self._instance, keep, channel)

        in_background(start(self._crew.run(0, run, int, [])), "taps of ended machines")

    # -- after a restart ----------------------------------------------------------------------------

    def adopt(self) -> None:
        """Find the workers of before; remove what nobody owns. Only this instance's are looked at."""
        for path in sorted(self._directory.iterdir()):
            directory = spawn.WorkerDirectory(path)
            record = self._recorded(path)
            worker = self._found(path.name, record, directory) if record is not None else None
            if worker is None:
                group = (
                    cgroup.WorkerCgroup(Path(record.cgroup)) if record is not None and record.cgroup else None
                )
                log(f"worker {path.name}: gone; removing its {directory.describe()}")
                steps.take_back([directory, *([group] if group is not None else [])])
                continue
            self._uids.hold(worker.record.worker_uid)
            self._loop.watch(worker.pidfd, lambda worker=worker: self._died(worker))  # type: ignore[misc]
            log(f"worker {worker.name}: adopted, pid {worker.record.pid}, uid {worker.record.worker_uid}")
            if worker.record.owner < 0:
                self.kill(worker)  # a spare one; its age is not known
            else:
                worker.taps = 1
                self._live[worker.name] = worker
        self.sweep_taps()
        self.replenish()

    def _recorded(self, path: Path) -> Record | None:
        try:
            return msgspec.json.decode((path / "record.json").read_bytes(), type=Record)
        except (OSError, msgspec.MsgspecError):
            return None

    def _found(self, name: str, record: Record, directory: spawn.WorkerDirectory) -> Worker | None:
        if record.boot_id != self._boot:
            return None
        try:
            worker = Worker(name, record, directory)
        except OSError:
            return None
        try:
            same = spawn.start_time(record.pid) == record.start_time
            if same and spawn.real_uid(record.pid) == record.worker_uid:
                return worker
        except OSError:
            pass
        os.close(worker.pidfd)
        return None

    # -- its words ----------------------------------------------------------------------------------

    def _follow(self, fd: int, name: str) -> None:
        """Log what a worker writes on its stderr, up to _LOG_LIMIT bytes; then it writes to nobody."""
        left = _LOG_LIMIT

        def read() -> None:
            nonlocal left
            try:
                words = os.read(fd, 4096)
            except BlockingIOError:
                return
            left -= len(words)
            for line in re.split(rb"[\r\n]+", words):
                if line:
                    log(f"worker {name} says: {line.decode(errors='backslashreplace')}")
            if not words or left <= 0:
                self._loop.unwatch(fd)
                os.close(fd)

        self._loop.watch(fd, read)
