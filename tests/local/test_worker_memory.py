# SPDX-License-Identifier: Apache-2.0
"""A guest's memory in a closed worker: given back through the balloon, and taken again."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.local.worker_guest import Guest
from vmbus.wire.worker import MemoryTarget, Stats

pytestmark = pytest.mark.requires("kvm")

MIB = 1 << 20
MEMORY = 64 * MIB


def resident(pid: int) -> int:
    """Bytes."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    found = re.search(r"^Rss:\s+(\d+) kB", text, re.MULTILINE)
    assert found
    return int(found[1]) * 1024


def test_what_the_guest_gives_the_worker_does_not_have() -> None:
    with Guest("balloon touch=16", memory=MEMORY) as guest:
        guest.start()
        guest.said(b"touched 4096 pages")
        before = resident(guest.worker.pid)
        assert guest.service.do(MemoryTarget, bytes=MEMORY - 12 * MIB).error is None
        guest.said(b"balloon: 3072 pages")
        assert before - resident(guest.worker.pid) > 11 * MIB
        figures = guest.service.do(Stats).stats["devices"]["balloon"]
        assert (figures["target"], figures["ballooned"]) == (MEMORY - 12 * MIB, 12 * MIB)
        assert guest.service.do(MemoryTarget, bytes=MEMORY).error is None
        guest.said(b"balloon: 0 pages")
        assert before - resident(guest.worker.pid) < 1 * MIB


def test_a_target_that_cannot_be_is_refused_and_the_guest_goes_on() -> None:
    with Guest("balloon touch=4", memory=MEMORY) as guest:
        guest.start()
        guest.said(b"touched 1024 pages")
        for target in (0, 4097, MEMORY + 4096):
            result = guest.service.do(MemoryTarget, bytes=target)
            assert (result.error, result.argument) == ("InvalidArgument", "target")
        assert guest.service.do(MemoryTarget, bytes=MEMORY - MIB).error is None
        guest.said(b"balloon: 256 pages")
