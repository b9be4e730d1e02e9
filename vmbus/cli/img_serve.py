# SPDX-License-Identifier: Apache-2.0
"""``vmbus-img serve``: an image over NBD, on a unix socket that is made, passed, or systemd's."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from types import SimpleNamespace
from typing import cast

from vmbus import image
from vmbus.cli import img_options, img_size, img_source
from vmbus.image import DetectZeroes
from vmbus.wire.errors import VmbusError


def run(options: SimpleNamespace) -> int:
    """Serve until the last client has left, or SIGTERM comes."""
    [text] = img_options.operands(options, 1, "Expecting one image file name")
    connections = 16
    if options.connections is not None:
        connections = img_size.number(options.connections, "number of clients", 1, 1024)
    if options.socket is not None and options.fd is not None:
        raise VmbusError("InvalidArgument", "--socket and --fd are mutually exclusive")
    fd = None if options.fd is None else img_size.number(options.fd, "fd", 0, img_size.INT_MAX)
    zeroes = cast(DetectZeroes, options.detect_zeroes or "off")
    if zeroes not in image.DETECT_ZEROES:
        raise VmbusError("InvalidArgument", f"Invalid detect-zeroes mode '{zeroes}'")
    cache = img_source.cache(options.cache)
    source = img_source.of(options, text, options.format)
    write = not options.read_only
    if write and source.guessed and source.format == "raw":
        # Whoever writes the first sector could make it anything: the next to look would open what it names.
        message = f"The format of '{text}' is not stated: serve a raw image with -f raw, or with -r"
        raise VmbusError("InvalidArgument", message)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    snapshot = None
    if options.snapshot is not None:
        snapshot = img_source.snapshot_id(source, options.snapshot, share=options.share)
    with contextlib.ExitStack() as stack:
        disk = stack.enter_context(
            img_source.opened(
                source,
                write=write,
                share=options.share,
                cache=cache,
                snapshot=snapshot,
                detect_zeroes=zeroes,
            )
        )
        listener = stack.enter_context(_listener(options.socket, fd))
        if options.socket:
            stack.callback(_unlink, options.socket)
        disk.serve(
            listener,
            export=options.export or "",
            persistent=options.persistent,
            connections=connections,
            bitmaps=options.bitmaps,
            stop=stop,
        )
    return 0


def _unlink(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def _listener(path: str | None, fd: int | None) -> socket.socket:
    """The socket asked for; without one, the first that systemd passes (sd_listen_fds(3))."""
    if path is not None:
        if os.path.exists(path):
            raise VmbusError("AlreadyExists", f"{path} exists already", argument="socket")
        made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        # Under its name once it listens: who waits for the name to appear can connect.
        begun = f"{path}.{os.getpid()}"
        try:
            made.bind(begun)
            made.listen(16)
            os.rename(begun, path)
        except OSError as error:
            made.close()
            raise VmbusError("InvalidArgument", f"{path}: {error.strerror}", argument="socket") from None
        return made
    if (
        fd is None
        and os.environ.get("LISTEN_PID") == str(os.getpid())
        and os.environ.get("LISTEN_FDS") == "1"
    ):
        fd = 3
    if fd is None:
        raise VmbusError("InvalidArgument", "where to listen: -k SOCKET, --fd N, or a socket from systemd")
    return socket.socket(fileno=fd)
