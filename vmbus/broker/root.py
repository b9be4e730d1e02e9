# SPDX-License-Identifier: Apache-2.0
"""A worker's root: a tmpfs with read-only binds of what it imports, and later with nothing at all.

What goes in is worked out once (dropped/survey.py). Things lie where they lie on the host, except
site-packages (/site) and vmbus (/code/vmbus). There is no /proc, no /dev and no /etc but ld.so.cache.
"""

import os

import msgspec

from vmbus.broker import syscalls

_TMPFS = "size=64k,nr_inodes=512,mode=0755"


class Image(msgspec.Struct, frozen=True):
    """What a root is made of, and what is executed in it."""

    binds: list[tuple[str, str]]  # source ("" for an empty directory), target; in order
    links: list[tuple[str, str]]  # target, text
    command: list[str]


def enter(image: Image, place: str) -> None:
    """Make the root on ``place`` and change into it. In a mount namespace of one's own.

    Without binds the root stays the host's, read-only.
    """
    syscalls.mount("none", "/", flags=syscalls.MS_REC | syscalls.MS_PRIVATE)
    if not image.binds:
        syscalls.mount_read_only("/")
        return
    flags = syscalls.MS_NOSUID | syscalls.MS_NODEV | syscalls.MS_NOEXEC
    syscalls.mount("vmbus", place, "tmpfs", flags, _TMPFS)
    os.mkdir(f"{place}/empty")
    for source, target in image.binds:
        _bind(source or f"{place}/empty", place + target)
    for target, text in image.links:
        os.makedirs(os.path.dirname(place + target), exist_ok=True)
        os.symlink(text, place + target)
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
    syscalls.mount(source, target, flags=syscalls.MS_BIND)
    syscalls.mount_read_only(target)


def leave_nothing(image: Image) -> None:
    """Take every bind away and remove every name: / stays, empty and read-only."""
    for _, target in reversed(image.binds):
        syscalls.umount(target, syscalls.MNT_DETACH)
    for directory, directories, files in os.walk("/", topdown=False):
        for name in [*files, *directories]:
            path = os.path.join(directory, name)
            remove = os.rmdir if os.path.isdir(path) and not os.path.islink(path) else os.unlink
            remove(path)
    syscalls.mount_read_only("/")
