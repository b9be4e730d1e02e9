# SPDX-License-Identifier: Apache-2.0
"""vmbusctl as an ordinary user of a whole system: real bus, polkitd, broker, service, workers and guests."""

from __future__ import annotations

import json
import os
import pty
import pwd
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.system import ALICE, BOB, PROGRAMS, SLOW, System
from tests.local.worker_guest import image

pytestmark = pytest.mark.requires("root", "kvm")


@pytest.fixture(scope="module")
def system() -> Iterator[System]:
    with System() as made:
        give(made, image(), "kernel")
        yield made


@pytest.fixture(autouse=True)
def nothing_left(system: System) -> Iterator[None]:
    """Each test leaves as many processes and records as it found, and no machine."""
    before = counts(system)
    yield
    for user in (ALICE, BOB):
        for name in system.vmbusctl(user, "list", "--names").stdout.split():
            system.vmbusctl(user, "kill", name)
            system.vmbusctl(user, "undefine", name)
    deadline = time.monotonic() + 10 * SLOW
    while (now := counts(system)) != before and time.monotonic() < deadline:
        time.sleep(0.1)
    assert now == before


def counts(system: System) -> dict[str, int]:
    """All but the service's descriptors: tests here restart it."""
    return {name: count for name, count in system.counts().items() if name != "service fds"}


def give(system: System, source: Path, name: str, user: str = ALICE) -> Path:
    """A copy of ``source`` that belongs to ``user`` alone."""
    account = pwd.getpwnam(user)
    place = system.files(user) / name
    shutil.copyfile(source, place)
    os.chown(place, account.pw_uid, account.pw_gid)
    place.chmod(0o600)
    return place


def define(system: System, name: str, mode: str, *words: str) -> None:
    done = system.vmbusctl(
        ALICE, "define", "--name", name, "--memory", "16M", "--kernel", "kernel", "--cmdline", mode, *words
    )
    assert done.returncode == 0, done.stderr


def show(system: System, name: str, user: str = ALICE) -> dict[str, object]:
    found: dict[str, object] = json.loads(system.vmbusctl(user, "show", name, "--json").stdout)
    return found


def test_run_shows_the_console_and_ends_with_the_guest(system: System) -> None:
    done = system.vmbusctl(
        ALICE, "run", "--name", "once", "--memory", "16M", "--kernel", "kernel", "--cmdline", "hello"
    )
    assert (done.returncode, "hello" in done.stdout) == (0, True), done.stderr
    assert system.vmbusctl(ALICE, "list", "--names").stdout == ""


def test_run_ends_with_status_8_when_the_guest_crashes(system: System) -> None:
    words = ["--name", "bad", "--memory", "16M", "--kernel", "kernel", "--cmdline", "triple-fault"]
    done = system.vmbusctl(ALICE, "run", *words)
    assert (done.returncode, "triple-fault" in done.stderr) == (8, True), done.stderr


def test_run_takes_a_file_that_broker_toml_does_not_grant(system: System) -> None:
    with_no_grant = Path("/tmp") / f"vmbusctl-test-{os.getpid()}"
    shutil.copyfile(image(), with_no_grant)
    try:
        words = ["--name", "far", "--memory", "16M", "--kernel", str(with_no_grant), "--cmdline", "hello"]
        done = system.vmbusctl(ALICE, "run", *words)
        refused = system.vmbusctl(ALICE, "define", *words)
    finally:
        with_no_grant.unlink()
    assert (done.returncode, refused.returncode) == (0, 4), done.stderr + refused.stderr


def test_a_life_from_definition_to_undefinition(system: System) -> None:
    define(system, "web", "wait-power-button")
    assert show(system, "web")["state"] == "stopped"

    assert system.vmbusctl(ALICE, "start", "web").returncode == 0
    assert show(system, "web")["state"] == "running"
    again = system.vmbusctl(ALICE, "start", "web")
    assert (again.returncode, len(again.stderr.splitlines())) == (5, 1)

    assert system.vmbusctl(ALICE, "pause", "web").returncode == 0
    assert show(system, "web")["state"] == "paused"
    assert system.vmbusctl(ALICE, "resume", "web").returncode == 0

    assert system.vmbusctl(ALICE, "stop", "web").returncode == 0
    assert show(system, "web")["state-reason"] == "guest-poweroff"
    assert system.vmbusctl(ALICE, "undefine", "web").returncode == 0
    assert system.vmbusctl(ALICE, "show", "web").returncode == 3


def test_a_guest_that_ignores_the_button_is_stopped_at_the_deadline(system: System) -> None:
    define(system, "deaf", "idle")
    system.vmbusctl(ALICE, "start", "deaf")
    assert system.vmbusctl(ALICE, "stop", "deaf", "--deadline", "0.5").returncode == 0
    assert show(system, "deaf")["state"] == "stopped"


def test_wait_returns_when_the_guest_powers_off(system: System) -> None:
    define(system, "web", "wait-power-button")
    system.vmbusctl(ALICE, "start", "web")
    waiting = system.popen(ALICE, [PROGRAMS / "vmbusctl", "wait", "web", "--timeout", "20"])
    time.sleep(0.5 * SLOW)
    assert waiting.poll() is None
    assert system.vmbusctl(ALICE, "shutdown", "web", "--wait", "20").returncode == 0
    assert waiting.wait(20 * SLOW) == 0


def test_anothers_machine_can_be_seen_and_not_touched(system: System) -> None:
    define(system, "web", "idle")
    uuid = str(show(system, "web")["uuid"])

    assert system.vmbusctl(BOB, "show", "web").returncode == 3
    seen = show(system, uuid, BOB)
    assert seen["state"] == "stopped"
    assert "name" not in seen and "definition" not in seen
    for words in (["start"], ["kill"], ["console"], ["undefine"], ["stop"]):
        done = system.vmbusctl(BOB, *words, uuid)
        assert (done.returncode, len(done.stderr.splitlines())) == (4, 1), (words, done.stderr)


def test_a_start_with_the_wrong_owner_of_a_file_says_which_file(system: System) -> None:
    secret = give(system, image(), "secret")
    define(system, "web", "idle")
    os.chown(secret, 0, 0)
    done = system.vmbusctl(
        ALICE, "define", "--name", "web2", "--memory", "16M", "--kernel", "secret", "--cmdline", "idle"
    )
    started = system.vmbusctl(ALICE, "start", "web2")
    assert (done.returncode, started.returncode) == (0, 4)
    assert "secret" in started.stderr


def test_a_slot_declared_for_a_file_gets_it_at_start(system: System) -> None:
    (system.files(ALICE) / "fd.toml").write_text(
        'name = "fd"\nmemory = "16M"\n[kernel]\nsource = "fd"\ncmdline = "wait-power-button"\n'
    )
    assert system.vmbusctl(ALICE, "define", "fd.toml").returncode == 0
    assert system.vmbusctl(ALICE, "start", "fd").returncode == 2
    done = system.vmbusctl(ALICE, "start", "fd", "--file", "kernel=kernel")
    assert done.returncode == 0, done.stderr


class Terminal:
    """Alice's terminal, with a vmbusctl in it."""

    def __init__(self, system: System, *words: str) -> None:
        self.leader, follower = pty.openpty()
        self.process = system.popen(
            ALICE, [PROGRAMS / "vmbusctl", *words], stdin=follower, stdout=follower, stderr=follower
        )
        os.close(follower)

    def read_until(self, wanted: bytes) -> bytes:
        seen, deadline = b"", time.monotonic() + 20 * SLOW
        while wanted not in seen:
            ready, _, _ = select.select([self.leader], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"{wanted!r} did not come: {seen!r}"
            seen += os.read(self.leader, 65536)
        return seen

    def type(self, keys: bytes) -> None:
        os.write(self.leader, keys)

    def ended(self) -> int:
        try:
            return self.process.wait(20 * SLOW)
        finally:
            os.close(self.leader)


def test_the_console_carries_keys_and_leaves_the_machine_running(system: System) -> None:
    define(system, "web", "echo")
    terminal = Terminal(system, "start", "web", "--console")
    terminal.read_until(b"leave with ^]")
    terminal.type(b"abc")
    terminal.read_until(b"abc")
    terminal.type(b"\x1d")
    terminal.read_until(b"\x1b[0m")
    assert terminal.ended() == 0
    assert show(system, "web")["state"] == "running"

    # What came before is there for the next one.
    done = system.popen(
        ALICE,
        [PROGRAMS / "vmbusctl", "console", "web", "--read-only"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
    )
    assert done.stdout is not None
    seen = b""
    while b"abc" not in seen:
        seen += os.read(done.stdout.fileno(), 4096)
    done.send_signal(signal.SIGTERM)
    done.wait(10 * SLOW)
    done.stdout.close()


def test_the_console_outlives_the_service(system: System) -> None:
    define(system, "web", "echo")
    terminal = Terminal(system, "start", "web", "--console")
    terminal.read_until(b"leave with ^]")
    terminal.type(b"one")
    terminal.read_until(b"one")
    system.service.kill()
    terminal.type(b"two")
    terminal.read_until(b"two")
    system.service.start()
    terminal.type(b"\x1d")
    terminal.read_until(b"\x1b[0m")
    assert terminal.ended() == 0
    assert show(system, "web")["state"] == "running"


def test_without_a_service_it_says_so_and_where_to_look(system: System) -> None:
    system.service.kill()
    try:
        done = system.vmbusctl(ALICE, "list")
        silent = system.vmbusctl(ALICE, "--no-autostart", "list")
    finally:
        system.service.start()
    assert (done.returncode, silent.returncode) == (6, 6)
    assert "vmbusd" in done.stderr and len(done.stderr.splitlines()) == 1
    assert "not running" in silent.stderr


def test_17_files_are_refused_and_the_connection_lives(system: System) -> None:
    words = ["--name", "many", "--memory", "16M", "--kernel", "kernel"]
    for number in range(16):
        give(system, image(), f"{number}.raw")
        words += ["--disk", f"{number}.raw,format=raw"]
    done = system.vmbusctl(ALICE, "run", *words)
    assert (done.returncode, "17 files" in done.stderr) == (2, True)
    assert "Disconnected" not in done.stderr
