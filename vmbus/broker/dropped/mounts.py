# SPDX-License-Identifier: Apache-2.0
"""File systems of huge pages (hugetlbfs) for programs beyond vmbus, as broker.toml wants them.

``min_size`` reserves pages at the mount, so that no machine and no other program can have them; ``size`` is
the most that the file system takes (Documentation/admin-guide/mm/hugetlbpage.rst). What is mounted carries
what it was made of as its source, ``vmbus:INSTANCE:OPTIONS``, and only what carries the instance's is ever
unmounted: when broker.toml does not want it any more, or not so. When the broker ends it stays, for others
use it. One that is in use stays too, and so says the log; the next start, or the next reload, tries again.

This child is nobody with CAP_SYS_ADMIN (and CAP_SYS_CHROOT, without which no mount namespace is entered), in
the mount namespace that the broker was told: systemd gives it one that nobody else sees. The directory must
be there, root's alone to write to, and reached without symlinks: only root says what is covered.
"""

import errno
import grp
import os
import pwd
import stat
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from vmbus.broker import syscalls
from vmbus.broker.children import Channel
from vmbus.broker.dropped import lookup, memfd, policy
from vmbus.wire.errors import VmbusError

_FLAGS = syscalls.MS_NOSUID | syscalls.MS_NODEV | syscalls.MS_NOEXEC
_UMOUNT_NOFOLLOW = 8  # include/linux/fs.h
_AT_FDCWD = -100

T = TypeVar("T")


def settle(instance: str, text: bytes, channel: Channel) -> None:
    """Mount what the policy ``text`` wants, unmount what it does not. Reports a line for each change.

    Kept: the mount namespace.
    """
    mark = f"vmbus:{instance}:"
    granted = {mount.path: mount for mount in policy.load(text).hugepages.mount}
    said: list[str] = []
    wanted = {path: _tried(said, path, _options, mount) for path, mount in granted.items()}
    # Names were looked up in the broker's own namespace, the last of whose files this was.
    syscalls.call("setns", "the mount namespace", channel.fds[0], syscalls.CLONE_NEWNS)
    for path, source in _mounted(mark).items():
        if path not in wanted or wanted[path] not in (None, source.removeprefix(mark)):
            _tried(said, path, _unmount, path, said)
    there = _mounted(mark)
    for path, options in wanted.items():
        if options and path not in there:
            _tried(said, path, _mount, granted[path], options, mark, said)
    channel.report(said)


def _mounted(mark: str) -> dict[str, str]:
    """By path, the sources of what we have mounted and nothing has covered since (proc(5), mountinfo)."""
    tops = {}
    for line in Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines():
        fields, _, kind = line.partition(" - ")
        tops[fields.split()[4]] = kind.split()[:2]
    return {path: top[1] for path, top in tops.items() if top[0] == "hugetlbfs" and top[1].startswith(mark)}


def _options(mount: policy.Mount) -> str:
    """For mount(2). Raises NotFound."""
    sizes = f"pagesize={mount.page_size},size={mount.size},min_size={mount.min_size}"
    uid = _id(mount.user, "user", lambda name: pwd.getpwnam(name).pw_uid)
    gid = _id(mount.group, "group", lambda name: grp.getgrnam(name).gr_gid)
    return f"{sizes},uid={uid},gid={gid},mode={mount.mode}"


def _id(name: str, kind: str, ask: Callable[[str], int]) -> int:
    try:
        return ask(name)
    except KeyError:
        raise VmbusError("NotFound", f"there is no {kind} '{name}'", argument=kind) from None


def _mount(mount: policy.Mount, options: str, mark: str, said: list[str]) -> None:
    page = policy.size(mount.page_size)
    pool = memfd.POOLS / f"hugepages-{page >> 10}kB"
    if not pool.is_dir():
        message = f"this host's CPU or kernel has no pages of {memfd.NAMES[page]}"
        raise VmbusError("NotSupported", message, argument="page-size")
    os.fchdir(_directory(mount.path))
    try:
        syscalls.mount(mark + options, ".", "hugetlbfs", _FLAGS, options)
    except OSError as error:
        if error.errno != errno.ENOMEM:
            raise
        raise memfd.too_few(policy.size(mount.min_size) // page, page, pool, "min-size") from None
    finally:
        os.chdir("/")
    said.append(f"hugetlbfs on {mount.path}: mounted, {options}")


def _directory(path: str) -> int:
    """Opened, as a place. Raises NotFound, AccessDenied."""
    flags = os.O_PATH | os.O_DIRECTORY
    try:
        fd = lookup.openat2(_AT_FDCWD, path, flags, lookup.RESOLVE_NO_SYMLINKS)
    except OSError as error:
        kind = "NotFound" if error.errno == errno.ENOENT else "AccessDenied"
        why = os.strerror(error.errno or 0)
        message = f"cannot be reached ({why}); it is to be a directory, without symlinks on the way"
        raise VmbusError(kind, message, argument="path") from None
    seen = os.fstat(fd)
    if seen.st_uid != 0 or stat.S_IMODE(seen.st_mode) & 0o022:
        raise VmbusError("AccessDenied", "others than root can write to that directory", argument="path")
    return fd


def _unmount(path: str, said: list[str]) -> None:
    syscalls.umount(path, _UMOUNT_NOFOLLOW)
    said.append(f"hugetlbfs on {path}: unmounted; broker.toml does not want it any more, or not so")


def _tried(said: list[str], path: str, act: Callable[..., T], *arguments: object) -> T | None:
    """What ``act`` returns; if it fails, that is said."""
    try:
        return act(*arguments)
    except VmbusError as error:
        said.append(f"hugetlbfs on {path}: {error.kind}: {error}")
    except OSError as error:
        kind = "InUse" if error.errno == errno.EBUSY else "Unavailable"
        said.append(f"hugetlbfs on {path}: {kind}: {error.strerror}; tried again at the next start or reload")
    return None
