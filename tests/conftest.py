# SPDX-License-Identifier: Apache-2.0
"""What all tests share: options, the private mount namespace, and which tests run where."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator

import pytest

from tests.lab import namespace, system
from tests.lab.system import System


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("vmbus")
    group.addoption("--no-nested", action="store_true", help="no tests that need the nested host")
    group.addoption("--soak", action="store_true", help="also the long rounds")
    group.addoption("--fuzz", action="store_true", help="also the fuzzers (FUZZ_SECONDS each, default 60)")


def pytest_configure(config: pytest.Config) -> None:
    if os.geteuid() == 0:
        namespace.enter()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    dropped = {
        mark for mark, option in (("soak", "--soak"), ("fuzz", "--fuzz")) if not config.getoption(option)
    }
    if config.getoption("--no-nested"):
        dropped.add("nested")
    kept = [item for item in items if not any(item.get_closest_marker(mark) for mark in dropped)]
    if len(kept) != len(items):
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A failure shows the logs of the systems that ran."""
    report = yield
    if report.failed:
        for running in system.LIVE:
            for name, log in running.logs().items():
                report.sections.append((f"log of {name} ({running.instance})", log[-20_000:]))
    return report


@pytest.fixture
def vmbus() -> Iterator[System]:
    """A whole system of one's own: bus, polkitd, broker and service (tests/lab/system.py)."""
    with System() as whole:
        yield whole


@pytest.fixture(scope="module")
def shared_vmbus() -> Iterator[System]:
    """A whole system for all tests of a module."""
    with System() as whole:
        yield whole
