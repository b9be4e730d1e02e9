# SPDX-License-Identifier: Apache-2.0
"""Files that clients pass: poison until shown harmless.

close() on a file of a FUSE server that does not answer never returns, not even to SIGKILL, and it comes
with every close of every copy, the one at exit too. A process that hangs there keeps all its other files:
the bus would never learn that a killed vmbusd is gone. So a poisonous file must leave our table of
descriptors without being closed by us. There is one way: ``close_range(N, ~0, CLOSE_RANGE_UNSHARE)`` gives
the calling thread a table of its own that holds only what is below N, and closes nothing as long as another
thread keeps the old table. Hence:

* **Layout.** Every number below N is always taken, by a file of ours or by a placeholder. Whatever arrives
  therefore gets a number of N or more.
* **Admission** happens before the event loop does anything else. Each file is classified without asking
  its file system: statx with AT_STATX_DONT_SYNC for type, device and mount; F_GET_SEALS, which
  only a tmpfs file answers; our own mountinfo for what the mount or the device is. Only what is *known* to be
  harmless is admitted, and then moved below N at once.
* **Disposal.** If one file of a message is not, a new thread keeps the old table, we take the one without
  it, and the thread closes everything of ours and at last the poison. It may hang for ever; it holds
  nothing else.

* **Sockets**, where a method takes one, are never harmless: the last close() of one closes the files that
  wait in it as messages, and waits for the lock that whoever is stuck in a call on it holds. So each leaves
  as poison does, and is kept no longer than it takes to hand it on. What it is, is asked without that lock.

The layout is kept by ``descriptors``. At most ``STUCK`` such threads a user; what that user sends beyond is
left open, uncounted threads being worse than a table that fills.
"""

from __future__ import annotations

import abc
import contextlib
import ctypes
import fcntl
import logging
import os
import select
import socket
import stat
from collections import Counter
from typing import Final

from vmbus.service import descriptors
from vmbus.wire.broker import Identity
from vmbus.wire.errors import VmbusError

log = logging.getLogger("vmbus.files")

STUCK: Final = 8
"""Threads that may hang in close() for one user."""
HELD: Final = 64
"""Admitted files that one user may have with us at a time."""

_libc = ctypes.CDLL(None, use_errno=True)
_AT_EMPTY_PATH: Final = 0x1000
_AT_STATX_DONT_SYNC: Final = 0x4000
_STATX_MNT_ID: Final = 0x1000
_F_GET_SEALS: Final = 1034
_SO_PROTOCOL: Final = 38
_SO_DOMAIN: Final = 39


class _Statx(ctypes.Structure):
    # struct statx, include/uapi/linux/stat.h
    _fields_ = [
        *((name, ctypes.c_uint32) for name in ("mask", "blksize")),
        ("attributes", ctypes.c_uint64),
        *((name, ctypes.c_uint32) for name in ("nlink", "uid", "gid")),
        *((name, ctypes.c_uint16) for name in ("mode", "spare0")),
        *((name, ctypes.c_uint64) for name in ("ino", "size", "blocks", "attributes_mask")),
        ("times", ctypes.c_byte * 64),
        *((name, ctypes.c_uint32) for name in ("rdev_major", "rdev_minor", "dev_major", "dev_minor")),
        ("mnt_id", ctypes.c_uint64),
        ("spare", ctypes.c_byte * 104),
    ]


def _statx(fd: int) -> _Statx:
    found = _Statx()
    flags = _AT_EMPTY_PATH | _AT_STATX_DONT_SYNC
    if _libc.statx(fd, b"", flags, _STATX_MNT_ID, ctypes.byref(found)):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return found


def harmless(fd: int) -> str:
    """ "" if closing, reading and locking this file can be done by us; else what is wrong with it.

    Nothing here asks the file's own file system.
    """
    if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_PATH:
        return "it was opened with O_PATH; open it for reading or writing"
    try:
        found = _statx(fd)
    except OSError as error:
        return f"it cannot be looked at ({error.strerror})"
    if stat.S_ISBLK(found.mode):
        return ""
    if not stat.S_ISREG(found.mode):
        return "it is neither a regular file nor a block device"
    with contextlib.suppress(OSError):
        fcntl.fcntl(fd, _F_GET_SEALS)
        return ""
    kind = _file_system(found)
    if kind is None:
        return "its file system is not mounted where vmbusd can see it; give its path instead"
    if kind.startswith("fuse"):
        return f"it lies on FUSE ({kind}), whose server could keep vmbus waiting for ever; copy it elsewhere"
    return ""


def _mode(fd: int) -> int:
    with contextlib.suppress(OSError):
        return int(_statx(fd).mode)
    return 0


def _file_system(found: _Statx) -> str | None:
    """The type of the file system, by the mount that the file was opened through, else by its device."""
    device = f"{found.dev_major}:{found.dev_minor}"
    by_device = None
    with open("/proc/self/mountinfo") as mounts:
        for line in mounts:
            words = line.split(" ")
            kind = words[words.index("-") + 1]
            if found.mask & _STATX_MNT_ID and int(words[0]) == found.mnt_id:
                return kind
            if words[2] == device:
                by_device = kind
    return by_device


def unfit(fd: int) -> str:
    """ "" if this is a socket for a stream of bytes to a peer that is there; else what is wrong with it.

    Nothing here waits for the socket's lock, as getsockname() and getpeername() do.
    """
    if _option(fd, socket.SO_TYPE) != socket.SOCK_STREAM:
        return "it is no stream socket"
    family, protocol = _option(fd, _SO_DOMAIN), _option(fd, _SO_PROTOCOL)
    tcp = family in (socket.AF_INET, socket.AF_INET6) and protocol == socket.IPPROTO_TCP
    if family != socket.AF_UNIX and not tcp:
        return "it is neither a UNIX nor a TCP socket"
    if _option(fd, socket.SO_ACCEPTCONN):
        return "it listens; pass a connection"
    poll = select.poll()
    poll.register(fd, 0)
    if any(events & select.POLLHUP for _, events in poll.poll(0)):
        return "it is not connected"
    return ""


def _option(fd: int, name: int) -> int:
    """A number that the kernel keeps of a socket; -1 if this is none."""
    value, size = ctypes.c_int(-1), ctypes.c_uint32(4)
    failed = _libc.getsockopt(fd, socket.SOL_SOCKET, name, ctypes.byref(value), ctypes.byref(size))
    return -1 if failed else value.value


class Passed(abc.ABC):
    """An admitted file or socket. Who wants to keep it beyond its call sets ``claimed``, and calls ``close``
    when done."""

    def __init__(self, files: Files, fd: int, who: str) -> None:
        self._files = files
        self.who = who
        self.fd = fd
        self.claimed = False

    @abc.abstractmethod
    def close(self) -> None:
        """Let it go. Closing twice is closing once."""


class PassedSocket(Passed):
    """A connected stream socket."""

    def close(self) -> None:
        """Have it closed by a thread that may hang in that."""
        if self.fd >= 0:
            self._files.bury(self.fd, self.who)
            self.fd = -1


class PassedFile(Passed):
    """A file whose close() is harmless."""

    def identity(self) -> Identity:
        """What it is, as fstat says."""
        found = os.fstat(self.fd)
        return Identity(found.st_dev, found.st_ino, found.st_rdev, found.st_mode, found.st_size)

    def check(self, slot: str, *, writable: bool, regular: bool) -> None:
        """Raise InvalidArgument unless it is fit for the slot."""
        mode = fcntl.fcntl(self.fd, fcntl.F_GETFL) & os.O_ACCMODE
        if writable and mode != os.O_RDWR:
            raise VmbusError(
                "InvalidArgument", "the file is not open for reading and writing; open it so", argument=slot
            )
        if mode == os.O_WRONLY:
            raise VmbusError(
                "InvalidArgument", "the file is open for writing only; open it for reading", argument=slot
            )
        if regular and not stat.S_ISREG(os.fstat(self.fd).st_mode):
            raise VmbusError(
                "InvalidArgument", "it is a block device; a regular file is needed", argument=slot
            )

    def close(self) -> None:
        """Close it (it is harmless). Closing twice is closing once."""
        if self.fd >= 0:
            self._files.release(self.fd, self.who)
            self.fd = -1


class OwnFile:
    """A file of the service's that is handed over as a client's is."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def close(self) -> None:
        """Closing twice is closing once."""
        if self.fd >= 0:
            descriptors.close(self.fd)
            self.fd = -1


def _too_many() -> VmbusError:
    text = f"at most {HELD} passed files can wait for a user's machines"
    return VmbusError("QuotaExceeded", text, argument="files")


class Files:
    """What clients have put into our table. ``who`` names a user, for the caps."""

    def __init__(self) -> None:
        self._held: Counter[str] = Counter()
        self._stuck: Counter[str] = Counter()

    def admit(self, fds: list[int], who: str) -> list[Passed]:
        """Take the files of one message. Raises InvalidArgument or QuotaExceeded, and then none is left."""
        if not fds:
            return []
        sockets = {fd for fd in fds if stat.S_ISSOCK(_mode(fd))}
        complaints = [unfit(fd) if fd in sockets else harmless(fd) for fd in fds]
        if any(complaints):
            self._dispose(fds, who)
            index = next(i for i, bad in enumerate(complaints) if bad)
            text = f"file {index + 1} of {len(fds)} is refused: {complaints[index]}"
            raise VmbusError("InvalidArgument", text, argument="files")
        if self._held[who] + len(fds) > HELD:
            for fd in set(fds) - sockets:
                os.close(fd)
            self._dispose(sorted(sockets), who)
            raise _too_many()
        self._held[who] += len(fds)
        kinds = [PassedSocket if fd in sockets else PassedFile for fd in fds]
        return [kind(self, descriptors.keep(fd), who) for kind, fd in zip(kinds, fds, strict=True)]

    def charge(self, files: list[Passed], who: str) -> None:
        """Count files for a user who was not known when they came. Raises QuotaExceeded."""
        for file in files:
            if file.who != who:
                self._less(file.who)
                self._held[who] += 1
                file.who = who
        if self._held[who] > HELD:
            raise _too_many()

    def discard(self, fds: list[int], who: str) -> None:
        """Get rid of files that nobody asked for."""
        with contextlib.suppress(VmbusError):
            for file in self.admit(fds, who):
                file.close()

    def release(self, fd: int, who: str) -> None:
        """Called by PassedFile.close."""
        self._less(who)
        descriptors.close(fd)

    def bury(self, fd: int, who: str) -> None:
        """Called by PassedSocket.close: it goes as one that has just come."""
        self._less(who)
        if not descriptors.limit():
            os.close(fd)
            return
        copy = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, descriptors.limit())
        descriptors.close(fd)
        self._dispose([copy], who)

    def _less(self, who: str) -> None:
        self._held[who] -= 1
        if self._held[who] <= 0:
            del self._held[who]

    def _dispose(self, fds: list[int], who: str) -> None:
        if not fds:
            return
        if self._stuck[who] >= STUCK:
            log.error("%s sent %d files that cannot be closed; %d more are left open", who, STUCK, len(fds))
            return
        self._stuck[who] += 1

        def ended() -> None:
            self._stuck[who] -= 1
            if self._stuck[who] <= 0:
                del self._stuck[who]

        if not descriptors.expel(fds, ended):
            log.error("files of %s cannot be taken out of the table; they are left open", who)
