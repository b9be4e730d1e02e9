# SPDX-License-Identifier: Apache-2.0
"""From a fork of the broker to a running worker (DESIGN section 3, 1 and 2).

Two processes. The *stager* (a child of the broker) leaves the host's namespaces, makes the root and forks;
its child, pid 1 of a new pid namespace, gives up everything for good and executes the worker. No code of
vmbus's worker and nothing of the core runs before that exec. The stager stays in the mount namespace, as
root, until the worker has imported all it needs, takes the root away and ends.

    broker ── fork ──► stager ── fork ──► pid 1: cgroup, label, limits, no rights, exec
       │                 │  ◄── end of file on `doomed`: it executed (or the reason why not)
       │ ◄── pid ────────┤
       ├── "go": the record is written ──►│
       │                 │  ◄── "imported" on the status pipe
       │                 └── leave_nothing, exit

If the broker dies before it has recorded the worker, the stager goes with it (PDEATHSIG, end of file), the
binds stay and the worker ends by itself because its / is not empty. So a worker that lives has a record.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import socket
import time
from pathlib import Path
from typing import Final, NoReturn

import msgspec
import prctl

from vmbus.broker import cgroup, root, syscalls
from vmbus.broker.children import Channel
from vmbus.wire import startup
from vmbus.wire.errors import VmbusError

IMPORT_DEADLINE: Final = 60.0  # seconds; an emulated host takes several for its imports
BACKLOG: Final = 32
_NAMESPACES: Final = (
    syscalls.CLONE_NEWNS
    | syscalls.CLONE_NEWPID
    | syscalls.CLONE_NEWNET
    | syscalls.CLONE_NEWIPC
    | syscalls.CLONE_NEWUTS
)
_LISTEN, _STATUS, _KVM = 3, 4, 5  # the worker's descriptors, beside 0 (the startup line), 1 and 2 (its log)
_CONTEXT: Final = "system_u:system_r:vmbus_worker_t:s0:c{},c{}"


class Started(msgspec.Struct, frozen=True):
    """The stager's report: pid 1 of the new pid namespace, as the broker sees it."""

    pid: int


class Plan(msgspec.Struct, frozen=True):
    """What one worker is made of."""

    uid: int  # and gid
    image: root.Image
    place: str  # an empty directory that the root is made on
    limits: dict[int, int]
    cgroup: Path | None
    context: str  # SELinux, "" when it is off
    last_capability: int = int(Path("/proc/sys/kernel/cap_last_cap").read_text())

    def describe(self) -> str:
        """For the audit log: what is given up, and what is given."""
        label = f", label {self.context}" if self.context else ""
        return (
            f"process as uid and gid {self.uid} with no groups and no capability; "
            f"namespaces mount, pid, net, ipc, uts, cgroup; {self.image.describe()}{label}; /dev/kvm"
        )


def selinux_context(index: int) -> str:
    """A label of its own for worker ``index`` of the range; "" when SELinux is off or has no such type.

    The two categories are the ``index``-th pair of c0 … c1023.
    """
    check = Path("/sys/fs/selinux/context")
    if not check.exists():
        return ""
    high = 1
    while index >= high:
        index, high = index - high, high + 1
    context = _CONTEXT.format(index, high)
    try:
        check.write_text(context)
    except OSError:
        return ""
    return context


class WorkerDirectory:
    """Step: RUN/workers/NAME with the socket that the worker will listen on."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.listener: socket.socket | None = None

    def describe(self) -> str:
        return f"directory {self.path}"

    def execute(self) -> None:
        self.path.mkdir(mode=0o700)
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        directory = os.open(self.path, os.O_PATH | os.O_CLOEXEC)
        try:
            # By way of the directory's descriptor: sun_path holds 107 bytes only.
            self.listener.bind(f"/proc/self/fd/{directory}/socket")
        finally:
            os.close(directory)
        self.listener.listen(BACKLOG)

    def undo(self) -> None:
        if self.listener is not None:
            self.listener.close()
        for name in ("socket", "record.json", ".record.json"):
            (self.path / name).unlink(missing_ok=True)
        if self.path.exists():
            self.path.rmdir()


def connect(directory: Path) -> socket.socket:
    """A new connection to the worker that listens in ``directory``. Raises VmbusError."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
    place = os.open(directory, os.O_PATH | os.O_CLOEXEC)
    try:
        connection.connect(f"/proc/self/fd/{place}/socket")
    except BlockingIOError:
        connection.close()
        raise VmbusError("Disconnected", "the worker does not accept connections; kill it") from None
    except OSError as error:
        connection.close()
        raise VmbusError("Disconnected", f"the worker is not there any more ({error.strerror})") from None
    finally:
        os.close(place)
    return connection


def stage(plan: Plan, channel: Channel) -> None:
    """The stager's whole work; kept: listening socket, /dev/kvm, the log. Reports ``Started``."""
    listener, kvm, log = channel.fds
    proc = os.open("/proc", os.O_PATH | os.O_CLOEXEC)
    group = -1
    if plan.cgroup is not None:
        group = os.open(plan.cgroup / "cgroup.procs", os.O_WRONLY | os.O_CLOEXEC)
    line_read, line_write = os.pipe2(os.O_CLOEXEC)
    status_read, status_write = os.pipe2(os.O_CLOEXEC)
    doomed_read, doomed_write = os.pipe2(os.O_CLOEXEC)
    os.write(line_write, startup.encode(startup.Startup(listen=_LISTEN, status=_STATUS, kvm=_KVM)))
    syscalls.unshare(_NAMESPACES)
    root.enter(plan.image, plan.place)
    socket.sethostname("vmbus-worker")
    pid = os.fork()
    if pid == 0:
        _become_worker(plan, [line_read, log, log, listener, status_write, kvm], doomed_write, proc, group)
    for fd in (line_read, line_write, status_write, doomed_write, proc, *channel.fds):
        os.close(fd)
    try:
        reason = os.read(doomed_read, 4096)
        if reason:
            raise VmbusError("Internal", f"the worker cannot be executed: {reason.decode(errors='replace')}")
        channel.report(Started(pid))
        if channel.socket.recv(16) != b"go":
            raise VmbusError("Disconnected", "the broker went away")
        prctl.set_pdeathsig(0)  # recorded: from here on neither needs the broker
        _await_imported(status_read)
        root.leave_nothing(plan.image)
    except BaseException:
        os.kill(pid, signal.SIGKILL)  # not reaped by anybody yet, so the number is still its own
        raise


def _await_imported(status: int) -> None:
    """Until the worker says that it needs no file any more; the caller's deadline ends the wait."""
    said = b""
    end = time.monotonic() + IMPORT_DEADLINE
    while said != startup.IMPORTED:
        ready, _, _ = select.select([status], [], [], max(0.0, end - time.monotonic()))
        more = os.read(status, 64) if ready else b""
        if not more or not startup.IMPORTED.startswith(said + more):
            raise VmbusError("Timeout", "the worker ended before it had imported everything")
        said += more


def _become_worker(plan: Plan, fds: list[int], doomed: int, proc: int, group: int) -> NoReturn:
    """In pid 1 of the new namespace: give up everything while that is possible, then exec."""
    try:
        os.setsid()
        if group >= 0:
            os.write(group, b"0")
        syscalls.unshare(syscalls.CLONE_NEWCGROUP)
        if plan.context:
            attribute = os.open("thread-self/attr/exec", os.O_WRONLY | os.O_CLOEXEC, dir_fd=proc)
            os.write(attribute, plan.context.encode())
        doomed = _arrange(fds, doomed)
        cgroup.apply_limits(0, plan.limits)
        for capability in range(1 + plan.last_capability):
            prctl.capbset_drop(capability)
        syscalls.lock_securebits()
        os.setgroups([])
        os.setresgid(plan.uid, plan.uid, plan.uid)
        os.setresuid(plan.uid, plan.uid, plan.uid)
        prctl.cap_inheritable.limit()
        prctl.set_no_new_privs(True)
        os.umask(0o077)
        command = plan.image.command()
        os.execve(command[0], command, {})
    except BaseException as error:
        os.write(doomed, f"{type(error).__name__}: {error}".encode())
    finally:
        os._exit(1)


def _arrange(fds: list[int], doomed: int) -> int:
    """``fds`` become 0, 1, 2, … for the exec; ``doomed`` comes next and is closed by it."""
    base = len(fds) + 1
    copies = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, base) for fd in (*fds, doomed)]
    for number, copy in enumerate(copies):
        os.dup2(copy, number, inheritable=number < len(fds))
    syscalls.close_from(base)
    return len(fds)


def open_figures(pid: int) -> list[int]:
    """smaps_rollup and, where the kernel has it, ksm_stat of a worker that has executed; the caller's."""
    fds = []
    for name in ("smaps_rollup", "ksm_stat"):
        with contextlib.suppress(FileNotFoundError):
            fds.append(os.open(f"/proc/{pid}/{name}", os.O_RDONLY | os.O_CLOEXEC))
    return fds


def start_time(pid: int) -> int:
    """When process ``pid`` started, in clock ticks since boot (proc(5), stat, field 22). Raises OSError."""
    text = Path(f"/proc/{pid}/stat").read_text()
    return int(text.rpartition(")")[2].split()[19])


def real_uid(pid: int) -> int:
    """The real uid of process ``pid``; its directory may be root's (not dumpable). Raises OSError."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("Uid:"):
            return int(line.split()[1])
    raise ProcessLookupError(pid)
