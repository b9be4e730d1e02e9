# SPDX-License-Identifier: Apache-2.0
"""One SEQPACKET datagram, one message: msgpack by msgspec, with file descriptors beside it.

A datagram is at most ``LIMIT`` bytes. A truncated datagram or control message is a violation:
the caller ends the connection. Sends never block: a peer that does not read is dropped.
Whether fds may be received is the caller's choice per connection; without a control buffer
the kernel drops whatever a hostile peer attaches.
"""

from __future__ import annotations

import array
import os
import socket
from typing import Final, TypeVar

import msgspec

LIMIT: Final = 64 * 1024
MAX_FDS: Final = 16

T = TypeVar("T")


class Violation(Exception):
    """The peer broke the protocol; the connection is of no more use."""


def send(sock: socket.socket, message: msgspec.Struct, fds: list[int] | None = None) -> None:
    """Send one message without blocking.

    Raises BlockingIOError when the peer does not read, OSError when it is gone, and
    Violation when the message is larger than LIMIT (ours to prevent).
    """
    data = msgspec.msgpack.encode(message)
    if len(data) > LIMIT:
        raise Violation(f"message of {len(data)} bytes is larger than {LIMIT}")
    if fds:
        rights = array.array("i", fds).tobytes()
        sock.sendmsg(
            [data],
            [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)],
            socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL,
        )
    else:
        sock.send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)


def receive(
    sock: socket.socket, decoder: msgspec.msgpack.Decoder[T], *, max_fds: int = 0
) -> tuple[T, list[int]] | None:
    """Receive one message; None at end of file.

    ``max_fds=0`` gives the kernel no control buffer. The fds are the caller's, close-on-exec.
    Raises Violation for anything that is not exactly one message, BlockingIOError when there
    is none.
    """
    fds: list[int] = []
    if max_fds:
        data, ancillary, flags, _ = sock.recvmsg(
            LIMIT + 1, socket.CMSG_SPACE(max_fds * 4), socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
        )
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                numbers = array.array("i")
                numbers.frombytes(payload[: len(payload) - len(payload) % numbers.itemsize])
                fds.extend(numbers)
        if flags & socket.MSG_CTRUNC:
            _close(fds)
            raise Violation("more file descriptors than this connection takes")
    else:
        data = sock.recv(LIMIT + 1, socket.MSG_DONTWAIT)
    if not data and not fds:
        return None
    if len(data) > LIMIT:
        _close(fds)
        raise Violation(f"datagram larger than {LIMIT} bytes")
    try:
        return decoder.decode(data), fds
    except (msgspec.MsgspecError, ValueError, OverflowError, RecursionError) as error:
        # Not only msgspec's own: bytes that are no UTF-8 raise UnicodeDecodeError, nesting RecursionError.
        _close(fds)
        raise Violation(f"not a message of this protocol: {error}") from None


def _close(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)
