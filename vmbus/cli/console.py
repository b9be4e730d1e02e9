# SPDX-License-Identifier: Apache-2.0
"""A machine's serial console in this terminal: raw, ``^]`` leaves.

What OpenConsole gives is a stream socket; bytes go both ways untouched until the escape character (0x1d,
as telnet and virsh have it) or the end of the machine. Whatever happens, the terminal gets back the modes
that it had, and what a guest may have left on the screen (alternate screen, hidden cursor, mouse and
paste modes, colours, a changed character set or scroll region) is undone, so that the shell's prompt
comes back readable.

Without a terminal on stdin its end is not the console's end: ``vmbusctl console web </dev/null | grep
...`` reads on.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import termios
import tty
from collections.abc import Iterator
from types import FrameType
from typing import Final, Literal

ESCAPE: Final = 0x1D  # ^]
_CHUNK: Final = 65536

# xterm's control sequences ("XTerm Control Sequences", DEC private modes): off goes the alternate screen
# (1049, 47), bracketed paste (2004), mouse reports (1000-1006, 1015), focus reports (1004), application
# keypad and cursor keys; on goes the cursor (25) and auto-wrap (7); the scroll region is the window, the
# character set G0 ASCII, colours plain. Then the rest of the line is cleared and a new one begun.
_RESTORE: Final = (
    b"\x1b[?1049l\x1b[?47l\x1b[?2004l\x1b[?1000l\x1b[?1002l\x1b[?1003l\x1b[?1004l\x1b[?1005l\x1b[?1006l\x1b[?1015l"
    b"\x1b[?1l\x1b>\x1b[?25h\x1b[?7h\x1b[4l\x1b7\x1b[r\x1b8\x1b(B\x0f\x1b[0m\x1b[K\r\n"
)

Ending = Literal["left", "closed", "interrupted"]


def attach(console: socket.socket, *, stdin: int = 0, stdout: int = 1, pass_end_on: bool = False) -> Ending:
    """Carry bytes between the terminal and ``console`` until one of them ends; closes neither.

    ``pass_end_on``: the end of stdin is the end of what ``console`` gets, which may still answer.

    Returns "left" for ^], "closed" when the machine's side ended, "interrupted" for SIGTERM or SIGHUP.
    Raises BrokenPipeError when stdout's reader is gone.
    """
    with _signals_wake() as woken, _raw(stdin), _screen_restored(stdout):
        return _carry(console, stdin, stdout, woken, pass_end_on=pass_end_on)


def _carry(console: socket.socket, stdin: int, stdout: int, woken: int, *, pass_end_on: bool) -> Ending:
    keyboard_open = True
    typed = b""  # from the keyboard, not yet taken by the guest
    while True:
        poller = select.poll()
        poller.register(woken, select.POLLIN)
        poller.register(console, select.POLLIN | (select.POLLOUT if typed else 0))
        # A guest that does not read holds up the keyboard, not the screen.
        if keyboard_open and len(typed) < _CHUNK:
            poller.register(stdin, select.POLLIN)
        events = dict(poller.poll())
        if woken in events:
            return "interrupted"
        ready = events.get(console.fileno(), 0)
        if ready & (select.POLLIN | select.POLLHUP | select.POLLERR):
            output = _receive(console)
            if not output:
                return "closed"
            _write_all(stdout, output)
        if stdin in events:
            data = _read_keyboard(stdin)
            keyboard_open = bool(data)
            at = data.find(ESCAPE) if os.isatty(stdin) else -1
            if at >= 0:
                _send(console, typed + data[:at])
                return "left"
            typed += data
        if typed and ready & select.POLLOUT:
            typed = typed[_send(console, typed) :]
        if pass_end_on and not keyboard_open and not typed:
            pass_end_on = False
            with contextlib.suppress(OSError):  # it is gone already, and reading says so
                console.shutdown(socket.SHUT_WR)


def _read_keyboard(fd: int) -> bytes:
    try:
        return os.read(fd, _CHUNK)
    except OSError:  # EIO: the terminal was hung up
        return b""


def _receive(console: socket.socket) -> bytes:
    try:
        return console.recv(_CHUNK)
    except ConnectionResetError:
        return b""


def _send(console: socket.socket, data: bytes) -> int:
    try:
        return console.send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
    except BlockingIOError:
        return 0
    except (BrokenPipeError, ConnectionResetError):
        return len(data)  # the reading side says "closed"


def _write_all(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]


@contextlib.contextmanager
def _raw(fd: int) -> Iterator[None]:
    if not os.isatty(fd):
        yield
        return
    before = termios.tcgetattr(fd)
    try:
        tty.setraw(fd, termios.TCSANOW)
        yield
    finally:
        # At once, not when the output has drained (a terminal that takes none would keep us here); and what
        # was typed for the guest is not for the shell. A terminal that was hung up needs neither.
        with contextlib.suppress(termios.error):
            termios.tcsetattr(fd, termios.TCSANOW, before)
            termios.tcflush(fd, termios.TCIFLUSH)


@contextlib.contextmanager
def _screen_restored(fd: int) -> Iterator[None]:
    try:
        yield
    finally:
        if os.isatty(fd):
            with contextlib.suppress(OSError):
                os.write(fd, _RESTORE)


@contextlib.contextmanager
def _signals_wake() -> Iterator[int]:
    """An fd that becomes readable when SIGTERM or SIGHUP arrives: the terminal is always given back."""
    reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    def wake(_signal: int, _frame: FrameType | None) -> None:
        with contextlib.suppress(BlockingIOError):
            os.write(writer, b"!")

    before = {number: signal.signal(number, wake) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield reader
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(reader)
        os.close(writer)
