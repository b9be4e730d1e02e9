# SPDX-License-Identifier: Apache-2.0
"""A small FUSE server on /dev/fuse: one file, ``disk``; it answers everything, or nothing after INIT.

A request that a silent server has read can never be interrupted, not even by SIGKILL: the caller hangs until
the connection is ended (``close``). Layouts: include/uapi/linux/fuse.h, protocol 7.31.
"""

from __future__ import annotations

import errno
import os
import signal
import struct
from pathlib import Path
from typing import Final

from tests.lab import namespace

CONTENT: Final = b"answered by the server"
READ: Final = 15
_LOOKUP, _FORGET, _GETATTR, _OPEN, _RELEASE, _FLUSH, _INIT = 1, 2, 3, 14, 18, 25, 26
_BATCH_FORGET: Final = 42


class Fuse:
    """Mounted on ``place`` from the start, served by a process of its own."""

    def __init__(
        self, place: Path, *, silent: bool, owner: int, silent_on: int = 0, silent_to: int | None = None
    ) -> None:
        """``silent``: answer nothing; ``silent_on``: nothing of an opcode; ``silent_to``: to one uid only."""
        self.place, self._silent, self._owner = place, silent, owner
        self._silent_on, self._silent_to = silent_on, silent_to
        self._fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        data = f"fd={self._fd},rootmode=40000,user_id=0,group_id=0,allow_other"
        namespace.mount("vmbus-test", place, kind="fuse", data=data)
        self._log, log = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._server = os.fork()
        if self._server == 0:
            try:
                self._serve(log)
            finally:
                os._exit(0)
        os.close(log)
        os.close(self._fd)

    def asked(self) -> bytes:
        """The opcodes that came after INIT since the last look."""
        try:
            return os.read(self._log, 4096)
        except BlockingIOError:
            return b""

    def close(self) -> None:
        """End the server, and with it the connection: whoever hangs gets ENOTCONN. Idempotent."""
        if self._server:
            os.kill(self._server, signal.SIGKILL)
            os.waitpid(self._server, 0)
            os.close(self._log)
            self._server = 0

    def _serve(self, log: int) -> None:
        while True:
            try:
                request = os.read(self._fd, 1 << 17)
            except OSError as error:
                if error.errno in {errno.EINTR, errno.ENOENT}:
                    continue
                return
            _, code, unique, node, uid = struct.unpack_from("IIQQI", request)
            if code == _INIT:
                head = struct.pack("IIIIHHIIHHI28x", 7, 31, 0, 0, 16, 12, 1 << 16, 1, 0, 0, 0)
                self._answer(unique, head)
                continue
            os.write(log, bytes([code]))
            refused = code == self._silent_on and self._silent_to in {None, uid}
            if not self._silent and not refused and code not in {_FORGET, _BATCH_FORGET}:
                self._reply(code, unique, node, request[40:])

    def _reply(self, code: int, unique: int, node: int, body: bytes) -> None:
        if code == _LOOKUP and body == b"disk\0":
            self._answer(unique, struct.pack("QQQQII", 2, 0, 60, 60, 0, 0) + self._attributes(2))
        elif code == _LOOKUP:
            self._answer(unique, b"", errno.ENOENT)
        elif code == _GETATTR:
            self._answer(unique, struct.pack("QII", 60, 0, 0) + self._attributes(node))
        elif code == _OPEN:
            self._answer(unique, struct.pack("QII", 1, 0, 0))
        elif code == READ:
            _, offset, size = struct.unpack_from("QQI", body)
            self._answer(unique, CONTENT[offset : offset + size])
        elif code in {_FLUSH, _RELEASE}:
            self._answer(unique, b"")
        else:
            self._answer(unique, b"", errno.ENOSYS)

    def _attributes(self, node: int) -> bytes:
        mode, size = (0o100600, len(CONTENT)) if node == 2 else (0o40755, 0)
        times = (0,) * 6
        return struct.pack(
            "QQQQQQIIIIIIIIII", node, size, 0, *times, mode, 1, self._owner, self._owner, 0, 512, 0
        )

    def _answer(self, unique: int, body: bytes, error: int = 0) -> None:
        os.write(self._fd, struct.pack("IiQ", 16 + len(body), -error, unique) + body)
