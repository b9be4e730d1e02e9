# SPDX-License-Identifier: Apache-2.0
"""Privileged steps, and the audit log that prints them.

A privileged operation is a list of steps. Each says what it does before it is done, does it, and undoes it.
``carry_out`` does them in order and, when one fails, undoes those before it in reverse; a worker keeps the
steps that made it, and its end undoes them.
"""

import contextlib
import os
import select
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
    """One line on stderr, with the time; control characters cannot forge another line.

    Never waits: when the reader of a pipe is behind, the line is lost (pipe(7): PIPE_BUF bytes fit, or none).
    """
    safe = "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)
    stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    data = f"{stamp} {safe}".encode(errors="backslashreplace")
    with contextlib.suppress(OSError):
        if select.select([], [2], [], 0)[1]:
            os.write(2, data[: select.PIPE_BUF - 1] + b"\n")
