# SPDX-License-Identifier: Apache-2.0
"""Privileged steps, and the audit log that prints them.

A privileged operation is a list of steps. Each can say what it does before it is done, do it, and undo it.
``carry_out`` does them in order and, when one fails, undoes those before it in reverse; a worker keeps the
steps that made it, and its end undoes them.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Sequence
from typing import Protocol


class Step(Protocol):
    """One privileged step."""

    def describe(self) -> str:
        """What it does, in words fit for the audit log."""

    def execute(self) -> None:
        """Do it. Raises OSError or VmbusError, having changed nothing."""

    def undo(self) -> None:
        """Take it back; idempotent, and complete as far as that is possible."""


def carry_out(steps: Sequence[Step]) -> None:
    """Execute ``steps`` in order; all or nothing."""
    done: list[Step] = []
    try:
        for step in steps:
            step.execute()
            done.append(step)
    except BaseException:
        take_back(done)
        raise


def take_back(steps: Sequence[Step]) -> None:
    """Undo ``steps``, last first; a step that cannot be undone is logged and the others go on."""
    for step in reversed(steps):
        try:
            step.undo()
        except OSError as error:
            log(f"cannot undo '{step.describe()}': {error}")


def describe(steps: Iterable[Step]) -> str:
    """The plan in one line."""
    return "; ".join(step.describe() for step in steps)


def log(line: str) -> None:
    """One line on stderr, with the time; control characters cannot forge another line."""
    safe = "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)
    stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    try:
        sys.stderr.write(f"{stamp} {safe}\n")
        sys.stderr.flush()
    except OSError:  # the log's reader is gone; the broker's work does not depend on it
        pass
