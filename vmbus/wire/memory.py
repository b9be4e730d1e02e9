# SPDX-License-Identifier: Apache-2.0
"""What children of the broker report to the service about the host's memory: settings, and who uses KSM.

Apart from ``wire.broker`` since the broker itself, which passes it on, has no need of it.
"""

from __future__ import annotations

import msgspec


class Tuned(msgspec.Struct, frozen=True, kw_only=True):
    """After a Tune."""

    values: dict[str, str] = {}
    """What the files that were named say now."""
    found: dict[str, str] = {}
    """Settings of KSM that we have changed, as they were found."""
    grown: dict[str, int] = {}
    """Pages that we have added to pools of huge pages, by the pool's nr_hugepages."""


class Merger(msgspec.Struct, frozen=True, kw_only=True):
    """A process some of whose memory is offered to KSM."""

    pid: int
    uid: int
    name: str
    merged: int
    """Pages."""
    profit: int
    """Bytes saved, less what KSM keeps for it; may be negative."""


class Seen(msgspec.Struct, frozen=True, kw_only=True):
    """After a Look."""

    mergers: list[Merger] = []
    ksmd_seconds: float = 0.0
    """CPU time of the kernel thread ksmd since boot."""
