# SPDX-License-Identifier: Apache-2.0
"""The lifeline's recorded transcript: its format, how it is replayed, how it was recorded.

The lifeline (vmbus/wire/worker.py) is frozen: a worker that runs for a year must understand the service
that is installed then. So what crossed the socket once is kept as bytes, and every worker must still
answer it.

    guest MODE          a new worker with this guest, running, its events stored by an earlier service
    connect             a new connection; what follows happens on it
    > HEX               a datagram to the worker          >fd HEX: with one end of a socket pair beside it
    < HEX               a datagram from it

A replay sends the bytes as they are, except that an acknowledgement gets the number that the replayed
worker gave to the event. Of what comes, every recorded field must be there with its value; further
fields, and events that depend on time (console), may be there too: that is how the protocol may grow.
``python -m tests.local.worker_lifeline`` records anew, which is right only when the lifeline gets a
second version.
"""

from __future__ import annotations

import socket
import sys
import time
from pathlib import Path
from typing import Any

import msgspec

from tests.local.worker_guest import Guest
from vmbus.wire import packet
from vmbus.wire.inlet import Greeting
from vmbus.wire.worker import Ack, Console, Hello, Pause, Reset, Resume, Shutdown, Stats, Stop

TRANSCRIPT = Path(__file__).with_name("worker_lifeline.transcript")
SECONDS = 15.0


def lines() -> list[tuple[str, str]]:
    """The transcript without its comments, as (word, rest)."""
    text = TRANSCRIPT.read_text().splitlines()
    parts = (line.partition(" ") for line in text if line and not line.startswith("#"))
    return [(word, rest) for word, _, rest in parts]


def decoded(datagram: bytes) -> dict[str, Any]:
    return msgspec.msgpack.decode(datagram, type=dict[str, Any])


class Replay:
    """Plays the transcript's lines to workers of today."""

    def __init__(self) -> None:
        self._guest: Guest | None = None
        self._sock: socket.socket | None = None
        self._numbers: dict[int, int] = {}  # recorded number of an event: its number now
        self._came: list[dict[str, Any]] = []
        self._pairs: list[socket.socket] = []

    def close(self) -> None:
        if self._guest is not None:
            self._guest.worker.close()
            self._guest.console.close()
            self._guest = None

    def play(self, word: str, rest: str) -> None:
        """One line. Raises AssertionError or TimeoutError if the worker does not keep to it."""
        if word == "guest":
            self.close()
            self._guest = prepared(rest)
        elif word == "connect":
            assert self._guest is not None
            self._sock = self._guest.worker.connect()
            self._came.clear()
        elif word == "ended":
            assert self._guest is not None
            assert self._guest.worker.wait() == 0
        elif word == "<":
            self._expect(decoded(bytes.fromhex(rest)))
        else:
            self._send(bytes.fromhex(rest), with_fd=word == ">fd")

    def _send(self, datagram: bytes, *, with_fd: bool) -> None:
        assert self._sock is not None
        message = decoded(datagram)
        if message["op"] == "ack":
            message["seq"] = self._numbers[message["seq"]]
            datagram = msgspec.msgpack.encode(message)
        if with_fd:
            ours, theirs = socket.socketpair()
            self._pairs.append(ours)
            socket.send_fds(self._sock, [datagram], [theirs.fileno()])
            theirs.close()
        else:
            self._sock.send(datagram)

    def _expect(self, recorded: dict[str, Any]) -> None:
        deadline = time.monotonic() + SECONDS
        assert self._sock is not None
        while True:
            for message in self._came:
                if fits(message, recorded):
                    if recorded["op"] == "event":
                        self._numbers[recorded["seq"]] = message["seq"]
                    self._came.remove(message)
                    return
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"{recorded} did not come; {self._came} did")
            self._sock.settimeout(left)
            self._came.append(decoded(self._sock.recv(packet.LIMIT)))


def fits(message: dict[str, Any], recorded: dict[str, Any]) -> bool:
    """Whether ``message`` says all that was recorded.

    An event's number is another each time, and sentences for people may be put better.
    """
    free = ("seq", "message", "detail")
    return all(key in free or message.get(key) == value for key, value in recorded.items())


def prepared(mode: str) -> Guest:
    """A running guest whose first events were stored."""
    guest = Guest(mode)
    guest.start()
    guest.service.event("state", state="running")
    guest.service.acknowledge()
    guest.console.close()
    guest.service.do(Stats)
    return guest


class _Recorder:
    def __init__(self) -> None:
        self.text: list[str] = ["# SPDX-License-Identifier: Apache-2.0", "# See worker_lifeline.py."]

    def guest(self, mode: str) -> None:
        self._guest = prepared(mode)
        self._epoch = 1
        self.text += ["", f"guest {mode}"]

    def connect(self) -> None:
        self._sock = self._guest.worker.connect()
        self._epoch += 1
        self.text.append("connect")
        self.send(Greeting(role="control", epoch=self._epoch))
        self.send(Hello(id=1, versions=[1]))

    def send(self, message: msgspec.Struct, *, with_fd: bool = False) -> None:
        data = msgspec.msgpack.encode(message)
        if with_fd:
            socket.send_fds(self._sock, [data], [socket.socketpair()[0].detach()])
        else:
            self._sock.send(data)
        self.text.append(f"{'>fd' if with_fd else '>'} {data.hex()}")

    def receive(self, count: int) -> dict[str, Any]:
        message: dict[str, Any] = {}
        while count:
            data = self._sock.recv(packet.LIMIT)
            if decoded(data).get("kind") == "console":
                continue
            message = decoded(data)
            self.text.append(f"< {data.hex()}")
            count -= 1
        return message

    def end(self) -> None:
        assert self._guest.worker.wait() == 0
        self.text.append("ended")
        self._guest.worker.close()


def record() -> str:
    """A new transcript."""
    recorder = _Recorder()
    recorder.guest("wait-power-button")
    recorder.connect()
    recorder.receive(1)
    recorder.send(Console(id=2, write=True), with_fd=True)
    recorder.receive(1)
    recorder.send(Console(id=3, write=True), with_fd=True)
    recorder.receive(1)
    recorder.send(Console(id=4, write=True, steal=True), with_fd=True)
    recorder.receive(1)
    for request in (Pause(id=5), Resume(id=6), Reset(id=7)):
        recorder.send(request)
        recorder.receive(2)
    recorder.connect()
    recorder.receive(4)
    recorder.send(Shutdown(id=2))
    recorder.receive(2)
    recorder.connect()
    event = recorder.receive(5)
    recorder.send(Ack(id=2, seq=event["seq"]))
    recorder.end()

    recorder.guest("idle")
    recorder.connect()
    recorder.receive(1)
    recorder.send(Resume(id=2))
    recorder.receive(1)
    recorder.send(Stop(id=3))
    event = recorder.receive(2)
    recorder.send(Ack(id=4, seq=event["seq"]))
    recorder.end()
    return "\n".join(recorder.text) + "\n"


if __name__ == "__main__":
    sys.stdout.write(record())
