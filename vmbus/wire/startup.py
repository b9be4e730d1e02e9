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
from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

LIMIT: Final = 4096
IMPORTED: Final = b"imported\n"

Fd = Annotated[int, Meta(ge=0, le=1 << 20)]


class Startup(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker holds when it begins. Unknown keys are ignored (an older worker, a newer broker)."""

    listen: Fd  # listening SOCK_SEQPACKET socket in RUN/workers/UUID/
    kvm: Fd  # /dev/kvm, read-write
    status: Fd  # write end of a pipe to the stager
    rings: Annotated[int, Meta(ge=0, le=16)] = 2  # io_uring rings, one an I/O thread; 0: blocking engine
    ring_files: Annotated[int, Meta(ge=1, le=16384)] = 1024  # places in each ring's sparse file table
    profile: Literal["plain", "vfio"] = "plain"
    expect_empty_root: bool = True  # False only in tests that run a worker without a root of its own


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Startup)


def encode(startup: Startup) -> bytes:
    """The line, newline included."""
    return _encoder.encode(startup) + b"\n"


def read(fd: int) -> Startup:
    """Read the line from ``fd`` without reading past it. Raises ValueError for anything else."""
    line = bytearray()
    while not line.endswith(b"\n"):
        byte = os.read(fd, 1)
        if not byte or len(line) >= LIMIT:
            raise ValueError("the startup line is cut short" if not byte else "the startup line is too long")
        line += byte
    return _decoder.decode(line)
