# SPDX-License-Identifier: Apache-2.0
"""openat2 and statx: how a path is walked without an accident (include/uapi/linux/{openat2,stat}.h)."""

import ctypes
import os

from vmbus.broker.syscalls import call, words

RESOLVE_NO_MAGICLINKS, RESOLVE_NO_SYMLINKS, RESOLVE_BENEATH = 0x02, 0x04, 0x08
_AT_EMPTY_PATH, _AT_STATX_DONT_SYNC = 0x1000, 0x4000
_STATX_SIZE, _STATX_MNT_ID = 256, 0x90  # struct statx, and stx_mnt_id in it


def openat2(directory: int, path: str, flags: int, resolve: int) -> int:
    """openat2(2), close-on-exec; ``resolve`` is an or of RESOLVE_*."""
    how = words(flags | os.O_CLOEXEC, 0, resolve)
    return call("openat2", path, directory, os.fsencode(path), how, len(how))


def mount_id(fd: int) -> int:
    """The id (first field of mountinfo) of the mount that ``fd`` lies on.

    With an empty mask and AT_STATX_DONT_SYNC no file system is asked: a FUSE server that never answers does
    not hold this up (fs/fuse/dir.c, fuse_update_get_attr).
    """
    buffer = ctypes.create_string_buffer(_STATX_SIZE)
    call("statx", fd, fd, b"", _AT_EMPTY_PATH | _AT_STATX_DONT_SYNC, 0, buffer)
    return int.from_bytes(buffer.raw[_STATX_MNT_ID : _STATX_MNT_ID + 8], "little")
