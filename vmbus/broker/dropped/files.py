# SPDX-License-Identifier: Apache-2.0
"""A file of a user, opened by a child that has become the user.

The child walks beneath the granted prefix with O_PATH, so that nothing is opened before it is known what it
is. Each step of the walk asks only the kernel on which mount it has arrived (statx without synchronisation,
then mountinfo): a FUSE file system is refused before its server is asked anything, unless ``[open] fuse``
allows it. A symlink within the prefix that leads on into a FUSE mount can still make this child hang; that
costs its owner one of four places and nobody else anything. The file goes from here straight to the worker;
the broker sees its identity only.
"""

import errno
import os
import socket
import stat

from vmbus.broker.children import Channel
from vmbus.broker.dropped import lookup, paths
from vmbus.broker.policy import Rights
from vmbus.wire import packet
from vmbus.wire.broker import Identity, Open
from vmbus.wire.errors import VmbusError
from vmbus.wire.inlet import Delivery

_WALK = lookup.RESOLVE_BENEATH | lookup.RESOLVE_NO_MAGICLINKS
_ESCAPES = (errno.EXDEV, errno.ELOOP)  # of RESOLVE_BENEATH; of RESOLVE_NO_SYMLINKS and RESOLVE_NO_MAGICLINKS


def deliver(rights: Rights, request: Open, fuse: bool, channel: Channel) -> None:
    """Open the path, send the file through the inlet (the one kept descriptor). Reports an ``Identity``.

    Raises VmbusError: AccessDenied, NotFound, InvalidArgument (no file), Disconnected (worker gone, full).
    """
    prefix, rest = paths.split(rights, request.path)
    try:
        found = _walk(prefix, rest, fuse=fuse)
        identity, fd = _open_found(found, request.path, writable=request.writable)
    except OSError as error:
        raise _named(error, request.path, prefix) from None
    try:
        packet.send(socket.socket(fileno=channel.fds[0]), Delivery(slot=request.slot), [fd])
    except OSError as error:
        raise VmbusError("Disconnected", f"the worker does not take files: {error.strerror}") from None
    channel.report(identity)


def _walk(prefix: str, rest: str, *, fuse: bool) -> int:
    """An O_PATH fd of the file; each mount on the way is looked at before it is entered."""
    place = os.open("/", os.O_PATH | os.O_CLOEXEC)
    seen = {lookup.mount_id(place)}

    def arrive(fd: int) -> int:
        mount = lookup.mount_id(fd)
        if not fuse and mount not in seen and _file_system(mount).split(".")[0] in {"fuse", "fuseblk"}:
            message = "lies on a FUSE file system, whose server may never answer; use a copy elsewhere"
            raise VmbusError("AccessDenied", f"'{prefix}/{rest}' {message}", argument="path")
        seen.add(mount)
        return fd

    for part in prefix.split("/")[1:]:
        place = arrive(lookup.openat2(place, part, os.O_PATH, lookup.RESOLVE_NO_SYMLINKS))
    found = place
    parts = rest.split("/")
    for count in range(1, len(parts) + 1):  # always from the prefix, so that links may go up within it
        found = arrive(lookup.openat2(place, "/".join(parts[:count]), os.O_PATH, _WALK))
    return found


def _file_system(mount: int) -> str:
    """The type of mount ``mount`` by /proc/self/mountinfo; "" if it is not there any more."""
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            if line.split(" ", 1)[0] == str(mount):
                return line.partition(" - ")[2].split(" ", 1)[0]
    return ""


def _open_found(found: int, path: str, *, writable: bool) -> tuple[Identity, int]:
    kind = os.fstat(found).st_mode
    if not (stat.S_ISREG(kind) or stat.S_ISBLK(kind)):
        what = "a directory" if stat.S_ISDIR(kind) else "not a regular file or block device"
        raise VmbusError("InvalidArgument", f"'{path}' is {what}; name a file", argument="path")
    access = os.O_RDWR if writable else os.O_RDONLY
    fd = os.open(f"/proc/self/fd/{found}", access | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK)
    seen = os.fstat(fd)
    size = os.lseek(fd, 0, os.SEEK_END) if stat.S_ISBLK(seen.st_mode) else seen.st_size
    os.lseek(fd, 0, os.SEEK_SET)
    os.set_blocking(fd, True)
    return Identity(dev=seen.st_dev, ino=seen.st_ino, rdev=seen.st_rdev, mode=seen.st_mode, size=size), fd


def _named(error: OSError, path: str, prefix: str) -> VmbusError:
    if isinstance(error, FileNotFoundError):
        return VmbusError("NotFound", f"'{path}' does not exist", argument="path")
    text = os.strerror(error.errno or 0)
    if error.errno in _ESCAPES:
        message = f"'{path}' leads out of {prefix} or through a magic link ({text})"
    else:
        message = f"the machine's owner may not open '{path}': {text}"
    return VmbusError("AccessDenied", message, argument="path")
