# SPDX-License-Identifier: Apache-2.0
"""Long work that a client can watch and cancel. A job is a task with a face on the bus.

Work tells how far it is as often as it likes (``Job.tell``); who watches hears of it at most once in
INTERVAL, of the latest, and with the end of what was last.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any, Final, Literal

from vmbus.wire.errors import VmbusError

log = logging.getLogger("vmbus.jobs")

LINGER: Final = 30.0
"""Seconds for which a finished job can still be read."""
KEPT: Final = 32
"""Finished jobs that are kept for an owner; with more, the oldest goes before its time."""
INTERVAL: Final = 1.0
"""Seconds between two news of a job that runs."""

Figure = bool | int | float | str
Work = Awaitable[None] | Callable[["Job"], Awaitable[None]]
"""What a job does; a function of the job where it has something to tell."""

State = Literal["running", "done", "failed", "cancelled"]


class Job:
    """``machine`` is the UUID of the machine that it works on, or the object path of something else;
    ``caller`` the connection that it ends with, if it does with one.

    ``progress``: bytes done and in all; ``result``: what it counts while it runs, and has found when it is
    done, by names that its kind fixes; ``note``: what a job that is done has to say.
    """

    def __init__(
        self, jobs: Jobs, number: int, kind: str, owner: int, machine: str, caller: str = ""
    ) -> None:
        self._jobs = jobs
        self.number = number
        self.kind = kind
        self.owner = owner
        self.machine = machine
        self.caller = caller
        self.state: State = "running"
        self.error: VmbusError | None = None
        self.progress = (0, 0)
        self.result: Mapping[str, Figure] = {}
        self.note = ""
        self._task: asyncio.Task[None] | None = None
        self._begun = asyncio.Event()
        self._cancelling = False

    def begin(self, work: Work) -> None:
        """Run ``work`` as this job. A VmbusError fails it, a cancellation cancels it."""
        self._task = asyncio.ensure_future(self._run(work(self) if callable(work) else work))

    def tell(self, progress: tuple[int, int] | None = None, **figures: Figure) -> None:
        """The work is so far, and has counted so much."""
        if progress is not None:
            self.progress = progress
        self.result = {**self.result, **figures}
        self._jobs.told(self)

    async def _run(self, work: Awaitable[None]) -> None:
        self._begun.set()
        begun = asyncio.get_running_loop().time()
        try:
            await work
            self.tell(seconds=asyncio.get_running_loop().time() - begun)
            self.state = "done"
        except asyncio.CancelledError:
            self.state = "cancelled"
        except VmbusError as error:
            self.state, self.error = "failed", error
        except Exception:
            log.exception("job %d (%s) failed", self.number, self.kind)
            self.state, self.error = (
                "failed",
                VmbusError("Internal", "an error of vmbus; its log has the details"),
            )
        self._jobs.finished(self)

    async def wait(self) -> None:
        """Wait for the end. Raises the error it failed with, Cancelled if it was cancelled.

        Cancelling the waiter does not cancel the job.
        """
        assert self._task is not None
        await asyncio.wait({self._task})
        if self.error is not None:
            raise self.error
        if self.state == "cancelled":
            raise VmbusError("Cancelled", f"the {self.kind} was cancelled")

    async def cancel(self) -> None:
        """Cancel and wait until everything is undone. Raises InvalidState when it has finished."""
        await self._begun.wait()  # a task that is cancelled before its first step would never undo anything
        if self.state != "running" or self._task is None:
            raise VmbusError("InvalidState", f"the job is {self.state}; only a running one can be cancelled")
        if not self._cancelling:  # a second cancellation would interrupt the undoing
            self._cancelling = True
            self._task.cancel()
        await asyncio.wait({self._task})


class Jobs:
    """All jobs. The observers are the bus's."""

    def __init__(self) -> None:
        self._next = 0
        self._jobs: dict[int, Job] = {}
        self._news: dict[int, asyncio.TimerHandle] = {}
        self._last: dict[int, float] = {}
        self._cancelling: set[asyncio.Task[None]] = set()
        self.on_added: Callable[[Job], None] = lambda job: None
        self.on_told: Callable[[Job], None] = lambda job: None
        self.on_finished: Callable[[Job], None] = lambda job: None
        self.on_removed: Callable[[Job], None] = lambda job: None

    def start(self, kind: str, owner: int, machine: str, work: Work, *, caller: str = "") -> Job:
        """A new job that is already running, and is cancelled when the connection ``caller`` leaves."""
        self._next += 1
        job = Job(self, self._next, kind, owner, machine, caller)
        self._jobs[job.number] = job
        self.on_added(job)
        job.begin(work)
        return job

    def sender_left(self, sender: str) -> None:
        """A connection is gone: nobody waits for what ends with it."""
        for job in self._jobs.values():
            if job.caller == sender and job.state == "running":
                task = asyncio.ensure_future(_cancel(job))
                self._cancelling.add(task)
                task.add_done_callback(self._cancelling.discard)

    def told(self, job: Job) -> None:
        """Called by the job when it has news."""
        if job.number not in self._news:
            loop = asyncio.get_running_loop()
            due = self._last.get(job.number, float("-inf")) + INTERVAL
            self._news[job.number] = loop.call_at(due, self._pass_on, job)

    def _pass_on(self, job: Job) -> None:
        del self._news[job.number]
        self._last[job.number] = asyncio.get_running_loop().time()
        self.on_told(job)

    def finished(self, job: Job) -> None:
        """Called by the job at its end."""
        if (news := self._news.pop(job.number, None)) is not None:
            news.cancel()
        self._last.pop(job.number, None)
        self.on_finished(job)
        finished = [
            other for other in self._jobs.values() if other.owner == job.owner and other.state != "running"
        ]
        for old in finished[:-KEPT]:
            self._remove(old)
        asyncio.get_running_loop().call_later(LINGER, self._remove, job)

    def _remove(self, job: Job) -> None:
        if self._jobs.pop(job.number, None) is not None:
            self.on_removed(job)


async def seen_through(work: Coroutine[Any, Any, object]) -> None:
    """Do what cannot be left half done: whoever does it may be cancelled meanwhile, and that is forgotten."""
    task = asyncio.ensure_future(work)
    while not task.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.shield(task)
    task.result()


async def _cancel(job: Job) -> None:
    with contextlib.suppress(VmbusError):  # it has ended by itself
        await job.cancel()
