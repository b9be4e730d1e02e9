# SPDX-License-Identifier: Apache-2.0
"""This machine's pools of huge pages, for tests: enlarged for a while, by one test at a time.

The figures are the whole machine's, so whoever uses a pool holds a lock: in one run, and across runs.
"""

from __future__ import annotations

import contextlib
import fcntl
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

SIZES: Final = {2 << 20: "2048kB", 1 << 30: "1048576kB"}
_LOCK: Final = Path("/tmp/.vmbus-lab-hugepages")


class Pool:
    """The pages of one size."""

    def __init__(self, page_size: int = 2 << 20) -> None:
        self.page_size = page_size
        self.directory = Path(f"/sys/kernel/mm/hugepages/hugepages-{SIZES[page_size]}")

    def __getitem__(self, name: str) -> int:
        """nr, free, resv, surplus."""
        return int((self.directory / f"{name}_hugepages").read_text())

    def figures(self) -> dict[str, int]:
        """All of them, and what is neither used nor reserved."""
        found = {name: self[name] for name in ("nr", "free", "resv", "surplus")}
        return found | {"left": found["free"] - found["resv"]}

    def set(self, pages: int) -> None:
        """Have ``pages`` in all, as an administrator does it."""
        (self.directory / "nr_hugepages").write_text(str(pages))

    def until_it_has(self, pages: int, seconds: float = 10) -> bool:
        """Wait until there are ``pages`` in all; whether they came to be."""
        end = time.monotonic() + seconds
        while self["nr"] != pages and time.monotonic() < end:
            time.sleep(0.01)
        return self["nr"] == pages

    def until(self, wanted: dict[str, int], seconds: float) -> dict[str, int]:
        """Wait until the figures are ``wanted``; what they are then."""
        end = time.monotonic() + seconds
        while (now := self.figures()) != wanted and time.monotonic() < end:
            time.sleep(0.005)
        return now


@contextlib.contextmanager
def enlarged(pages: int, page_size: int = 2 << 20) -> Iterator[Pool]:
    """``pages`` more than there were, all to be left when the test is over; skips where there is no room."""
    with _LOCK.open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        pool = Pool(page_size)
        if not pool.directory.is_dir():
            pytest.skip(f"needs pages of {SIZES[page_size]}")
        before = pool["nr"]
        pool.set(before + pages)
        try:
            if pool["nr"] < before + pages:
                pytest.skip(f"needs {pages} pages of {SIZES[page_size]}: memory is too full or in pieces")
            yield pool
        finally:
            pool.set(before)
