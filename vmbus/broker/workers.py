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

import contextlib
import functools
import os
import resource
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import msgspec

from vmbus.broker import cgroup, children, kvm, policy, root, spawn, steps, tap, uids
from vmbus.broker.loop import Task, start
from vmbus.wire import packet
from vmbus.wire.broker import Ended, Spawn, WorkerInfo
from vmbus.wire.errors import VmbusError
from vmbus.wire.inlet import Delivery, Greeting

STUCK_AFTER = 5.0  # seconds from SIGKILL
HELPERS = 16  # of one machine
HELPER_MEMORY = 128 << 20  # bytes of one helper
_LOG_LIMIT = 64 * 1024  # bytes of a worker's own words that reach the log
_RETRY = 0.1  # seconds between two looks at a cgroup that is not empty yet
_SPARE_RETRY = 10.0  # seconds until a spare worker is tried again after one failed


class Record(msgspec.Struct, frozen=True):
    """What is kept of a worker, or of a helper, which serves ``slot`` of the machine ``of``."""

    owner: int  # uid; -1 for a spare one
    memory: int = 0  # bytes, of the guest
    hugepages: int = 0  # bytes of it that are huge pages
    locked: int = 0  # bytes of it that may be locked
    vcpus: int = 1
    epoch: int = 0
    pid: int = 0
    start_time: int = 0
    boot_id: str = ""
    worker_uid: int = 0
    cgroup: str = ""
    of: str = ""
    slot: str = ""


class Worker:
    """A living worker process, or helper."""

    def __init__(self, name: str, record: Record, directory: spawn.WorkerDirectory) -> None:
        self.name = self.born_as = name  # the machine's uuid, or "spare-…"; a helper's is UUID+N
        self.record, self.directory = record, directory
        self.group = cgroup.WorkerCgroup(Path(record.cgroup)) if record.cgroup else None
        self.pidfd = os.pidfd_open(record.pid)
        self.killed = 0  # the timer since then
        self.ended = False
        self.taps = 0
        self.stager: children.Child[int] | None = None

    def save(self, **changes: int) -> None:
        """Write the record, with ``changes``, atomically."""
        self.record = msgspec.structs.replace(self.record, **changes)
        draft = self.directory.path / ".record.json"
        draft.write_bytes(msgspec.json.encode(self.record))
        draft.replace(self.directory.path / "record.json")

    def connect_control(self) -> list[int]:
        """A control connection with the next epoch, and the figures; the caller's. Raises Disconnected."""
        self.save(epoch=self.record.epoch + 1)
        connection = self.directory.connect(Greeting(role="control", epoch=self.record.epoch))
        try:
            figures = spawn.open_figures(self.record.pid, self.record.start_time)
        except OSError as error:
            connection.close()
            raise VmbusError("Disconnected", f"the worker is not there ({error.strerror})") from None
        return [connection.detach(), *figures]


class Workers:
    """All workers of one instance."""

    def __init__(
        self, pool: uids.Uids, rules: policy.Policy, instance: str, *, run: Path, base: Path
    ) -> None:
        """``run``: the instance's run directory; ``base``: a delegated cgroup v2, if it is one."""
        self.rules, self.instance, self._uids = rules, instance, pool
        self._crew, self._loop = rules.crew, rules.crew.loop
        self._directory, self._place, self.settings = run / "workers", run / "root", run / "settings.json"
        self.notes = cgroup.delegated(base)
        self._base = None if self.notes else base
        self._boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        self._spares: list[Worker] = []
        self._wanted_spares = self._helpers = 0
        self._live: dict[str, Worker] = {}
        self._starting: dict[str, Record] = {}
        self.ended: Callable[[Ended], None] = lambda _: None
        for directory in (self._directory, self._place):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.settings.touch(mode=0o600)

    def get(self, uuid: str) -> Worker:
        """The worker of ``uuid``. Raises InvalidState when it has none."""
        if uuid not in self._live:
            raise VmbusError("InvalidState", f"machine {uuid} has no worker; start it first", argument="uuid")
        return self._live[uuid]

    def must_not_have(self, uuid: str) -> None:
        """Raises InvalidState if ``uuid`` has a worker, be it one that is being made or is stuck."""
        if uuid in self._live or uuid in self._starting:
            raise VmbusError("InvalidState", f"machine {uuid} has a worker; end it first", argument="uuid")

    def listed(self) -> list[WorkerInfo]:
        """The living workers that belong to a machine."""
        return [WorkerInfo(name, w.record.pid) for name, w in sorted(self._live.items()) if not w.record.of]

    def used_by(self, owner: int) -> list[int]:
        """What the machines that ``owner`` has running or starting add up to, as ``policy.amounts``."""
        records = [*(worker.record for worker in self._live.values()), *self._starting.values()]
        mine = [policy.amounts(record) for record in records if record.owner == owner and not record.of]
        return [sum(column) for column in zip([0] * 5, *mine, strict=True)]

    # A start.

    def provide(self, request: Spawn, owner: int) -> Task[list[int]]:
        """A worker as asked for: reply fds as wire.broker.Spawn says, the caller's. Quota was checked.

        Counts against the owner from the first moment, so that two requests at once cannot both pass.
        """
        uuid, memory, vcpus, huge = request.uuid, request.memory, request.vcpus, request.hugepages
        self._starting[uuid] = wanted = Record(owner, memory, huge, request.locked, vcpus)
        whole = memory + self.rules.survey.overhead
        try:
            if self._spares and not request.locked:  # one that exists cannot be given more
                worker = self._spares.pop()
                worker.name, path = uuid, self._directory / uuid
                worker.directory.path.rename(path)
                worker.directory.path = path
                self._loop.later(0.5, self._replenish)
            else:
                worker = yield from self._make(uuid, wanted, whole)
        finally:
            del self._starting[uuid]
        self._live[uuid] = worker
        try:
            self._bound(worker, whole, vcpus)
            worker.save(owner=owner, memory=memory, hugepages=huge, vcpus=vcpus, locked=request.locked)
            if request.memory_kind != "mergeable":
                work = children.dropped("memfd", "deliver", memory, request.page_size)
                with worker.directory.connect(Greeting(role="inlet")) as inlet:
                    yield from self._crew.run(owner, work, str, [inlet.fileno()])
            return worker.connect_control()
        except BaseException:
            self.kill(worker)
            raise

    def help(self, request: Spawn) -> Task[None]:
        """A helper for a machine that has a worker, whose slot gets the other end of its socket."""
        machine, command = self.get(request.uuid), self.rules.survey.helpers.get(request.kind)
        if not command:
            raise VmbusError("NotSupported", f"no {request.kind} is here; install it, and reload the broker")
        if sum(worker.record.of == request.uuid for worker in self._live.values()) >= HELPERS:
            raise VmbusError("QuotaExceeded", f"a machine has at most {HELPERS} helpers", argument="slot")
        self._helpers += 1
        wanted = Record(machine.record.owner, of=request.uuid, slot=request.slot)
        ours, theirs = socket.socketpair()
        with ours, theirs:
            name = f"{request.uuid}+{self._helpers}"
            argv = command + request.options
            helper = yield from self._make(name, wanted, HELPER_MEMORY, argv, theirs.fileno())
            self._live[name] = helper
            try:
                self._bound(helper, HELPER_MEMORY, 1)
                if machine.ended:
                    raise VmbusError("Disconnected", "the machine's worker has ended")
                with machine.directory.connect(Greeting(role="inlet")) as inlet:
                    packet.send(inlet, Delivery(slot=request.slot), [ours.fileno()])
            except BaseException:
                self.kill(helper)
                raise

    def _make(
        self, name: str, wanted: Record, whole: int, command: list[str] | None = None, own: int = -1
    ) -> Task[Worker]:
        """A worker; with ``command`` a helper, whose one descriptor is ``own``."""
        uid = self._uids.take()
        directory = spawn.WorkerDirectory(self._directory / name)
        made: list[steps.Step] = [directory]
        group = str(self._base / f"worker-{uid}") if self._base is not None else ""
        if group:
            made.append(cgroup.WorkerCgroup(Path(group)))
        limits = cgroup.limits(0 if group else whole, wanted.vcpus, wanted.locked)
        index = uid - self._uids.range.start  # two categories make a label its own
        kind = "helper" if command else "worker"
        label = self.rules.survey.label.format(kind, index % 512, 512 + index // 512)
        image = root.Image([], [], command) if command else self.rules.survey.image
        plan = spawn.Plan(uid, image, str(self._place), limits, group, label)
        words, words_write = os.pipe2(os.O_CLOEXEC)
        self._follow(words, name)
        fds = [words_write]
        kept = [words_write, own if command else directory.listener.fileno()]
        try:
            steps.carry_out(made)
            if command:
                work = tap.fence(uid, self.mark(name, uid), command)
                steps.log((yield from self._crew.run(0, work, str, [])))
            else:
                fds.append(kvm.open_kvm())
            steps.log(f"spawn {name}: {'; '.join(step.describe() for step in made)}; {plan.describe()}")
            stage = functools.partial(spawn.stage, plan)
            child = children.Child(self._loop, stage, int, kept + fds[1:], spawn.IMPORT_DEADLINE)
            pid = yield from child.reported
            process = {"pid": pid, "start_time": spawn.start_time(pid), "boot_id": self._boot}
            record = msgspec.structs.replace(wanted, worker_uid=uid, cgroup=group, **process)
            worker = Worker(name, record, directory)
            worker.save()
        except BaseException as error:
            steps.take_back(made)
            if command:
                self._sweep(name, uid)
            if not (isinstance(error, VmbusError) and error.kind == "Timeout"):
                self._uids.free(uid)  # after a timeout a process may still have it
            raise
        finally:
            directory.listener.close()
            for fd in fds:
                os.close(fd)
        worker.stager = child
        child.gone.when_settled(lambda: self._staged(worker, child))
        self._loop.watch(worker.pidfd, lambda: self._died(worker))
        child.socket.send(b"go")
        return worker

    def _staged(self, worker: Worker, child: children.Child[int]) -> None:
        if child.gone.result() != 0 and not worker.ended:
            steps.log(f"worker {worker.name}: its root was not taken away; ending it")
            self.kill(worker)

    def _bound(self, worker: Worker, whole: int, vcpus: int) -> None:
        if worker.group is not None:
            worker.group.limit(whole, vcpus)
        elif worker.name != worker.born_as:
            bound = cgroup.limits(whole, vcpus)[resource.RLIMIT_AS]
            # A spare one of a broker without CAP_SYS_RESOURCE stays unbounded.
            with contextlib.suppress(PermissionError):
                cgroup.apply_limits(worker.record.pid, {resource.RLIMIT_AS: bound})

    def _follow(self, fd: int, name: str) -> None:
        """Log what a worker writes on its stderr, up to _LOG_LIMIT bytes; then it writes to nobody."""
        left = _LOG_LIMIT

        def read() -> None:
            nonlocal left
            words = os.read(fd, 4096)
            left -= len(words)
            for line in words.splitlines():
                steps.log(f"worker {name} says: {line.decode(errors='backslashreplace')}")
            if not words or left <= 0:
                self._loop.unwatch(fd)
                os.close(fd)

        self._loop.watch(fd, read)

    # Spares.

    def _replenish(self) -> None:
        if len(self._spares) < self._wanted_spares and "spare" not in self._starting:
            self._starting["spare"] = Record(-1)
            start(self._make_spare())

    def _make_spare(self) -> Task[None]:
        pause = 0.0
        try:
            worker = yield from self._make(f"spare-{os.urandom(8).hex()}", self._starting["spare"], 0)
            self._spares.append(worker)
        except (VmbusError, OSError) as error:
            steps.log(f"no spare worker: {error}")
            pause = _SPARE_RETRY
        del self._starting["spare"]
        self._loop.later(pause, self._replenish)

    # An end.

    def kill(self, worker: Worker) -> None:
        """End it now; ``Ended`` follows, with ``stuck`` first if the kernel does not let go of it."""
        if worker.ended or worker.killed:
            return
        worker.killed = self._loop.later(STUCK_AFTER, lambda: self._stuck(worker))
        with contextlib.suppress(OSError):  # it may have ended this moment
            signal.pidfd_send_signal(worker.pidfd, signal.SIGKILL)
            if worker.group is not None:
                worker.group.kill()

    def _stuck(self, worker: Worker) -> None:
        steps.log(f"worker {worker.name} (pid {worker.record.pid}) was killed, but is stuck in the kernel")
        if worker.name in self._live and not worker.record.of:
            self.ended(Ended(uuid=worker.name, stuck=True))

    def _died(self, worker: Worker) -> None:
        worker.ended = True
        self._loop.unwatch(worker.pidfd)
        self._loop.cancel(worker.killed)
        if worker in self._spares:
            self._spares.remove(worker)
            self._loop.later(_SPARE_RETRY, self._replenish)
        if worker.stager is None:  # it was adopted: nobody's child
            os.close(worker.pidfd)
        else:  # until that ends, the worker is its child and not ours
            worker.stager.gone.when_settled(lambda: self._reap(worker))
        self._tidy(worker)
        self._end_helpers()

    def _end_helpers(self) -> None:
        """Of machines whose worker has ended."""
        for helper in list(self._live.values()):
            of = helper.record.of
            if of and (of not in self._live or self._live[of].ended):
                self.kill(helper)

    def _reap(self, worker: Worker) -> None:
        with contextlib.suppress(ChildProcessError):  # it died early, and the stager has reaped it
            ended = os.waitid(os.P_PIDFD, worker.pidfd, os.WEXITED)
            if ended is not None:
                how = "exit status" if ended.si_code == os.CLD_EXITED else "signal"
                steps.log(f"worker {worker.name} (pid {worker.record.pid}) ended: {how} {ended.si_status}")
        os.close(worker.pidfd)

    def _tidy(self, worker: Worker) -> None:
        try:
            if worker.group is not None:
                worker.group.undo()
        except OSError:
            self._loop.later(_RETRY, lambda: self._tidy(worker))
            return
        steps.take_back([worker.directory])
        self._uids.free(worker.record.worker_uid)
        if self._live.pop(worker.name, None) is not None:
            self.ended(Ended(uuid=worker.record.of or worker.name, slot=worker.record.slot))
        if worker.taps or worker.record.of:
            self._sweep(worker.name, worker.record.worker_uid)

    def _sweep(self, name: str, uid: int) -> None:
        start(self._crew.run(0, tap.sweep([], [self.mark(name, uid)]), int, []))

    def mark(self, name: str, uid: int) -> str:
        """What taps and rules of a worker carry: of this instance, of this machine, and of this run of it."""
        return f"vmbus:{self.instance}:{name}:{uid};"

    # After a restart.

    def adopt(self, spares: int) -> Task[None]:
        """Find the workers of before and remove what nobody owns, of this instance; keep ``spares``."""
        held = set()
        for path in sorted(self._directory.iterdir()):
            directory = spawn.WorkerDirectory(path)
            directory.listener.close()
            try:
                record = msgspec.json.decode((path / "record.json").read_bytes(), type=Record)
            except (OSError, msgspec.MsgspecError, ValueError):
                record = Record(-1)
            worker = self._found(path.name, record, directory)
            if worker is None:
                steps.log(f"worker {path.name}: gone; removing {directory.describe()}")
                steps.take_back([directory])
                continue
            steps.log(f"worker {worker.name}: adopted, pid {record.pid}, uid {record.worker_uid}")
            self._uids.hold(record.worker_uid)
            held.add(record.cgroup)
            self._loop.watch(worker.pidfd, functools.partial(self._died, worker))
            if record.owner < 0:
                self.kill(worker)  # a spare one; its age is not known
            else:
                worker.taps = 1  # it may have some
                self._live[worker.name] = worker
        self._end_helpers()
        for path in self._base.glob("worker-*") if self._base else ():
            uid = path.name.removeprefix("worker-")
            if uid.isdigit() and int(uid) in self._uids.range and str(path) not in held:
                steps.take_back([cgroup.WorkerCgroup(path)])  # of a start that was cut short
        keep = [self.mark(worker.name, worker.record.worker_uid) for worker in self._live.values()]
        yield from self._crew.run(0, tap.sweep(keep, [f"vmbus:{self.instance}:"], self._uids.range), int, [])
        self._wanted_spares = spares
        self._replenish()

    def _found(self, name: str, record: Record, directory: spawn.WorkerDirectory) -> Worker | None:
        if record.boot_id != self._boot:
            return None
        try:
            worker = Worker(name, record, directory)
            seen = spawn.start_time(record.pid), spawn.real_uid(record.pid)
        except OSError:
            return None
        if seen != (record.start_time, record.worker_uid):
            os.close(worker.pidfd)
            return None
        return worker
