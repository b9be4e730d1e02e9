# SPDX-License-Identifier: Apache-2.0
"""How far an operation is, on one line: with -p always, without it each time SIGUSR1 asks (not with -q)."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from types import SimpleNamespace

from vmbus.image import Report


class Progress:
    """Shows what it is called with. Several operations one behind the other are parts of one line."""

    def __init__(self, *, shown: bool, asked: int | None = None) -> None:
        self.shown = shown
        self._asked = asked

    def __call__(self, done: int, total: int) -> None:
        """``done`` of ``total``."""
        if self.shown or self._was_asked():
            percent = 100 * done / total if total else 0.0
            print(f"    ({percent:.2f}/100%)", end="\r", file=sys.stdout, flush=True)

    def part(self, start: int, length: int, whole: int) -> Report:
        """A report for the bytes from ``start`` on, ``length`` of ``whole``."""
        return lambda done, total: self(start + (length * done // total if total else 0), whole)

    def _was_asked(self) -> bool:
        if self._asked is None:
            return False
        with contextlib.suppress(BlockingIOError):
            return bool(os.read(self._asked, 64))
        return False


@contextlib.contextmanager
def progress(options: SimpleNamespace) -> Iterator[Progress]:
    """The progress of a sub-command, which ends its line."""
    shown = options.progress and not options.quiet
    if shown or options.quiet:
        line = Progress(shown=shown)
        line(0, 1)
        yield line
    else:
        with _on_signal() as asked:
            line = Progress(shown=False, asked=asked)
            yield line
    if line.shown:
        print()


@contextlib.contextmanager
def _on_signal() -> Iterator[int]:
    """What can be read whenever SIGUSR1 has come, even while the main thread is in the core."""
    reading, writing = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    before = signal.signal(signal.SIGUSR1, lambda *_: None)
    woken = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    try:
        yield reading
    finally:
        signal.set_wakeup_fd(woken)
        signal.signal(signal.SIGUSR1, before)
        os.close(reading)
        os.close(writing)
