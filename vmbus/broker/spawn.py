# SPDX-License-Identifier: Apache-2.0
"""From a fork of the broker to a running worker, or a helper of one.

Two processes. The *stager* (a child of the broker) leaves the host's namespaces, makes the root and forks;
its child, pid 1 of a new pid namespace, gives up everything for good and executes the worker. No code of
vmbus's worker and nothing of the core runs before that exec. The stager stays in the mount namespace, as
root, until the worker has imported all it needs, takes the root away and ends.

A *helper* is a program that we did not write, which works for one machine (passt). It is begun in the same
way and is as bare of rights, but stays in the host's network, which is what it is for, and sees the host's
files, as far as anybody may read them: all mounts are read-only for it. It closes itself in further.

    broker ── fork ──► stager ── fork ──► pid 1: cgroup, label, limits, no rights, exec
       │                 │  ◄── end of file on `doomed`: it executed (or the reason why not)
       │ ◄── pid ────────┤
       ├── "go": the record is written ──►│
       │                 │  ◄── "imported" on the status pipe
       │                 └── leave_nothing, exit

If the broker dies before it has recorded the worker, the stager goes with it (PDEATHSIG, end of file), the
binds stay and the worker ends by itself because its / is not empty. So a worker that lives on has a record.
"""

import errno
import fcntl
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import msgspec
import prctl

from vmbus.broker import cgroup, root, syscalls
from vmbus.broker.children import Channel, become
from vmbus.wire import inlet, packet
from vmbus.wire.errors import VmbusError

IMPORT_DEADLINE = 60.0  # seconds, of the whole stager; an emulated host takes several for the imports
BACKLOG = 32
_NAMESPACES = syscalls.CLONE_NEWNS | syscalls.CLONE_NEWPID | syscalls.CLONE_NEWIPC | syscalls.CLONE_NEWUTS
_LISTEN, _KVM, _STATUS = 3, 4, 5  # the worker's descriptors, beside 0 (the startup line), 1 and 2 (its log)


class Plan(msgspec.Struct, frozen=True):
    """What one worker, or helper, is made of."""

    uid: int  # and gid
    image: root.Image  # a helper's has no binds: it stays in the host's root and network
    place: str  # an empty directory that the root is made on
    limits: dict[int, int]
    cgroup: str  # "" without one
    context: str  # SELinux, "" when it is off

    def describe(self) -> str:
        """For the audit log: what is given up, and what is given."""
        kind = f"a root of {len(self.image.binds)} read-only binds, own net; /dev/kvm"
        return (
            f"uid and gid {self.uid}, no groups, no capability; own mount, pid, ipc, uts, cgroup; "
            f"{kind if self.image.binds else ' '.join(self.image.command)}; label '{self.context}'"
        )


class WorkerDirectory:
    """Step: RUN/workers/NAME with the socket that the worker will listen on."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def describe(self) -> str:
        return f"directory {self.path}"

    def execute(self) -> None:
        self.path.mkdir(mode=0o700)
        self._at(self.listener.bind)
        self.listener.listen(BACKLOG)

    def undo(self) -> None:
        self.listener.close()
        for name in ("socket", "record.json", ".record.json"):
            (self.path / name).unlink(missing_ok=True)
        if self.path.exists():
            self.path.rmdir()

    def connect(self, greeting: inlet.Greeting) -> socket.socket:
        """A new connection to the worker that listens here, begun with ``greeting``. Raises Disconnected."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        try:
            self._at(connection.connect)
            packet.send(connection, greeting)
        except OSError as error:
            connection.close()
            message = f"the worker accepts no connection ({error.strerror}); kill it"
            raise VmbusError("Disconnected", message) from None
        return connection

    def _at(self, act: Callable[[str], object]) -> None:
        """By way of the directory's descriptor: sun_path holds 107 bytes only."""
        place = os.open(self.path, os.O_PATH | os.O_CLOEXEC)
        try:
            act(f"/proc/self/fd/{place}/socket")
        finally:
            os.close(place)


def stage(plan: Plan, channel: Channel) -> None:
    """The stager's whole work. Reports the pid.

    Kept: the log, and what will be 3 and so on: a worker's listening socket and /dev/kvm, a helper's socket.
    """
    log, *own = channel.fds
    is_worker = bool(plan.image.binds)
    proc = os.open("/proc", os.O_PATH | os.O_CLOEXEC)
    group = os.open(f"{plan.cgroup}/cgroup.procs", os.O_WRONLY | os.O_CLOEXEC) if plan.cgroup else -1
    line, line_write = os.pipe2(os.O_CLOEXEC)
    imported, status = os.pipe2(os.O_CLOEXEC)
    doomed_read, doomed = os.pipe2(os.O_CLOEXEC)
    os.write(line_write, inlet.encode(inlet.Startup(listen=_LISTEN, status=_STATUS, kvm=_KVM)))
    syscalls.unshare(_NAMESPACES | syscalls.CLONE_NEWNET * is_worker)
    root.enter(plan.image, plan.place)
    socket.sethostname("vmbus-worker")
    pid = os.fork()
    if pid == 0:
        _execute(plan, [line, log, log, *own, *[status] * is_worker], doomed, proc, group)
    for fd in (line, line_write, status, doomed, proc, *channel.fds):
        os.close(fd)
    try:
        reason = os.read(doomed_read, 4096)
        if reason:
            raise VmbusError("Internal", f"it cannot be executed: {reason.decode(errors='replace')}")
        channel.report(pid)
        if channel.socket.recv(16) != b"go":
            raise VmbusError("Disconnected", "the broker went away")
        prctl.set_pdeathsig(0)  # recorded: from here on neither needs the broker
        if not is_worker:
            return
        said = b""
        while said != inlet.IMPORTED:
            more = os.read(imported, 64)
            said += more
            if not more or not inlet.IMPORTED.startswith(said):
                raise VmbusError("Disconnected", "the worker ended before it had imported everything")
        root.leave_nothing(plan.image)
    except BaseException:
        os.kill(pid, signal.SIGKILL)  # not reaped by anybody yet, so the number is still its own
        os.waitpid(pid, 0)
        raise


def _execute(plan: Plan, fds: list[int], doomed: int, proc: int, group: int) -> NoReturn:
    """In pid 1 of the new namespace: give up everything while that is possible, then exec."""
    try:
        os.setsid()
        if group >= 0:
            os.write(group, b"0")
        syscalls.unshare(syscalls.CLONE_NEWCGROUP)
        if plan.context:
            attribute = os.open("thread-self/attr/exec", os.O_WRONLY | os.O_CLOEXEC, dir_fd=proc)
            os.write(attribute, plan.context.encode())
        copies = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, len(fds) + 1) for fd in (*fds, doomed)]
        for number, copy in enumerate(copies):  # ``doomed`` comes last, and is closed by the exec
            os.dup2(copy, number, inheritable=number < len(fds))
        doomed = len(fds)
        syscalls.close_from(doomed + 1)
        cgroup.apply_limits(0, plan.limits)
        become(plan.uid, [plan.uid])
        prctl.set_pdeathsig(0)  # the stager, its parent, ends before it
        os.execve(plan.image.command[0], plan.image.command, {})
    except BaseException as error:
        os.write(doomed, f"{type(error).__name__}: {error}".encode())
    finally:
        os._exit(1)


def open_figures(pid: int, started: int) -> list[int]:
    """smaps_rollup, smaps and, where the kernel has it, ksm_stat of a worker that has executed; the caller's.

    ``started`` is its start time: another process of that number is not looked at. Raises OSError.
    """
    names = [f"/proc/{pid}/{name}" for name in ("smaps_rollup", "smaps", "ksm_stat")]
    fds = [os.open(name, os.O_RDONLY | os.O_CLOEXEC) for name in names if os.path.exists(name)]
    if start_time(pid) != started:
        for fd in fds:
            os.close(fd)
        raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH))
    return fds


def start_time(pid: int) -> int:
    """When process ``pid`` started, in clock ticks since boot (proc(5), stat, field 22). Raises OSError."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])


def real_uid(pid: int) -> int:
    """The real uid of process ``pid``; its directory may be root's (not dumpable). Raises OSError."""
    return int(Path(f"/proc/{pid}/status").read_text().partition("\nUid:")[2].split()[0])
