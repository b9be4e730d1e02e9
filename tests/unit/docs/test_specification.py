# SPDX-License-Identifier: Apache-2.0
"""SPECIFICATION.md: every promise has a number and a test that exists, or says that it is pending."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[3]
TEXT = (ROOT / "SPECIFICATION.md").read_text()
ROWS = re.findall(r"^\| (\d+\.\d+) \| (.*?) \| (.*?) \|$", TEXT, flags=re.M)


def rust_tests(path: Path) -> set[str]:
    return set(re.findall(r"#\[test\]\s*(?:#\[[^\]]*\]\s*)*fn (\w+)", path.read_text()))


def python_tests(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    return {
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test")
    }


def test_there_are_promises() -> None:
    assert len(ROWS) > 30


def test_every_row_of_the_tables_is_read() -> None:
    lines = [line for line in TEXT.splitlines() if re.match(r"\| \d", line)]
    assert len(lines) == len(ROWS)


def test_numbers_are_unique_and_in_order() -> None:
    numbers = [tuple(map(int, number.split("."))) for number, _, _ in ROWS]
    assert numbers == sorted(set(numbers))


def test_every_test_that_is_named_exists() -> None:
    missing = []
    for number, _, held in ROWS:
        if held == "pending":
            continue
        named = re.findall(r"`([^`]+)`", held)
        assert named, f"{number} names neither a test nor says pending"
        for reference in named:
            place, _, name = reference.partition("::")
            path = ROOT / place
            if not path.is_file():
                missing.append(f"{number}: {place}")
                continue
            if held.startswith("measured by ") and path.parent == ROOT / "bench":
                continue
            known = rust_tests(path) if path.suffix == ".rs" else python_tests(path)
            if not known or (name and name not in known):
                missing.append(f"{number}: {reference}")
    assert missing == []
