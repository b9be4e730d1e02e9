# SPDX-License-Identifier: Apache-2.0
"""Runs a part of pytest's items in the nested host, as if they had run here.

One nested host and one pytest session in it serve all of them; items that need the mended emulator have
another. That session (``--reports FILE``) writes each test report as a line of JSON to the share as it is
made; here the item of that name waits for its three reports (set-up, call, tear-down) and hands them to
pytest, so that the final report, the counts and junit files are those of one run. It begins when the items
are known and runs beside those that run here, which come first: the nested host has one processor, and most
of them need one. When the nested host says nothing for ``SILENCE`` seconds, the items that are left fail
with what is known.

The emulator that the nested host is goes wrong now and then (tests/lab/emulator.py), and a test with many
processors may wait too long when the machine is busy. So an item that failed, or that was running when QEMU
ended by itself, is tried again in a new nested host, in which the rest runs, too; the end of the run names
it, with what went wrong. An item has ``TRIES``, and ``LIVES`` nested hosts are used up at most.
"""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import pytest

from tests.lab import initramfs, kernels, mended
from tests.lab.kernels import CHECKOUT
from tests.lab.nested import Command, NestedHost, NestedHostDied, NestedHostFailed

SILENCE: Final = 1200.0
LIVES: Final = 6
TRIES: Final = 3
OPTIONS: Final = ("--soak", "--fuzz")


class RemoteSession:
    """The pytest session in the nested host. ``begin`` once, ``reports`` for each item, ``close``."""

    def __init__(
        self, config: pytest.Config, items: Sequence[pytest.Item], *, with_mended_emulator: bool = False
    ) -> None:
        self._config = config
        self._mended = with_mended_emulator
        self._items = dict.fromkeys(item.nodeid for item in items)
        self._host: NestedHost | None = None
        self._command: Command | None = None
        self._read = 0
        self._reports: dict[str, list[pytest.TestReport]] = {}
        self._broken = ""
        self.spent: list[tuple[str, str]] = []
        """The items for which a nested host was given up, and why."""

    def begin(self) -> None:
        """Start it. A host that dies meanwhile is noticed, and another started, when the first item asks."""
        try:
            self._start()
        except NestedHostDied:
            self.close()
        except (NestedHostFailed, kernels.KernelUnavailable) as error:
            self._broken = str(error)

    def has(self, item: pytest.Item) -> bool:
        """Whether ``item`` runs there."""
        return item.nodeid in self._items

    def reports(self, item: pytest.Item) -> list[pytest.TestReport]:
        """The reports of ``item``, waiting for them; a failed one that says why when there are none."""
        name, why = item.nodeid, self._broken
        while not why and not self._settled(name):
            try:
                if self._command is None:
                    self._start()
                self._wait_for(name)
                if not self._settled(name):
                    self._give_up(name, self._failure(name))
            except NestedHostDied as error:
                why = self._bury(name, str(error))
            except (NestedHostFailed, kernels.KernelUnavailable) as error:
                why = self._broken = str(error)
                if self._host:
                    self._take(self._host.out / "reports")
        found = self._reports.get(name, [])
        if self._complete(name):
            return found
        message = f"no report from the nested host: {why}"
        return [*found, pytest.TestReport(name, item.location, {}, "failed", message, "call")]

    def close(self) -> None:
        """Power the nested host off."""
        if self._host:
            self._host.stop()
            self._host = None

    def _bury(self, name: str, error: str) -> str:
        """After the host died while item ``name`` was waited for: why that has failed; "" to try again."""
        assert self._host
        self._take(self._host.out / "reports")
        if self._complete(name):
            return ""
        self._give_up(name, error)
        if len(self.spent) == LIVES:
            self._broken = error
        return error if self._broken or self._spent_on(name) == TRIES else ""

    def _give_up(self, name: str, why: str) -> None:
        """The host; item ``name`` begins anew in the next."""
        self.spent.append((name, why))
        self.close()
        self._command, self._read = None, 0
        self._reports.pop(name, None)

    def _settled(self, name: str) -> bool:
        """Whether there is an outcome that stands."""
        last = self._spent_on(name) == TRIES - 1 or len(self.spent) >= LIVES - 1
        return self._complete(name) and (last or not self._failure(name))

    def _spent_on(self, name: str) -> int:
        """How many nested hosts were given up for item ``name``."""
        return sum(name == spent for spent, _ in self.spent)

    def _failure(self, name: str) -> str:
        """What its failed reports say; "" if it has none."""
        return "\n".join(report.longreprtext for report in self._reports.get(name, []) if report.failed)

    def _start(self) -> None:
        for series in kernels.SERIES:
            initramfs.base(kernels.stock(series))  # quick here, slow there
        self._host = NestedHost(program=mended.command() if self._mended else ())
        self._host.start()
        left = [name for name in self._items if not self._complete(name) and self._spent_on(name) < TRIES]
        (self._host.out / "items").write_text("".join(f"{name}\n" for name in left))
        words = [sys.executable, "-m", "pytest", "--reports", "/out/reports", "-p", "no:cacheprovider", "-q"]
        words += [option for option in OPTIONS if self._config.getoption(option)]
        told = {"VMBUS_LAB_EMULATOR": "mended"} if self._mended else {}
        self._command = self._host.spawn(shlex.join([*words, "@/out/items"]), cwd=CHECKOUT, env=told)

    def _wait_for(self, name: str) -> None:
        assert self._host and self._command
        heard = time.monotonic()
        while not self._complete(name):
            ended = self._command.poll()
            if self._take(self._host.out / "reports"):
                heard = time.monotonic()
            elif ended:
                raise NestedHostFailed(
                    f"its pytest ended with {self._command.code}:\n{self._command.output()[-4000:]}"
                )
            elif time.monotonic() > heard + SILENCE:
                raise NestedHostFailed(f"silent for {SILENCE:.0f} s:\n{self._command.output()[-4000:]}")
            time.sleep(0.05)

    def _complete(self, name: str) -> bool:
        found = self._reports.get(name)
        return bool(found and found[-1].when == "teardown")

    def _take(self, file: Path) -> bool:
        """Read the lines that have been added; whether there were any."""
        if not file.exists():
            return False
        with file.open("rb") as lines:
            lines.seek(self._read)
            new = lines.read()
        new = new[: new.rfind(b"\n") + 1]
        self._read += len(new)
        for line in new.splitlines():
            data: dict[str, Any] = json.loads(line)
            report = self._config.hook.pytest_report_from_serializable(config=self._config, data=data)
            report.nested = True
            if report.skipped and isinstance(report.longrepr, list):
                report.longrepr = tuple(report.longrepr)  # JSON has no tuples, and pytest's summary wants one
            self._reports.setdefault(report.nodeid, []).append(report)
        return bool(new)


class ReportWriter:
    """The other side: a plugin of the session in the nested host."""

    def __init__(self, config: pytest.Config, path: str) -> None:
        self._config = config
        self._file = Path(path).open("a")  # noqa: SIM115 -- for the whole session

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        data = self._config.hook.pytest_report_to_serializable(config=self._config, report=report)
        self._file.write(json.dumps(data, default=str) + "\n")
        self._file.flush()
