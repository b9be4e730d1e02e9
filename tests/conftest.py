# SPDX-License-Identifier: Apache-2.0
"""What all tests share: options, the private mount namespace, which tests run where, and whole systems.

Markers: ``requires("capability", …)`` (tests/lab/capabilities.py), ``nested`` (runs in the nested host
wherever the run was started), ``ahead`` (tests/lab/ahead.py), ``long`` (not in make test-fast), ``soak``,
``fuzz``. An item runs here if all that it requires is here; else in the nested host, beside all others, if
that has it; else, after all others, in a nested host with the mended emulator, if that has it; else it is
skipped. The terminal summary lists by name what was absent and what became of the tests that required it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Generator, Iterator

import pytest

from tests.lab import ahead as running_ahead
from tests.lab import capabilities, namespace, scratch, system
from tests.lab.remote import RemoteSession, ReportWriter
from tests.lab.system import System

REMOTE = pytest.StashKey[list[RemoteSession]]()
WHERE_NESTED = pytest.StashKey[dict[str, list[str]]]()
SKIPPED = pytest.StashKey[dict[str, list[str]]]()
AHEAD = pytest.StashKey[running_ahead.Ahead]()
NEEDS = re.compile(r"needs ([a-z0-9-]+): (.*)", re.DOTALL)
IN_NESTED_HOST = os.environ.get("VMBUS_LAB") == "nested"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("vmbus")
    group.addoption("--no-nested", action="store_true", help="no tests that need the nested host")
    group.addoption("--soak", action="store_true", help="also the long rounds")
    group.addoption("--fuzz", action="store_true", help="also the fuzzers (FUZZ_SECONDS each, default 60)")
    group.addoption("--reports", metavar="FILE", help="write reports as JSON (used in the nested host)")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[SKIPPED] = {}
    config.stash[WHERE_NESTED] = {}
    if config.getoption("--reports"):
        config.pluginmanager.register(ReportWriter(config, config.getoption("--reports")))
    if os.geteuid() == 0:
        namespace.enter()
    scratch.enter()


def pytest_unconfigure() -> None:
    scratch.leave()


# -- which items, and where


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    dropped = {mark for mark in ("soak", "fuzz") if not config.getoption(f"--{mark}")}
    if config.getoption("--no-nested"):
        dropped.add("nested")
    kept = [item for item in items if not any(item.get_closest_marker(mark) for mark in dropped)]
    if config.getoption("--no-nested"):
        kept = [item for item in kept if "nested-host" not in _required(item)]
    if len(kept) != len(items):
        chosen = set(kept)
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    places: dict[str, list[pytest.Item]] = {"here": [], "nested": [], "mended": []}
    for item in kept:
        places[_place(item, config)].append(item)
    running_ahead.move_behind(places["here"])
    items[:] = [item for chosen in places.values() for item in chosen]
    config.stash[REMOTE] = [
        RemoteSession(config, places[place], with_mended_emulator=place == "mended")
        for place in ("nested", "mended")
        if places[place]
    ]


def _place(item: pytest.Item, config: pytest.Config) -> str:
    """Where ``item`` runs; "here" for one that nothing can run, which is marked to be skipped."""
    if IN_NESTED_HOST:
        _skip_if_absent(item, _required(item))
        return "here"
    missing = [name for name in _required(item) if capabilities.absent(name)]
    if not missing and not item.get_closest_marker("nested"):
        return "here"
    nowhere = [name for name in missing if name not in capabilities.MENDED]
    if nowhere or config.getoption("--no-nested"):
        _skip_if_absent(item, nowhere or missing)
        return "here"
    if capabilities.absent("nested-host"):
        _skip_if_absent(item, [*missing, "nested-host"])
        return "here"
    place = "nested" if capabilities.NESTED.issuperset(missing) else "mended"
    if place == "mended" and capabilities.absent("mended-emulator"):
        _skip_if_absent(item, ["mended-emulator"])
        return "here"
    for name in missing:
        config.stash[WHERE_NESTED].setdefault(name, []).append(item.nodeid)
    item.add_marker(pytest.mark.timeout(0), append=False)  # it has its deadline there
    return place


def _required(item: pytest.Item) -> list[str]:
    return [name for mark in item.iter_markers("requires") for name in mark.args]


def _skip_if_absent(item: pytest.Item, names: list[str]) -> None:
    for name in names:
        why = capabilities.absent(name)
        if why:
            item.add_marker(pytest.mark.skip(reason=f"needs {name}: {why}"))
            return


def pytest_collection_finish(session: pytest.Session) -> None:
    if session.config.option.collectonly:
        return
    if remotes := session.config.stash.get(REMOTE, []):
        remotes[0].begin()
    if commands := running_ahead.commands(session.items):
        session.config.stash[AHEAD] = running_ahead.Ahead()
        session.config.stash[AHEAD].begin(commands)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    """Items of the nested host: their reports are those from there."""
    remote = next((each for each in item.config.stash.get(REMOTE, []) if each.has(item)), None)
    if remote is None:
        return None
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for report in remote.reports(item):
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    if nextitem is None or not remote.has(nextitem):
        remote.close()
    return True


def pytest_sessionfinish(session: pytest.Session) -> None:
    running = session.config.stash.get(AHEAD, None)
    if running:
        running.close()
    for remote in session.config.stash.get(REMOTE, []):
        remote.close()


# -- what the run says at its end


@pytest.hookimpl(tryfirst=True)
def pytest_report_teststatus(report: pytest.TestReport) -> tuple[str, str, str] | None:
    if getattr(report, "nested", False) and report.passed and report.when == "call":
        return "passed", ".", "PASSED (nested host)"
    return None


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for name, why in (spent for remote in config.stash.get(REMOTE, []) for spent in remote.spent):
        terminalreporter.section("a nested host was given up; the rest ran in a new one", sep="-")
        terminalreporter.write_line(f"during {name}\n{why}")
    skipped: dict[str, tuple[str, list[str]]] = {}
    for report in terminalreporter.stats.get("skipped", []):
        text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        found = NEEDS.search(text)
        if found:
            skipped.setdefault(found[1], (found[2], []))[1].append(report.nodeid)
    moved = config.stash[WHERE_NESTED]
    if not skipped and not moved:
        return
    write = terminalreporter.write_line
    terminalreporter.section("capabilities absent here")
    for name in sorted({*skipped, *moved}):
        why, tests = skipped.get(name, (capabilities.absent(name), []))
        counts = [f"{len(tests)} skipped"] if tests else []
        counts += [f"{len(moved[name])} ran in the nested host"] if name in moved else []
        write(f"{name}: {why} -- {', '.join(counts)}")
        for test in tests:
            write(f"    skipped {test}")


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
def ahead(request: pytest.FixtureRequest) -> running_ahead.Finish:
    """Waits for the command of the test's marker ``ahead``."""
    return lambda: request.config.stash[AHEAD].finish(request.node.nodeid)


# -- systems


@pytest.fixture
def vmbus() -> Iterator[System]:
    """A whole system of one's own: bus, polkitd, broker and service (tests/lab/system.py)."""
    with System() as whole:
        yield whole
