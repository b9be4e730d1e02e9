# SPDX-License-Identifier: Apache-2.0
"""Formatters, linters and type checkers have nothing to say, and the core's own tests pass.

All of it is started with the session and runs beside the other tests (tests/lab/ahead.py).
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.lab.ahead import Finish, cargo

pytestmark = pytest.mark.timeout(1800)


def tool(name: str) -> str:
    """A program of .venv."""
    return str(Path(sys.executable).with_name(name))


@pytest.mark.ahead(tool("ruff"), "check", ".")
def test_ruff_finds_nothing(ahead: Finish) -> None:
    ahead()


@pytest.mark.ahead(tool("ruff"), "format", "--check", ".")
def test_python_is_formatted(ahead: Finish) -> None:
    ahead()


@pytest.mark.ahead(*cargo("fmt", "--all", "--check"))
def test_rust_is_formatted(ahead: Finish) -> None:
    ahead()


@pytest.mark.ahead(*cargo("test", "--quiet", "--workspace", "--no-fail-fast"))
def test_the_crates_own_tests_pass(ahead: Finish) -> None:
    ahead()


@pytest.mark.ahead(*cargo("clippy", "--quiet", "--workspace", "--all-targets", "--", "-D", "warnings"))
def test_clippy_finds_nothing(ahead: Finish) -> None:
    ahead()


@pytest.mark.ahead(tool("mypy"))
def test_types_are_right(ahead: Finish) -> None:
    ahead()
