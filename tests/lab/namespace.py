# SPDX-License-Identifier: Apache-2.0
"""A private mount namespace, in which this machine's files can be replaced without touching the machine.

``enter`` is called once by whatever runs systems of vmbus (pytest's conftest.py, setup/run.py). It also
makes the checkout reachable: a clone below a directory that other users cannot enter (mkdtemp's 0700, a
home directory) is of no use to the service's user. A tmpfs, mode 0755, is laid over the first closed
directory and the checkout, opened before, is bound back at its path; only in this namespace, and only what
leads to the checkout is opened. What else lies below that directory is out of sight; ``outside`` runs a
command in the namespace we came from (cargo may live in root's home directory).
"""

from __future__ import annotations

import ctypes
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from tests.lab.kernels import CHECKOUT

CLONE_NEWNS: Final = 0x00020000
MS_BIND: Final = 4096
MS_REC: Final = 16384
MS_PRIVATE: Final = 1 << 18

_libc: Final = ctypes.CDLL(None, use_errno=True)
_outside: list[int] = []


def enter() -> None:
    """Go into a private mount namespace with the checkout reachable for all; the second call does nothing.

    Must be called while the process has one thread, as root. Raises OSError; PermissionError with a hint
    when the files of the checkout themselves are closed (a clone made with umask 077).
    """
    if _outside:
        return
    before = os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    _call("unshare(CLONE_NEWNS)", _libc.unshare(CLONE_NEWNS))
    _outside.append(before)
    mount("none", "/", flags=MS_REC | MS_PRIVATE)
    make_reachable(CHECKOUT)


def outside(argv: Sequence[str | Path], *, cwd: Path = CHECKOUT) -> list[str]:
    """The command line that runs ``argv`` in ``cwd`` in the mount namespace that ``enter`` was called in.

    To be started with ``pass_fds=outside_fds()``.
    """
    way = ["nsenter", f"--mount=/proc/self/fd/{_outside[0]}", "--"] if _outside else []
    return [*way, "env", "-C", str(cwd), *(str(word) for word in argv)]


def outside_fds() -> tuple[int, ...]:
    """What the command of ``outside`` has to inherit."""
    return tuple(_outside)


def make_reachable(checkout: Path) -> None:
    """See the module's note. Does nothing when every user can enter ``checkout`` already."""
    places = (*reversed(checkout.parents), checkout)
    closed = next((place for place in places if not _open_to_all(place)), None)
    if closed:
        here = os.open(checkout, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            if not _open_to_all(checkout):
                _rebuild(checkout, here, closed)
            else:
                mount("tmpfs", closed, kind="tmpfs", data="mode=0755")
                checkout.mkdir(parents=True)
                mount(f"/proc/self/fd/{here}", checkout, flags=MS_BIND | MS_REC)
        finally:
            os.close(here)
        os.chdir(checkout)
    sample = checkout / "vmbus/__init__.py"
    if not (sample.parent.stat().st_mode & stat.S_IXOTH and sample.stat().st_mode & stat.S_IROTH):
        raise PermissionError(f"{checkout}: user vmbus cannot read its files; chmod -R go+rX '{checkout}'")


def _rebuild(checkout: Path, here: int, closed: Path) -> None:
    """The checkout itself is closed: a directory in its place, with each of its entries bound in it."""
    names = os.listdir(here)
    mount("tmpfs", closed, kind="tmpfs", data="mode=0755")
    checkout.mkdir(parents=True, exist_ok=True)
    for name in names:
        target = checkout / name
        mode = os.stat(name, dir_fd=here, follow_symlinks=False).st_mode
        if stat.S_ISLNK(mode):
            target.symlink_to(os.readlink(name, dir_fd=here))
            continue
        if stat.S_ISDIR(mode):
            target.mkdir()
        else:
            target.touch()
        mount(f"/proc/self/fd/{here}/{name}", target, flags=MS_BIND | MS_REC)


def mount(source: str | Path, target: str | Path, *, kind: str = "", flags: int = 0, data: str = "") -> None:
    """mount(2). Raises OSError."""
    result = _libc.mount(
        os.fsencode(source),
        os.fsencode(target),
        kind.encode() or None,
        ctypes.c_ulong(flags),
        data.encode() or None,
    )
    _call(f"mount {kind} {source} on {target}", result)


def bind(source: str | Path, target: str | Path) -> None:
    """Lay ``source`` (with what is mounted below it) over ``target``."""
    mount(source, target, flags=MS_BIND | MS_REC)


def _open_to_all(place: Path) -> bool:
    return bool(place.stat().st_mode & stat.S_IXOTH)


def _call(what: str, result: int) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
