# SPDX-License-Identifier: Apache-2.0
"""Requests and answers over a SEQPACKET socket in the event loop: to the broker, and to each worker.

A request has a number of our choosing; its answer comes back under it, in any order. What has no number of
ours is an event. A datagram that is no message of the protocol, or an answer that nobody asked for, ends
the channel: the peer is broken or hostile, and is connected to anew. Requests that are unanswered when the
channel ends fail with Disconnected. Nothing here blocks: what the socket does not take waits in a queue,
bounded, and a peer that lets it fill is dropped.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections import deque
from collections.abc import Callable
from typing import Final, Generic, Protocol, TypeVar

import msgspec

from vmbus.service import descriptors
from vmbus.wire import handover, packet
from vmbus.wire.errors import KINDS, VmbusError

log = logging.getLogger("vmbus.channel")

QUEUE: Final = 256
"""Datagrams that may wait for the socket; with 64 KiB each at most 16 MiB."""


class Answered(Protocol):
    """What an answer to a request looks like."""

    @property
    def id(self) -> int: ...
    @property
    def error(self) -> str | None: ...
    @property
    def message(self) -> str: ...
    @property
    def argument(self) -> str: ...


A = TypeVar("A", bound=Answered)
E = TypeVar("E")


class Channel(Generic[A, E]):
    """``answer`` is the type of answers, all other messages of ``decoder`` are events.

    ``max_fds`` 0: the kernel drops whatever fds the peer attaches (workers are hostile). ``on_closed``
    is called once, from the loop, unless ``close`` was called first.
    """

    def __init__(
        self,
        sock: socket.socket,
        decoder: msgspec.msgpack.Decoder[A | E],
        answer: type[A],
        *,
        peer: str,
        on_event: Callable[[E], None],
        on_closed: Callable[[], None],
        max_fds: int = 0,
    ) -> None:
        # Below N (see descriptors), whatever number it came with.
        self._sock = socket.socket(fileno=descriptors.keep(sock.detach()))
        self._decoder = decoder
        self._answer = answer
        self._peer = peer
        self._on_event = on_event
        self._on_closed = on_closed
        self._max_fds = max_fds
        self._next = 1
        self._pending: dict[int, asyncio.Future[tuple[A, list[int]]]] = {}
        self._forgotten: set[int] = set()
        self._queue: deque[tuple[msgspec.Struct, list[int], Callable[[], None]]] = deque()
        self._loop = asyncio.get_running_loop()
        self.open = True
        self._resting = False
        self._sock.setblocking(False)
        self._loop.add_reader(self._sock.fileno(), self._readable)

    def number(self) -> int:
        """A fresh request number."""
        self._next += 1
        return self._next

    async def request(
        self,
        message: msgspec.Struct,
        number: int,
        *,
        fds: list[int] | None = None,
        timeout: float = 30,
        on_sent: Callable[[], None] = lambda: None,
    ) -> tuple[A, list[int]]:
        """Send ``message``, whose id is ``number``, and wait for its answer; fds that come are the caller's.

        Copies of ``fds`` are kept until they are sent; ``on_sent`` is called when they are, or never will be.
        Raises the error that the answer names; Disconnected, Timeout.
        """
        future: asyncio.Future[tuple[A, list[int]]] = self._loop.create_future()
        self._pending[number] = future
        try:
            self.send(message, fds, on_sent)
            answer, received = await asyncio.wait_for(future, timeout)
        except TimeoutError:
            self._forgotten.add(number)
            raise VmbusError("Timeout", f"{self._peer} did not answer within {timeout:g} s") from None
        except asyncio.CancelledError:
            self._forgotten.add(number)
            raise
        finally:
            self._pending.pop(number, None)
        if answer.error is not None:
            _close(received)
            kind = answer.error if answer.error in KINDS else "Internal"
            raise VmbusError(kind, answer.message[:2000], argument=answer.argument[:200])
        return answer, received

    def send(
        self,
        message: msgspec.Struct,
        fds: list[int] | None = None,
        on_sent: Callable[[], None] = lambda: None,
    ) -> None:
        """Send without waiting for an answer. Raises Disconnected."""
        if not self.open:
            raise VmbusError("Disconnected", f"{self._peer} is not connected")
        if len(self._queue) >= QUEUE:
            self._end(f"{self._peer} does not read")
            raise VmbusError("Disconnected", f"{self._peer} does not read")
        self._queue.append((message, [descriptors.keep(os.dup(fd)) for fd in fds or ()], on_sent))
        if len(self._queue) == 1:
            self._writable()

    def rest(self, seconds: float) -> None:
        """Read nothing for a while: the peer says more than it should, and waits in its socket."""
        if self.open:
            self._resting = True
            self._loop.remove_reader(self._sock.fileno())
            self._loop.call_later(seconds, self._go_on)

    def _go_on(self) -> None:
        self._resting = False
        if self.open:
            self._loop.add_reader(self._sock.fileno(), self._readable)

    def close(self) -> None:
        """End the channel; pending requests fail, ``on_closed`` is not called."""
        self._on_closed = lambda: None
        self._end("closed")

    def _writable(self) -> None:
        while self._queue:
            message, fds, on_sent = self._queue[0]
            try:
                packet.send(self._sock, message, fds)
            except BlockingIOError:
                self._loop.add_writer(self._sock.fileno(), self._writable)
                return
            except OSError as error:
                self._end(f"{self._peer}: {error.strerror}")
                return
            except packet.Violation as error:
                self._queue.popleft()
                _close(fds)
                on_sent()
                number = getattr(message, "id", 0)
                if (future := self._pending.get(number)) and not future.done():
                    future.set_exception(VmbusError("InvalidArgument", f"too large to be sent: {error}"))
                continue
            self._queue.popleft()
            _close(fds)
            on_sent()
        self._loop.remove_writer(self._sock.fileno())

    def _readable(self) -> None:
        for _ in range(32):  # others want the loop too
            if not self.open or self._resting:
                return
            try:
                received = handover.receive(self._sock, self._decoder, max_fds=self._max_fds)
            except BlockingIOError:
                return
            except packet.Violation as error:
                self._end(f"{self._peer} broke the protocol: {error}")
                return
            except OSError as error:
                self._end(f"{self._peer}: {error.strerror}")
                return
            if received is None:
                self._end(f"{self._peer} has closed the connection")
                return
            self._take(*received)

    def _take(self, message: A | E, received: list[int]) -> None:
        fds = [descriptors.keep(fd) for fd in received]
        if isinstance(message, self._answer):
            future = self._pending.get(message.id)
            if future is not None and not future.done():
                future.set_result((message, fds))
            elif message.id in self._forgotten:
                self._forgotten.discard(message.id)
                _close(fds)
            else:
                _close(fds)
                self._end(f"{self._peer} answered request {message.id}, which was not asked")
            return
        _close(fds)
        self._on_event(message)  # type: ignore[arg-type]

    def _end(self, why: str) -> None:
        if not self.open:
            return
        self.open = False
        log.info("channel ended: %s", why)
        self._loop.remove_reader(self._sock.fileno())
        self._loop.remove_writer(self._sock.fileno())
        descriptors.close(self._sock.detach())
        for _, fds, on_sent in self._queue:
            _close(fds)
            on_sent()
        self._queue.clear()
        for future in self._pending.values():
            if not future.done():
                future.set_exception(VmbusError("Disconnected", f"{self._peer} went away before it answered"))
        self._on_closed()


def _close(fds: list[int]) -> None:
    for fd in fds:
        with contextlib.suppress(OSError):
            descriptors.close(fd)
