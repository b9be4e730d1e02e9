# SPDX-License-Identifier: Apache-2.0
"""The single-threaded loop: descriptors, timers, and tasks that wait without blocking.

A task is a generator. It yields a ``Pending`` and is resumed with its value (or its error is raised at
the yield) once somebody settles it; ``wait`` spells that for type checkers. There are no threads, so
between two yields nothing else of the broker runs: check and act without a yield between them.
Left out on purpose: asyncio (12 MB and a scheduler to trust in a root process), priorities, cancellation.
"""

from __future__ import annotations

import contextlib
import functools
import heapq
import itertools
import os
import selectors
import signal
import time
import traceback
from collections.abc import Callable, Generator
from typing import Any, Generic, TypeVar

from vmbus.broker.steps import log

T = TypeVar("T")
Task = Generator["Pending[Any]", Any, T]


class Pending(Generic[T]):
    """A value that will be there later. Settled once; later attempts are ignored."""

    def __init__(self) -> None:
        self.settled = False
        self._value: T | None = None
        self._error: Exception | None = None
        self._waiting: list[Callable[[], None]] = []

    def settle(self, value: T | None = None, *, error: Exception | None = None) -> None:
        """Give the value or the error to all who wait."""
        if self.settled:
            return
        self.settled, self._value, self._error = True, value, error
        for resume in self._waiting:
            resume()
        self._waiting.clear()

    def when_settled(self, resume: Callable[[], None]) -> None:
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


def wait(pending: Pending[T]) -> Task[T]:
    """``value = yield from wait(pending)`` in a task."""
    value: T = yield pending
    return value


def start(task: Task[T]) -> Pending[T]:
    """Run a task up to its first wait; what it returns or raises settles the result."""
    outcome: Pending[T] = Pending()

    def advance(pending: Pending[Any] | None) -> None:
        while True:
            try:
                if pending is None:
                    awaited = next(task)
                else:
                    try:
                        value = pending.result()
                    except Exception as error:
                        awaited = task.throw(error)
                    else:
                        awaited = task.send(value)
            except StopIteration as stop:
                outcome.settle(stop.value)
                return
            except Exception as error:
                outcome.settle(error=error)
                return
            if not awaited.settled:
                awaited.when_settled(functools.partial(advance, awaited))
                return
            pending = awaited

    advance(None)
    return outcome


class Timer:
    """A call that is due; ``cancel`` forgets it."""

    def __init__(self, call: Callable[[], None]) -> None:
        self.call: Callable[[], None] | None = call

    def cancel(self) -> None:
        """Not any more. Idempotent."""
        self.call = None


class Loop:
    """Watches descriptors for reading, keeps timers, and ends on a signal."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._timers: list[tuple[float, int, Timer]] = []
        self._order = itertools.count()
        self._running = True
        self._signals: dict[int, Callable[[], None]] = {}

    def watch(self, fd: int, call: Callable[[], None]) -> None:
        """Call ``call`` whenever ``fd`` is readable (a pidfd: has ended)."""
        self._selector.register(fd, selectors.EVENT_READ, call)

    def unwatch(self, fd: int) -> None:
        """Forget ``fd``; idempotent, before it is closed."""
        with contextlib.suppress(KeyError):
            self._selector.unregister(fd)

    def later(self, seconds: float, call: Callable[[], None]) -> Timer:
        """Call ``call`` once, in ``seconds``."""
        timer = Timer(call)
        heapq.heappush(self._timers, (time.monotonic() + seconds, next(self._order), timer))
        return timer

    def on_signal(self, number: signal.Signals, call: Callable[[], None]) -> None:
        """Call ``call`` from the loop when the signal arrives."""
        if not self._signals:
            self._wakeup, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
            signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
            self.watch(self._wakeup, self._signalled)
        self._signals[number] = call
        signal.signal(number, lambda *_: None)

    def _signalled(self) -> None:
        for number in os.read(self._wakeup, 64):
            self._signals[number]()

    def stop(self) -> None:
        """Leave ``run`` after this turn."""
        self._running = False

    def run(self) -> None:
        """Serve until ``stop``."""
        while self._running:
            now = time.monotonic()
            while self._timers and (self._timers[0][0] <= now or self._timers[0][2].call is None):
                _, _, timer = heapq.heappop(self._timers)
                if timer.call is not None:
                    _guarded(timer.call)
            due = max(0.0, self._timers[0][0] - time.monotonic()) if self._timers else None
            for key, _ in self._selector.select(due if self._running else 0):
                if key.fd in self._selector.get_map():  # an earlier call of this turn may have closed it
                    _guarded(key.data)


def _guarded(call: Callable[[], None]) -> None:
    """A mistake in one call is logged and costs that call only: the broker goes on for all other machines."""
    try:
        call()
    except Exception:
        for line in traceback.format_exc().splitlines():
            log(f"bug: {line}")
