# SPDX-License-Identifier: Apache-2.0
"""The SELinux module compiles, and a worker's domain opens nothing but what its interpreter loads."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
DEVEL = Path("/usr/share/selinux/devel/Makefile")

pytestmark = pytest.mark.requires("selinux-compiler")

# Read-only parts of the host that hold programs, libraries and their settings; nothing of a user, no device
# but the random one.
LOADED = {
    "bin_t",
    "device_t",
    "etc_t",
    "ld_so_t",
    "lib_t",
    "locale_t",
    "proc_t",
    "textrel_shlib_t",
    "tmpfs_t",  # its root, while there is something in it: directories and links
    "urandom_device_t",
    "usr_t",
    "vmbus_lib_t",
    "ld_so_cache_t",
}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not DEVEL.exists():
        pytest.skip("needs selinux-policy-dev: the package is not installed")
    place = tmp_path_factory.mktemp("selinux")
    for file in (ROOT / "selinux").glob("vmbus.*"):
        shutil.copy(file, place)
    made = subprocess.run(
        ["make", "-f", str(DEVEL), "vmbus.pp"],
        cwd=place,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert made.returncode == 0, made.stdout + made.stderr
    return place


def rules(place: Path, source: str) -> list[tuple[set[str], set[str], set[str]]]:
    """Targets, classes and permissions of each allow rule of ``source``, macros expanded."""
    expanded = (place / "tmp/vmbus.tmp").read_text()
    found = re.findall(r"\ballow\s+([^;]+?)\s+([^;:]+):\s*(\{[^}]*\}|\w+)\s+(\{[^}]*\}|\w+)\s*;", expanded)
    return [
        (set(target.strip("{} ").split()), set(classes.strip("{} ").split()), set(perms.strip("{} ").split()))
        for sources, target, classes, perms in found
        if source in sources.strip("{} ").split()
    ]


def test_it_compiles_to_a_package(compiled: Path) -> None:
    assert (compiled / "vmbus.pp").stat().st_size > 10_000


def test_a_worker_opens_files_only_of_what_its_interpreter_loads(compiled: Path) -> None:
    opened = [
        (targets, classes)
        for targets, classes, permissions in rules(compiled, "vmbus_worker_t")
        if "open" in permissions and classes & {"file", "chr_file", "blk_file", "sock_file", "dir"}
    ]
    assert opened
    assert set().union(*(targets for targets, _ in opened)) <= LOADED
    assert set().union(*(classes for _, classes in opened)) <= {"file", "dir", "chr_file"}


def test_what_a_worker_opens_it_cannot_write(compiled: Path) -> None:
    for targets, _, permissions in rules(compiled, "vmbus_worker_t"):
        if "open" in permissions and targets & LOADED:
            assert not permissions & {"write", "append", "create", "unlink", "setattr"}


def test_a_worker_makes_no_socket(compiled: Path) -> None:
    for _, classes, permissions in rules(compiled, "vmbus_worker_t"):
        if any(kind.endswith("socket") for kind in classes):
            assert not permissions & {"create", "connect", "connectto", "bind"}


def test_the_broker_alone_enters_the_workers_domain(compiled: Path) -> None:
    expanded = (compiled / "tmp/vmbus.tmp").read_text()
    entering = re.findall(r"\ballow\s+(\w+)\s+vmbus_worker_t:\s*process\s+\{([^}]*)\}", expanded)
    assert [source for source, permissions in entering if "transition" in permissions.split()] == [
        "vmbus_broker_t"
    ]


def test_the_service_opens_no_file_of_a_user(compiled: Path) -> None:
    for targets, classes, permissions in rules(compiled, "vmbusd_t"):
        if "non_auth_file_type" in targets or "blk_file" in classes:
            assert "open" not in permissions
