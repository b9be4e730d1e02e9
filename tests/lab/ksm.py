# SPDX-License-Identifier: Apache-2.0
"""This machine's KSM, for tests: held by one at a time, and left as it was found."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from tests.lab.system import SLOW

KSM: Final = Path("/sys/kernel/mm/ksm")
_LOCK: Final = Path("/tmp/.vmbus-lab-ksm")
_NAMES: Final = ("pages_to_scan", "sleep_millisecs", "smart_scan", "use_zero_pages", "run")


def read(name: str) -> str:
    """A setting or a figure; of a choice the one in brackets."""
    text = (KSM / name).read_text().strip()
    return text.partition("[")[2].partition("]")[0] or text


def settings() -> dict[str, str]:
    """What tests change, as it is."""
    return {name: read(name) for name in ("advisor_mode", *_NAMES) if (KSM / name).exists()}


@contextlib.contextmanager
def alone() -> Iterator[dict[str, str]]:
    """No other test uses KSM meanwhile; gives the settings that were found, and puts them back."""
    with _LOCK.open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = settings()
        try:
            yield found
        finally:
            (KSM / "run").write_text("2")
            for name, value in found.items():
                with contextlib.suppress(OSError):
                    (KSM / name).write_text(value)


def until(true: Callable[[], bool], seconds: float = 30) -> None:
    """Look every 50 ms; fail after ``seconds`` (of a machine with hardware KVM)."""
    end = time.monotonic() + seconds * SLOW
    while not true():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.05)


def merging(pids: list[int]) -> list[int]:
    """Pages of each worker that KSM has merged."""
    texts = [Path(f"/proc/{pid}/ksm_stat").read_text() for pid in pids]
    return [int(text.partition("ksm_merging_pages ")[2].split()[0]) for text in texts]


def scanned_since(scans: str) -> bool:
    """Whether a full scan has ended since ``full_scans`` was ``scans``."""
    return read("full_scans") != scans


def at_rest(pids: list[int], least: int, seconds: float = 90) -> list[int]:
    """Merged pages of each worker, once each has ``least`` and a full scan has added next to none."""
    end = time.monotonic() + seconds * SLOW
    while min(now := merging(pids)) < least:
        assert time.monotonic() < end, (now, least)
        time.sleep(0.05)
    while True:
        scans, last = read("full_scans"), now
        until(functools.partial(scanned_since, scans), 60)
        now = merging(pids)
        if sum(now) - sum(last) < 16:
            return now
