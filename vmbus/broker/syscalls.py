# SPDX-License-Identifier: Apache-2.0
"""System calls that Python 3.11 lacks, through ctypes; dropped/lookup.py has more of them.

Each raises ``OSError`` whose text names the call and what it was about and, where the errno is known to
puzzle people, says what would work. Numbers are x86-64's (arch/x86/entry/syscalls/syscall_64.tbl), layouts
those of include/uapi/linux/mount.h.
"""

import ctypes
import errno
import os

CLONE_NEWNS, CLONE_NEWCGROUP, CLONE_NEWUTS = 0x00020000, 0x02000000, 0x04000000
CLONE_NEWIPC, CLONE_NEWPID, CLONE_NEWNET = 0x08000000, 0x20000000, 0x40000000
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 8, 0x1000, 0x4000, 0x40000
MNT_DETACH = 2
_AT_FDCWD, _AT_RECURSIVE = -100, 0x8000
_MOUNT_ATTR_RDONLY_NOSUID_NODEV = 1 | 2 | 4
# capabilities(7): no rights from uid 0, none kept over setuid, none ambient; all of that locked. python-prctl
# knows only the first six bits.
_PR_SET_SECUREBITS, _SECUREBITS_NONE_EVER = 28, 0x01 | 0x02 | 0x08 | 0x20 | 0x40 | 0x80

_NUMBERS = {
    **{"pivot_root": 155, "prctl": 157, "mount": 165, "umount2": 166, "unshare": 272, "setns": 308},
    **{"statx": 332, "close_range": 436, "openat2": 437, "mount_setattr": 442},
}
_HINTS = {
    ("unshare", errno.EPERM): "; the broker needs CAP_SYS_ADMIN",
    ("unshare", errno.ENOSPC): "; raise the limits in /proc/sys/user/max_*_namespaces",
    ("mount_setattr", errno.ENOSYS): "; needs Linux 5.12 or newer",
}
_syscall = ctypes.CDLL(None, use_errno=True).syscall
_syscall.restype = ctypes.c_long


def call(name: str, what: object, *arguments: int | bytes | ctypes.Array[ctypes.c_char] | None) -> int:
    """The result of one. Raises OSError."""
    wide = [ctypes.c_long(argument) if isinstance(argument, int) else argument for argument in arguments]
    result = int(_syscall(ctypes.c_long(_NUMBERS[name]), *wide))
    if result < 0:
        number = ctypes.get_errno()
        text = f"{name}({what}): {os.strerror(number)}{_HINTS.get((name, number), '')}"
        raise OSError(number, text)
    return result


def words(*values: int) -> ctypes.Array[ctypes.c_char]:
    """A structure of 64-bit words."""
    data = b"".join(value.to_bytes(8, "little") for value in values)
    return ctypes.create_string_buffer(data, len(data))


def unshare(flags: int) -> None:
    """Leave the namespaces that ``flags`` (CLONE_NEW*) name for new ones."""
    call("unshare", hex(flags), flags)


def mount(source: str, target: str, kind: str = "", flags: int = 0, data: str = "") -> None:
    """mount(2)."""
    arguments = (source.encode(), target.encode(), kind.encode() or None, flags, data.encode() or None)
    call("mount", f"{source} on {target}", *arguments)


def umount(target: str, flags: int) -> None:
    """umount2(2)."""
    call("umount2", target, target.encode(), flags)


def mount_read_only(target: str) -> None:
    """Make the mount ``target`` and those below it read-only, nosuid and nodev."""
    attributes = words(_MOUNT_ATTR_RDONLY_NOSUID_NODEV, 0, 0, 0)
    call("mount_setattr", target, _AT_FDCWD, target.encode(), _AT_RECURSIVE, attributes, len(attributes))


def pivot_root(new: str, old: str) -> None:
    """pivot_root(2)."""
    call("pivot_root", new, new.encode(), old.encode())


def close_from(first: int) -> None:
    """Close every descriptor from ``first`` on."""
    call("close_range", first, first, 0xFFFFFFFF, 0)


def lock_securebits() -> None:
    """No rights from uid 0, none over setuid, none ambient: for good. Needs CAP_SETPCAP."""
    call("prctl", "PR_SET_SECUREBITS", _PR_SET_SECUREBITS, _SECUREBITS_NONE_EVER, 0, 0, 0)
