# SPDX-License-Identifier: Apache-2.0
"""The worker's event loop: descriptors, callbacks and a few timers over one epoll instance.

Neither asyncio nor ``selectors`` with its wrappers: a worker is mostly idle and there are many of them,
so what it imports is what it costs. All callbacks run on the main thread, never block, and handle their
own peer's mistakes; an exception that leaves one is a bug of ours and ends the worker.
"""

from __future__ import annotations

import select
import time
from collections.abc import Callable
from typing import Final

READ: Final = select.EPOLLIN
WRITE: Final = select.EPOLLOUT

Callback = Callable[[int], object]


class Timer:
    """A callback at a point in time; ``cancel`` may be called at any time."""

    def __init__(self, due: float, callback: Callable[[], None]) -> None:
        self.due = due
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        self.callback = None


class Loop:
    """Level-triggered; an fd is watched by at most one callback, and forgotten before it is closed."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._callbacks: dict[int, Callback] = {}
        self._timers: list[Timer] = []
        self._running = True

    def fileno(self) -> int:
        """The epoll instance, one of the worker's own descriptors."""
        return self._epoll.fileno()

    def watch(self, fd: int, callback: Callback, events: int = READ) -> None:
        """Call ``callback`` with what happened when ``fd`` has one of ``events``, an error or a hang-up."""
        self._epoll.register(fd, events)
        self._callbacks[fd] = callback

    def change(self, fd: int, events: int) -> None:
        """Wait for other events; 0 leaves errors and hang-ups."""
        self._epoll.modify(fd, events)

    def forget(self, fd: int) -> None:
        """Stop watching. An fd that is not watched is ignored."""
        if self._callbacks.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def after(self, seconds: float, callback: Callable[[], None]) -> Timer:
        """Call ``callback`` once, ``seconds`` from now."""
        timer = Timer(time.monotonic() + seconds, callback)
        self._timers.append(timer)
        return timer

    def stop(self) -> None:
        """Let ``run`` return after the callbacks of this round."""
        self._running = False

    def run(self) -> None:
        """Serve until ``stop``."""
        while self._running:
            for fd, events in self._epoll.poll(self._timeout()):
                # A callback of this round may have forgotten the fd.
                callback = self._callbacks.get(fd)
                if callback is not None:
                    callback(events)
            self._run_timers()

    def _timeout(self) -> float | None:
        self._timers = [timer for timer in self._timers if timer.callback is not None]
        if not self._timers:
            return None
        return max(0.0, min(timer.due for timer in self._timers) - time.monotonic())

    def _run_timers(self) -> None:
        now = time.monotonic()
        for timer in [timer for timer in self._timers if timer.due <= now]:
            callback, timer.callback = timer.callback, None
            if callback is not None:
                callback()
