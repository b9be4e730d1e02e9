# SPDX-License-Identifier: Apache-2.0
"""The README's clients, as they stand there, run by an ordinary user against a whole system."""

from __future__ import annotations

import os
import pwd
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.system import ALICE, SLOW, System
from tests.local.worker_guest import image

pytestmark = pytest.mark.requires("root", "kvm")

README = (Path(__file__).parents[2] / "README.md").read_text()
# The guests of the tests take a mode where Linux takes a console.
BLOCKS = dict(
    re.findall(
        r"```(?:sh|python)\n# (\w+)\n(.*?)```", README.replace("console=ttyS0", "idle"), flags=re.DOTALL
    )
)
NEEDED = {"busctl": "systemd", "gdbus": "libglib2.0-bin"}


@pytest.fixture(scope="module")
def system() -> Iterator[System]:
    with System() as made:
        yield made


@pytest.fixture
def kernel(system: System) -> Path:
    account = pwd.getpwnam(ALICE)
    place = system.files(ALICE) / "kernel"
    shutil.copyfile(image(), place)
    os.chown(place, account.pw_uid, account.pw_gid)
    return place


def test_there_are_three_clients_of_five_lines() -> None:
    assert sorted(BLOCKS) == ["busctl", "gdbus", "python"]
    assert [len(block.split("\n")) - block.count("\n\n") - 1 for block in BLOCKS.values()] == [5, 5, 5]


@pytest.mark.parametrize("name", ["busctl", "gdbus"])
def test_a_shell_client_defines_starts_looks_kills_and_undefines(
    name: str, system: System, kernel: Path
) -> None:
    if shutil.which(name) is None:
        pytest.skip(f"needs {name}: package {NEEDED[name]} is not installed")
    before = system.counts()["workers"]
    done = system.run_as(ALICE, ["bash", "-euc", BLOCKS[name]], env={"KERNEL": str(kernel)}, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "'running'" in done.stdout or '"running"' in done.stdout
    assert system.vmbusctl(ALICE, "list", "--names").stdout == ""
    assert system.counts()["workers"] == before


def test_the_python_client_runs_a_machine_on_a_file_that_it_opened(system: System, kernel: Path) -> None:
    python = "/usr/bin/python3"
    if system.run_as(ALICE, [python, "-c", "import dbus"]).returncode != 0:
        pytest.skip("needs python3-dbus: the package is not installed")
    done = system.run_as(
        ALICE, [python, "-c", BLOCKS["python"]], env={"KERNEL": str(kernel)}, timeout=60 * SLOW
    )
    assert done.returncode == 0, done.stderr
    assert system.vmbusctl(ALICE, "show", "three").returncode == 0
    assert system.vmbusctl(ALICE, "kill", "three").returncode == 0
    assert system.vmbusctl(ALICE, "list", "--names").stdout == ""
