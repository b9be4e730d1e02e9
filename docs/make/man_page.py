# SPDX-License-Identifier: Apache-2.0
"""man/vmbusctl.1, from the command line's parser and the table of exit statuses."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from docs.make import roff
from vmbus.cli import arguments, commands, main
from vmbus.cli.verbs.command import Command

OUTPUT = "man/vmbusctl.1"

_HEAD = """\
.\\" SPDX-License-Identifier: Apache-2.0
.\\" Made from vmbus/cli/arguments.py by docs/make/man_page.py (`make docs`); not to be edited.
.TH VMBUSCTL 1 "" "vmbus" "User Commands"
.SH NAME
vmbusctl \\- define, run and watch virtual machines of vmbus
.SH SYNOPSIS
.B vmbusctl
.RI [ "common options" ]
.I COMMAND
.RI [ arguments ]
.SH DESCRIPTION
vmbusctl talks to
.BR vmbusd (8)
on the system bus. It needs no rights of its own: what you may do is decided there, by polkit.
Files that it opens (for
.BR run ,
and for
.B start \\-\\-file\\fR)
it opens as you.
.PP
A machine is named by the name that you gave it, which is unique among your machines, or by its
UUID, which also finds other users' machines.
"""
_TAIL = """\
.SH ENVIRONMENT
.TP
.B DBUS_SYSTEM_BUS_ADDRESS
The bus, unless
.B \\-\\-bus\\-address
is given.
.SH EXAMPLES
Define a machine on an overlay of yours, start it and look at it boot:
.PP
.EX
qemu\\-img create \\-f qcow2 \\-b /srv/images/debian.qcow2 \\-F qcow2 web.qcow2
vmbusctl define \\-\\-name web \\-\\-memory 512M \\-\\-kernel /boot/vmlinuz \\e
    \\-\\-cmdline "console=ttyS0 root=/dev/vda" \\-\\-disk web.qcow2,format=qcow2
vmbusctl start web \\-\\-console
.EE
.PP
In a script, wait until it has powered off, and know whether it crashed:
.PP
.EX
vmbusctl shutdown web && vmbusctl wait web \\-\\-timeout 120 || echo "status $?"
.EE
.SH SEE ALSO
.BR vmbus (7),
.BR vmbus\\-machine (5),
.BR vmbusd (8),
.BR vmbus\\-broker (8),
.BR busctl (1),
.BR qemu\\-img (1)
"""
_OTHERWISE = "Another error, or the reader of the output went away."
_MEANING = {
    0: "Done. For run: the guest powered off, or the console was left.",
    1: _OTHERWISE,
    2: "The command line, the definition or an image is wrong; nothing was done.",
    3: "There is no such machine or file.",
    4: "You may not: polkit, the broker's policy or a file's mode says so.",
    5: "The machine is not in a state in which this can be done, or what it needs is in use.",
    6: "The bus, vmbusd or the broker cannot be reached.",
    7: "A deadline passed.",
    8: "The machine crashed (run, wait).",
    130: "Interrupted.",
}


def text() -> str:
    """The whole page."""
    top = arguments.parser()
    verbs = next(a for a in top._actions if isinstance(a, argparse._SubParsersAction)).choices
    lines = [_HEAD.rstrip("\n"), ".SH COMMANDS"]
    for command in arguments.COMMANDS:
        lines.extend(_command(command, verbs[command.name]))
    lines.append(".SH COMMON OPTIONS")
    lines.append("These may stand before or after the command.")
    for action in _common(top):
        lines.extend(roff.option(action))
    lines.append(".SH EXIT STATUS")
    statuses = {0, main.OTHERWISE, main.INTERRUPTED, commands.CRASHED, *main.STATUS.values()}
    for status in sorted(statuses):
        lines += [".TP", f".B {status}", roff.escaped(_MEANING[status])]
        kinds = ", ".join(kind for kind, found in main.STATUS.items() if found == status)
        if kinds:
            lines.append(roff.escaped(f"({kinds})"))
    lines.append(_TAIL.rstrip("\n"))
    return "\n".join(lines) + "\n"


def _command(command: Command, parser: argparse.ArgumentParser) -> Iterator[str]:
    own = [action for action in parser._actions if action.dest not in _shared(parser)]
    positionals = [roff.metavar(action) for action in own if not action.option_strings]
    yield f".SS {roff.escaped(' '.join(['vmbusctl', command.name, *positionals]))}"
    yield roff.escaped(f"{command.summary[:1].upper()}{command.summary[1:]}.")
    if command.detail:
        yield roff.escaped(command.detail.replace("\n", " "))
    for action in own:
        if action.dest != "help":
            yield from roff.option(action)
    for line, what in command.examples:
        yield ".PP"
        yield roff.escaped(f"{what[:1].upper()}{what[1:]}:")
        yield ".PP"
        yield ".EX"
        yield f"    {roff.escaped(line)}"
        yield ".EE"


def _shared(parser: argparse.ArgumentParser) -> set[str]:
    return {action.dest for action in _common(parser)}


def _common(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    (group,) = (group for group in parser._action_groups if group.title == "common options")
    return group._group_actions
