# SPDX-License-Identifier: Apache-2.0
"""Privileged steps, and the audit log that prints them.

A privileged operation is a list of steps. Each says what it does before it is done, does it, and undoes it.
``carry_out`` does them in order and, when one fails, undoes those before it in reverse; a worker keeps the
steps that made it, and its end undoes them.
"""

import sys
import time
from collections.abc import Sequence
from typing import Protocol


class Step(Protocol):
    """One privileged step."""

    def describe(self) -> str:
        """What it does, in words fit for the audit log."""

    def execute(self) -> None:
        """Do it. Raises OSError or VmbusError, having changed nothing."""

    def undo(self) -> None:
        """Take it back. Idempotent."""


def carry_out(steps: Sequence[Step]) -> None:
    """Execute ``steps`` in order; all or nothing."""
    for index, step in enumerate(steps):
        try:
            step.execute()
        except BaseException:
            take_back(steps[:index])
            raise


def take_back(steps: Sequence[Step]) -> None:
    """Undo ``steps``, last first; a step that cannot be undone is logged and the others go on."""
    for step in reversed(steps):
        try:
            step.undo()
        except OSError as error:
            log(f"cannot undo '{step.describe()}': {error}")


def log(line: str) -> None:
    """One line on stderr, with the time; control characters cannot forge another line."""
    safe = "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)
    try:
        sys.stderr.write(f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} {safe}\n")
    except OSError:
        return  # the log's reader is gone; the broker's work does not depend on it
