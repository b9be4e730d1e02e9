# SPDX-License-Identifier: Apache-2.0
"""What there is to complete after each verb of vmbusctl, for the makers of completions."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from vmbus.cli import arguments
from vmbus.cli.verbs.command import Completion, completion_of


@dataclass(frozen=True)
class Words:
    """A verb's options, and what its positional argument is ("machine", "file" or "none")."""

    name: str
    summary: str
    actions: tuple[argparse.Action, ...]
    common: frozenset[str]
    positional: Completion

    @property
    def options(self) -> list[str]:
        """Every option string."""
        return [word for action in self.actions for word in action.option_strings]

    @property
    def with_value(self) -> list[argparse.Action]:
        """The options that take a value."""
        return [action for action in self.actions if action.option_strings and action.nargs != 0]

    def kind(self, action: argparse.Action) -> Completion:
        """What the value of ``action`` is."""
        return completion_of(action)


def verbs() -> list[Words]:
    """One entry for each verb, in the order of the help."""
    top = arguments.parser()
    common = frozenset(word for action in top._actions for word in action.option_strings)
    choices = next(a for a in top._actions if isinstance(a, argparse._SubParsersAction)).choices
    return [
        Words(
            command.name,
            command.summary,
            tuple(choices[command.name]._actions),
            common,
            _positional(choices[command.name]),
        )
        for command in arguments.COMMANDS
    ]


def _positional(parser: argparse.ArgumentParser) -> Completion:
    for action in parser._actions:
        if not action.option_strings:
            return completion_of(action)
    return "none"
