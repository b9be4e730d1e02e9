# SPDX-License-Identifier: Apache-2.0
"""Work beside the loop: its result, its error, and no thread that stays."""

from __future__ import annotations

import asyncio
import os
import threading
import time

import pytest

from vmbus.service.aside import aside


def test_results_and_errors_come_back_and_no_thread_stays() -> None:
    async def work() -> None:
        assert await aside(os.path.basename, "/a/b") == "b"
        with pytest.raises(FileNotFoundError):
            await aside(os.stat, "/there/is/no/such/file")

    before = threading.active_count()
    asyncio.run(work())
    deadline = time.monotonic() + 5  # the last one tells its result before it ends
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == before


def test_work_that_cannot_wake_the_loop_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after ``descriptors.expel``: the queue is shared, the descriptor that wakes is not."""

    async def work() -> str:
        monkeypatch.setattr(asyncio.get_running_loop(), "_write_to_self", lambda: None)
        return await aside(os.path.basename, "/a/b")

    assert asyncio.run(asyncio.wait_for(work(), 5)) == "b"
