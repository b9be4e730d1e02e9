# SPDX-License-Identifier: Apache-2.0
"""What the tests that drive a whole system by vmbusctl share: its verbs, and the bare-metal guest's file."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
from collections.abc import Iterator
from pathlib import Path

from tests.lab.system import ALICE, System
from tests.local import worker_guest


def ctl(system: System, *words: str, user: str = ALICE) -> str:
    """What a verb prints that has to succeed."""
    done = system.vmbusctl(user, *words, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def refused(system: System, *words: str, user: str = ALICE) -> str:
    """What a verb complains of that has to fail, in one line."""
    done = system.vmbusctl(user, *words, timeout=60)
    assert done.returncode != 0, done.stdout
    assert len(done.stderr.splitlines()) == 1
    return done.stderr


def place_guest(system: System, user: str = ALICE) -> Path:
    """The bare-metal guest as the user's own file, to be given as a kernel."""
    kernel = system.files(user) / "guest"
    shutil.copy(worker_guest.image(), kernel)
    os.chown(kernel, pwd.getpwnam(user).pw_uid, -1)
    return kernel


@contextlib.contextmanager
def nothing_left(system: System, name: str) -> Iterator[None]:
    """Whatever becomes of alice's machine ``name``: it is ended and undefined, and nothing of it is left."""
    before = system.counts()
    yield
    system.vmbusctl(ALICE, "kill", name)
    system.vmbusctl(ALICE, "undefine", name)
    assert system.settle(before) == before
