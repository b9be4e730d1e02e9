# SPDX-License-Identifier: Apache-2.0
"""The worker's listening socket and what comes in by it: control connections and files.

A connection says with its first datagram what it is (``wire.inlet.Greeting``):

- *inlet*: one more datagram brings a file for a slot; then it is closed;
- *control*: the service's. There is one at a time. A new one, whose epoch must be greater than any before,
  replaces it: the old one is closed and what it asked and was not yet told is dropped (the service learns the
  outcome from the state and the events).

On a control connection ``Hello`` comes first; its result says the state, and then the events that nobody
has acknowledged are sent again, at most WINDOW of them ahead of the acknowledgements. Descriptors are
received here and on inlets and nowhere else; none is ever sent (the filter denies sendmsg).

A peer that breaks the protocol, or that does not read, loses its connection and nothing else.
"""

from __future__ import annotations

import socket
from typing import Final, Protocol

import msgspec

from vmbus.wire import handover, packet
from vmbus.wire.errors import VmbusError
from vmbus.wire.inlet import Delivery, Greeting
from vmbus.wire.worker import (
    LIFELINE,
    VERSION,
    Ack,
    AddFile,
    AddLink,
    Attach,
    CancelPrefault,
    CancelSave,
    Change,
    Configure,
    Console,
    Detach,
    Hello,
    Keep,
    Media,
    MemoryTarget,
    OpenPort,
    Prefault,
    Receive,
    Request,
    Restore,
    Result,
    Run,
    Save,
    Send,
    Snapshot,
    State,
    Stats,
    Tidy,
    Vsock,
)
from vmbus.worker.events import EventQueue
from vmbus.worker.files import Files, close
from vmbus.worker.log import say
from vmbus.worker.loop import READ, Loop, Timer

WINDOW: Final = 32
PENDING_MAX: Final = 64
# A greeting follows at once. A delivery waits for a child that opens a file: it has 10 s and is then killed.
GREETING_SECONDS: Final = 10.0
DELIVERY_SECONDS: Final = 20.0

_greetings = msgspec.msgpack.Decoder(Greeting)
_deliveries = msgspec.msgpack.Decoder(Delivery)
_requests = msgspec.msgpack.Decoder(Request)

# What an older or newer service, with which only the lifeline is shared, may not ask.
_BEYOND_LIFELINE = (
    AddFile,
    AddLink,
    Configure,
    Run,
    Stats,
    MemoryTarget,
    Prefault,
    CancelPrefault,
    Attach,
    Detach,
    Keep,
    Change,
    Restore,
    CancelSave,
    Send,
    Receive,
    Snapshot,
    Tidy,
    Media,
    OpenPort,
    Vsock,
)


_TAKES: Final[dict[type, int]] = {
    AddFile: packet.MAX_FDS,
    AddLink: 1,
    Console: 1,
    OpenPort: 1,
    Save: 1,
    Send: 1,
    Receive: 1,
    Snapshot: 1,
    Vsock: 1,
}
"""How many descriptors come with a request."""


class Desk(Protocol):
    """Who carries requests out."""

    state: State
    reason: str

    def handle(self, request: Request, fds: list[int], reply: Reply) -> None:
        """Begin ``request``; answer by ``reply``, now or later. Owns ``fds``. Raises VmbusError."""

    def attended(self, present: bool) -> None:
        """A control connection came (True) or the last one went (False)."""

    def acknowledged(self) -> None:
        """The service has stored events."""


class Reply:
    """The way back for one request; says nothing once its connection has been replaced."""

    def __init__(self, control: Control, epoch: int, request: int) -> None:
        self._control = control
        self._epoch = epoch
        self._request = request

    def done(self, stats: dict[str, object] | None = None) -> None:
        """The request is carried out."""
        self._control.answer(self._epoch, Result(id=self._request, stats=stats or {}))

    def failed(self, error: VmbusError) -> None:
        """It could not be."""
        self._control.answer(
            self._epoch,
            Result(id=self._request, error=error.kind, message=error.message, argument=error.argument),
        )


class _Pending:
    """A connection that has not yet said, or not yet brought, what it is for."""

    def __init__(self, sock: socket.socket, timer: Timer) -> None:
        self.sock = sock
        self.timer = timer
        self.inlet = False


class Control:
    """Serves the listening socket ``listener`` on ``loop``."""

    def __init__(
        self, loop: Loop, listener: socket.socket, *, files: Files, events: EventQueue, desk: Desk
    ) -> None:
        listener.setblocking(False)
        self._loop = loop
        self._listener = listener
        self._files = files
        self._events = events
        self._desk = desk
        self._pending: list[_Pending] = []
        self._sock: socket.socket | None = None
        self._epoch = -1
        self._version: int | None = None  # None until Hello; 0: the lifeline only
        self._sent = 0  # the last event sent on this connection
        loop.watch(listener.fileno(), self._listener_ready)

    # The listening socket.

    def _listener_ready(self, _: int) -> None:
        self._accept()

    def _accept(self) -> bool:
        """Take one connection; False when there is none."""
        try:
            sock, _ = self._listener.accept()
        except BlockingIOError:
            return False
        except OSError as error:  # the table of descriptors is full, for one; the peer waits, and so do we
            say(f"a connection could not be accepted: {error}")
            self._loop.change(self._listener.fileno(), 0)
            self._loop.after(1.0, lambda: self._loop.change(self._listener.fileno(), READ))
            return False
        if len(self._pending) >= PENDING_MAX:
            say("a connection was refused: too many say nothing")
            sock.close()
            return True
        sock.setblocking(False)
        pending = _Pending(sock, self._loop.after(GREETING_SECONDS, lambda: self._dismiss(pending)))
        self._pending.append(pending)
        self._loop.watch(sock.fileno(), lambda _: self._read_pending(pending))
        return True

    def collect_files(self) -> None:
        """Take in every file whose delivery was complete before now.

        The service asks for the machine after the broker has told it that the files were sent; but they were
        sent on connections of their own, and nothing else orders those before the control connection.
        """
        while self._accept():
            pass
        for pending in list(self._pending):
            while pending in self._pending and self._read_pending(pending):
                pass

    def _read_pending(self, pending: _Pending) -> bool:
        """Read one datagram of a connection that is not control; False when there is none."""
        try:
            if pending.inlet:
                self._take_delivery(pending)
            else:
                self._take_greeting(pending)
        except BlockingIOError:
            return False
        except (packet.Violation, OSError, VmbusError) as error:
            say(f"a connection was ended: {error}")
            self._dismiss(pending)
        return True

    def _take_greeting(self, pending: _Pending) -> None:
        greeting = packet.receive(pending.sock, _greetings)
        if greeting is None:
            self._dismiss(pending)
            return
        if greeting.role == "inlet":
            pending.inlet = True
            pending.timer.cancel()
            pending.timer = self._loop.after(DELIVERY_SECONDS, lambda: self._dismiss(pending))
            return
        if greeting.epoch <= self._epoch:
            raise packet.Violation(f"epoch {greeting.epoch} is not after {self._epoch}")
        self._release(pending)
        self._replace(pending.sock, greeting.epoch)

    def _take_delivery(self, pending: _Pending) -> None:
        received = handover.receive(pending.sock, _deliveries, max_fds=packet.MAX_FDS)
        self._dismiss(pending)
        if received is not None:
            delivery, fds = received
            self._files.add(delivery.slot, fds)

    def _release(self, pending: _Pending) -> None:
        pending.timer.cancel()
        self._pending.remove(pending)
        self._loop.forget(pending.sock.fileno())

    def _dismiss(self, pending: _Pending) -> None:
        if pending in self._pending:
            self._release(pending)
            pending.sock.close()

    # The control connection.

    def _replace(self, sock: socket.socket, epoch: int) -> None:
        self._hang_up()
        self._sock = sock
        self._epoch = epoch
        self._loop.watch(sock.fileno(), lambda _: self._control_ready())
        self._desk.attended(True)

    def _hang_up(self) -> None:
        if self._sock is not None:
            self._loop.forget(self._sock.fileno())
            self._sock.close()
            self._sock = None
            self._version = None
            self._sent = 0
            self._desk.attended(False)

    def _control_ready(self) -> None:
        sock = self._sock
        assert sock is not None
        try:
            received = handover.receive(sock, _requests, max_fds=packet.MAX_FDS)
            if received is None:
                self._hang_up()
                return
        except BlockingIOError:
            return
        except (packet.Violation, OSError) as error:
            self._end(sock, error)
            return
        try:
            self._dispatch(*received)
        except packet.Violation as error:
            self._end(sock, error)

    def _end(self, sock: socket.socket, why: Exception) -> None:
        say(f"the control connection was ended: {why}")
        if self._sock is sock:
            self._hang_up()

    def _dispatch(self, request: Request, fds: list[int]) -> None:
        """The one boundary at which a handler's error becomes a result. Raises Violation."""
        takes = _TAKES.get(type(request), 0)
        if len(fds) > takes:
            close(fds)
            raise packet.Violation(f"{len(fds)} file descriptors beside {type(request).__name__}")
        if self._version is None and not isinstance(request, Hello):
            close(fds)
            raise packet.Violation("the first request is not Hello")
        reply = Reply(self, self._epoch, request.id)
        try:
            self._carry_out(request, fds, reply)
        except VmbusError as error:
            reply.failed(error)
        except packet.Violation:
            raise
        except Exception as error:  # a bug of ours costs a request, not the guest
            say(f"{type(request).__name__}: {type(error).__name__}: {error}")
            reply.failed(VmbusError("Internal", "a bug in the worker; its log says more"))

    def _carry_out(self, request: Request, fds: list[int], reply: Reply) -> None:
        if isinstance(request, Hello):
            self._hello(request)
        elif isinstance(request, Ack):
            self._acknowledge(request.seq)
        elif self._version == 0 and isinstance(request, _BEYOND_LIFELINE):
            close(fds)
            raise VmbusError("Restricted", f"this worker speaks version {VERSION} of the protocol")
        elif isinstance(request, AddFile):
            self._files.add(request.slot, fds)
            reply.done()
        else:
            if isinstance(request, Configure | Attach | Media):
                self.collect_files()
            self._desk.handle(request, fds, reply)

    def _hello(self, request: Hello) -> None:
        if self._version is not None:
            raise packet.Violation("a second Hello")
        self._version = VERSION if VERSION in request.versions else 0
        self._send(
            Result(
                id=request.id,
                version=self._version,
                lifeline=LIFELINE,
                epoch=self._epoch,
                state=self._desk.state,
                reason=self._desk.reason,
            )
        )
        self.send_events()

    def _acknowledge(self, seq: int) -> None:
        if seq > self._events.last:
            raise packet.Violation(f"event {seq} is acknowledged and never was")
        self._events.acknowledge(seq)
        self._desk.acknowledged()
        self.send_events()

    def send_events(self) -> None:
        """Send what the window allows; called whenever an event was added."""
        if self._sock is None or self._version is None:
            return
        held = len(self._events)
        ahead = held - sum(1 for _ in self._events.after(self._sent))
        for event in list(self._events.after(self._sent))[: max(0, WINDOW - ahead)]:
            if not self._send(event):
                return
            self._sent = event.seq

    def answer(self, epoch: int, result: Result) -> None:
        """Send ``result`` if the connection that asked is still the one."""
        if epoch == self._epoch and self._sock is not None:
            self._send(result)

    def _send(self, message: msgspec.Struct) -> bool:
        if self._sock is None:
            return False
        try:
            packet.send(self._sock, message)
        except (
            OSError,
            packet.Violation,
        ) as error:  # it does not read, it is gone, or the message is too long
            say(f"the control connection was ended: {error}")
            self._hang_up()
            return False
        return True
