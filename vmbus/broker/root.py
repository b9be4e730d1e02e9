# SPDX-License-Identifier: Apache-2.0
"""A worker's root: a tmpfs with read-only binds of what it imports, and later with nothing at all.

``Image`` is worked out once, when the broker starts: the interpreter, its standard library, the directories
of its shared libraries, site-packages, and of vmbus only ``wire``, ``worker`` and ``_native``, so that a
worker cannot even read the code of the broker. Inside, things lie where they lie on the host, except
site-packages (/site) and vmbus (/code/vmbus). There is no /proc, no /dev and no /etc but ld.so.cache.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Final

import msgspec

import vmbus
from vmbus.broker import syscalls

_LOADER: Final = Path("/lib64/ld-linux-x86-64.so.2")  # System V ABI, AMD64 supplement
_PARTS: Final = ("__init__.py", "wire", "worker", "_native")
_TMPFS: Final = "size=64k,nr_inodes=512,mode=0755"


class Image:
    """What a root is made of: ``binds`` (source, target) and ``links`` (target, text), in order."""

    def __init__(self) -> None:
        self.python = os.path.realpath(sys.executable)
        stdlib = os.path.realpath(os.path.dirname(os.__file__))
        site = os.path.dirname(os.path.dirname(os.path.realpath(msgspec.__file__)))
        package = os.path.dirname(os.path.realpath(vmbus.__file__))
        self.path = ["/code", stdlib, f"{stdlib}/lib-dynload", "/site"]
        self.binds: list[tuple[str, str]] = [(self.python, self.python), (stdlib, stdlib), (site, "/site")]
        for directory in _library_directories(outside=[stdlib, site, package]):
            self.binds.append((directory, directory))
        if os.path.exists("/etc/ld.so.cache"):
            self.binds.append(("/etc/ld.so.cache", "/etc/ld.so.cache"))
        for part in _PARTS:
            if os.path.exists(f"{package}/{part}"):
                self.binds.append((f"{package}/{part}", f"/code/vmbus/{part}"))
        # A wheel installs all of vmbus into site-packages: an empty directory covers it.
        self.cover = "/site/vmbus" if os.path.isdir(f"{site}/vmbus") else None
        self.links = [(str(_LOADER), os.path.realpath(_LOADER))]
        if os.path.islink("/lib"):
            self.links.append(("/lib", os.readlink("/lib")))

    def describe(self) -> str:
        """For the audit log."""
        return f"a root of {len(self.binds)} read-only binds"

    def command(self) -> list[str]:
        """What the worker's process executes."""
        start = (
            f"import sys; sys.path[:] = {self.path!r}; from vmbus.worker.main import main; sys.exit(main())"
        )
        return [self.python, "-I", "-S", "-X", "utf8", "-c", start]


def _library_directories(outside: list[str]) -> list[str]:
    """The directories of the shared libraries that this very interpreter has mapped."""
    found = {os.path.dirname(os.path.realpath(_LOADER))}
    with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            name = line.rstrip("\n").partition("/")[2]
            if ".so" in name and not any(f"/{name}".startswith(f"{other}/") for other in outside):
                found.add(os.path.dirname(f"/{name}"))
    return sorted(found)


def enter(image: Image, place: str) -> None:
    """Make the root on ``place`` and change into it. In a mount namespace of one's own."""
    syscalls.mount("none", "/", None, syscalls.MS_REC | syscalls.MS_PRIVATE)
    flags = syscalls.MS_NOSUID | syscalls.MS_NODEV | syscalls.MS_NOEXEC
    syscalls.mount("vmbus", place, "tmpfs", flags, _TMPFS)
    for source, target in image.binds:
        _bind(source, place + target)
    for target, text in image.links:
        os.makedirs(os.path.dirname(place + target), exist_ok=True)
        os.symlink(text, place + target)
    if image.cover is not None:
        os.makedirs(f"{place}/empty")
        _bind(f"{place}/empty", place + image.cover)
    os.chdir(place)
    syscalls.pivot_root(".", ".")
    syscalls.umount(".", syscalls.MNT_DETACH)
    os.chdir("/")


def _bind(source: str, target: str) -> None:
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o444))
    syscalls.mount(source, target, None, syscalls.MS_BIND)
    syscalls.mount_read_only(target)


def leave_nothing(image: Image) -> None:
    """Take every bind away and remove every name: / stays, empty and read-only."""
    targets = [target for _, target in image.binds]
    for target in [*([image.cover] if image.cover else []), *reversed(targets)]:
        syscalls.umount(target, syscalls.MNT_DETACH)
    for directory, directories, files in os.walk("/", topdown=False):
        for name in files:
            os.unlink(os.path.join(directory, name))
        for name in directories:
            path = os.path.join(directory, name)
            os.unlink(path) if os.path.islink(path) else os.rmdir(path)
    syscalls.mount_read_only("/")
