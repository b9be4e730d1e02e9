# SPDX-License-Identifier: Apache-2.0
"""The units are valid, hardened, and name programs and places that exist elsewhere in the tree."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
UNITS = sorted((ROOT / "systemd").glob("*.service"))
# systemd-analyze's exposure, 0 (none) to 10; measured, and not to grow. The broker's helpers inherit
# its filters: passt makes a user namespace for itself, and sockets of the Internet.
EXPOSURE = {"vmbus-broker": 5.6, "vmbusd": 0.5, "vmbus-machines": 1.5, "vmbus-shutdown": 1.2}

needs_analyze = pytest.mark.requires("systemd-analyze")


def settings(unit: Path) -> list[tuple[str, str]]:
    """Key and value of every line, continuation lines joined."""
    lines = unit.read_text().replace("\\\n", " ").splitlines()
    pairs = [line.partition("=") for line in lines if line and line[0] not in "#["]
    return [(key, " ".join(value.split())) for key, _, value in pairs]


@needs_analyze
def test_systemd_finds_nothing_wrong_with_them(tmp_path: Path) -> None:
    for unit in UNITS:
        # The programs are not installed here; that each is ours is another test.
        runnable = re.sub(r"^(Exec\w+=-?)/usr/lib/vmbus/\S+", r"\1/bin/true", unit.read_text(), flags=re.M)
        (tmp_path / unit.name).write_text(runnable)
    found = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *(str(tmp_path / unit.name) for unit in UNITS)],
        env={**os.environ, "SYSTEMD_UNIT_PATH": f"{tmp_path}:"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    ours = [line for line in found.stderr.splitlines() if "vmbus" in line or str(tmp_path) in line]
    assert (found.returncode, ours) == (0, [])


@needs_analyze
@pytest.mark.parametrize("name", EXPOSURE)
def test_exposure_stays_below_its_bound(name: str, tmp_path: Path) -> None:
    place = tmp_path / "usr/lib/systemd/system"
    place.mkdir(parents=True)
    shutil.copy(ROOT / f"systemd/{name}.service", place)
    bound = str(round(EXPOSURE[name] * 10))
    found = subprocess.run(
        [
            "systemd-analyze",
            "security",
            "--offline=yes",
            f"--root={tmp_path}",
            f"--threshold={bound}",
            f"{name}.service",
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert found.returncode == 0, found.stdout


def test_every_unit_has_a_bound_of_its_exposure() -> None:
    assert {unit.stem for unit in UNITS} == set(EXPOSURE)


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_programs_are_those_that_are_installed(unit: Path) -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    for key, value in settings(unit):
        if key.startswith("Exec") and value.lstrip("-").split()[0] not in ("/bin/true", "/bin/kill"):
            program = value.lstrip("-").split()[0]
            known = {f"/usr/lib/vmbus/env/bin/{script}" for script in scripts} | {
                "/usr/lib/vmbus/hold-machines"
            }
            assert program in known


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_only_the_broker_has_capabilities(unit: Path) -> None:
    bounding = dict(settings(unit))["CapabilityBoundingSet"]
    assert (bounding == "") == (unit.name != "vmbus-broker.service")
    assert dict(settings(unit))["NoNewPrivileges"] == "yes"


def test_the_service_runs_as_its_user() -> None:
    assert dict(settings(ROOT / "systemd/vmbusd.service"))["User"] == "vmbus"
    assert re.search(r"^u vmbus ", (ROOT / "systemd/vmbus.sysusers").read_text(), flags=re.M)


def test_restarting_broker_or_service_leaves_the_machines_alone() -> None:
    assert dict(settings(ROOT / "systemd/vmbus-broker.service"))["KillMode"] == "process"
    for name in ("vmbus-broker", "vmbusd"):
        ties = [
            value for key, value in settings(ROOT / f"systemd/{name}.service") if key in ("BindsTo", "PartOf")
        ]
        assert "vmbus-machines.service" not in ties
    assert dict(settings(ROOT / "systemd/vmbus-machines.service"))["Restart"] == "no"


def test_the_directories_of_the_service_are_made_beforehand() -> None:
    made = {
        line.split()[1]
        for line in (ROOT / "systemd/vmbus.tmpfiles").read_text().splitlines()
        if line[:2] == "d "
    }
    writable = dict(settings(ROOT / "systemd/vmbusd.service"))["ReadWritePaths"].split()
    assert set(writable) <= made
