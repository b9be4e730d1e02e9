# SPDX-License-Identifier: Apache-2.0
"""Imports point downward only, as docs/architecture.md's table says: read from the source, not from a run."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PACKAGE = ROOT / "vmbus"

# Part: what of vmbus it may import besides itself.
MAY_IMPORT = {
    "wire": set(),
    "bus": {"wire"},
    "service": {"wire", "bus"},
    "api": {"service", "wire", "bus"},
    "broker": {"wire"},
    "worker": {"wire", "_native"},
    "cli": {"wire", "bus", "image", "abi"},
    "abi": {"wire", "_native"},
    "image": {"wire", "_native"},
}
# vmbusd's composition root is the one place below which api is imported.
EXCEPTIONS = {"vmbus/service/main.py": {"api"}}
DBUS_LIBRARIES = {"dbus_next", "dbus_fast", "dbus", "gi", "jeepney", "sdbus", "pydbus"}


def sources() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if "_native" not in path.parts)


def imported(path: Path) -> set[str]:
    """Every dotted name that the file imports, at any depth of its code."""
    names: set[str] = set()
    here = path.relative_to(ROOT).with_suffix("").parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(here[: len(here) - node.level]) if node.level else ""
            module = ".".join(part for part in (base, node.module or "") if part)
            # `from vmbus import bus` names a module; `from vmbus.bus import Bus` a name in one.
            names.update(f"{module}.{alias.name}" for alias in node.names)
    return names


def part(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_only_what_lies_below_it(path: Path) -> None:
    mine = part(path)
    if mine == "__init__":
        assert not {name for name in imported(path) if name.startswith("vmbus.")}
        return
    allowed = MAY_IMPORT[mine] | {mine, "__version__"} | EXCEPTIONS.get(str(path.relative_to(ROOT)), set())
    parts = {name.split(".")[1] for name in imported(path) if name.startswith("vmbus.")}
    assert parts <= allowed


def test_every_part_of_the_package_has_its_rule() -> None:
    assert {part(path) for path in sources()} - {"__init__"} <= set(MAY_IMPORT)


def test_the_rules_are_those_of_the_architecture() -> None:
    table = (ROOT / "docs/architecture.md").read_text()
    for name, allowed in MAY_IMPORT.items():
        if name == "image":
            continue
        row = next(
            line
            for line in table.splitlines()
            if line.startswith((f"| `vmbus/{name}/`", f"| `vmbus/{name}.py`"))
        )
        written = {word.strip("` ").removeprefix("vmbus.") for word in row.split("|")[3].split(",")} - {
            "nothing of vmbus"
        }
        assert written == allowed


def test_one_module_alone_imports_a_dbus_library() -> None:
    users = {
        str(path.relative_to(ROOT))
        for path in sources()
        if DBUS_LIBRARIES & {name.split(".")[0] for name in imported(path)} or "dbus_next" in literals(path)
    }
    assert users == {"vmbus/bus.py"}


def literals(path: Path) -> set[str]:
    """String constants: a module may be imported by its name."""
    tree = ast.parse(path.read_text())
    return {
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }


@pytest.mark.parametrize("name", ["broker", "worker"])
def test_neither_broker_nor_worker_has_an_event_loop_library_or_the_bus(name: str) -> None:
    for path in sorted((PACKAGE / name).rglob("*.py")):
        roots = {found.split(".")[0] for found in imported(path)}
        assert not roots & ({"asyncio"} | DBUS_LIBRARIES), path
