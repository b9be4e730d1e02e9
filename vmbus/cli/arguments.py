# SPDX-License-Identifier: Apache-2.0
"""vmbusctl's command line. The man page and the shell completions are made from this parser (docs/make).

The verbs are in ``vmbus.cli.verbs``, a module a group; here they get their order, and the options that all of
them take.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, Final, NoReturn

import vmbus
from vmbus.cli.verbs import definition, devices, host, life, saving, talking
from vmbus.cli.verbs.command import Command

COMMANDS: Final[Sequence[Command]] = (
    *definition.COMMANDS,
    *life.FIRST,
    *saving.COMMANDS,
    *talking.COMMANDS,
    *devices.COMMANDS,
    *life.LAST,
    *host.COMMANDS,
)


class Parser(argparse.ArgumentParser):
    """argparse, with errors of one line that say where help is."""

    def error(self, message: str) -> NoReturn:
        """Exit with status 2."""
        self.exit(2, f"vmbusctl: {message} (see '{self.prog} --help')\n")


class Format(argparse.RawDescriptionHelpFormatter):
    """Two columns, the first narrow enough for 80 characters."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=26, width=96)


def parser() -> Parser:
    """The whole command line."""
    top = Parser(
        prog="vmbusctl",
        description="Define, run and watch virtual machines of vmbus.",
        epilog="Every command has its own help with examples: vmbusctl COMMAND --help. More: man vmbusctl.",
        formatter_class=Format,
        allow_abbrev=False,
    )
    top.add_argument("--version", action="version", version=f"vmbusctl {vmbus.__version__}")
    _common(top)
    verbs = top.add_subparsers(dest="command", metavar="COMMAND", required=True, title="commands")
    for command in COMMANDS:
        sub = verbs.add_parser(
            command.name,
            help=command.summary,
            description=f"{command.summary[:1].upper()}{command.summary[1:]}.\n\n{command.detail}".strip(),
            epilog="examples:\n" + "\n".join(f"  {line}\n      {what}" for line, what in command.examples),
            formatter_class=Format,
            allow_abbrev=False,
        )
        command.arguments(sub)
        _common(sub)
    return top


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; exits with status 2 if it is wrong, 0 after --help."""
    defaults: dict[str, Any] = {
        "json": False,
        "bus_address": None,
        "bus_name": "org.vmbus1",
        "no_ask": False,
        "no_autostart": False,
    }
    found = parser().parse_args(arguments)
    for key, value in defaults.items():
        if not hasattr(found, key):
            setattr(found, key, value)
    return found


def _common(to: argparse.ArgumentParser) -> None:
    """Options that may stand before or after the command."""
    group = to.add_argument_group("common options")
    add = group.add_argument
    add(
        "--json",
        action="store_true",
        default=argparse.SUPPRESS,
        help="one JSON document; errors as JSON too",
    )
    add(
        "--bus-address",
        metavar="ADDRESS",
        default=argparse.SUPPRESS,
        help="D-Bus address of the bus (default: DBUS_SYSTEM_BUS_ADDRESS, else the system bus)",
    )
    add(
        "--bus-name",
        metavar="NAME",
        default=argparse.SUPPRESS,
        help="bus name of the vmbusd to talk to (default: org.vmbus1)",
    )
    add(
        "--no-ask",
        action="store_true",
        default=argparse.SUPPRESS,
        help="fail rather than let polkit ask somebody for a password",
    )
    add(
        "--no-autostart",
        action="store_true",
        default=argparse.SUPPRESS,
        help="fail when vmbusd is not running, rather than let the bus start it",
    )
