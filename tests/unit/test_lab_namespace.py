# SPDX-License-Identifier: Apache-2.0
"""The harness can run from a checkout that other users cannot enter."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab import namespace
from tests.lab.kernels import CHECKOUT

READ_AS_SERVICE = """
import subprocess, sys
from pathlib import Path
from tests.lab import namespace
namespace.enter()
command = ["setpriv", "--reuid", "vmbus", "--regid", "vmbus", "--clear-groups", "cat"]
print(subprocess.run([*command, str(namespace.CHECKOUT / "vmbus/__init__.py")]).returncode)
print(subprocess.run(namespace.outside(["test", "-e", str(Path(sys.argv[1]) / "beside")]),
                     pass_fds=namespace.outside_fds()).returncode)
"""


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that all can enter (pytest's own are closed)."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:
        Path(name).chmod(0o755)
        yield Path(name)


def copy_of_checkout(target: Path) -> Path:
    """What the harness itself needs of a clone."""
    for part in ("tests/lab", "vmbus"):
        ignore = shutil.ignore_patterns("__pycache__", "_native")
        shutil.copytree(CHECKOUT / part, target / part, ignore=ignore)
    shutil.copy(CHECKOUT / "tests/__init__.py", target / "tests")
    return target


@pytest.mark.parametrize("closed", ["an ancestor", "the checkout itself", "both"])
def test_the_services_user_can_read_a_checkout_in_a_closed_place(place: Path, closed: str) -> None:
    checkout = copy_of_checkout(place / "upper/clone")
    (place / "beside").touch()
    place.chmod(0o755 if closed == "the checkout itself" else 0o700)
    checkout.chmod(0o755 if closed == "an ancestor" else 0o700)

    done = subprocess.run(
        [sys.executable, "-c", READ_AS_SERVICE, str(place)],
        cwd=checkout,
        env={**os.environ, "PYTHONPATH": str(checkout)},
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )

    assert done.stdout.split()[-2:] == ["0", "0"], done.stdout + done.stderr
    assert "SPDX-License-Identifier" in done.stdout


def test_a_checkout_whose_files_are_closed_is_refused_with_a_hint(place: Path) -> None:
    checkout = copy_of_checkout(place / "clone")
    (checkout / "vmbus/__init__.py").chmod(0o600)

    with pytest.raises(PermissionError, match="chmod -R go"):
        namespace.make_reachable(checkout)
