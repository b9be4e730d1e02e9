# SPDX-License-Identifier: Apache-2.0
"""What a verb of vmbusctl is, and the arguments that verbs of several groups take.

A module beside this one is a group of verbs: a function for the arguments of each, then their sentences and
examples in the order of the help. It knows of this module only. ``vmbus.cli.arguments`` makes one parser of
all groups; what the verbs do is in ``vmbus.cli.commands``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

Completion = Literal["machine", "file", "directory", "none"]


@dataclass(frozen=True)
class Command:
    """One verb: its sentence, examples with what they do, and what adds its arguments."""

    name: str
    summary: str
    detail: str
    examples: Sequence[tuple[str, str]]
    arguments: Callable[[argparse.ArgumentParser], None]


def completion_of(action: argparse.Action) -> Completion:
    """What a shell offers for the value of this argument."""
    found: Completion = getattr(action, "vmbus_completion", "none")
    return found


def completed(action: argparse.Action, kind: Completion) -> None:
    """Have shells offer values of this kind for the argument."""
    action.vmbus_completion = kind  # type: ignore[attr-defined]


def machine(to: argparse.ArgumentParser) -> None:
    """One machine."""
    completed(to.add_argument("machine", metavar="MACHINE", help="a name of yours, or a UUID"), "machine")


def machines(to: argparse.ArgumentParser) -> None:
    """One machine or several."""
    action = to.add_argument("machines", metavar="MACHINE", nargs="+", help="names of yours, or UUIDs")
    completed(action, "machine")


def files(to: argparse.ArgumentParser, limit: str = "") -> None:
    """Files for slots that are passed with the call."""
    action = to.add_argument(
        "--file",
        metavar="SLOT=PATH",
        action="append",
        default=[],
        dest="files",
        help=f'open PATH here and pass it for a slot with source = "fd"{limit}',
    )
    completed(action, "file")


def secrets(to: argparse.ArgumentParser) -> None:
    """Passphrases of encrypted images."""
    action = to.add_argument(
        "--secret",
        metavar="SLOT=PATH",
        action="append",
        default=[],
        dest="secrets",
        help="the passphrase of encrypted image disk/ID/N: a file's content, or - for standard input",
    )
    completed(action, "file")
