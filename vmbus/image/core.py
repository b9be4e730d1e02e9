# SPDX-License-Identifier: Apache-2.0
"""The native core's face for images: JSON requests, descriptors for files and passphrases, VmbusError."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, cast

from vmbus._native import ffi, lib
from vmbus.wire.errors import KINDS, VmbusError

if TYPE_CHECKING:
    from vmbus.image.secret import Secret

Report = Callable[[int, int], None]


def file(stack: contextlib.ExitStack, path: str, flags: int) -> int:
    """A descriptor, closed with the stack."""
    fd = os.open(path, flags | os.O_CLOEXEC, 0o644)
    stack.callback(os.close, fd)
    return fd


def secret_pipe(stack: contextlib.ExitStack, secret: Secret) -> int:
    """A pipe that holds the passphrase, closed with the stack."""
    fd = secret.pipe()
    stack.callback(os.close, fd)
    return fd


@contextlib.contextmanager
def reporting(report: Report) -> Iterator[Any]:
    """Words for the core to count in, from which ``report`` is called ten times a second and at the end."""
    from threading import Event, Thread  # noqa: PLC0415 (vmbus-img is started often, and seldom reports)

    progress = ffi.new("uint64_t[3]")
    ended = Event()

    def watch() -> None:
        while not ended.wait(0.1):
            report(int(progress[0]), int(progress[1]))

    watcher = Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield progress
    finally:
        ended.set()
        watcher.join()
    report(1, 1)


def perform(
    request: dict[str, Any],
    image: Any = ffi.NULL,
    other: Any = ffi.NULL,
    *,
    report: Report | None = None,
    shared: Any = ffi.NULL,
) -> object:
    """Have the core perform a request on an open image, two, or none; gives its answer."""
    text = json.dumps(request).encode()
    out = ffi.new("char **")
    with contextlib.ExitStack() as stack:
        if report is not None:
            shared = stack.enter_context(reporting(report))
        call(lib.vmbus_image_call(image, other, text, len(text), shared, out))
    result = ffi.string(out[0])
    lib.vmbus_image_free_text(out[0])
    return cast(object, json.loads(result))


def call(result: int) -> None:
    """Raise the error that a function of the core has returned."""
    if result < 0:
        error = json.loads(ffi.string(lib.vmbus_error()))
        kind = error["kind"] if error["kind"] in KINDS else "Internal"
        raise VmbusError(kind, error["message"], argument=error["argument"])
