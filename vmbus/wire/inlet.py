# SPDX-License-Identifier: Apache-2.0
"""What the broker itself writes on a connection to a worker: who connects, and a file.

Apart from ``wire.worker`` so that the broker, which runs as root, loads nothing of the definition
format or of the worker's other messages.
"""

from __future__ import annotations

from typing import Literal

import msgspec


class Greeting(msgspec.Struct, tag_field="op", tag="greeting", frozen=True, kw_only=True):
    """The first datagram of a connection, written by the broker.

    ``inlet``: exactly one more datagram follows, a Delivery with one fd (or several queues of one tap).
    """

    role: Literal["control", "inlet"]
    epoch: int = 0


class Delivery(msgspec.Struct, tag_field="op", tag="delivery", frozen=True, kw_only=True):
    """A file for ``slot``; the fd is beside it."""

    slot: str
