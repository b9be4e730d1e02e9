# SPDX-License-Identifier: Apache-2.0
"""Children of the broker: whatever may block (NSS, a user's file system, rtnl) runs in one.

A child is a fork of the broker that keeps only the descriptors it is handed, gives root up (``become``) as
soon as it can, reports one typed value or one named error over a socketpair, and has a deadline. At the
deadline the waiting task gets Timeout and the child SIGKILL; a child that hangs in the kernel stays *stuck*
and counted until its pidfd says that it has ended, so one user can hold at most PER_USER of them, and all
together IN_ALL. Further work for that user queues.

Code that needs no uid 0 lives in ``vmbus.broker.dropped`` and is imported only after ``become``.
"""

from __future__ import annotations

import collections
import fcntl
import importlib
import os
import signal
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Generic, NoReturn, TypeVar

import msgspec
import prctl

from vmbus.broker import syscalls
from vmbus.broker.loop import Loop, Pending, Task
from vmbus.wire.errors import KINDS, VmbusError
from vmbus.wire.packet import LIMIT

PER_USER = 4
IN_ALL = 64
DEADLINE = 10.0  # seconds
NOBODY = (65534, [65534])
_CAPABILITIES = range(int(Path("/proc/sys/kernel/cap_last_cap").read_text()) + 1)

T = TypeVar("T")
User = tuple[int, list[int]]  # uid, gids
Caps = Sequence[int]  # CAP_* of prctl


# A value, or an error: kind, message, argument.
_Report = tuple[msgspec.Raw, tuple[str, str, str] | None]


class Channel:
    """The child's side: where it reports, and the descriptors that it kept, in the order they were given."""

    def __init__(self, sock: socket.socket, fds: list[int]) -> None:
        self.socket, self.fds = sock, fds

    def report(self, value: Any, error: tuple[str, str, str] | None = None) -> None:
        """Hand the value, or the error (kind, message, argument), to the broker."""
        self.socket.send(msgspec.msgpack.encode((value, error)))


Work = Callable[[Channel], None]


class Child(Generic[T]):
    """A running child. ``reported``: its value or error; ``gone``: its exit status or signal, at its end."""

    def __init__(self, loop: Loop, work: Work, kind: type[T], fds: list[int], deadline: float) -> None:
        self.reported: Pending[T] = Pending()
        self.gone: Pending[int] = Pending()
        self._loop = loop
        self._kind = kind
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        pid = os.fork()
        if pid == 0:
            _child(theirs, fds, work)
        theirs.close()
        self._pidfd = os.pidfd_open(pid)
        self._timer = loop.later(deadline, self._too_late)
        loop.watch(self.socket.fileno(), self._read)
        loop.watch(self._pidfd, self._ended)

    def _read(self) -> None:
        self._loop.unwatch(self.socket.fileno())
        try:
            value, error = msgspec.msgpack.decode(self.socket.recv(LIMIT, socket.MSG_DONTWAIT), type=_Report)
            if error is None:
                self.reported.settle(msgspec.msgpack.decode(value, type=self._kind))
            else:
                kind, message, argument = error
                known = kind if kind in KINDS else "Internal"
                self.reported.settle(None, VmbusError(known, message, argument=argument))
        except (OSError, msgspec.MsgspecError, ValueError):
            self.reported.settle(None, VmbusError("Internal", "a child of the broker ended without a report"))

    def _too_late(self) -> None:
        self.reported.settle(None, VmbusError("Timeout", "the operation did not end within its deadline"))
        signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def _ended(self) -> None:
        if not self.reported.settled:
            self._read()
        self._loop.unwatch(self.socket.fileno())
        self._loop.unwatch(self._pidfd)
        ended = os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED)
        os.close(self._pidfd)
        self.socket.close()
        self._loop.cancel(self._timer)
        self.gone.settle(ended.si_status if ended is not None else 0)


def _child(sock: socket.socket, fds: list[int], work: Work) -> NoReturn:
    status = 1
    try:
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        kept = _keep_only([sock.detach(), *fds])
        channel = Channel(socket.socket(fileno=kept[0]), kept[1:])
        prctl.set_pdeathsig(signal.SIGKILL)
        try:
            work(channel)
            status = 0
        except VmbusError as error:
            channel.report(None, (error.kind, error.message[:4000], error.argument))
        except Exception as error:
            channel.report(None, ("Internal", f"{type(error).__name__}: {error}"[:4000], ""))
    finally:
        os._exit(status)


def _keep_only(fds: list[int]) -> list[int]:
    """Close everything but ``fds``, which become 3, 4, …; 0, 1 and 2 are /dev/null."""
    base = 3 + len(fds)
    copies = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, base) for fd in fds]
    null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    for number, fd in enumerate([null, null, null, *copies]):
        os.dup2(fd, number, inheritable=number < 3)
    syscalls.close_from(base)
    return list(range(3, base))


def become(uid: int, gids: list[int], caps: Caps = ()) -> None:
    """Be ``uid`` with ``gids`` (the first is its own) for good; keep the capabilities ``caps`` only.

    One gid means no other groups. Without a capability there never will be any again: the bounding set is
    empty, the securebits are locked.
    """
    for number in () if caps else _CAPABILITIES:
        prctl.capbset_drop(number)
    prctl.set_keepcaps(bool(caps))
    if not caps:
        syscalls.lock_securebits()
    os.setgroups(gids[:65536] if gids[1:] else [])
    os.setresgid(gids[0], gids[0], gids[0])
    os.setresuid(uid, uid, uid)
    prctl.cap_inheritable.limit()
    prctl.cap_permitted.limit(*caps)
    prctl.set_caps(*((number, prctl.CAP_EFFECTIVE, True) for number in caps))
    prctl.set_no_new_privs(True)
    prctl.set_dumpable(False)  # whatever fs.suid_dumpable says: nobody traces it
    prctl.set_pdeathsig(signal.SIGKILL)  # the change of uid cleared it
    os.umask(0o077)


def dropped(
    module: str, what: str, *arguments: Any, user: User = NOBODY, caps: Caps = (), opened: Sequence[str] = ()
) -> Work:
    """Work for a child that is ``user``, with the capabilities ``caps``: ``what`` of dropped/``module``.py.

    That is called with ``arguments`` and the channel, whose descriptors are followed by those of the paths
    ``opened`` as root. Named by strings, for it is not loaded as root.
    """

    def work(channel: Channel) -> None:
        channel.fds += [os.open(path, os.O_RDWR | os.O_CLOEXEC) for path in opened]
        become(*user, caps)
        getattr(importlib.import_module(f"vmbus.broker.dropped.{module}"), what)(*arguments, channel)

    return work


class Crew:
    """Runs children for users, within the limits."""

    def __init__(self, loop: Loop) -> None:
        self.loop = loop
        self._busy: collections.Counter[int] = collections.Counter()
        self._queue: list[tuple[int, Pending[None]]] = []

    def run(self, user: int, work: Work, kind: type[T], fds: list[int]) -> Task[T]:
        """Fork a child for ``user`` (uid; 0: the broker itself) when there is room, and wait for its report.

        Raises VmbusError: the child's, or Timeout for one that did not report, or found no room, in time.
        """
        turn: Pending[None] = Pending()
        self._queue.append((user, turn))
        timer = self.loop.later(DEADLINE, lambda: self._give_up(user, turn))
        self._admit()
        yield from turn
        self.loop.cancel(timer)
        try:
            child = Child(self.loop, work, kind, fds, DEADLINE)
        except OSError:
            self._left(user)
            raise
        child.gone.when_settled(lambda: self._left(user))
        return (yield from child.reported)

    def _admit(self) -> None:
        for entry in list(self._queue):
            user, turn = entry
            if self._busy[user] < PER_USER and self._busy.total() < IN_ALL:
                self._busy[user] += 1
                self._queue.remove(entry)
                turn.settle(None)

    def _give_up(self, user: int, turn: Pending[None]) -> None:
        self._queue.remove((user, turn))
        message = f"{self._busy[user]} earlier operations for this user have not ended; a file system hangs"
        turn.settle(None, VmbusError("Timeout", message))

    def _left(self, user: int) -> None:
        self._busy[user] -= 1
        self._busy += collections.Counter()  # forgets those without any
        self._admit()
