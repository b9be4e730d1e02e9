# SPDX-License-Identifier: Apache-2.0
"""One directory for all temporary files of a session, which no killed session leaves for good.

``enter`` makes it, and whatever asks for a temporary directory afterwards, here or in a program that is
started (TMPDIR), gets one in it: systems, pytest's tmp_path, the crates' own tests. A lock says that the
session lives; whoever enters next removes the directories whose lock is free, so that a SIGKILL costs disk
space until then and no longer.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from pathlib import Path
from typing import Final

PREFIX: Final = "vmbus-session-"

_held: list[tuple[Path, int]] = []


def enter(parent: Path | None = None) -> Path:
    """The session's directory below ``parent`` (default: where temporary files are); all users can enter
    it."""
    parent = parent or Path(tempfile.gettempdir())
    sweep(parent)
    place = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
    claim = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    fcntl.flock(claim, fcntl.LOCK_EX)
    place.chmod(0o755)
    _held.append((place, claim))
    os.environ["TMPDIR"] = tempfile.tempdir = str(place)
    return place


def leave() -> None:
    """Remove what ``enter`` made; temporary files are where they were before."""
    while _held:
        place, claim = _held.pop()
        os.environ["TMPDIR"] = tempfile.tempdir = str(place.parent)
        shutil.rmtree(place, ignore_errors=True)
        os.close(claim)


def sweep(parent: Path) -> None:
    """Remove the directories of sessions that are gone."""
    for old in parent.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            claim = os.open(old, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # One that is being made is not locked yet: its mode says so.
                if os.fstat(claim).st_uid == os.geteuid() and os.fstat(claim).st_mode & 0o777 == 0o755:
                    shutil.rmtree(old, ignore_errors=True)
            finally:
                os.close(claim)
