# SPDX-License-Identifier: Apache-2.0
"""A real vmbus-broker for one test, with users of its own and a worker made for the test.

The broker runs as root from a copy of ``vmbus`` in which ``worker/main.py`` is ``broker_worker.py`` (a worker
that answers questions about itself), in a mount namespace where /etc/passwd and /etc/group have the test's
users. The test is the service: it connects with the service's uid.
"""

from __future__ import annotations

import array
import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec

import vmbus
from tests.lab import rules
from vmbus.wire import broker as wire
from vmbus.wire import packet

SERVICE = 61001  # uid and gid of the service's user
ALICE, BOB = 61010, 61011
UID_COUNT = 64
MIB = 1 << 20
HERE = Path(__file__).parent

POLICY = f"""
[open]
[[open.grant]]
users = ["alice", "bob"]
prefixes = ["{{home}}"]
[[open.grant]]
groups = ["pool"]
prefixes = ["@/pool"]
[quota]
memory = "1G"
vcpus = 8
machines = 4
hugepages = "64M"
[[quota.for]]
groups = ["pool"]
memory = "2G"
[bridges.vmbt0]
users = ["alice"]
[interfaces.vmbt3]
users = ["alice"]
[interfaces.vmbt6]
users = ["alice"]
[user-network]
users = ["alice"]
[workers]
uid_first = UID_FIRST
uid_count = {UID_COUNT}
[owners]
uid_min = 1000
"""


def new_uuid() -> str:
    """A machine's uuid."""
    return str(uuid.uuid4())


def wait_until(true: Callable[[], bool], seconds: float = 10) -> None:
    """Look every 10 ms; fail after ``seconds``."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.01)


class Client:
    """The service's end of the socket."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._answers = msgspec.msgpack.Decoder(wire.Answer)
        self._id = 0
        self.ended: list[wire.Ended] = []
        self._replies: dict[int, tuple[wire.Reply, list[int]]] = {}

    def post(self, what: type[Any], /, **fields: Any) -> int:
        """Send a request without waiting for its reply."""
        self._id += 1
        self.sock.settimeout(20)
        self.sock.send(msgspec.msgpack.encode(what(id=self._id, **fields)))
        return self._id

    def _take(self, seconds: float) -> bool:
        self.sock.settimeout(seconds)
        data, ancillary, _, _ = self.sock.recvmsg(1 << 17, socket.CMSG_SPACE(64))
        if not data:
            raise EOFError
        fds: list[int] = []
        for _level, _kind, payload in ancillary:
            fds.extend(array.array("i", payload))
        answer = self._answers.decode(data)
        if isinstance(answer, wire.Ended):
            self.ended.append(answer)
        else:
            self._replies[answer.id] = (answer, fds)
        return True

    def reply(self, number: int, seconds: float = 20) -> tuple[wire.Reply, list[int]]:
        """The reply to request ``number`` and its fds."""
        end = time.monotonic() + seconds
        while number not in self._replies:
            self._take(max(0.01, end - time.monotonic()))
        return self._replies.pop(number)

    def ask(self, what: type[Any], /, **fields: Any) -> wire.Reply:
        """Send a request, wait, close what came with the reply."""
        reply, fds = self.reply(self.post(what, **fields))
        for fd in fds:
            os.close(fd)
        return reply

    def wait_ended(self, machine: str, *, stuck: bool = False, seconds: float = 10) -> None:
        """Until the broker says that the worker of ``machine`` ended."""
        wanted = wire.Ended(uuid=machine, stuck=stuck)
        end = time.monotonic() + seconds
        while wanted not in self.ended:
            self._take(max(0.01, end - time.monotonic()))

    def close(self) -> None:
        """Hang up."""
        self.sock.close()


class Machine:
    """A spawned worker: the control connection, its process, its figures."""

    def __init__(self, client: Client, name: str, fds: list[int]) -> None:
        self.client, self.uuid = client, name
        self.control = socket.socket(fileno=fds[0])
        self.figures = fds[1:]
        self.pid = next(w.pid for w in client.ask(wire.Workers).workers if w.uuid == name)

    def ask(self, **question: Any) -> Any:
        """Ask the test's worker; see broker_worker.py."""
        self.control.settimeout(20)
        self.control.send(msgspec.msgpack.encode(question))
        return msgspec.msgpack.decode(self.control.recv(1 << 17))

    def open(self, path: Path | str, slot: str = "disk/a/0", *, writable: bool = False) -> wire.Reply:
        """Let the broker open ``path`` for it."""
        return self.client.ask(wire.Open, uuid=self.uuid, slot=slot, path=str(path), writable=writable)

    def close(self) -> None:
        """Close what this end holds."""
        self.control.close()
        for fd in self.figures:
            os.close(fd)
        self.figures = []


class Bed:
    """Directories, users, and the broker."""

    def __init__(
        self,
        *,
        worker: str = "answers",
        spares: int = 0,
        cgroup: Path | None = None,
        import_deadline: float = 60,
    ) -> None:
        """``worker``: a KIND of broker_worker.py, or "real"; ``import_deadline``: seconds."""
        self.place = Path(tempfile.mkdtemp(prefix="vmbus-broker-"))
        self.place.chmod(0o755)
        self.run, self.state = self.place / "run", self.place / "state"
        self.home = self.place / "home"
        self.spares, self.cgroup = spares, cgroup
        self.instance = self.place.name[-8:].replace("_", "x")
        self.log = self.place / "log"
        self.command = [sys.executable, "-m", "vmbus.broker.main"]
        self.process: subprocess.Popen[bytes] | None = None
        self.uid_first = 2_100_000_000 + secrets.randbelow(1 << 20) * UID_COUNT
        self._users()
        self.config = self.place / "broker.toml"
        self.config.write_text(POLICY.replace("@", str(self.place)).replace("UID_FIRST", str(self.uid_first)))
        self._code(worker)
        if import_deadline != 60:
            spawn = self.code / "vmbus/broker/spawn.py"
            text = spawn.read_text()
            assert "\nIMPORT_DEADLINE = 60.0" in text
            spawn.write_text(text.replace("IMPORT_DEADLINE = 60.0", f"IMPORT_DEADLINE = {import_deadline}"))

    def _users(self) -> None:
        accounts = Path("/etc/passwd").read_text()
        groups = Path("/etc/group").read_text()
        for name, uid in (("vmbus-test", SERVICE), ("alice", ALICE), ("bob", BOB)):
            home = self.home / name
            home.mkdir(parents=True)
            home.chmod(0o700)
            os.chown(home, uid, uid)
            accounts += f"{name}:x:{uid}:{uid}::{home}:/bin/false\n"
            groups += f"{name}:x:{uid}:\n"
        pool = self.place / "pool"
        pool.mkdir()
        pool.chmod(0o770)
        os.chown(pool, 0, 61020)
        (self.place / "passwd").write_text(accounts)
        (self.place / "group").write_text(f"{groups}pool:x:61020:alice\n")
        self.pool = pool

    def _code(self, worker: str) -> None:
        """The code to run: vmbus with the test's worker, or ("real") vmbus as it is."""
        source = Path(vmbus.__file__).parent
        self.code = source.parent
        if worker == "real":
            return
        self.code = self.place / "code"
        target = self.place / "code/vmbus"
        (target / "worker").mkdir(parents=True)
        shutil.copy(source / "__init__.py", target)
        for part in ("wire", "broker"):
            shutil.copytree(source / part, target / part, ignore=shutil.ignore_patterns("__pycache__"))
        (target / "worker/__init__.py").write_text("")
        text = (HERE / "broker_worker.py").read_text()
        (target / "worker/main.py").write_text(text.replace('KIND = "answers"', f"KIND = {worker!r}"))

    def start(self, *, seconds: float = 20) -> None:
        """Start the broker and wait until it is ready."""
        options: list[str | Path] = ["--instance", self.instance, "--run-dir", self.run]
        options += ["--state-dir", self.state, "--config", self.config, "--service-user", "vmbus-test"]
        options += ["--spares", str(self.spares), "--cgroup", self.cgroup or self.place / "no-cgroup"]
        binds = 'mount --bind "$0/passwd" /etc/passwd && mount --bind "$0/group" /etc/group && exec "$@"'
        already = self.said("ready")
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                ["unshare", "-m", "sh", "-c", binds, self.place, *self.command, *options],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={"PATH": os.environ["PATH"], "PYTHONPATH": str(self.code)},
                cwd="/",
            )
        end = time.monotonic() + seconds
        while self.said("ready") == already:
            if self.process.poll() is not None or time.monotonic() > end:
                raise AssertionError(f"the broker is not ready:\n{self.log.read_text()}")
            time.sleep(0.01)

    def said(self, word: str) -> int:
        """How many lines of the log have ``word``."""
        return sum(word in line for line in self.log.read_text().splitlines()) if self.log.exists() else 0

    def connect(self, uid: int = SERVICE, *, hello: bool = True) -> Client:
        """A connection as ``uid``."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        os.setegid(SERVICE)
        os.seteuid(uid)
        try:
            sock.connect(str(self.run / "broker/socket"))
        finally:
            os.seteuid(0)
            os.setegid(0)
        client = Client(sock)
        if hello:
            assert client.ask(wire.Hello, versions=[1]).error is None
        return client

    def machine(
        self,
        client: Client,
        *,
        owner: int = ALICE,
        memory: int = 64 * MIB,
        vcpus: int = 1,
        name: str = "",
        **more: Any,
    ) -> Machine:
        """Own and spawn; ``more`` are further fields of Spawn."""
        name = name or new_uuid()
        reply = client.ask(wire.Own, uuid=name, uid=owner)
        assert reply.error is None, reply
        reply, fds = client.reply(client.post(wire.Spawn, uuid=name, memory=memory, vcpus=vcpus, **more))
        assert reply.error is None, (reply, self.log.read_text())
        return Machine(client, name, fds)

    def file(self, name: str, data: bytes = b"data", *, owner: int = ALICE, mode: int = 0o600) -> Path:
        """A file in the owner's home."""
        path = self.home / {ALICE: "alice", BOB: "bob"}[owner] / name
        path.write_bytes(data)
        os.chown(path, owner, owner)
        path.chmod(mode)
        return path

    def stop(self, *, kill: bool = False) -> None:
        """End the broker; workers go on."""
        if self.process is not None:
            self.process.kill() if kill else self.process.terminate()
            self.process.wait(20)
            self.process = None

    def worker_pids(self) -> list[int]:
        """Processes whose real uid is in the range."""
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError, ValueError, StopIteration):
                lines = (entry / "status").read_text().splitlines()
                uid = int(next(line for line in lines if line.startswith("Uid:")).split()[1])
                if self.uid_first <= uid < self.uid_first + UID_COUNT and not any(
                    "State:\tZ" in line for line in lines
                ):
                    found.append(int(entry.name))
        return found

    def close(self) -> None:
        """End everything and remove it."""
        self.stop()
        for pid in self.worker_pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, 9)
        end = time.monotonic() + 10
        while self.worker_pids() and time.monotonic() < end:
            time.sleep(0.02)
        shutil.rmtree(self.place)
        rules.delete(self.instance)


@contextlib.contextmanager
def broker(**options: Any) -> Iterator[Bed]:
    """A started bed."""
    bed = Bed(**options)
    try:
        bed.start()
        yield bed
    finally:
        print(bed.log.read_text())  # pytest shows it with a failure
        bed.close()


def send_with_fds(client: Client, message: msgspec.Struct, fds: list[int]) -> None:
    """A request with descriptors attached, as a hostile service would."""
    packet.send(client.sock, message, fds)
