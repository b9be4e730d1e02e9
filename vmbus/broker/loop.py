# SPDX-License-Identifier: Apache-2.0
"""The single-threaded loop: descriptors, timers, and tasks that wait without blocking.

A task is a generator: ``value = yield from pending`` goes on once somebody has settled ``pending``, or raises
the error that it failed with. There are no threads, so between two yields nothing else of the broker runs:
check and act without a yield between them. Left out on purpose: asyncio (a scheduler to trust, and several
MB, in a root process), priorities, cancellation.
"""

from __future__ import annotations

import heapq
import os
import selectors
import signal
import time
import traceback
from collections.abc import Callable, Generator
from typing import Any, Generic, TypeVar

from vmbus.broker.steps import log

T = TypeVar("T")
Task = Generator["Pending[Any]", None, T]
Call = Callable[[], object]


class Pending(Generic[T]):
    """A value that will be there later. Settled once; later attempts are ignored."""

    def __init__(self) -> None:
        self.settled = False
        self._value: T | None = None
        self._error: Exception | None = None
        self._waiting: list[Call] = []

    def settle(self, value: T | None, error: Exception | None = None) -> None:
        """Give the value to all who wait, or raise the error in them."""
        if not self.settled:
            self.settled, self._value, self._error = True, value, error
            for resume in self._waiting:
                resume()
            self._waiting.clear()

    def when_settled(self, resume: Call) -> None:
        """Call ``resume`` once settled (now, if it is)."""
        if self.settled:
            resume()
        else:
            self._waiting.append(resume)

    def result(self) -> Any:
        """The value, or raise the error."""
        if self._error is not None:
            raise self._error
        return self._value

    def __iter__(self) -> Task[T]:
        yield self
        value: T = self.result()
        return value


def start(task: Task[T]) -> Pending[T]:
    """Run a task until it waits; what it returns or raises settles the result."""
    outcome: Pending[T] = Pending()

    def advance() -> None:
        try:
            next(task).when_settled(advance)
        except StopIteration as stop:
            outcome.settle(stop.value)
        except Exception as error:
            log(f"a task failed: {type(error).__name__}: {error}")
            outcome.settle(None, error)

    advance()
    return outcome


class Loop:
    """Watches descriptors for reading, keeps timers, hears signals."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._timers: list[tuple[float, int]] = []
        self._calls: dict[int, Call] = {}  # of timers that are due, by their numbers, from 1
        self._last = 0
        self._code: int | None = None

    def watch(self, fd: int, call: Call) -> None:
        """Call ``call`` whenever ``fd`` is readable (a pidfd: its process has ended)."""
        self._selector.register(fd, selectors.EVENT_READ, call)

    def unwatch(self, fd: int) -> None:
        """Forget ``fd``, before it is closed. Idempotent."""
        if fd in self._selector.get_map():
            self._selector.unregister(fd)

    def later(self, seconds: float, call: Call) -> int:
        """Call ``call`` once, in ``seconds``. The timer's number."""
        self._last += 1
        self._calls[self._last] = call
        heapq.heappush(self._timers, (time.monotonic() + seconds, self._last))
        return self._last

    def cancel(self, timer: int) -> None:
        """Forget a timer; one that is over, or 0, is no matter."""
        self._calls.pop(timer, None)

    def on_signals(self, calls: dict[int, Call]) -> None:
        """Call ``calls[number]`` from the loop when that signal arrives."""
        reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        for number in calls:
            signal.signal(number, lambda *_: None)
        self.watch(reader, lambda: [calls[number]() for number in os.read(reader, 64)])

    def stop(self, code: int = 0) -> None:
        """Leave ``run`` after this turn."""
        self._code = code

    def run(self) -> int:
        """Serve until ``stop``; its code."""
        while self._code is None:
            timeout = self._due()
            for key, _ in self._selector.select(timeout if self._code is None else 0):
                if key.fd in self._selector.get_map():  # an earlier call of this turn may have closed it
                    _guarded(key.data)
        return self._code

    def _due(self) -> float | None:
        """Make the calls that are due; seconds until the next one, None for none."""
        while self._timers:
            due, timer = self._timers[0]
            left = due - time.monotonic()
            if left > 0 and timer in self._calls:
                return left
            heapq.heappop(self._timers)
            _guarded(self._calls.pop(timer, int))
        return None


def _guarded(call: Call) -> None:
    """A mistake in one call is logged and costs that call only: the broker goes on for all other machines."""
    try:
        call()
    except Exception:
        for line in traceback.format_exc().splitlines():
            log(f"bug: {line}")
