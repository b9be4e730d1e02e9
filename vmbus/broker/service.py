# SPDX-License-Identifier: Apache-2.0
"""The socket that the service connects to, and its one connection.

A peer that is not the service's user is refused by its credentials; a new connection replaces the old one. A
datagram is first accepted (size, type, fields, and Hello before anything else), only then acted on; whatever
is not acceptable ends the connection. There is no control buffer for receiving, so descriptors attached to a
request never arrive (and, from Linux 6.16 on, cannot even be sent). No send waits: a peer that lets
SEND_BUFFER fill is dropped. At most IN_FLIGHT requests are worked on at a time; the next ones stay in the
socket.
"""

import contextlib
import os
import socket
import struct
from pathlib import Path

import msgspec

from vmbus.broker.loop import Loop, start
from vmbus.broker.requests import Requests
from vmbus.broker.steps import log
from vmbus.wire import packet
from vmbus.wire.broker import Ended, Hello, Reply, Request

IN_FLIGHT = 64
SEND_BUFFER = 4 << 20  # bytes, as the kernel counts them: 4,000 workers may end at once
_SO_SNDBUFFORCE = 32  # include/uapi/asm-generic/socket.h
_SO_PASSRIGHTS = 83  # include/uapi/asm-generic/socket.h, Linux 6.16


def listen(directory: Path, group: int) -> socket.socket:
    """Bind ``directory``/socket: root and ``group`` may reach it. Replaces a socket of before."""
    directory.mkdir(mode=0o750, parents=True, exist_ok=True)
    os.chown(directory, 0, group)
    path = directory / "socket"
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
    listener.bind(str(path))
    os.chown(path, 0, group)
    path.chmod(0o660)
    listener.listen(8)
    return listener


class Service:
    """Accepts connections of the service's user and serves the latest one."""

    def __init__(self, loop: Loop, listener: socket.socket, uid: int, requests: Requests) -> None:
        self._loop, self._listener, self._uid, self._requests = loop, listener, uid, requests
        self._peer: _Peer | None = None
        loop.watch(listener.fileno(), self._accept)

    def tell(self, ended: Ended) -> None:
        """Pass on that a worker ended; a service that is away asks for the list when it is back."""
        if self._peer is not None:
            self._peer.send(ended, [])

    def _accept(self) -> None:
        connection, _ = self._listener.accept()
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        pid, uid, _ = struct.unpack("iII", credentials)
        if uid != self._uid:
            log(f"uid {uid} (pid {pid}): refused; only uid {self._uid} may ask")
            connection.close()
            return
        if self._peer is not None:
            self._peer.end("replaced by a new connection")
        self._peer = _Peer(self._loop, connection, f"service[{pid}]", self._requests)


class _Peer:
    def __init__(self, loop: Loop, connection: socket.socket, name: str, requests: Requests) -> None:
        self._loop, self._connection, self._name, self._requests = loop, connection, name, requests
        self._decoder = msgspec.msgpack.Decoder(Request)
        self._greeted = False
        self._in_flight = 0
        connection.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, SEND_BUFFER)
        with contextlib.suppress(OSError):  # before Linux 6.16 fds are dropped on receipt
            connection.setsockopt(socket.SOL_SOCKET, _SO_PASSRIGHTS, 0)
        loop.watch(connection.fileno(), self._readable)
        log(f"{name}: connected")

    def end(self, why: str) -> None:
        """Close the connection; what is being worked on goes on, its reply is dropped. Idempotent."""
        if self._connection.fileno() >= 0:
            log(f"{self._name}: {why}")
            self._loop.unwatch(self._connection.fileno())
            self._connection.close()

    def send(self, message: Reply | Ended, fds: list[int]) -> None:
        """Send without waiting, and close ``fds``: sockets and files of /proc, whose close never blocks."""
        try:
            if self._connection.fileno() >= 0:
                packet.send(self._connection, message, fds)
        except OSError as error:
            self.end(f"gone, or does not read its replies ({error.strerror})")
        finally:
            for fd in fds:
                os.close(fd)

    def _readable(self) -> None:
        try:
            request = packet.receive(self._connection, self._decoder)
            if request is None:
                self.end("closed")
                return
            if not self._greeted and not isinstance(request, Hello):
                raise packet.Violation("hello comes first")
        except (packet.Violation, OSError) as error:
            self.end(f"ended: {error}")
            return
        self._in_flight += 1
        if self._in_flight == IN_FLIGHT:
            self._loop.unwatch(self._connection.fileno())
        answered = start(self._requests.answer(self._name, request))

        def reply() -> None:
            message, fds = answered.result()
            self._greeted = self._greeted or message.version > 0  # only the reply to a good Hello has one
            self.send(message, fds)
            self._in_flight -= 1
            if self._in_flight == IN_FLIGHT - 1 and self._connection.fileno() >= 0:
                self._loop.watch(self._connection.fileno(), self._readable)

        answered.when_settled(reply)
