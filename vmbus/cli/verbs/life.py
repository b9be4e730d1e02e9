# SPDX-License-Identifier: Apache-2.0
"""The verbs of a defined machine's life, from list to undefine.

In the help, ``FIRST`` looks at machines and changes their state; ``LAST``, which waits for a state and
forgets machines, stands behind the verbs of what a machine can do meanwhile.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Final

from vmbus.cli.verbs.command import Command, completed, files, machine, machines, secrets

STATES: Final = ("stopped", "starting", "running", "paused", "stopping", "crashed")


def _list(to: argparse.ArgumentParser) -> None:
    to.add_argument("--all", action="store_true", help="other users' machines too")
    to.add_argument("--names", action="store_true", help="names alone, one a line")


def _show(to: argparse.ArgumentParser) -> None:
    machine(to)
    to.add_argument("--stats", action="store_true", help="with its counters and memory")


def _start(to: argparse.ArgumentParser) -> None:
    machines(to)
    to.add_argument("--paused", action="store_true", help="stop before the first guest instruction")
    files(to, " (one machine only)")
    secrets(to)
    to.add_argument("--console", action="store_true", help="attach to its console (one machine only)")


def _stop(to: argparse.ArgumentParser) -> None:
    machines(to)
    to.add_argument(
        "--deadline",
        metavar="SECONDS",
        type=float,
        default=60.0,
        help="how long the guest gets to power off (default 60); 0: none",
    )
    to.add_argument("--no-wait", action="store_true", help="return at once")


def _shutdown(to: argparse.ArgumentParser) -> None:
    action = to.add_argument("machines", metavar="MACHINE", nargs="*", help="names of yours, or UUIDs")
    completed(action, "machine")
    to.add_argument(
        "--all", action="store_true", help="all running machines that you may see (for root: all there are)"
    )
    to.add_argument("--wait", metavar="SECONDS", type=float, help="wait so long for them to stop")


def _wait(to: argparse.ArgumentParser) -> None:
    machine(to)
    to.add_argument(
        "--state", choices=STATES, default="stopped", help="the state to wait for (default stopped)"
    )
    to.add_argument("--timeout", metavar="SECONDS", type=float, help="give up after so long (default: never)")


FIRST: Final[Sequence[Command]] = (
    Command(
        "list",
        "list machines",
        "Your own; root's list is everybody's. Without a terminal there is no heading.",
        (("vmbusctl list", "your machines"), ("vmbusctl list --all --json", "everybody's, for a program")),
        _list,
    ),
    Command(
        "show",
        "show a machine",
        "",
        (
            ("vmbusctl show web", "state and definition"),
            ("vmbusctl show web --stats --json", "for a program"),
        ),
        _show,
    ),
    Command(
        "start",
        "start machines",
        "Returns when the guest runs, or says why it does not.",
        (
            ("vmbusctl start web", "start it"),
            ("vmbusctl start web --console", "and see it boot"),
            ("vmbusctl start web --file disk/data/0=./data.qcow2", "with a file of yours for a slot"),
            ("vmbusctl start web --secret disk/root/0=-", "with the passphrase of an encrypted image"),
        ),
        _start,
    ),
    Command(
        "stop",
        "stop machines: power button, deadline, then the plug (disks flushed)",
        "",
        (
            ("vmbusctl stop web", "give the guest 60 seconds"),
            ("vmbusctl stop web --deadline 0", "end it now, its disks flushed"),
        ),
        _stop,
    ),
    Command(
        "shutdown",
        "press the power button",
        "What the guest makes of it is its own affair; see stop.",
        (
            ("vmbusctl shutdown web", "press and return"),
            ("vmbusctl shutdown --all --wait 90", "all of them, and wait"),
        ),
        _shutdown,
    ),
    Command(
        "kill",
        "end machines at once; what the guest had not flushed is lost",
        "",
        (("vmbusctl kill web", "pull the plug"),),
        machines,
    ),
    Command("reset", "pull the reset line", "", (("vmbusctl reset web", "as the reset button"),), machines),
    Command("pause", "stop the vCPUs", "", (("vmbusctl pause web", "until resume"),), machines),
    Command("resume", "let paused machines go on", "", (("vmbusctl resume web", "go on"),), machines),
)


LAST: Final[Sequence[Command]] = (
    Command(
        "wait",
        "wait for a state",
        "Ends with status 7 after the timeout, and 8 when the machine crashed instead.",
        (
            ("vmbusctl wait web", "until it is stopped"),
            ("vmbusctl wait web --state running --timeout 10", "up to ten seconds"),
        ),
        _wait,
    ),
    Command(
        "undefine",
        "forget stopped machines; their images stay",
        "",
        (("vmbusctl undefine web", "forget it"),),
        machines,
    ),
)
