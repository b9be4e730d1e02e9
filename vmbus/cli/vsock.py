# SPDX-License-Identifier: Apache-2.0
"""Connections between a guest and this terminal, or programs here: virtio-vsock.

Bytes go through as they are. An end of file on the standard input is passed on: the guest reads it as the end
of what comes, and may still answer. To listen is to serve each connection with a program that has it as
its standard input and output, as inetd does, or, without one, to take one connection and be done.
"""

from __future__ import annotations

import argparse
import array
import asyncio
import os
import signal
import socket
import subprocess
import sys
from typing import Final

from vmbus.cli import console, output
from vmbus.cli.remote import Remote
from vmbus.wire.errors import VmbusError

_ANNOUNCEMENT: Final = 4
"""Bytes of a listener's datagram: the guest's port."""


async def vsock(remote: Remote, arguments: argparse.Namespace) -> int:
    """Connect or listen."""
    if arguments.program and arguments.what == "connect":
        raise VmbusError("InvalidArgument", "is for listen: connect is this terminal", argument="COMMAND")
    path = await remote.find(arguments.machine)
    if arguments.what == "connect":
        with await remote.vsock(path, "Connect", arguments.port) as channel:
            return _carry(channel)
    with await remote.vsock(path, "Listen", arguments.port) as listener:
        output.warn(f"listening on port {arguments.port}; stop with ^C")
        if not arguments.program:
            with await _accept(listener, arguments.machine) as channel:
                return _carry(channel)
        # Nobody waits for them: the kernel forgets each when it ends.
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        while True:
            with await _accept(listener, arguments.machine) as channel:
                _serve(arguments.program, channel)


def _carry(channel: socket.socket) -> int:
    if sys.stdin.isatty():
        output.warn("connected; leave with ^]")
    console.attach(channel, pass_end_on=True)
    return 0


async def _accept(listener: socket.socket, machine: str) -> socket.socket:
    listener.setblocking(False)
    readable = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_reader(listener.fileno(), readable.set)
    try:
        await readable.wait()
    finally:
        loop.remove_reader(listener.fileno())
    data, ancillary, _, _ = listener.recvmsg(
        _ANNOUNCEMENT, socket.CMSG_SPACE(array.array("i").itemsize), socket.MSG_CMSG_CLOEXEC
    )
    fds = array.array("i", b"".join(payload for _, _, payload in ancillary))
    if not data or len(fds) != 1:
        raise VmbusError("Disconnected", f"{machine} or vmbusd has ended; listen again when it is back")
    output.warn(f"connection from the guest's port {int.from_bytes(data, 'little')}")
    return socket.socket(fileno=fds[0])


def _serve(command: list[str], channel: socket.socket) -> None:
    try:
        subprocess.Popen(command, stdin=channel.fileno(), stdout=channel.fileno())
    except OSError as error:
        raise VmbusError(
            "NotFound", f"{command[0]} cannot be run: {os.strerror(error.errno or 0)}", argument="COMMAND"
        ) from None
