# SPDX-License-Identifier: Apache-2.0
"""The worker of the broker's tests: it keeps the contract of a worker and answers questions about itself.

It is put in place of vmbus/worker/main.py. A question is a map on the control connection, the answer one too:
``do`` is ``look`` (directory, ids, descriptors, what it can still do), ``files`` (what came by the inlet),
``write`` (data to the file in a slot), ``seals`` (of a memfd), ``persist`` (make a tap so). KIND: "answers";
"deaf" never accepts; "late" never says imported; "dies" ends before it has imported; "chatty" writes on
stderr without end.
"""

from __future__ import annotations

import array
import fcntl
import os
import select
import socket
import time
from collections.abc import Callable
from typing import Any

import msgspec

from vmbus.wire import startup
from vmbus.wire.inlet import Delivery, Greeting

KIND = "answers"


def main() -> int:
    """Serve until killed."""
    line = startup.read(0)
    if KIND == "dies":
        return 3
    if KIND == "late":
        time.sleep(3600)
    os.write(line.status, startup.IMPORTED)
    os.close(line.status)
    end = time.monotonic() + 10
    while os.listdir("/"):
        if time.monotonic() > end:
            return 4
        time.sleep(0.001)
    while KIND == "chatty":
        os.write(2, b"x" * 100 + b"\n")
    if KIND == "deaf":
        time.sleep(3600)
    _serve(socket.socket(fileno=line.listen))
    return 0


def _serve(listener: socket.socket) -> None:
    control: socket.socket | None = None
    epoch = 0
    files: dict[str, list[int]] = {}
    while True:
        ready, _, _ = select.select([listener, *([control] if control else [])], [], [])
        if listener in ready:
            connection, _ = listener.accept()
            greeting = msgspec.msgpack.decode(connection.recv(65536), type=Greeting)
            if greeting.role == "control":
                if control is not None:
                    control.close()
                control, epoch = connection, greeting.epoch
            else:
                _inlet(connection, files)
        elif control is not None:
            data = control.recv(65536)
            if not data:
                control.close()
                control = None
                continue
            control.send(msgspec.msgpack.encode(_answer(msgspec.msgpack.decode(data), files, epoch)))


def _inlet(connection: socket.socket, files: dict[str, list[int]]) -> None:
    with connection:
        data, ancillary, _, _ = connection.recvmsg(65536, socket.CMSG_SPACE(64))
        if not data:
            return
        delivery = msgspec.msgpack.decode(data, type=Delivery)
        fds = array.array("i", ancillary[0][2])
        files[delivery.slot] = list(fds)


def _answer(question: dict[str, Any], files: dict[str, list[int]], epoch: int) -> dict[str, Any]:
    if question["do"] == "look":
        return {"epoch": epoch, "pid": os.getpid(), "root": os.listdir("/"), **_rights()}
    if question["do"] == "write":
        fd = files[question["slot"]][0]
        try:
            return {"written": os.pwrite(fd, question["data"], 0)}
        except OSError as error:
            return {"errno": error.errno}
    if question["do"] == "seals":
        fd = files[question["slot"]][0]
        return {"size": os.fstat(fd).st_size, "seals": fcntl.fcntl(fd, fcntl.F_GET_SEALS)}
    if question["do"] == "persist":
        fcntl.ioctl(files[question["slot"]][0], 0x400454CB, 1)  # TUNSETPERSIST
        return {}
    found = {}
    for slot, fds in files.items():
        seen = os.fstat(fds[0])
        regular = seen.st_mode & 0o170000 == 0o100000
        found[slot] = {
            "ino": seen.st_ino,
            "fds": len(fds),
            "data": os.pread(fds[0], 64, 0) if regular else b"",
        }
    return found


def _rights() -> dict[str, Any]:
    """What it is and what it can do."""
    refused = {}
    attempts: dict[str, Callable[[], object]] = {
        "mkdir": lambda: os.mkdir("/x"),
        "open": lambda: os.open("/etc/passwd", os.O_RDONLY),
        "setuid": lambda: os.setuid(0),
        "up": lambda: os.open("../../etc/passwd", os.O_RDONLY),
        "connect": lambda: socket.socket().connect(("127.0.0.1", 22)),
        "chroot": lambda: os.chroot("/"),
    }
    for name, attempt in attempts.items():
        try:
            attempt()
            refused[name] = False
        except OSError:
            refused[name] = True
    return {
        "uids": os.getresuid(),
        "gids": os.getresgid(),
        "groups": os.getgroups(),
        "environment": dict(os.environ),
        "interfaces": [name for _, name in socket.if_nameindex()],
        "refused": refused,
    }
