# SPDX-License-Identifier: Apache-2.0
"""What the tests that drive a whole system by vmbusctl share: its verbs, the bare-metal guest's file, and
fixtures for a module about one machine, whose ``NAME`` it is."""

from __future__ import annotations

import os
import pwd
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

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


@pytest.fixture(scope="module")
def system() -> Iterator[System]:
    """A whole system with the guest in alice's directory."""
    with System() as whole:
        place_guest(whole)
        yield whole


@pytest.fixture(autouse=True)
def nothing_is_left(request: pytest.FixtureRequest, system: System) -> Iterator[None]:
    """Whatever becomes of alice's machine ``NAME`` of the module: it is ended and undefined, and nothing of
    it is left."""
    before = system.counts()
    yield
    system.vmbusctl(ALICE, "kill", request.module.NAME)
    system.vmbusctl(ALICE, "undefine", request.module.NAME)
    assert system.settle(before) == before
