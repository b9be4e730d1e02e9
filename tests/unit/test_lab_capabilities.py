# SPDX-License-Identifier: Apache-2.0
"""A run says by name what this machine lacks, and what was skipped for it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.lab import capabilities
from tests.lab.kernels import CHECKOUT

TESTS = """
import pytest

@pytest.mark.requires("root", "absent-for-the-test")
def test_one(): assert False

@pytest.mark.requires("absent-for-the-test")
def test_two(): assert False

@pytest.mark.requires("root")
def test_three(): pass

@pytest.mark.soak
def test_four(): assert False
"""

PLUGIN = """
from tests.lab import capabilities
capabilities.PROBES["absent-for-the-test"] = lambda: "never there"
capabilities.PROBES["root"] = lambda: ""
"""


def test_the_summary_lists_what_was_absent_and_the_tests_skipped_for_it(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(TESTS)
    (tmp_path / "absent_plugin.py").write_text(PLUGIN)
    words = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "tests.conftest",
        "-p",
        "absent_plugin",
        "-p",
        "no:cacheprovider",
    ]
    words += [
        "-c",
        str(CHECKOUT / "pyproject.toml"),
        "--rootdir",
        str(tmp_path),
        str(tmp_path / "test_it.py"),
    ]

    done = subprocess.run(
        words,
        cwd=tmp_path,
        env={"PYTHONPATH": f"{CHECKOUT}:{tmp_path}", "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )

    lines = done.stdout.splitlines()
    at = lines.index("absent-for-the-test: never there -- 2 skipped")
    assert [line.rsplit("::")[-1] for line in lines[at + 1 : at + 3]] == ["test_one", "test_two"]
    assert "1 passed, 2 skipped, 1 deselected" in lines[-1], done.stdout


def test_every_capability_of_the_nested_host_is_registered() -> None:
    assert set(capabilities.PROBES) >= capabilities.NESTED


def test_an_unknown_capability_is_a_mistake() -> None:
    with pytest.raises(KeyError):
        capabilities.absent("kwm")
