# SPDX-License-Identifier: Apache-2.0
"""What the broker itself writes to a worker: its startup line, who connects, and a file.

Apart from ``wire.worker`` and ``wire.startup`` so that the broker, which runs as root, loads nothing of the
definition format, of the worker's other messages, or of what only a worker does.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

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


def encode(startup: Startup) -> bytes:
    """The line, newline included."""
    return msgspec.json.encode(startup) + b"\n"


class Greeting(msgspec.Struct, tag_field="op", tag="greeting", frozen=True, kw_only=True):
    """The first datagram of a connection, written by the broker.

    ``inlet``: exactly one more datagram follows, a Delivery with one fd (or several queues of one tap).
    """

    role: Literal["control", "inlet"]
    epoch: int = 0


class Delivery(msgspec.Struct, tag_field="op", tag="delivery", frozen=True, kw_only=True):
    """A file for ``slot``; the fd is beside it."""

    slot: str
