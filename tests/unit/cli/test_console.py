# SPDX-License-Identifier: Apache-2.0
"""The console on a pseudo-terminal: bytes both ways, ^] leaves, and the terminal is as it was."""

from __future__ import annotations

import contextlib
import os
import pty
import select
import signal
import socket
import termios
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from vmbus.cli import console


@dataclass
class Desk:
    """A person's terminal, and a guest's end of the console."""

    pid: int
    terminal: int
    guest: socket.socket
    before: list[object]

    def read_until(self, wanted: bytes) -> bytes:
        seen, deadline = b"", time.monotonic() + 10
        while wanted not in seen:
            ready, _, _ = select.select([self.terminal], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"{wanted!r} did not come: {seen!r}"
            seen += os.read(self.terminal, 65536)
        return seen

    def ended(self) -> int:
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.01)
        raise AssertionError("it has not ended")


ENDINGS = ("left", "closed", "interrupted")


@pytest.fixture
def desk() -> Iterator[Desk]:
    guest, ours = socket.socketpair()
    pid, terminal = pty.fork()
    if pid == 0:
        # Exit status 100 + the ending's number, so that the test sees what attach returned. Nothing that goes
        # wrong here may return into pytest, which would go on with the tests in this process too; an alarm
        # ends it if the run is killed before the fixture can.
        try:
            signal.alarm(30)
            guest.close()
            os._exit(100 + ENDINGS.index(console.attach(ours)))
        finally:
            os._exit(1)
    ours.close()
    try:
        # Before the child is raw: the modes that it must give back.
        made = Desk(pid, terminal, guest, [])
        made.guest.sendall(b"ready")
        made.read_until(b"ready")
        yield made
    finally:
        guest.close()
        os.close(terminal)
        end(pid)


def end(pid: int) -> None:
    """Kill and reap a child, if a test has not seen it end."""
    with contextlib.suppress(ProcessLookupError, ChildProcessError):
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


@pytest.fixture(autouse=True, scope="module")
def _no_child_is_left() -> Iterator[None]:
    before = children()
    yield
    assert children() <= before


def children() -> set[str]:
    """This process's, those that nobody has waited for included."""
    return {
        pid for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()
    }


@pytest.fixture
def modes() -> Callable[[int], list[object]]:
    # A pty's two ends share one set of modes.
    return lambda fd: termios.tcgetattr(fd)[:4]


def cooked_modes() -> list[object]:
    leader, follower = pty.openpty()
    try:
        return termios.tcgetattr(follower)[:4]
    finally:
        os.close(leader)
        os.close(follower)


def test_what_is_typed_reaches_the_guest_untouched(desk: Desk) -> None:
    os.write(desk.terminal, b"ls\r\x03\x1a\x04")
    assert desk.guest.recv(100) == b"ls\r\x03\x1a\x04"


def test_what_the_guest_writes_reaches_the_terminal_untouched(desk: Desk) -> None:
    desk.guest.sendall(b"line\nnext\x1b[31m!")
    assert b"line\nnext\x1b[31m!" in desk.read_until(b"!")


def test_the_escape_character_leaves_and_what_stood_before_it_is_sent(desk: Desk) -> None:
    os.write(desk.terminal, b"x\x1dy")
    desk.read_until(b"\x1b[?1049l")
    assert ENDINGS[desk.ended() - 100] == "left"
    assert desk.guest.recv(100) == b"x"


def test_the_end_of_the_machine_ends_it(desk: Desk) -> None:
    desk.guest.close()
    desk.read_until(b"\x1b[?1049l")
    assert ENDINGS[desk.ended() - 100] == "closed"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_it_in_order(number: signal.Signals, desk: Desk) -> None:
    os.kill(desk.pid, number)
    desk.read_until(b"\x1b[?1049l")
    assert ENDINGS[desk.ended() - 100] == "interrupted"


def test_the_terminal_is_raw_meanwhile_and_as_before_afterwards(
    desk: Desk, modes: Callable[[int], list[object]]
) -> None:
    cooked = cooked_modes()
    assert modes(desk.terminal) != cooked
    os.write(desk.terminal, b"\x1d")
    desk.read_until(b"\x1b[?1049l")
    desk.ended()
    assert modes(desk.terminal) == cooked


def test_what_a_guest_left_on_the_screen_is_undone(desk: Desk) -> None:
    desk.guest.sendall(b"\x1b[?1049h\x1b[?25l\x1b[?2004h\x1b[?1000h\x1b[31m")
    desk.read_until(b"\x1b[31m")
    os.write(desk.terminal, b"\x1d")
    after = desk.read_until(b"\x1b[K\r\n")
    for sequence in (b"\x1b[?1049l", b"\x1b[?25h", b"\x1b[?2004l", b"\x1b[?1000l", b"\x1b[0m"):
        assert sequence in after


def test_a_guest_that_does_not_read_holds_up_the_keyboard_and_not_the_screen(desk: Desk) -> None:
    desk.guest.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    os.set_blocking(desk.terminal, False)
    for _ in range(400):
        try:
            os.write(desk.terminal, b"k" * 4000)
        except BlockingIOError:
            if not select.select([], [desk.terminal], [], 0.2)[1]:
                break
    desk.guest.sendall(b"still here")
    assert b"still here" in desk.read_until(b"still here")


def test_without_a_terminal_the_end_of_stdin_is_not_the_end() -> None:
    guest, ours = socket.socketpair()
    nothing = os.open(os.devnull, os.O_RDONLY)
    reader, writer = os.pipe()
    guest.sendall(b"one ")
    guest.sendall(b"two")
    guest.shutdown(socket.SHUT_WR)
    assert console.attach(ours, stdin=nothing, stdout=writer) == "closed"
    assert os.read(reader, 100) == b"one two"


def test_without_a_terminal_the_escape_character_is_a_byte_like_any_other() -> None:
    guest, ours = socket.socketpair()
    source, typed = os.pipe()
    _, writer = os.pipe()
    os.write(typed, b"a\x1db")
    os.close(typed)

    pid = os.fork()
    if pid == 0:
        try:
            signal.alarm(30)
            guest.close()
            os._exit(0 if console.attach(ours, stdin=source, stdout=writer) == "closed" else 1)
        finally:
            os._exit(1)
    ours.close()
    try:
        assert guest.recv(100) == b"a\x1db"
        guest.close()
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    finally:
        end(pid)
