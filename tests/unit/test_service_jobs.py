# SPDX-License-Identifier: Apache-2.0
"""What a job tells of its work, and how often that is passed on."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from vmbus.service import jobs as module
from vmbus.service.jobs import Job, Jobs

Seen = list[tuple[str, tuple[int, int], dict[str, Any]]]


def told(interval: float, monkeypatch: pytest.MonkeyPatch) -> tuple[Seen, Job]:
    """What is passed on of work that tells three things, each when the loop has had time to pass it on."""
    monkeypatch.setattr(module, "INTERVAL", interval)
    seen: Seen = []

    async def work(job: Job) -> None:
        for step in range(3):
            job.tell((step, 3), step=step)
            job.tell(twice=2 * step)
            for _ in range(3):
                await asyncio.sleep(0)
        job.tell((3, 3))

    async def scenario() -> Job:
        jobs = Jobs()
        jobs.on_told = lambda job: seen.append(("told", job.progress, dict(job.result)))
        jobs.on_finished = lambda job: seen.append(("finished", job.progress, dict(job.result)))
        job = jobs.start("test", 0, "/x", work)
        await job.wait()
        return job

    return seen, asyncio.run(scenario())


def test_each_news_is_passed_on_where_there_is_time(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, job = told(0.0, monkeypatch)
    assert [progress for what, progress, _ in seen if what == "told"] == [(0, 3), (1, 3), (2, 3)]
    assert seen[1] == ("told", (1, 3), {"step": 1, "twice": 2})
    assert job.result.keys() == {"step", "twice", "seconds"}


def test_of_more_than_one_in_an_interval_the_first_is_passed_on_and_the_end_has_the_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen, job = told(3600.0, monkeypatch)
    assert [what for what, _, _ in seen] == ["told", "finished"]
    assert seen[0][1] == (0, 3)
    assert seen[1][1] == (3, 3)
    assert seen[1][2] == job.result
    assert job.result["twice"] == 4


def test_what_fails_keeps_what_it_has_counted_and_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(job: Job) -> None:
        job.tell((1, 2), pages=1)
        await asyncio.sleep(3600)

    async def scenario() -> Job:
        job = Jobs().start("test", 0, "/x", work)
        await asyncio.sleep(0)
        await job.cancel()
        return job

    job = asyncio.run(scenario())
    assert (job.state, job.progress, dict(job.result)) == ("cancelled", (1, 2), {"pages": 1})
