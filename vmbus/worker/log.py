# SPDX-License-Identifier: Apache-2.0
"""The worker's log: lines on its stderr, read by the broker's log.

A line that does not fit into the pipe now is lost: whoever reads a worker's stderr can never make it wait.
"""

from __future__ import annotations

import os
import select
from typing import Final

_LINE_MAX: Final = 1024  # less than PIPE_BUF, so a pipe that is ready takes all of it at once
_ready = select.poll()
_ready.register(2, select.POLLOUT)


def say(what: str) -> None:
    """Write one line."""
    try:
        if any(events & select.POLLOUT for _, events in _ready.poll(0)):
            os.write(2, f"worker: {what}".encode(errors="replace")[: _LINE_MAX - 1] + b"\n")
    except OSError:
        return
