# SPDX-License-Identifier: Apache-2.0
"""The console hub: history, many readers, one writer, and nobody who waits for anybody."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator

import pytest

from vmbus.wire.errors import VmbusError
from vmbus.worker.console import HISTORY, READERS_MAX, Hub
from vmbus.worker.loop import Loop


class Line:
    """A hub with the guest's end of its line."""

    def __init__(self) -> None:
        self.loop = Loop()
        ours, self.guest = socket.socketpair()
        self.guest.settimeout(5)
        self.outputs = 0
        self.hub = Hub(self.loop, ours, self._output)

    def _output(self) -> None:
        self.outputs += 1

    def turn(self, rounds: int = 50) -> None:
        """Let the hub do what there is to do."""
        for _ in range(rounds):
            self.loop.after(0, self.loop.stop)
            self.loop.run()
            self.loop._running = True

    def reader(self, *, write: bool = False, steal: bool = False) -> socket.socket:
        theirs, ours = socket.socketpair()
        theirs.settimeout(5)
        self.hub.attach(ours.detach(), write=write, steal=steal)
        return theirs

    def say(self, data: bytes) -> None:
        """The guest writes all of ``data``."""
        self.guest.setblocking(False)
        while data:
            try:
                data = data[self.guest.send(data) :]
            except BlockingIOError:
                self.turn(1)
        self.turn()


@pytest.fixture
def line() -> Iterator[Line]:
    line = Line()
    yield line
    line.hub.close()


def everything(line: Line, sock: socket.socket) -> bytes:
    """What the hub has for this reader, until there is no more."""
    sock.setblocking(False)
    data = b""
    idle = 0
    while idle < 5:
        try:
            data += sock.recv(1 << 16)
            idle = 0
        except BlockingIOError:
            idle += 1
        line.turn(2)
    return data


def test_every_reader_gets_the_history_and_what_comes(line: Line) -> None:
    line.say(b"Linux version 6\r\n")
    first = line.reader()
    line.say(b"login: ")
    second = line.reader()
    assert everything(line, first) == b"Linux version 6\r\nlogin: "
    assert everything(line, second) == b"Linux version 6\r\nlogin: "
    assert line.outputs == 2


def test_the_history_is_the_last_64_kib(line: Line) -> None:
    line.say(b"old" + b"x" * HISTORY + b"new")
    got = everything(line, line.reader())
    assert len(got) == HISTORY
    assert got == b"x" * (HISTORY - 3) + b"new"


def test_a_reader_that_never_reads_holds_up_nobody_and_learns_what_it_missed(line: Line) -> None:
    lazy = line.reader()
    eager = [line.reader() for _ in range(20)]
    collected = [b""] * 20
    chunk = bytes(range(32, 127)) * 40
    total = 0
    for _ in range(300):  # 1.1 MB: more than a socket buffer and the history together
        line.say(chunk)
        total += len(chunk)
        for index, sock in enumerate(eager):
            collected[index] += everything_quick(sock)
    line.turn()
    for index, sock in enumerate(eager):
        collected[index] += everything(line, sock)
        assert collected[index] == chunk * 300
    got = everything(line, lazy)
    before, _, rest = got.partition(b"\r\n[")
    number, _, after = rest.partition(b" bytes of output skipped]\r\n")
    assert (chunk * 300).startswith(before)
    assert (chunk * 300).endswith(after)
    assert len(before) + int(number) + len(after) == total
    assert len(after) >= HISTORY


def everything_quick(sock: socket.socket) -> bytes:
    sock.setblocking(False)
    try:
        return sock.recv(1 << 20)
    except BlockingIOError:
        return b""


def test_only_the_writer_is_heard(line: Line) -> None:
    reader, writer = line.reader(), line.reader(write=True)
    reader.send(b"evil")
    writer.send(b"good")
    line.turn()
    assert line.guest.recv(100) == b"good"


def test_a_second_writer_is_refused_unless_it_steals(line: Line) -> None:
    first = line.reader(write=True)
    theirs, ours = socket.socketpair()
    fd = ours.detach()
    with pytest.raises(VmbusError) as caught:
        line.hub.attach(fd, write=True, steal=False)
    assert caught.value.kind == "InUse"
    with pytest.raises(OSError):
        os.fstat(fd)
    thief = line.reader(write=True, steal=True)
    thief.send(b"mine")
    line.turn()
    assert line.guest.recv(100) == b"mine"
    assert first.recv(100) == b""
    theirs.close()


def test_the_next_writer_follows_one_that_has_gone(line: Line) -> None:
    line.reader(write=True).close()
    line.turn()
    assert line.hub.clients == 0
    line.reader(write=True).send(b"next")
    line.turn()
    assert line.guest.recv(100) == b"next"


def test_keys_wait_for_a_guest_that_does_not_read_and_none_is_lost(line: Line) -> None:
    writer = line.reader(write=True)
    writer.setblocking(False)
    keys = b"0123456789" * 100_000
    sent = 0
    for _ in range(100):
        with contextlib.suppress(BlockingIOError):
            sent += writer.send(keys[sent:])
        line.turn(5)
    assert sent < len(keys)  # the writer waits, the hub's memory does not grow
    assert len(line.hub._keys) <= 8192
    got = b""
    line.guest.setblocking(False)
    while len(got) < len(keys):
        if sent < len(keys):
            with contextlib.suppress(BlockingIOError):
                sent += writer.send(keys[sent:])
        with contextlib.suppress(BlockingIOError):
            got += line.guest.recv(1 << 16)
        line.turn(2)
    assert got == keys


def test_a_writer_that_hangs_up_on_a_full_guest_is_let_go(line: Line) -> None:
    writer = line.reader(write=True)
    writer.setblocking(False)
    for _ in range(200):
        try:
            writer.send(b"k" * 4096)
        except BlockingIOError:
            break
        line.turn(2)
    writer.close()
    line.turn(200)
    assert line.hub.clients == 0


def test_readers_are_bounded(line: Line) -> None:
    held = [line.reader() for _ in range(READERS_MAX)]
    with pytest.raises(VmbusError) as caught:
        line.reader()
    assert caught.value.kind == "QuotaExceeded"
    assert len(held) == line.hub.clients


@pytest.mark.parametrize("kind", ["pipe", "datagram", "inet"])
def test_what_is_no_stream_socket_pair_is_refused_and_closed(line: Line, kind: str) -> None:
    if kind == "pipe":
        fd, other = os.pipe()
        os.close(other)
    elif kind == "datagram":
        fd = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).detach()
    else:
        fd = socket.socket(socket.AF_INET, socket.SOCK_STREAM).detach()
    with pytest.raises(VmbusError) as caught:
        line.hub.attach(fd, write=False, steal=False)
    assert caught.value.kind == "InvalidArgument"
    with pytest.raises(OSError):
        os.fstat(fd)


def test_the_last_words_reach_everyone_before_the_hang_up(line: Line) -> None:
    reader = line.reader()
    line.guest.send(b"reboot: Power down\r\n")
    line.hub.close()
    assert reader.recv(100) == b"reboot: Power down\r\n"
    assert reader.recv(100) == b""


def test_after_the_end_there_is_no_console(line: Line) -> None:
    line.hub.close()
    with pytest.raises(VmbusError) as caught:
        line.reader()
    assert caught.value.kind == "InvalidState"


def test_a_guest_end_that_closes_leaves_the_readers_with_the_history(line: Line) -> None:
    writer = line.reader(write=True)
    line.say(b"bye")
    line.guest.close()
    line.turn()
    writer.send(b"hello?")
    line.turn()
    assert writer.recv(100) == b"bye"
