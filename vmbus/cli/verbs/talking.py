# SPDX-License-Identifier: Apache-2.0
"""The verbs that connect to what runs in a guest: by its console, a named port or a socket."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Final

from vmbus.cli.verbs.command import Command, machine


def _console(to: argparse.ArgumentParser) -> None:
    machine(to)
    to.add_argument("--read-only", action="store_true", help="only look")
    to.add_argument("--steal", action="store_true", help="take the place of who writes there now")


def _port(to: argparse.ArgumentParser) -> None:
    machine(to)
    to.add_argument("port", metavar="NAME", help="the port's name")
    to.add_argument("--read-only", action="store_true", help="only look")
    to.add_argument("--steal", action="store_true", help="take the place of who writes there now")


def _vsock(to: argparse.ArgumentParser) -> None:
    to.add_argument(
        "what",
        choices=("connect", "listen"),
        help="connect: to a port of the guest's; listen: take its connections to a port of the host's",
    )
    machine(to)
    to.add_argument("port", metavar="PORT", type=int, help="0 to 4294967295")
    to.add_argument(
        "program",
        metavar="COMMAND",
        nargs=argparse.REMAINDER,
        help="of listen: serves each connection as its standard input and output; "
        "without it one connection is taken, here",
    )


COMMANDS: Final[Sequence[Command]] = (
    Command(
        "console",
        "attach to the serial console; ^] leaves",
        "First comes the last output (up to 64 KiB). Many may look, one may write.",
        (
            ("vmbusctl console web", "read and write"),
            ("vmbusctl console web --read-only </dev/null >web.log", "record it"),
        ),
        _console,
    ),
    Command(
        "port",
        "connect to a named port of a machine",
        "The guest has it as /dev/virtio-ports/NAME. First comes what it wrote last (up to 64 KiB).",
        (
            ("vmbusctl port web agent", "read and write; ^] leaves"),
            ("vmbusctl port web log --read-only </dev/null >>web.log", "record it"),
        ),
        _port,
    ),
    Command(
        "vsock",
        "connect to a port of a guest's, or listen for its connections",
        "For a machine with vsock, the guest's CID, in its definition. The guest uses AF_VSOCK; the host is\n"
        "CID 2, and its ports are this machine's alone. An end of file on standard input is passed on.",
        (
            ("vmbusctl vsock connect web 1024", "read and write; ^] leaves"),
            ("vmbusctl vsock listen web 514 tee -a web.log", "a program for each connection"),
        ),
        _vsock,
    ),
)
