# SPDX-License-Identifier: Apache-2.0
"""Children of the broker: whatever may block (NSS, a user's file system, rtnl) runs in one.

A child is a fork of the broker that keeps only the descriptors it is handed, reports one typed value or one
named error over a socketpair, and has a deadline. At the deadline the waiting task gets Timeout and the child
SIGKILL; a child that hangs in the kernel stays *stuck* and counted until its pidfd says that it has ended, so
one user can hold at most PER_USER of them, and all users together IN_ALL. Further work of that user queues.
"""

from __future__ import annotations

import collections
import fcntl
import os
import signal
import socket
from collections.abc import Callable
from typing import Any, Final, Generic, NoReturn, TypeVar

import msgspec
import prctl

from vmbus.broker import syscalls
from vmbus.broker.loop import Loop, Pending, Task, wait
from vmbus.broker.steps import log
from vmbus.wire.errors import KINDS, VmbusError
from vmbus.wire.packet import LIMIT

PER_USER: Final = 4
IN_ALL: Final = 64
DEADLINE: Final = 10.0  # seconds

T = TypeVar("T")


class _Failed(msgspec.Struct, tag="failed"):
    kind: str
    message: str
    argument: str


class Channel:
    """The child's side: where it reports, and the descriptors that it kept, in the order they were given."""

    def __init__(self, sock: socket.socket, fds: list[int]) -> None:
        self.socket = sock
        self.fds = fds

    def report(self, value: Any) -> None:
        """Hand the value to the broker."""
        self.socket.send(b"+" + msgspec.msgpack.encode(value))

    def fail(self, error: VmbusError) -> None:
        """Hand an error to the broker."""
        failed = _Failed(error.kind, error.message[:2000], error.argument)
        self.socket.send(b"-" + msgspec.msgpack.encode(failed))


class Child(Generic[T]):
    """A running child. ``reported`` is its value or error, ``gone`` is settled when the process has ended."""

    def __init__(
        self, loop: Loop, run: Callable[[Channel], None], kind: type[T], fds: list[int], deadline: float
    ) -> None:
        self.reported: Pending[T] = Pending()
        self.gone: Pending[int] = Pending()
        self._loop = loop
        self._decoder = msgspec.msgpack.Decoder(kind)
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.pid = os.fork()
        if self.pid == 0:
            _child(theirs, fds, run)
        theirs.close()
        self._pidfd = os.pidfd_open(self.pid)
        self._timer = loop.later(deadline, self._too_late)
        loop.watch(self.socket.fileno(), self._read)
        loop.watch(self._pidfd, self._ended)

    def _read(self) -> None:
        try:
            data = self.socket.recv(LIMIT, socket.MSG_DONTWAIT)
        except OSError:
            data = b""
        try:
            if data[:1] == b"+":
                self.reported.settle(self._decoder.decode(data[1:]))
                return
            if data[:1] == b"-":
                failed = msgspec.msgpack.decode(data[1:], type=_Failed)
                kind = failed.kind if failed.kind in KINDS else "Internal"
                self.reported.settle(error=VmbusError(kind, failed.message, argument=failed.argument))
                return
        except (msgspec.MsgspecError, ValueError) as error:
            self.reported.settle(
                error=VmbusError("Internal", f"a child of the broker reported nonsense: {error}")
            )
        self._loop.unwatch(self.socket.fileno())

    def _too_late(self) -> None:
        self.reported.settle(error=VmbusError("Timeout", "the operation did not end within its deadline"))
        signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def _ended(self) -> None:
        self._read()
        self._loop.unwatch(self._pidfd)
        self._loop.unwatch(self.socket.fileno())
        ended = os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED)
        os.close(self._pidfd)
        self.socket.close()
        self._timer.cancel()
        self.reported.settle(error=VmbusError("Internal", "a child of the broker ended without a report"))
        self.gone.settle(ended.si_status if ended is not None else 0)


def _child(sock: socket.socket, fds: list[int], run: Callable[[Channel], None]) -> NoReturn:
    status = 1
    try:
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        kept = _keep_only([sock.fileno(), *fds])
        sock.detach()
        channel = Channel(socket.socket(fileno=kept[0]), kept[1:])
        prctl.set_pdeathsig(signal.SIGKILL)
        try:
            run(channel)
            status = 0
        except VmbusError as error:
            channel.fail(error)
        except OSError as error:
            channel.fail(VmbusError("Internal", str(error)))
    finally:
        os._exit(status)


def _keep_only(fds: list[int]) -> list[int]:
    """Close everything but ``fds``, which become 3, 4, …; 0, 1 and 2 are /dev/null."""
    base = 3 + len(fds)
    copies = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, base) for fd in fds]
    null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    for number in range(3):
        os.dup2(null, number, inheritable=True)
    for index, copy in enumerate(copies):
        os.dup2(copy, 3 + index, inheritable=False)
    syscalls.close_from(base)
    return list(range(3, base))


class Crew:
    """Runs children for users, within the limits."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._busy: collections.Counter[int] = collections.Counter()
        self._queue: collections.deque[tuple[int, Pending[None]]] = collections.deque()

    def busy(self, user: int) -> int:
        """How many children work for ``user`` (uid; 0 for the broker itself), stuck ones included."""
        return self._busy[user]

    def run(
        self,
        user: int,
        run: Callable[[Channel], None],
        kind: type[T],
        fds: list[int],
        deadline: float = DEADLINE,
    ) -> Task[T]:
        """Fork a child for ``user`` when there is room, and wait for its report.

        Raises VmbusError: the child's, or Timeout for one that did not report, or found no room, in time.
        """
        yield from wait(self._room(user, deadline))
        child = Child(self._loop, run, kind, fds, deadline)
        child.gone.when_settled(lambda: self._left(user))
        value = yield from wait(child.reported)
        return value

    def _has_room(self, user: int) -> bool:
        return self._busy[user] < PER_USER and self._busy.total() < IN_ALL

    def _room(self, user: int, deadline: float) -> Pending[None]:
        turn: Pending[None] = Pending()
        if self._has_room(user):
            self._busy[user] += 1
            turn.settle()
            return turn
        entry = (user, turn)
        self._queue.append(entry)

        def give_up() -> None:
            if entry in self._queue:
                self._queue.remove(entry)
                message = (
                    f"{self._busy[user]} earlier operations for this user have not ended; a file system hangs"
                )
                turn.settle(error=VmbusError("Timeout", message))

        self._loop.later(deadline, give_up)
        return turn

    def _left(self, user: int) -> None:
        self._busy[user] -= 1
        if not self._busy[user]:
            del self._busy[user]
        for entry in list(self._queue):
            if self._has_room(entry[0]):
                self._queue.remove(entry)
                self._busy[entry[0]] += 1
                entry[1].settle()


def in_background(task_result: Pending[Any], what: str) -> None:
    """Nobody waits for this one: log its failure."""

    def settled() -> None:
        try:
            task_result.result()
        except VmbusError as error:
            log(f"{what}: {error.kind}: {error}")

    task_result.when_settled(settled)
