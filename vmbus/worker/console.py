# SPDX-License-Identifier: Apache-2.0
"""The console hub: one serial line, 64 KiB of history, many readers, at most one writer.

The guest's output arrives on one end of a socket pair whose other end the core has. The hub reads it
without delay, so a guest never waits for a reader. A reader is a place in the output, not a buffer of its
own: it is sent what lies between its place and the end as its socket takes it, so twenty readers cost no
more than one, and one that never reads costs nothing. A reader that falls behind the history is moved to
its start and told how many bytes it missed. Nothing here ever blocks.

Keys go from the writer to the guest; while the guest does not take them, the writer's socket is not read.
What a reader sends is thrown away.
"""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Callable
from typing import Final

from vmbus.wire.errors import VmbusError
from vmbus.worker.loop import READ, WRITE, Loop

HISTORY: Final = 64 * 1024
READERS_MAX: Final = 32
_CHUNK: Final = 16 * 1024
_KEYS: Final = 4 * 1024


class _Client:
    """A reader, or the writer: its socket and its place in the output."""

    def __init__(self, fd: int, sock: socket.socket, place: int) -> None:
        self.fd = fd
        self.sock = sock
        self.place = place
        self.notice = b""  # what is to be sent before the output goes on
        self.events = READ


class Hub:
    """``guest`` is the hub's end of the pair; ``output`` is called whenever the guest has written."""

    def __init__(self, loop: Loop, guest: socket.socket, output: Callable[[], None]) -> None:
        guest.setblocking(False)
        self._loop = loop
        self._guest: socket.socket | None = guest
        self._output = output
        self._history = bytearray()
        self._end = 0  # bytes that the guest has written so far
        self._clients: list[_Client] = []
        self._writer: _Client | None = None
        self._keys = b""  # typed, not yet taken by the guest
        loop.watch(guest.fileno(), self._guest_ready)

    def attach(self, fd: int, *, write: bool, steal: bool) -> None:
        """Take ``fd``, one end of a stream socket pair, as a reader (and the writer).

        The fd is closed if it is refused: InvalidArgument (no stream socket), InUse (there is a writer and
        ``steal`` is not given), QuotaExceeded, InvalidState (the machine has ended).
        """
        try:
            sock = self._check(fd, write=write, steal=steal)
        except (VmbusError, OSError):
            os.close(fd)
            raise
        if write and self._writer is not None:
            self._drop(self._writer)
        client = _Client(fd, sock, self._end - len(self._history))
        self._clients.append(client)
        if write:
            self._writer = client
        self._loop.watch(fd, lambda happened: self._client_ready(client, happened))
        self._feed(client)

    def _check(self, fd: int, *, write: bool, steal: bool) -> socket.socket:
        if self._guest is None:
            raise VmbusError("InvalidState", "the machine has ended, and its console with it")
        if write and self._writer is not None and not steal:
            raise VmbusError("InUse", "somebody else writes to this console; take it over with steal")
        if len(self._clients) >= READERS_MAX:
            raise VmbusError("QuotaExceeded", f"a console has at most {READERS_MAX} readers")
        refusal = VmbusError("InvalidArgument", "a console takes one end of a stream socket pair")
        if not stat.S_ISSOCK(os.fstat(fd).st_mode):
            raise refusal
        sock = socket.socket(fileno=fd)
        if sock.family != socket.AF_UNIX or sock.type != socket.SOCK_STREAM:
            sock.detach()
            raise refusal
        sock.setblocking(False)
        return sock

    def close(self) -> None:
        """Send everyone what the guest wrote last, as far as it goes without waiting, and hang up."""
        if self._guest is None:
            return
        while self._read_guest():
            pass
        self._hang_up()
        for client in list(self._clients):
            self._drop(client)

    def _hang_up(self) -> None:
        if self._guest is not None:
            self._loop.forget(self._guest.fileno())
            self._guest.close()
            self._guest = None

    @property
    def clients(self) -> int:
        """How many are attached."""
        return len(self._clients)

    def _guest_ready(self, happened: int) -> None:
        if happened & WRITE:
            self._type(b"")
        self._read_guest()

    def _read_guest(self) -> bool:
        """One chunk of output; False when there is none."""
        if self._guest is None:
            return False
        try:
            data = self._guest.recv(_CHUNK)
        except BlockingIOError:
            return False
        except OSError:
            data = b""
        if not data:
            self._hang_up()
            return False
        self._history += data
        self._end += len(data)
        del self._history[: max(0, len(self._history) - HISTORY)]
        for client in list(self._clients):
            if not client.events & WRITE:
                self._feed(client)
        self._output()
        return True

    def _feed(self, client: _Client) -> None:
        """Send ``client`` what it has not had, until its socket is full."""
        try:
            while client.notice or client.place < self._end:
                start = self._end - len(self._history)
                if not client.notice and client.place < start:
                    client.notice = b"\r\n[%d bytes of output skipped]\r\n" % (start - client.place)
                    client.place = start
                if client.notice:
                    client.notice = client.notice[client.sock.send(client.notice, socket.MSG_NOSIGNAL) :]
                    continue
                offset = client.place - start
                chunk = self._history[offset : offset + _CHUNK]
                client.place += client.sock.send(chunk, socket.MSG_NOSIGNAL)
        except BlockingIOError:
            self._wait_for(client, client.events | WRITE)
        except OSError:
            self._drop(client)
        else:
            self._wait_for(client, client.events & ~WRITE)

    def _client_ready(self, client: _Client, happened: int) -> None:
        if happened & WRITE:
            self._feed(client)
        # A writer that waits for the guest is read only once it has hung up.
        if happened & ~WRITE and client in self._clients:
            try:
                data = client.sock.recv(_KEYS)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if not data:
                self._drop(client)
            elif client is self._writer:
                self._type(data)

    def _type(self, data: bytes) -> None:
        """Give the guest ``data`` after what is waiting; the writer is not read until all is taken."""
        if self._guest is None:
            return
        keys = self._keys + data
        try:
            keys = keys[self._guest.send(keys, socket.MSG_NOSIGNAL) :]
        except BlockingIOError:
            pass
        except OSError:
            keys = b""
        if bool(keys) != bool(self._keys):
            self._loop.change(self._guest.fileno(), READ | WRITE if keys else READ)
        self._keys = keys
        if self._writer is not None:
            events = self._writer.events & WRITE
            self._wait_for(self._writer, events if keys else events | READ)

    def _wait_for(self, client: _Client, events: int) -> None:
        if events != client.events:
            client.events = events
            self._loop.change(client.fd, events)

    def _drop(self, client: _Client) -> None:
        if client is self._writer:
            self._writer = None
        self._clients.remove(client)
        self._loop.forget(client.fd)
        client.sock.close()
