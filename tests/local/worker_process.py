# SPDX-License-Identifier: Apache-2.0
"""A real worker process for tests, with both of its peers: the broker that starts it, the service that asks.

It has everything of the worker but what only root's spawn child gives it (namespaces, an empty root, a uid of
its own): the startup line, the rings, Landlock, the filters, the control socket.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import msgspec

from vmbus.wire import packet, startup
from vmbus.wire.inlet import Delivery, Greeting
from vmbus.wire.worker import Ack, Answer, Event, Hello, Request, Result

SECONDS = 10.0
_answers = msgspec.msgpack.Decoder(Answer)


class WorkerProcess:
    """A worker, started and closed; ``with`` ends it whatever happened."""

    def __init__(
        self,
        *,
        program: Sequence[str] = ("-m", "vmbus.worker.main"),
        kvm: str = "/dev/null",
        rings: int = 2,
        profile: Literal["plain", "vfio"] = "plain",
        expect_empty_root: bool = False,
        line: bytes | None = None,
    ) -> None:
        """``line`` replaces the startup line; ``program`` is what the interpreter runs."""
        self.directory = tempfile.mkdtemp(prefix="vmbus-worker-")
        self.path = os.path.join(self.directory, "socket")
        self.epoch = 0
        self._opened: list[socket.socket] = []
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listener.bind(self.path)
        listener.listen(64)
        kvm_fd = os.open(kvm, os.O_RDWR | os.O_CLOEXEC)
        status, status_write = os.pipe()
        orders = startup.Startup(
            listen=listener.fileno(),
            kvm=kvm_fd,
            status=status_write,
            rings=rings,
            profile=profile,
            expect_empty_root=expect_empty_root,
        )
        with tempfile.TemporaryFile() as log:
            self._log = os.dup(log.fileno())
        self.process = subprocess.Popen(
            [sys.executable, "-I", *program],
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=self._log,
            pass_fds=(listener.fileno(), kvm_fd, status_write),
            env={},
            cwd="/",
        )
        assert self.process.stdin is not None
        self.process.stdin.write(startup.encode(orders) if line is None else line)
        self.process.stdin.close()
        listener.close()
        os.close(kvm_fd)
        os.close(status_write)
        self.said = os.read(status, 64)
        os.close(status)

    @property
    def pid(self) -> int:
        return self.process.pid

    def log(self) -> str:
        """What it has written to stderr."""
        return os.pread(self._log, 1 << 20, 0).decode()

    def status(self, field: str) -> str:
        """A field of /proc/PID/status."""
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith(field + ":"))

    def wait(self, seconds: float = SECONDS) -> int:
        """Its exit code, negative for a signal."""
        return self.process.wait(seconds)

    def connect(self) -> socket.socket:
        """A connection that has said nothing yet."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sock.settimeout(SECONDS)
        sock.connect(self.path)
        self._opened.append(sock)
        return sock

    def control(self, *, epoch: int | None = None, hello: bool = True) -> Service:
        """A control connection, as the service gets it from the broker; by default the next epoch."""
        self.epoch = self.epoch + 1 if epoch is None else epoch
        sock = self.connect()
        packet.send(sock, Greeting(role="control", epoch=self.epoch))
        service = Service(sock)
        if hello:
            service.welcome = service.ask(Hello(id=0, versions=[1]))
        return service

    def deliver(self, slot: str, *fds: int) -> None:
        """A file for ``slot``, as the opening child sends it; the fds are closed here."""
        sock = self.connect()
        packet.send(sock, Greeting(role="inlet"))
        packet.send(sock, Delivery(slot=slot), list(fds))
        sock.close()
        for fd in fds:
            os.close(fd)

    def deliver_path(self, slot: str, path: str | Path, *, writable: bool = False) -> None:
        """As ``deliver``, for a file of this machine's."""
        self.deliver(slot, os.open(path, os.O_RDWR if writable else os.O_RDONLY))

    def close(self) -> None:
        for sock in self._opened:
            sock.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._log)
        shutil.rmtree(self.directory)

    def __enter__(self) -> WorkerProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            sys.stderr.write(f"--- worker's log\n{self.log()}---\n")
        self.close()


class Service:
    """The service's side of a control connection."""

    welcome: Result

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.events: list[Event] = []
        self._results: dict[int, Result] = {}
        self._id = 100

    def send(self, request: Request, *fds: int) -> None:
        """Send without waiting for the result; the fds are closed here."""
        try:
            packet.send(self.sock, request, list(fds))
        finally:
            for fd in fds:
                os.close(fd)

    def ask(self, request: Request, *fds: int) -> Result:
        """Send and wait for the result; events that come before it are kept."""
        self.send(request, *fds)
        return self.result(request.id)

    def result(self, request: int, seconds: float = SECONDS) -> Result:
        """The result of an earlier request."""
        deadline = time.monotonic() + seconds
        while request not in self._results:
            self._read(deadline)
        return self._results.pop(request)

    def do(self, request: type, *fds: int, **fields: Any) -> Result:
        """``ask`` with an id of its own."""
        self._id += 1
        return self.ask(request(id=self._id, **fields), *fds)

    def event(self, kind: str, seconds: float = SECONDS, **fields: Any) -> Event:
        """The first event of ``kind`` with these fields that has come or comes."""
        deadline = time.monotonic() + seconds
        while True:
            for event in self.events:
                if event.kind == kind and all(getattr(event, key) == value for key, value in fields.items()):
                    return event
            self._read(deadline)

    def acknowledge(self) -> None:
        """All events that have come are stored."""
        self.send(Ack(id=1, seq=self.events[-1].seq))

    def _read(self, deadline: float) -> None:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError(f"nothing in time; events so far: {self.events}")
        self.sock.settimeout(left)
        data = self.sock.recv(packet.LIMIT + 1)
        if not data:
            raise ConnectionResetError("the worker ended the connection")
        message = _answers.decode(data)
        if isinstance(message, Event):
            self.events.append(message)
        else:
            self._results[message.id] = message

    def ended(self, seconds: float = SECONDS) -> bool:
        """Whether the worker ends this connection within ``seconds``."""
        try:
            while True:
                self._read(time.monotonic() + seconds)
        except ConnectionResetError:
            return True
        except TimeoutError:
            return False
