# SPDX-License-Identifier: Apache-2.0
"""Runs a part of pytest's items in the nested host, as if they had run here.

One nested host and one pytest session in it serve all of them. That session (``--reports FILE``) writes
each test report as a line of JSON to the share as it is made; here the item of that name waits for its
three reports (set-up, call, tear-down) and hands them to pytest, so that the final report, the counts and
junit files are those of one run. When the nested host dies or says nothing for ``SILENCE`` seconds, the
items that are left fail with what is known.
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

from tests.lab import initramfs, kernels
from tests.lab.kernels import CHECKOUT
from tests.lab.nested import Command, NestedHost, NestedHostFailed

SILENCE: Final = 1200.0
OPTIONS: Final = ("--soak", "--fuzz")


class RemoteSession:
    """The pytest session in the nested host; started by the first item that asks for its reports."""

    def __init__(self, config: pytest.Config, items: Sequence[pytest.Item]) -> None:
        self._config = config
        self._items = dict.fromkeys(item.nodeid for item in items)
        self._host: NestedHost | None = None
        self._command: Command | None = None
        self._read = 0
        self._reports: dict[str, list[pytest.TestReport]] = {}
        self._broken = ""

    def has(self, item: pytest.Item) -> bool:
        """Whether ``item`` runs there."""
        return item.nodeid in self._items

    def reports(self, item: pytest.Item) -> list[pytest.TestReport]:
        """The reports of ``item``, waiting for them; a failed one that says why when there are none."""
        if not self._broken:
            try:
                if self._command is None:
                    self._start()
                self._wait_for(item.nodeid)
            except (NestedHostFailed, kernels.KernelUnavailable) as error:
                self._broken = str(error)
                if self._host:
                    self._take(self._host.out / "reports")
        found = self._reports.get(item.nodeid, [])
        if found and found[-1].when == "teardown":
            return found
        message = f"no report from the nested host: {self._broken}"
        return [*found, pytest.TestReport(item.nodeid, item.location, {}, "failed", message, "call")]

    def close(self) -> None:
        """Power the nested host off."""
        if self._host:
            self._host.stop()
            self._host = None

    def _start(self) -> None:
        for series in kernels.SERIES:
            initramfs.base(kernels.stock(series))  # quick here, slow there
        self._host = NestedHost()
        self._host.start()
        (self._host.out / "items").write_text("".join(f"{name}\n" for name in self._items))
        words = [sys.executable, "-m", "pytest", "--reports", "/out/reports", "-p", "no:cacheprovider", "-q"]
        words += [option for option in OPTIONS if self._config.getoption(option)]
        self._command = self._host.spawn(shlex.join([*words, "@/out/items"]), cwd=CHECKOUT)

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
