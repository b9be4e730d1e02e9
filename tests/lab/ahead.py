# SPDX-License-Identifier: Apache-2.0
"""Commands that tests only wait for, run while other tests are under way: compilers, linters, type checkers.

    @pytest.mark.ahead("cargo", "clippy", …)
    def test_clippy_finds_nothing(ahead: Finish) -> None:
        ahead()

When the items are known, the commands of those that were chosen are handed to one process (``python -m
tests.lab.ahead``), which runs them one after the other at a low priority, so that a test which has
something to do does not notice; the items themselves are moved behind all others. A test waits for its own
command and fails with its output. The process is no thread of pytest's, since tests change pytest's uid and
fork; it ends with pytest.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import pytest

from tests.lab import namespace
from tests.lab.kernels import CHECKOUT

Finish = Callable[[], None]

NICE: Final = 10
PR_SET_PDEATHSIG: Final = 1
TICK: Final = 0.05


def cargo(*words: str) -> list[str]:
    """The command line of cargo, on the workspace of native/."""
    found = shutil.which("cargo") or str(Path.home() / ".cargo/bin/cargo")
    return ["env", "-C", str(CHECKOUT / "native"), found, *words]


def quiet(argv: Sequence[str | Path]) -> None:
    """Run a command outside the private namespace, now; fail with its output unless the exit code is 0."""
    done = subprocess.run(
        namespace.outside(argv),
        pass_fds=namespace.outside_fds(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:]


class Ahead:
    """The commands of one session. ``begin`` once, ``finish`` for each, ``close``."""

    def __init__(self) -> None:
        self._place = Path(tempfile.mkdtemp(prefix="vmbus-ahead-"))
        self._numbers: dict[str, int] = {}
        self._runner: subprocess.Popen[bytes] | None = None

    def begin(self, commands: dict[str, Sequence[str]]) -> None:
        """Start them, in this order; the names are items'."""
        self._numbers = {name: number for number, name in enumerate(commands)}
        orders = [namespace.outside(words) for words in commands.values()]
        self._runner = subprocess.Popen(
            [sys.executable, "-m", "tests.lab.ahead", str(self._place)],
            cwd=CHECKOUT,
            stdin=subprocess.PIPE,
            pass_fds=namespace.outside_fds(),
            start_new_session=True,
        )
        assert self._runner.stdin
        self._runner.stdin.write(json.dumps(orders).encode())
        self._runner.stdin.close()

    def finish(self, name: str) -> None:
        """Wait for a command's end. Fails with its output unless the exit code is 0."""
        number = self._numbers[name]
        ended, log = self._place / f"{number}.code", self._place / f"{number}.log"
        while not ended.exists():
            assert self._runner and self._runner.poll() is None, "the process that runs the commands is gone"
            time.sleep(TICK)
        assert ended.read_text() == "0", log.read_text(errors="replace")[-8000:]

    def close(self) -> None:
        """End what still runs."""
        if self._runner:
            if self._runner.poll() is None:
                os.killpg(self._runner.pid, signal.SIGKILL)
            self._runner.wait()
        shutil.rmtree(self._place, ignore_errors=True)


def move_behind(items: list[pytest.Item]) -> None:
    """The items that wait for a command come last, the slowest last of all as they stand in their files."""
    items.sort(key=lambda item: item.get_closest_marker("ahead") is not None)


def commands(items: Sequence[pytest.Item]) -> dict[str, Sequence[str]]:
    """What the markers of ``items`` say, by the items' names."""
    marked = ((item.nodeid, item.get_closest_marker("ahead")) for item in items)
    return {name: mark.args for name, mark in marked if mark}


def main() -> int:
    """The process that runs the commands: each one's output goes to N.log, its code to N.code at its end."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    signal.signal(signal.SIGTERM, lambda *_: os.killpg(0, signal.SIGKILL))
    os.nice(NICE)
    place = Path(sys.argv[1])
    inherited = [int(name) for name in os.listdir("/proc/self/fd") if int(name) > 2]
    for number, words in enumerate(json.load(sys.stdin)):
        with (place / f"{number}.log").open("wb") as log:
            done = subprocess.run(
                words,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[fd for fd in inherited if os.path.exists(f"/proc/self/fd/{fd}")],
                check=False,
            )
        draft = place / f"{number}.draft"
        draft.write_text(str(done.returncode))
        draft.rename(place / f"{number}.code")
    return 0


if __name__ == "__main__":
    sys.exit(main())
