# SPDX-License-Identifier: Apache-2.0
"""Sockets between a machine's guest and the host: the host's side of virtio-vsock.

For each connection a pair of stream sockets is made here; the worker gets one end, whoever connects or
listens the other, and bytes flow without the service. A worker never sends a descriptor, so a guest that
connects needs a socket that is there already: for each port that somebody listens on, ``BACKLOG`` of them
wait in the worker, and each one that was used is replaced.

*A listener* is a SEQPACKET socket of which the client has the other end. For each connection comes one
datagram: the guest's port (four bytes, little-endian) with the connection's socket beside it. It ends when
the client closes it, when the machine ends, and when the service loses the worker: then the client reads an
end of file, and the sockets that wait in the worker are hung up on. A client that does not take what comes
holds up the guest's next connections and nothing else: hardly any datagrams fit into the socket, since each
holds a descriptor of ours in the kernel.
"""

from __future__ import annotations

import array
import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

from vmbus.service import descriptors
from vmbus.service.machine import Machine
from vmbus.service.worker_client import WorkerClient
from vmbus.wire.errors import VmbusError

log = logging.getLogger("vmbus.vsock")

BACKLOG: Final = 4
LISTENERS: Final = 16
"""Ports of one machine that are listened on at a time."""
CONNECT: Final = 10.0
"""Seconds for a guest to say yes or no."""

T = TypeVar("T")


class Vsock:
    """For all machines."""

    def __init__(self) -> None:
        self._listeners: dict[tuple[str, int], _Listener] = {}

    async def connect(self, machine: Machine, port: int) -> int:
        """A socket that is connected with ``port`` of the guest's; the caller's.

        Raises InvalidState, Unavailable (nobody there takes it, or there are too many), Timeout.
        """
        _check(machine, "ConnectVsock")
        worker = machine.connection()
        try:
            mine, _ = await _with_pair(lambda fd: worker.vsock_connect(port, fd, timeout=CONNECT))
        except VmbusError as error:
            if error.kind != "Timeout":
                raise
            message = f"the guest has not said within {CONNECT:g} s whether it takes it"
            raise VmbusError("Timeout", message, argument="port") from None
        return mine

    def listen(self, machine: Machine, port: int) -> int:
        """A listener on ``port`` of the host's; the caller's. Raises InvalidState, InUse, QuotaExceeded."""
        _check(machine, "ListenVsock")
        key = (machine.uuid, port)
        if key in self._listeners:
            raise VmbusError("InUse", f"somebody listens on port {port} already", argument="port")
        if sum(uuid == machine.uuid for uuid, _ in self._listeners) >= LISTENERS:
            message = f"{LISTENERS} ports of the machine are listened on already"
            raise VmbusError("QuotaExceeded", message, argument="port")
        worker = machine.connection()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)  # the kernel's least
        self._listeners[key] = _Listener(worker, port, ours, lambda: self._listeners.pop(key, None))
        return descriptors.keep(theirs.detach())


class _Listener:
    """One port; ``on_closed`` is called once."""

    def __init__(
        self, worker: WorkerClient, port: int, sock: socket.socket, on_closed: Callable[[], object]
    ) -> None:
        self._worker = worker
        self._port = port
        self._sock = socket.socket(fileno=descriptors.keep(sock.detach()))
        self._sock.setblocking(False)
        self._on_closed = on_closed
        self._loop = asyncio.get_running_loop()
        self._sending = asyncio.Lock()
        # What a client says is nothing to us, so either it has gone or it is none.
        self._loop.add_reader(self._sock.fileno(), self._close)
        self._tasks = {asyncio.ensure_future(self._serve()) for _ in range(BACKLOG)}

    async def _serve(self) -> None:
        """One connection after the other, until there is nobody any more on one side."""
        try:
            while True:
                mine, port = await _with_pair(lambda fd: self._worker.vsock_accept(self._port, fd))
                try:
                    async with self._sending:
                        await self._hand_over(mine, port)
                finally:
                    descriptors.close(mine)
        except (VmbusError, OSError) as error:
            log.info("port %d is listened on no more: %s", self._port, error)
            self._close()

    async def _hand_over(self, connection: int, port: int) -> None:
        beside = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [connection]))]
        while True:
            try:
                self._sock.sendmsg([port.to_bytes(4, "little")], beside)
                return
            except BlockingIOError:
                writable = self._loop.create_future()
                self._loop.add_writer(self._sock.fileno(), _settle, writable)
                try:
                    await writable
                finally:
                    self._loop.remove_writer(self._sock.fileno())

    def _close(self) -> None:
        if self._sock.fileno() < 0:
            return
        self._loop.remove_reader(self._sock.fileno())
        for task in self._tasks:
            if task is not asyncio.current_task():
                task.cancel()
        descriptors.close(self._sock.detach())
        self._on_closed()


def _settle(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _check(machine: Machine, what: str) -> None:
    machine.require(what, "running", "paused")
    if not machine.definition.vsock:
        raise VmbusError(
            "InvalidState", "the machine has no vsock device; give its definition vsock, the guest's CID"
        )


async def _with_pair(give: Callable[[int], Awaitable[T]]) -> tuple[int, T]:
    """One end of a pair whose other end somebody is given, and the answer; the end is the caller's."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    theirs.setblocking(False)
    mine, its = descriptors.keep(ours.detach()), descriptors.keep(theirs.detach())
    try:
        return mine, await give(its)
    except BaseException:
        descriptors.close(mine)
        raise
    finally:
        descriptors.close(its)
