# SPDX-License-Identifier: Apache-2.0
"""A whole vmbus on this machine, beside any other: bus, polkitd, broker, service, and users who call it.

    with System() as system:
        system.vmbusctl("vmbus-alice", "list").stdout
        system.service.kill(); system.service.start()          # kill -9, start again
        system.rule('polkit.addRule(function(action, subject) {…});')
        before = system.counts(); …; assert system.counts() == before

Everything is real: dbus-daemon with its installed configuration and the checkout's policy, polkitd,
``vmbus-broker`` as root, ``vmbusd`` as user vmbus with no capability. They live in a mount namespace of
their own (tests/lab/stage.py), in which the bus is at its usual address; from outside it is at
``bus_address``. All state is below ``place``, a fresh directory; users' own files go to ``files(user)``,
which broker.toml grants. Each system takes a slot, which gives it a range of worker uids and an instance
name, so that any number run at once, here and in the nested host.

Deadlines are multiplied by six in the nested host (VMBUS_LAB=nested), whose processors are emulated.
"""

from __future__ import annotations

import fcntl
import json
import os
import pwd
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from tests.lab import rules
from tests.lab.daemon import Daemon, NotReady
from tests.lab.kernels import CACHE, CHECKOUT

NESTED: Final = os.environ.get("VMBUS_LAB") == "nested"
SLOW: Final = 6 if NESTED else 1
ALICE: Final = "vmbus-alice"
BOB: Final = "vmbus-bob"
PROGRAMS: Final = Path(sys.executable).parent
CGROUP_ROOT: Final = Path("/sys/fs/cgroup")
SLOTS: Final = Path("/tmp/.vmbus-lab-slots")
UID_FIRST: Final = 2_100_000_000
UID_COUNT: Final = 4096

POLICY: Final = """\
[workers]
uid_first = {uid_first}
uid_count = {uid_count}

[[open.grant]]
users = ["*"]
prefixes = ["{place}/files/{{user}}", "{cache}"]
"""

LIVE: Final[list[System]] = []
"""The systems that run, for whoever reports a failure."""


class System:
    """One instance of vmbus. A context manager; ``start`` and ``close`` may also be called alone.

    ``policy`` is appended to broker.toml, ``config`` is vmbusd.toml. ``parts`` says how far ``start`` goes:
    "bus" (with polkitd), "broker" or "service" (all). ``firmware`` is where the packages of firmware are.
    Raises NotReady from ``start``, with logs.
    """

    def __init__(
        self,
        *,
        policy: str = "",
        config: str = "",
        parts: str = "service",
        bus_name: str = "org.vmbus1",
        firmware: Path = Path("/"),
    ) -> None:
        self._parts = parts
        self._firmware = firmware
        self._take_slot()
        self.place = Path(tempfile.mkdtemp(prefix="vmbus-"))
        self.instance = f"lab{self._slot}"
        self.uids = range(UID_FIRST + self._slot * UID_COUNT, UID_FIRST + (self._slot + 1) * UID_COUNT)
        self.bus_name = bus_name
        self._stage: subprocess.Popen[str] | None = None
        self._rules = 0
        self._lay_out(policy)
        self.vmbusd_toml.write_text(config)

    def _take_slot(self) -> None:
        SLOTS.mkdir(exist_ok=True, mode=0o755)
        for slot in range(128):
            claim = os.open(SLOTS / str(slot), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(claim)
                continue
            self._slot, self._claim = slot, claim
            return
        raise NotReady("128 systems run on this machine already")

    def _lay_out(self, policy: str) -> None:
        service = pwd.getpwnam("vmbus")
        self.place.chmod(0o755)
        for name in ("bus", "rules", "files", "log", "run", "stage"):
            (self.place / name).mkdir(mode=0o755)
        for name, uid, gid in (
            ("state", service.pw_uid, service.pw_gid),
            ("run/service", service.pw_uid, service.pw_gid),
            ("state-broker", 0, 0),
        ):
            (self.place / name).mkdir(mode=0o700)
            os.chown(self.place / name, uid, gid)
        for user in (ALICE, BOB):
            account = pwd.getpwnam(user)
            own = self.place / "files" / user
            own.mkdir(mode=0o700)
            os.chown(own, account.pw_uid, account.pw_gid)
        general = POLICY.format(
            uid_first=self.uids.start, uid_count=len(self.uids), place=self.place, cache=CACHE
        )
        self.broker_toml.write_text(general + policy)
        self.broker_toml.chmod(0o644)

    # -- places

    @property
    def run_dir(self) -> Path:
        """--run-dir of broker and service."""
        return self.place / "run"

    @property
    def broker_toml(self) -> Path:
        """The broker's policy."""
        return self.place / "broker.toml"

    @property
    def vmbusd_toml(self) -> Path:
        """What the service shall do by itself."""
        return self.place / "vmbusd.toml"

    @property
    def bus_address(self) -> str:
        """The bus as seen from outside the namespace (and inside)."""
        return f"unix:path={self.place}/bus/system_bus_socket"

    def files(self, user: str) -> Path:
        """A directory of ``user`` alone (0700), granted by broker.toml."""
        return self.place / "files" / user

    @property
    def cgroup(self) -> Path | None:
        """The delegated cgroup for machines, None where this machine has no cgroup v2 with the
        controllers."""
        try:
            present = (CGROUP_ROOT / "cgroup.controllers").read_text().split()
        except OSError:
            return None
        return CGROUP_ROOT / f"vmbus-{self.instance}" if {"memory", "pids"} <= set(present) else None

    # -- life

    def __enter__(self) -> System:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def start(self) -> None:
        """Set the stage, then start what ``parts`` says, each when the one before it serves."""
        LIVE.append(self)
        self._set_stage()
        self.bus = self._daemon("bus", self._bus(), "", deadline=10)
        self.polkitd = self._daemon("polkitd", self._polkitd(), "Acquired the name", deadline=15)
        self.broker = self._daemon("broker", self._broker(), " ready\n", deadline=10)
        self.service = self._daemon("service", self._service(), " ready\n", deadline=10)
        self.bus.start()
        self._wait_for_socket()
        self.polkitd.start()
        if self._parts in ("broker", "service"):
            self.broker.start()
        if self._parts == "service":
            self.service.start()
            self._wait_until_quiet()

    def _wait_until_quiet(self) -> None:
        """vmbusd asks the broker about the host at its start, and children of the broker look: until none has
        been there for half a second."""
        deadline = time.monotonic() + 10 * SLOW
        quiet_since = time.monotonic()
        while time.monotonic() < min(deadline, quiet_since + 0.5):
            if _children(self.broker.pid):
                quiet_since = time.monotonic()
            time.sleep(0.02)

    def close(self) -> None:
        """End everything, whatever state it is in, and remove what it had. The logs are gone after it."""
        if self in LIVE:
            LIVE.remove(self)
            for daemon in (self.service, self.broker, self.polkitd, self.bus):
                daemon.stop()
        if self._stage:
            assert self._stage.stdin
            self._stage.stdin.close()
            self._stage.wait(60)
            self._stage = None
        rules.delete(self.instance)
        shutil.rmtree(self.place, ignore_errors=True)
        if self._claim >= 0:
            os.close(self._claim)
            self._claim = -1

    def _set_stage(self) -> None:
        self._stage = subprocess.Popen(
            [sys.executable, "-m", "tests.lab.stage"],
            cwd=CHECKOUT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert self._stage.stdin and self._stage.stdout
        orders = {
            "place": str(self.place),
            "uids": [self.uids.start, self.uids.stop],
            "cgroup": str(self.cgroup) if self.cgroup else "",
        }
        self._stage.stdin.write(json.dumps(orders) + "\n")
        self._stage.stdin.flush()
        if self._stage.stdout.readline() != "ready\n":
            raise NotReady("the stage could not be set (its message is on stderr)")
        if self.cgroup:
            self.cgroup.mkdir(exist_ok=True)

    def _wait_for_socket(self) -> None:
        deadline = time.monotonic() + 10 * SLOW
        while not (self.place / "bus/system_bus_socket").exists():
            if not self.bus.running or time.monotonic() > deadline:
                raise NotReady(f"no bus:\n{self.bus.since_start()}")
            time.sleep(0.01)

    def _daemon(self, name: str, argv: list[str], ready: str, *, deadline: float) -> Daemon:
        log = self.place / "log" / name
        return Daemon(name, self.inside(argv), log, ready, env=self.environment(), deadline=deadline * SLOW)

    def _bus(self) -> list[str]:
        return ["dbus-daemon", "--system", "--nofork", "--nopidfile", "--nosyslog"]

    def _polkitd(self) -> list[str]:
        return ["/usr/lib/polkit-1/polkitd"]

    def _broker(self) -> list[str]:
        argv = [str(PROGRAMS / "vmbus-broker"), "--instance", self.instance, "--run-dir", str(self.run_dir)]
        argv += ["--state-dir", str(self.place / "state-broker"), "--config", str(self.broker_toml)]
        argv += ["--service-user", "vmbus"]
        return argv + (["--cgroup", str(self.cgroup)] if self.cgroup else [])

    def _service(self) -> list[str]:
        argv = [str(PROGRAMS / "vmbusd"), "--instance", self.instance, "--run-dir", str(self.run_dir)]
        argv += ["--state-dir", str(self.place / "state"), "--bus-name", self.bus_name]
        argv += ["--config", str(self.vmbusd_toml)]
        argv += ["--firmware-root", str(self._firmware)]
        return as_user("vmbus", [*argv, "--bus-address", "unix:path=/run/dbus/system_bus_socket"])

    # -- users

    def inside(self, argv: Sequence[str]) -> list[str]:
        """The command line that runs ``argv`` as root in this system's mount namespace."""
        assert self._stage, "not started"
        return ["nsenter", f"--mount=/proc/{self._stage.pid}/ns/mnt", "--", *argv]

    def environment(self, user: str = "root") -> dict[str, str]:
        """A clean environment for ``user``."""
        home = str(self.files(user)) if user in (ALICE, BOB) else "/"
        return {
            "PATH": f"{PROGRAMS}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "LANG": "C.UTF-8",
            "HOME": home,
            "USER": user,
            "PYTHONDONTWRITEBYTECODE": "1",
        } | ({"VMBUS_LAB": "nested"} if NESTED else {})

    def popen(
        self, user: str, argv: Sequence[str | Path], *, env: Mapping[str, str] | None = None, **options: Any
    ) -> subprocess.Popen[bytes]:
        """Start a command as an ordinary user (no group but its own, no capability), in the user's directory.

        ``options`` are those of subprocess.Popen.
        """
        words = ["env", "-C", str(self.files(user)), *(str(word) for word in argv)]
        environment = {**self.environment(user), **(env or {})}
        return subprocess.Popen(self.inside(as_user(user, words)), env=environment, **options)

    def run_as(
        self,
        user: str,
        argv: Sequence[str | Path],
        *,
        timeout: float = 30,
        stdin: str = "",
        env: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command as an ordinary user. Raises subprocess.TimeoutExpired (after killing it)."""
        pipe = subprocess.PIPE
        with self.popen(user, argv, env=env, stdin=pipe, stdout=pipe, stderr=pipe) as process:
            try:
                out, err = process.communicate(stdin.encode(), timeout * SLOW)
            except BaseException:
                process.kill()
                raise
        decoded = (out.decode(errors="replace"), err.decode(errors="replace"))
        return subprocess.CompletedProcess(list(argv), process.returncode, *decoded)

    def vmbusctl(
        self, user: str, *words: str | Path, timeout: float = 30
    ) -> subprocess.CompletedProcess[str]:
        """``vmbusctl WORDS`` as ``user``."""
        return self.run_as(user, [PROGRAMS / "vmbusctl", *words], timeout=timeout)

    # -- polkit

    def rule(self, text: str, *, name: str = "10-test.rules") -> None:
        """Put a rules file in place ("": an empty one) and wait until polkitd has taken it in.

        Raises NotReady after 10 s.
        """
        self._rules += 1
        token = f"rules of the test, version {self._rules}"
        fresh = self.place / "stage" / name
        fresh.write_text(f'{text}\npolkit.log("{token}");\n')
        fresh.chmod(0o644)
        fresh.rename(self.place / "rules" / name)
        deadline = time.monotonic() + 10 * SLOW
        while token not in self.polkitd.since_start():
            if time.monotonic() > deadline:
                raise NotReady(f"polkitd does not load its rules again:\n{self.polkitd.since_start()}")
            time.sleep(0.02)

    # -- looking at it

    def logs(self) -> dict[str, str]:
        """The whole log of each daemon."""
        return {
            file.name: file.read_text(errors="replace")
            for file in sorted((self.place / "log").iterdir())
            if file.stat().st_size
        }

    def workers(self) -> dict[int, int]:
        """The living processes with one of this instance's worker uids: pid to uid."""
        found: dict[int, int] = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    uid = entry.stat().st_uid
                    status = (entry / "status").read_text()
                except OSError:
                    continue
                real = re.search(r"^Uid:\t(\d+)", status, re.MULTILINE)
                if real and int(real[1]) in self.uids and "State:\tZ" not in status:
                    found[int(entry.name)] = uid
        return found

    def counts(self) -> dict[str, int]:
        """What must not grow: fds and children of the daemons, workers, cgroups, taps, records in the run
        directory."""
        found = {"workers": len(self.workers())}
        for daemon in (self.broker, self.service):
            if daemon.running:
                found[f"{daemon.name} fds"] = len(os.listdir(f"/proc/{daemon.pid}/fd"))
                found[f"{daemon.name} children"] = len(_children(daemon.pid))
        cgroup = self.cgroup
        if cgroup and cgroup.is_dir():
            found["cgroups"] = sum(inner.is_dir() for inner in cgroup.iterdir())
        found["rules"] = len(rules.of(self.instance))
        found["taps"] = sum(self._is_our_tap(link) for link in Path("/sys/class/net").iterdir())
        for name in ("workers", "service"):
            record = self.run_dir / name
            found[f"run/{name}"] = len(os.listdir(record)) if record.is_dir() else 0
        return found

    def _is_our_tap(self, link: Path) -> bool:
        """Whether a network interface is a tap of this instance: its name has the uid of the worker."""
        found = re.match("vt([0-9a-f]{8})", link.name)
        return found is not None and int(found[1], 16) in self.uids

    def settle(self, wanted: Mapping[str, int], *, within: float = 10) -> dict[str, int]:
        """Wait until ``counts`` are ``wanted``; return them as they are then, or at the deadline."""
        deadline = time.monotonic() + within * SLOW
        while (now := self.counts()) != wanted and time.monotonic() < deadline:
            time.sleep(0.05)
        return now


def as_user(user: str, argv: Sequence[str]) -> list[str]:
    """The command line that becomes ``user`` for good: its own group alone, no capability in any set."""
    return [
        *("setpriv", "--reuid", user, "--regid", user, "--clear-groups", "--no-new-privs"),
        *("--inh-caps=-all", "--ambient-caps=-all", "--bounding-set=-all", "--", *argv),
    ]


def _children(pid: int) -> list[int]:
    listed = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(word) for word in listed.read_text().split()]
