# SPDX-License-Identifier: Apache-2.0
"""A message with file descriptors beside it, where they are taken; ``wire.packet`` has the framing."""

from __future__ import annotations

import array
import os
import socket
from typing import TypeVar

import msgspec

from vmbus.wire.packet import LIMIT, Violation, decode
from vmbus.wire.packet import receive as receive_alone

T = TypeVar("T")


def receive(
    sock: socket.socket, decoder: msgspec.msgpack.Decoder[T], *, max_fds: int
) -> tuple[T, list[int]] | None:
    """Receive one message and at most ``max_fds`` fds; None at end of file. 0: there is no control buffer.

    The fds are the caller's, close-on-exec. Raises Violation for anything that is not exactly one message: no
    fd is left then. Raises BlockingIOError when there is none.
    """
    if not max_fds:
        message = receive_alone(sock, decoder)
        return None if message is None else (message, [])
    fds: list[int] = []
    data, ancillary, flags, _ = sock.recvmsg(
        LIMIT + 1, socket.CMSG_SPACE(max_fds * 4), socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
    )
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            numbers = array.array("i")
            numbers.frombytes(payload[: len(payload) - len(payload) % numbers.itemsize])
            fds.extend(numbers)
    if not data and not fds:
        return None
    try:
        if flags & socket.MSG_CTRUNC:
            raise Violation("more file descriptors than this connection takes")
        return decode(data, decoder), fds
    except Violation:
        for fd in fds:
            os.close(fd)
        raise
