# SPDX-License-Identifier: Apache-2.0
"""The one line of JSON that the broker writes to a new worker's stdin.

The worker is told nothing on its command line and nothing in its environment. Every descriptor
that the line names is inherited; the worker takes 0, 1, 2 and these, and no other.

``imported`` travels the other way: the worker writes the bytes ``IMPORTED`` to ``status`` once it
needs no file any more. The stager (same mount namespace) answers by taking the binds away; the
worker then goes on as soon as its ``/`` has no entry, and ends if that takes more than 10 s.
"""

from __future__ import annotations

import os
from typing import Final

import msgspec

from vmbus.wire.inlet import IMPORTED as IMPORTED  # noqa: PLC0414 (handed on)
from vmbus.wire.inlet import Startup as Startup  # noqa: PLC0414
from vmbus.wire.inlet import encode as encode  # noqa: PLC0414

LIMIT: Final = 4096

_decoder = msgspec.json.Decoder(Startup)


def read(fd: int) -> Startup:
    """Read the line from ``fd`` without reading past it. Raises ValueError for anything else."""
    line = bytearray()
    while not line.endswith(b"\n"):
        byte = os.read(fd, 1)
        if not byte or len(line) >= LIMIT:
            raise ValueError("the startup line is cut short" if not byte else "the startup line is too long")
        line += byte
    return _decoder.decode(line)
