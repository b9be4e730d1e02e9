# SPDX-License-Identifier: Apache-2.0
"""A broker and workers that speak vmbus.wire and do as a test says: for what real ones do too seldom, too
late or never. They live in a thread of the test."""

from __future__ import annotations

import array
import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from vmbus.wire import broker, packet
from vmbus.wire import worker as wire

_broker_requests = msgspec.msgpack.Decoder(broker.Request)
_worker_requests = msgspec.msgpack.Decoder(wire.Request)

Refusal = tuple[str, str, str]  # kind, message, argument


class FakeWorker:
    """Answers as a worker whose guest obeys at once. ``obeys``: the guest heeds the power button."""

    def __init__(self, ended: Callable[[], None]) -> None:
        self.state: wire.State = "ready"
        self.version = 1
        self.obeys = True
        self.silent: set[str] = set()
        self.refuse: dict[str, Refusal] = {}
        self.files: dict[str, int] = {}
        self.asked: list[str] = []
        self.history = b"login: "
        self.balloon: dict[str, Any] | None = None
        self.touching = 0
        """The number of a Prefault that waits, if ``slow``."""
        self.slow = False
        self.heeds = True
        """Whether the guest gives back what it is asked for."""
        self.moving = 0
        """The number of a Send or Receive, which waits until a test says what becomes of it."""
        self.socket: socket.socket | None = None
        """The connection that came with it."""
        self.asked_last: wire.Request | None = None
        self.too_late = False
        """Whether a machine that moves cannot be kept from it any more."""
        self.console: socket.socket | None = None
        self.reason = ""
        self.events: list[wire.Event] = []
        self.memory = 0
        self._seq = 0
        self._ended = ended
        self._sock: socket.socket | None = None
        self._lock = threading.RLock()

    def connect(self) -> socket.socket:
        """A new control connection: the other end."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        before, self._sock = self._sock, ours
        if before is not None:
            with contextlib.suppress(OSError):
                before.shutdown(socket.SHUT_RDWR)
        threading.Thread(target=self._serve, args=(ours,), daemon=True).start()
        return theirs

    def say(self, message: msgspec.Struct) -> None:
        """Send anything."""
        if self._sock is not None:
            packet.send(self._sock, message)

    def say_bytes(self, data: bytes, fds: list[int] | None = None) -> None:
        """Send bytes that need be no message, and fds, as a worker must not."""
        assert self._sock is not None
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        self._sock.sendmsg([data], rights)

    def event(self, kind: Any, **fields: Any) -> None:
        """A numbered event."""
        with self._lock:
            self._seq += 1
            event = wire.Event(seq=self._seq, kind=kind, **fields)
            self.events.append(event)
            while True:
                try:
                    self.say(event)
                except BlockingIOError:
                    time.sleep(0.01)
                    continue
                except OSError:
                    pass  # it is sent again on the next connection
                return

    def enter(self, state: wire.State) -> None:
        """A new state."""
        self.state = state
        self.event("state", state=state)

    def end(self, reason: str, detail: str = "") -> None:
        """The guest is over."""
        self.state, self.reason = "ended", reason
        self.event("ended", state="ended", reason=reason, detail=detail)

    def moved(self, state: wire.State = "running", **stats: Any) -> None:
        """A machine that moves is where it should be: gone, or here and ``state``."""
        with self._lock:
            number, self.moving = self.moving, 0
            sent = isinstance(self.asked_last, wire.Send)
            if not sent:
                self.enter(state)
            self.say(wire.Result(id=number, stats=stats))
            if sent:
                self.end("migrated")

    def not_moved(self, kind: str, message: str = "no", argument: str = "") -> None:
        """It is not."""
        with self._lock:
            number, self.moving = self.moving, 0
            self.say(wire.Result(id=number, error=kind, message=message, argument=argument))
            if isinstance(self.asked_last, wire.Receive):
                self.end("error", message)

    def finish_touching(self) -> None:
        """A Prefault that waits is done."""
        with self._lock:
            number, self.touching = self.touching, 0
            self.say(wire.Result(id=number))

    def hang_up(self) -> None:
        """Close the control connection, without ending."""
        assert self._sock is not None
        self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close everything."""
        if self._sock is not None:
            self._sock.close()
            self._sock = None
        for fd in self.files.values():
            os.close(fd)
        self.files = {}
        for sock in (self.console, self.socket):
            if sock is not None:
                sock.close()
        self.console = self.socket = None

    def _serve(self, sock: socket.socket) -> None:
        while True:
            try:
                sock.settimeout(None)
                data, fds, _, _ = socket.recv_fds(sock, packet.LIMIT, 4)
            except OSError:
                return
            if not data:
                sock.close()
                return
            with self._lock:
                self._take(_worker_requests.decode(data), fds)

    def _take(self, request: wire.Request, fds: list[int]) -> None:
        tag = type(request).__struct_config__.tag
        assert isinstance(tag, str)
        self.asked.append(tag)
        if isinstance(request, wire.Ack):
            self.events = [event for event in self.events if event.seq > request.seq]
            if self.state == "ended" and not any(event.kind == "ended" for event in self.events):
                self._ended()
            return
        if tag in self.silent:
            return
        if tag in self.refuse:
            kind, message, argument = self.refuse[tag]
            self.say(wire.Result(id=request.id, error=kind, message=message, argument=argument))
            return
        if isinstance(request, wire.Hello):
            fields: dict[str, Any] = {
                "version": self.version,
                "lifeline": 1,
                "state": self.state,
                "reason": self.reason,
            }
            self.say(wire.Result(id=request.id, **fields))
            for event in self.events:
                self.say(event)
            return
        if isinstance(request, wire.AddFile):
            self.files[request.slot] = fds[0]
        if isinstance(request, wire.Console):
            self.console = socket.socket(fileno=fds[0])
            self.console.send(self.history)
        if isinstance(request, wire.Send | wire.Receive):
            self.moving, self.socket, self.asked_last = request.id, socket.socket(fileno=fds[0]), request
            return
        if isinstance(request, wire.CancelSave) and self.moving and not self.too_late:
            self.not_moved("Cancelled", "stopped")
        if isinstance(request, wire.Prefault) and self.slow:
            self.touching = request.id
            return
        if isinstance(request, wire.CancelPrefault) and self.touching:
            self.say(wire.Result(id=self.touching, error="Cancelled", message="stopped"))
            self.touching = 0
        stats: dict[str, Any] = {}
        if isinstance(request, wire.Stats):
            stats = {"vcpus": {"exits": 7}, "odd": None, "devices": {"balloon": self.balloon}}
            stats["memory"] = {"prefaulted": self.memory // 2}
            if self.moving:
                stats["migration"] = {"total": self.memory, "sent": 1000, "remaining": 500, "odd": [1]}
        self.say(wire.Result(id=request.id, stats=stats))
        self._act(request)

    def _act(self, request: wire.Request) -> None:
        if isinstance(request, wire.Configure):
            self.memory = request.definition.memory
            self.balloon = {"target": self.memory, "ballooned": 0, "reported": 0}
            self.enter("configured")
        elif isinstance(request, wire.Run | wire.Resume):
            self.enter("running")
        elif isinstance(request, wire.Pause):
            self.enter("paused")
        elif isinstance(request, wire.Reset):
            self.event("reset")
        elif isinstance(request, wire.MemoryTarget) and self.balloon is not None:
            self.balloon["target"] = request.bytes
            if self.heeds:
                self.balloon["ballooned"] = self.memory - request.bytes
        elif isinstance(request, wire.Stop):
            self.end("stopped")
        elif isinstance(request, wire.Shutdown) and self.obeys:
            self.end("guest-poweroff")


class FakeBroker:
    """Listens at ``path``. ``refuse`` maps an operation to an error; ``silent`` holds those that it
    never answers, ``lingering`` the machines whose workers do not go, whatever ends them; ``make_worker``
    changes a worker before it is handed out."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.workers: dict[str, FakeWorker] = {}
        self.owners: dict[str, int] = {}
        self.refuse: dict[str, Refusal] = {}
        self.silent: set[str] = set()
        self.asked: list[Any] = []
        self.stuck: set[str] = set()
        self.lingering: set[str] = set()
        self.make_worker: Callable[[FakeWorker], None] = lambda worker: None
        # Opened now: while a test connects as another user, this process may not look at its own memory.
        names = ("smaps_rollup", "smaps", "ksm_stat")
        self._figures = [os.open(f"/proc/self/{name}", os.O_RDONLY) for name in names]
        self._listener: socket.socket | None = None
        self._peer: socket.socket | None = None

    def start(self) -> None:
        """Listen and serve."""
        self.path.parent.mkdir(exist_ok=True, mode=0o755)
        self.path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(str(self.path))
        self.path.chmod(0o666)
        self._listener.listen(8)
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def stop(self) -> None:
        """Go away; workers live on."""
        self.path.unlink(missing_ok=True)
        for sock in (self._listener, self._peer):
            if sock is not None:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
                sock.close()
        self._listener = self._peer = None

    def close(self) -> None:
        """End everything."""
        self.stop()
        for worker in self.workers.values():
            worker.close()
        for fd in self._figures:
            os.close(fd)
        self._figures = []

    def reset(self) -> None:
        """Behave again."""
        self.refuse, self.silent, self.stuck, self.lingering = {}, set(), set(), set()
        self.make_worker = lambda worker: None
        self.asked = []

    def ended(self, uuid: str) -> None:
        """The worker's process is gone."""
        worker = None if uuid in self.lingering else self.workers.pop(uuid, None)
        if worker is not None:
            worker.close()
            self._say(broker.Ended(uuid=uuid))

    def _say(self, message: msgspec.Struct, fds: list[int] | None = None) -> None:
        if self._peer is not None:
            with contextlib.suppress(OSError):
                packet.send(self._peer, message, fds)

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                peer, _ = listener.accept()
            except OSError:
                return
            self._peer = peer
            threading.Thread(target=self._serve, args=(peer,), daemon=True).start()

    def _serve(self, peer: socket.socket) -> None:
        while True:
            try:
                data = peer.recv(packet.LIMIT)
            except OSError:
                return
            if not data:
                return
            request = _broker_requests.decode(data)
            tag = type(request).__struct_config__.tag
            assert isinstance(tag, str)
            self.asked.append(request)
            if tag in self.silent:
                continue
            if tag in self.refuse:
                kind, message, argument = self.refuse[tag]
                self._say(broker.Reply(id=request.id, error=kind, message=message, argument=argument))
                continue
            self._take(request)

    def _take(self, request: Any) -> None:
        fields: dict[str, Any] = {}
        fds: list[int] = []
        opened: list[Any] = []
        worker = self.workers.get(getattr(request, "uuid", ""))
        match request:
            case broker.Hello():
                fields = {"version": 1, "instance": "fake", "notes": ["nothing here is real"]}
            case broker.Own():
                self.owners[request.uuid] = request.uid
            case broker.Disown():
                self.owners.pop(request.uuid, None)
            case broker.Spawn() | broker.Connect():
                if isinstance(request, broker.Spawn):
                    uuid = request.uuid
                    worker = self.workers[uuid] = FakeWorker(lambda: self.ended(uuid))
                    self.make_worker(worker)
                    fields["workers"] = [broker.WorkerInfo(uuid, 4242)]
                if worker is None:
                    fields = {"error": "InvalidState", "message": "no worker"}
                else:
                    opened = [worker.connect()]
                    fds = [opened[0].fileno(), *self._figures]
            case broker.Open():
                if os.path.exists(request.path):
                    found = os.stat(request.path)
                    fields["identity"] = broker.Identity(
                        found.st_dev, found.st_ino, found.st_rdev, found.st_mode, found.st_size
                    )
                else:
                    fields = {
                        "error": "NotFound",
                        "message": f"'{request.path}' does not exist",
                        "argument": "path",
                    }
            case broker.Kill():
                if worker is None:
                    fields = {"error": "InvalidState", "message": "no worker"}
            case broker.Workers():
                fields["workers"] = [broker.WorkerInfo(uuid, 4242) for uuid in self.workers]
        self._say(broker.Reply(id=request.id, **fields), fds)
        for file in opened:
            file.close()
        if isinstance(request, broker.Kill) and worker is not None:
            if request.uuid in self.stuck:
                self._say(broker.Ended(uuid=request.uuid, stuck=True))
            else:
                self.ended(request.uuid)


def eventually(condition: Callable[[], bool], within: float = 10) -> bool:
    """Whether ``condition`` comes true in time."""
    deadline = time.monotonic() + within
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True
