# SPDX-License-Identifier: Apache-2.0
"""Formatters, linters and type checkers have nothing to say, and the core's own tests pass."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.lab import namespace
from tests.lab.kernels import CHECKOUT

CRATES = ("qcow2", "sandbox", "vmm", "capi")


def quiet(argv: Sequence[str | Path], *, cwd: Path = CHECKOUT) -> None:
    """Run outside the private namespace; fail with the output unless the exit code is 0."""
    done = subprocess.run(
        namespace.outside(argv, cwd=cwd),
        pass_fds=namespace.outside_fds(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:]


def tool(name: str) -> Path:
    """A program of .venv."""
    return Path(sys.executable).with_name(name)


def cargo(*words: str) -> None:
    """Run cargo on the workspace."""
    found = shutil.which("cargo") or str(Path.home() / ".cargo/bin/cargo")
    quiet([found, *words], cwd=CHECKOUT / "native")


def test_ruff_finds_nothing() -> None:
    quiet([tool("ruff"), "check", "."])


def test_python_is_formatted() -> None:
    quiet([tool("ruff"), "format", "--check", "."])


def test_types_are_right() -> None:
    quiet([tool("mypy")])


def test_rust_is_formatted() -> None:
    cargo("fmt", "--all", "--check")


@pytest.mark.timeout(900)
def test_clippy_finds_nothing() -> None:
    cargo("clippy", "--quiet", "--workspace", "--all-targets", "--", "-D", "warnings")


@pytest.mark.timeout(900)
@pytest.mark.parametrize("crate", CRATES)
def test_the_crates_own_tests_pass(crate: str) -> None:
    cargo("test", "--quiet", "-p", f"vmbus-{crate}")
