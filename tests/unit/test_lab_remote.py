# SPDX-License-Identifier: Apache-2.0
"""What becomes of the items of a nested host that ends by itself."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.lab import kernels, remote
from tests.lab.nested import NestedHostDied

NAMES = ["first", "second", "third"]


class Host:
    """It runs the items that it is given up to the one that ``lives`` names for it, during which it ends; one
    with a ``!`` fails, and it goes on; ``boot``: it does not come up."""

    lives: list[str]
    begun: list[list[str]]

    def __init__(self, out: Path) -> None:
        self.out = out
        self._until = self.lives.pop(0)

    def start(self) -> None:
        self.out.mkdir()
        if self._until == "boot":
            raise NestedHostDied("an assertion of its own")

    def stop(self) -> None:
        pass

    def spawn(self, _command: str, *, cwd: Path, env: dict[str, str]) -> Host:
        assert cwd.is_dir() and not env
        items = (self.out / "items").read_text().split()
        self.begun.append(items)
        with (self.out / "reports").open("w") as file:
            for name in items:
                for when in ("setup",) if name == self._until else ("setup", "call", "teardown"):
                    bad = self._until == f"{name}!" and when == "call"
                    report = {"nodeid": name, "when": when, "outcome": "failed" if bad else "passed"}
                    file.write(json.dumps(report) + "\n")
                if name == self._until:
                    return self
        return self

    def poll(self) -> bool:
        if self._until in NAMES:
            raise NestedHostDied("an assertion of its own")
        return True


@pytest.fixture
def session(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> remote.RemoteSession:
    places = iter(tmp_path / str(number) for number in range(9))
    Host.begun = []
    monkeypatch.setattr(remote, "NestedHost", lambda program: Host(next(places)))
    monkeypatch.setattr(remote, "LIVES", 3)
    monkeypatch.setattr(remote, "TRIES", 2)
    monkeypatch.setattr(kernels, "SERIES", ())

    def report(data: dict[str, Any], **_: object) -> SimpleNamespace:
        failed = data["outcome"] == "failed"
        return SimpleNamespace(**data, failed=failed, skipped=False, longrepr=None, longreprtext="why")

    hook = SimpleNamespace(pytest_report_from_serializable=report)
    config: Any = SimpleNamespace(hook=hook, getoption=lambda _: False)
    return remote.RemoteSession(config, [item(name) for name in NAMES])


def item(name: str) -> Any:
    return SimpleNamespace(nodeid=name, location=("file", 1, name))


def outcomes(session: remote.RemoteSession) -> list[list[str]]:
    return [[report.outcome for report in session.reports(item(name))] for name in NAMES]


def test_the_item_that_was_running_gets_one_more_try_and_the_rest_a_new_host(
    session: remote.RemoteSession,
) -> None:
    Host.lives = ["second", ""]
    assert outcomes(session) == [["passed"] * 3] * 3
    assert Host.begun == [NAMES, NAMES[1:]]
    assert [name for name, _ in session.spent] == ["second"]


def test_an_item_that_two_hosts_died_of_has_failed(session: remote.RemoteSession) -> None:
    Host.lives = ["second", "second", ""]
    assert outcomes(session) == [["passed"] * 3, ["failed"], ["passed"] * 3]
    assert Host.begun == [NAMES, NAMES[1:], NAMES[2:]]


def test_no_more_than_three_hosts_are_used_up(session: remote.RemoteSession) -> None:
    Host.lives = ["first", "second", "third"]
    assert outcomes(session) == [["passed"] * 3, ["passed"] * 3, ["failed"]]
    assert len(Host.begun) == remote.LIVES


def test_an_item_that_failed_gets_one_more_try_in_a_new_host(session: remote.RemoteSession) -> None:
    Host.lives = ["second!", ""]
    assert outcomes(session) == [["passed"] * 3] * 3
    assert Host.begun == [NAMES, ["second"]]
    assert session.spent == [("second", "why")]


def test_an_item_that_fails_twice_has_failed(session: remote.RemoteSession) -> None:
    Host.lives = ["second!", "second!"]
    assert outcomes(session)[1] == ["passed", "failed", "passed"]
    assert Host.begun == [NAMES, ["second"]]


def test_what_fails_in_the_last_host_has_failed(session: remote.RemoteSession) -> None:
    Host.lives = ["first", "second", "third!"]
    assert outcomes(session)[2] == ["passed", "failed", "passed"]
    assert len(Host.begun) == remote.LIVES


def test_it_begins_before_the_first_item_asks(session: remote.RemoteSession) -> None:
    Host.lives = [""]
    session.begin()
    assert Host.begun == [NAMES]
    assert outcomes(session) == [["passed"] * 3] * 3
    assert Host.begun == [NAMES]


def test_a_host_that_does_not_come_up_at_the_beginning_is_replaced(session: remote.RemoteSession) -> None:
    Host.lives = ["boot", ""]
    session.begin()
    assert outcomes(session) == [["passed"] * 3] * 3
    assert Host.begun == [NAMES]
    assert not session.spent
