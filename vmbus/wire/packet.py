# SPDX-License-Identifier: Apache-2.0
"""One SEQPACKET datagram, one message: msgpack by msgspec, with file descriptors beside it.

A datagram is at most ``LIMIT`` bytes. A truncated datagram or control message is a violation:
the caller ends the connection. Sends never block: a peer that does not read is dropped.
Whoever may receive fds uses ``wire.handover``, which the broker does not load; here there is no control
buffer, so the kernel drops whatever a hostile peer attaches.
"""

from __future__ import annotations

import array
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
    flags = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
    if fds:
        sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))], flags)
    else:  # a worker's filter forbids it sendmsg
        sock.send(data, flags)


def receive(sock: socket.socket, decoder: msgspec.msgpack.Decoder[T]) -> T | None:
    """Receive one message, and no fd: the kernel is given no control buffer. None at end of file.

    Raises Violation for anything that is not exactly one message, BlockingIOError when there is none.
    """
    data = sock.recv(LIMIT + 1, socket.MSG_DONTWAIT)
    return decode(data, decoder) if data else None


def decode(data: bytes, decoder: msgspec.msgpack.Decoder[T]) -> T:
    """The message that a datagram is. Raises Violation."""
    if len(data) > LIMIT:
        raise Violation(f"datagram larger than {LIMIT} bytes")
    try:
        return decoder.decode(data)
    except (msgspec.MsgspecError, ValueError, OverflowError, RecursionError) as error:
        # Not only msgspec's own: bytes that are no UTF-8 raise UnicodeDecodeError, nesting RecursionError.
        raise Violation(f"not a message of this protocol: {error}") from None
