# SPDX-License-Identifier: Apache-2.0
"""How much code runs as root, and what never does."""

from __future__ import annotations

import ast
import importlib.util
import io
import os
import signal
import subprocess
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

import vmbus
from tests.local.broker_bed import ALICE, Bed, new_uuid, wait_until
from vmbus.wire import broker as wire

pytestmark = pytest.mark.requires("root", "kvm")

MOST_LINES = 1500
PACKAGE = Path(vmbus.__file__).parent
LAYOUT = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}


def lines_of_code(text: str) -> int:
    """Lines with code on them: no comments, no blank ones, no docstrings."""
    prose: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if (
            isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
            and ast.get_docstring(node) is not None
        ):
            first = node.body[0]
            assert first.end_lineno is not None
            prose.update(range(first.lineno, first.end_lineno + 1))
    code: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in LAYOUT:
            code.update(range(token.start[0], token.end[0] + 1))
    return len(code - prose)


def test_the_counter_counts_code_only() -> None:
    assert (
        lines_of_code(
            '"""Doc."""\n\n# no\nx = 1  # yes\n\ndef f():\n    """Doc\n    more."""\n    y = (\n    1)\n'
        )
        == 4
    )


@pytest.fixture(scope="module")
def loaded() -> Iterator[set[tuple[int, str]]]:
    """(uid, module) of everything that a broker and its children load while all of it is exercised."""
    bed = Bed(spares=1)
    notes = bed.place / "imports"
    notes.touch(mode=0o666)
    notes.chmod(0o666)
    bed.command = [*bed.command[:1], str(Path(__file__).with_name("broker_imports.py")), str(notes)]
    try:
        bed.start()
        client = bed.connect()
        wait_until(lambda: bool(list((bed.run / "workers").glob("spare-*/record.json"))))
        for kind in ("mergeable", "shareable"):
            machine = bed.machine(client, memory_kind=kind)
            assert machine.open(bed.file("disk")).error is None
            client.ask(wire.Check, uid=ALICE, grants=["bridges.vmbt0"])
            client.ask(wire.Tap, uuid=machine.uuid, slot="n", mac="52:54:00:00:00:01", bridge="vmbt0")
            client.ask(wire.Spawn, uuid=machine.uuid, kind="passt", slot="u")
            client.reply(client.post(wire.Connect, uuid=machine.uuid))
            client.ask(wire.Kill, uuid=machine.uuid)
            client.wait_ended(machine.uuid)
            client.ask(wire.Disown, uuid=machine.uuid)
            machine.close()
        client.ask(wire.Own, uuid=new_uuid(), uid=0)
        assert client.ask(wire.Tune, settings={}).error is None
        assert client.ask(wire.Look).error is None
        assert bed.process is not None
        bed.process.send_signal(signal.SIGHUP)
        wait_until(lambda: bed.said("policy reloaded") == 1)
        bed.stop()
        pairs = (line.split(" ", 1) for line in notes.read_text().splitlines())
        yield {(int(uid), name) for uid, name in pairs}
    finally:
        print(bed.log.read_text())
        bed.close()


def file_of(module: str) -> Path:
    """Where a module of vmbus is."""
    place = PACKAGE.joinpath(*module.split(".")[1:])
    return place / "__init__.py" if place.is_dir() else place.with_suffix(".py")


def test_root_runs_at_most_1500_lines_of_vmbus(loaded: set[tuple[int, str]]) -> None:
    names = sorted({name for uid, name in loaded if uid == 0 and name.split(".")[0] == "vmbus"})
    counts = {name: lines_of_code(file_of(name).read_text()) for name in names}
    for name, count in counts.items():
        print(f"{count:5} {name}")
    print(f"{sum(counts.values()):5} in all")
    assert {"vmbus.broker.main", "vmbus.broker.spawn", "vmbus.broker.root", "vmbus.wire.broker"} <= set(names)
    assert sum(counts.values()) <= MOST_LINES


def test_what_needs_no_root_is_loaded_after_it_was_given_up(loaded: set[tuple[int, str]]) -> None:
    as_root = {name for uid, name in loaded if uid == 0}
    dropped = {name for uid, name in loaded if uid != 0 and name.startswith("vmbus.")}
    assert not [name for name in as_root if name.startswith("vmbus.broker.dropped")]
    assert {
        f"vmbus.broker.dropped.{name}"
        for name in ("accounts", "files", "links", "memfd", "mergers", "policy", "settings", "survey", "taps")
    } <= dropped
    assert (ALICE, "vmbus.broker.dropped.files") in loaded


def test_third_party_code_as_root_is_little_and_listed(loaded: set[tuple[int, str]]) -> None:
    site = Path(str(importlib.util.find_spec("msgspec").origin)).parents[1]  # type: ignore[union-attr]
    third = {}
    for name in {name.split(".")[0] for uid, name in loaded if uid == 0} - {"vmbus"}:
        places = [place for place in site.glob(f"{name}*") if place.name.split(".")[0] == name]
        if places:
            files = [file for place in places for file in (place.rglob("*") if place.is_dir() else [place])]
            third[name] = sum(file.stat().st_size for file in files if file.suffix in {".py", ".so"})
    print(third)
    # msgspec takes typing_extensions where mypy has brought it.
    assert set(third) - {"typing_extensions"} == {"msgspec", "prctl", "_prctl"}


@pytest.mark.parametrize("name", ["dbus_next", "dbus_fast", "asyncio", "threading", "pyroute2", "cffi"])
def test_never_in_the_broker(loaded: set[tuple[int, str]], name: str) -> None:
    assert not [module for _, module in loaded if module.split(".")[0] == name]


def test_nothing_of_service_worker_and_core_in_the_broker(loaded: set[tuple[int, str]]) -> None:
    for part in ("service", "worker", "api", "cli", "bus", "_native"):
        assert not [module for _, module in loaded if module.startswith(f"vmbus.{part}")], part


def test_code_for_the_unprivileged_refuses_root() -> None:
    command = ["python3", "-c", "import vmbus.broker.dropped"]
    done = subprocess.run(
        command,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(PACKAGE.parent)},
        capture_output=True,
        check=False,
    )
    assert b"not root any more" in done.stderr
