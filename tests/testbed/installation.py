# SPDX-License-Identifier: Apache-2.0
"""What ``make install`` puts into a DESTDIR, programs and all; made once a session."""

from __future__ import annotations

import functools
import subprocess
from pathlib import Path

from tests.lab import namespace
from tests.lab.kernels import CACHE, CHECKOUT


def make(target: str, place: Path) -> None:
    """``make TARGET DESTDIR=PLACE``."""
    done = subprocess.run(
        namespace.outside(["make", "-s", target, f"DESTDIR={place}"], cwd=CHECKOUT),
        pass_fds=namespace.outside_fds(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]


@functools.cache
def tree() -> Path:
    """A DESTDIR into which everything was installed; not to be changed."""
    place = CACHE / "installed"
    subprocess.run(["rm", "-rf", place], check=True)
    place.mkdir(parents=True)
    make("install", place)
    return place
