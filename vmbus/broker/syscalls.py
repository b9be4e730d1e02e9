# SPDX-License-Identifier: Apache-2.0
"""System calls that Python 3.11 lacks, through ctypes; nothing else of vmbus calls C.

Each function raises ``OSError`` whose text names the call and its argument and, where the errno is known
to puzzle people, a hint at what would work. Numbers are x86-64's (arch/x86/entry/syscalls/syscall_64.tbl),
layouts are those of include/uapi/linux/{openat2,stat,mount}.h.
"""

from __future__ import annotations

import ctypes
import errno
import os
from typing import Final

_libc = ctypes.CDLL(None, use_errno=True)

CLONE_NEWNS: Final = 0x00020000
CLONE_NEWCGROUP: Final = 0x02000000
CLONE_NEWUTS: Final = 0x04000000
CLONE_NEWIPC: Final = 0x08000000
CLONE_NEWPID: Final = 0x20000000
CLONE_NEWNET: Final = 0x40000000

MS_RDONLY: Final = 1
MS_NOSUID: Final = 2
MS_NODEV: Final = 4
MS_NOEXEC: Final = 8
MS_REMOUNT: Final = 32
MS_BIND: Final = 4096
MS_REC: Final = 16384
MS_PRIVATE: Final = 1 << 18
MNT_DETACH: Final = 2
_MOUNT_ATTR_RDONLY_NOSUID_NODEV: Final = 1 | 2 | 4

RESOLVE_NO_MAGICLINKS: Final = 0x02
RESOLVE_NO_SYMLINKS: Final = 0x04
RESOLVE_BENEATH: Final = 0x08

# Securebits as capabilities(7) has them: no rights from uid 0, none kept over setuid, none ambient; all
# locked. python-prctl knows only the first six bits.
SECUREBITS_NONE_EVER: Final = 0x01 | 0x02 | 0x08 | 0x20 | 0x40 | 0x80
_PR_SET_SECUREBITS: Final = 28

_AT_FDCWD: Final = -100
_AT_EMPTY_PATH: Final = 0x1000
_AT_RECURSIVE: Final = 0x8000
_AT_STATX_DONT_SYNC: Final = 0x4000
_CLOSE_RANGE_CLOEXEC: Final = 4
_SYS_PIVOT_ROOT: Final = 155
_SYS_STATX: Final = 332
_SYS_CLOSE_RANGE: Final = 436
_SYS_OPENAT2: Final = 437
_SYS_MOUNT_SETATTR: Final = 442

_HINTS: Final = {
    ("unshare", errno.EPERM): "the broker needs CAP_SYS_ADMIN",
    ("unshare", errno.ENOSPC): "raise the limits in /proc/sys/user/max_*_namespaces",
    ("mount", errno.EPERM): "the broker needs CAP_SYS_ADMIN in a mount namespace of its own",
    ("mount_setattr", errno.ENOSYS): "needs Linux 5.12 or newer",
    ("openat2", errno.ENOSYS): "needs Linux 5.6 or newer",
    ("close_range", errno.ENOSYS): "needs Linux 5.9 or newer",
}


class _OpenHow(ctypes.Structure):
    _fields_ = [("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64)]


class _MountAttr(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("set", "clear", "propagation", "userns_fd")]


class _Statx(ctypes.Structure):
    """struct statx up to stx_mnt_id (offset 0x90); the rest of its 256 bytes is padding here."""

    _fields_ = [
        ("head", ctypes.c_uint8 * 0x90),
        ("mnt_id", ctypes.c_uint64),
        ("tail", ctypes.c_uint8 * (256 - 0x98)),
    ]


def _check(call: str, what: object, result: int) -> int:
    if result >= 0:
        return result
    number = ctypes.get_errno()
    hint = _HINTS.get((call, number), "")
    raise OSError(number, f"{call}({what}): {os.strerror(number)}{f'; {hint}' if hint else ''}")


def _syscall(name: str, what: object, number: int, *arguments: object) -> int:
    wide = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    return _check(name, what, _libc.syscall(ctypes.c_long(number), *wide))


def unshare(flags: int) -> None:
    """Leave the namespaces that ``flags`` (CLONE_NEW*) name for new ones."""
    _check("unshare", hex(flags), _libc.unshare(flags))


def mount(source: str, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    """mount(2); ``kind`` and ``data`` may be None."""
    encoded = [part.encode() if part is not None else None for part in (source, target, kind)]
    result = _libc.mount(*encoded, ctypes.c_ulong(flags), data.encode() if data is not None else None)
    _check("mount", f"{source} on {target}", result)


def umount(target: str, flags: int) -> None:
    """umount2(2)."""
    _check("umount", target, _libc.umount2(target.encode(), flags))


def mount_read_only(target: str) -> None:
    """Make ``target`` and every mount below it read-only, nosuid and nodev, in one call."""
    attributes = _MountAttr(set=_MOUNT_ATTR_RDONLY_NOSUID_NODEV)
    arguments = (
        _AT_FDCWD,
        target.encode(),
        _AT_RECURSIVE,
        ctypes.byref(attributes),
        ctypes.sizeof(attributes),
    )
    _syscall("mount_setattr", target, _SYS_MOUNT_SETATTR, *arguments)


def pivot_root(new: str, old: str) -> None:
    """pivot_root(2)."""
    _syscall("pivot_root", new, _SYS_PIVOT_ROOT, new.encode(), old.encode())


def openat2(directory: int, path: str, flags: int, resolve: int) -> int:
    """openat2(2), close-on-exec; ``resolve`` is an or of RESOLVE_*."""
    how = _OpenHow(flags | os.O_CLOEXEC, 0, resolve)
    arguments = (directory, os.fsencode(path), ctypes.byref(how), ctypes.sizeof(how))
    return _syscall("openat2", path, _SYS_OPENAT2, *arguments)


def mount_id(fd: int) -> int:
    """The id (first field of mountinfo) of the mount that ``fd`` lies on.

    With an empty mask and AT_STATX_DONT_SYNC no file system is asked: a FUSE server that never answers
    does not hold this up (fs/fuse/dir.c, fuse_update_get_attr).
    """
    buffer = _Statx()
    flags = _AT_EMPTY_PATH | _AT_STATX_DONT_SYNC
    _syscall("statx", fd, _SYS_STATX, fd, b"", flags, 0, ctypes.byref(buffer))
    return int(buffer.mnt_id)


def close_from(first: int, *, on_exec: bool = False) -> None:
    """Close every descriptor from ``first`` on, now or (``on_exec``) when the process execs."""
    flags = _CLOSE_RANGE_CLOEXEC if on_exec else 0
    _syscall("close_range", first, _SYS_CLOSE_RANGE, first, 0xFFFFFFFF, flags)


def lock_securebits() -> None:
    """Set and lock SECUREBITS_NONE_EVER. Needs CAP_SETPCAP."""
    _check("prctl", "PR_SET_SECUREBITS", _libc.prctl(_PR_SET_SECUREBITS, SECUREBITS_NONE_EVER, 0, 0, 0))
