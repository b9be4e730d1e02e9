# SPDX-License-Identifier: Apache-2.0
"""This machine's KSM, for tests: held by one at a time, and left as it was found."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path
from typing import Final

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
