# SPDX-License-Identifier: Apache-2.0
"""One daemon of a system under test: start, wait until it serves, kill, start again; its log is kept."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

TICK: Final = 0.01


class NotReady(Exception):
    """A daemon ended before it served, or its deadline passed; the message ends with its log."""


class Daemon:
    """A program in the foreground that logs to a file; ``ready`` is a text in that log.

    An instance may be started any number of times; the log grows.
    """

    def __init__(
        self,
        name: str,
        argv: Sequence[str],
        log: Path,
        ready: str,
        *,
        env: Mapping[str, str],
        deadline: float,
    ) -> None:
        self.name = name
        self.argv = list(argv)
        self.log = log
        self._ready = ready
        self._env = dict(env)
        self._deadline = deadline
        self._process: subprocess.Popen[bytes] | None = None
        self._from = 0
        self.started = 0.0

    @property
    def pid(self) -> int:
        """The process id. Raises LookupError when it is not running."""
        if not self.running:
            raise LookupError(f"{self.name} is not running")
        assert self._process
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether there is a process."""
        return self._process is not None and self._process.poll() is None

    def start(self, *, wait: bool = True) -> None:
        """Start it, and return when it serves unless ``wait=False``. Raises NotReady."""
        assert not self.running, f"{self.name} is running"
        self._from = self.log.stat().st_size if self.log.exists() else 0
        self.started = time.monotonic()
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self.argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self._env, cwd="/"
            )
        if wait:
            self.wait_ready()

    def wait_ready(self) -> None:
        """Wait until it says that it serves. Raises NotReady."""
        deadline = self.started + self._deadline
        while self._ready not in self.since_start():
            if not self.running:
                code = self._process.returncode if self._process else None
                raise NotReady(
                    f"{self.name} ended with {code} before it served:\n{self.since_start()[-6000:]}"
                )
            if time.monotonic() > deadline:
                raise NotReady(
                    f"{self.name} does not serve after {self._deadline:.0f} s:\n{self.since_start()}"
                )
            time.sleep(TICK)

    def since_start(self) -> str:
        """What it has logged since it was last started."""
        with self.log.open("rb") as log:
            log.seek(self._from)
            return log.read().decode(errors="replace")

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal (SIGKILL) and wait for the end. Raises subprocess.TimeoutExpired after 20 s."""
        if self._process and self._process.poll() is None:
            os.kill(self._process.pid, number)
            self._process.wait(20)

    def stop(self) -> None:
        """SIGTERM; SIGKILL after 10 s."""
        try:
            self.kill(signal.SIGTERM)
        except subprocess.TimeoutExpired:
            self.kill()
