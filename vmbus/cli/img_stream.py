# SPDX-License-Identifier: Apache-2.0
"""Raw bytes from a pipe into an image, and from images into a pipe.

What comes in is gathered in chunks of memory, each of which is copied as an image of its own, with all that
copying can (compression, leaving out zeros, several threads); the target grows with it.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO, Final, cast

from vmbus.image import Image, Layer, Preallocation
from vmbus.wire.errors import VmbusError

CHUNK: Final = 32 << 20  # a multiple of every cluster size
PIECE: Final = 2 << 20
Read = Callable[[int], bytes]


def is_stream(text: str) -> bool:
    """Whether a word of the command line means a stream: ``-``, or what is neither a file nor a disk."""
    if text == "-":
        return True
    try:
        mode = os.stat(text).st_mode
    except OSError:
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode) or stat.S_ISCHR(mode)


@contextlib.contextmanager
def reading(text: str) -> Iterator[Read]:
    """Something that gives the next bytes of a stream; fewer than asked for only at its end."""
    with open(0 if text == "-" else text, "rb", closefd=text != "-") as file:
        yield file.read


def whole(length: int) -> int:
    """A disk's size in whole sectors: a raw file may end within one."""
    return -(-length // 512) * 512


def joined(images: Sequence[Image]) -> Read:
    """The same for images, one behind the other."""

    def pieces() -> Iterator[bytes]:
        for one in images:
            for at in range(0, one.size, PIECE):
                piece = one.read(at, min(PIECE, one.size - at))
                yield piece + bytes(whole(len(piece)) - len(piece))

    return _gather(pieces())


def _gather(pieces: Iterator[bytes]) -> Read:
    rest = b""

    def read(length: int) -> bytes:
        nonlocal rest
        parts, have = [rest], len(rest)
        while have < length and (piece := next(pieces, b"")):
            parts.append(piece)
            have += len(piece)
        data = b"".join(parts)
        rest = data[length:]
        return data[:length]

    return read


def copy(
    read: Read, target: Image, how: dict[str, Any], *, grow: str | None, done: Callable[[int], None]
) -> int:
    """Write all that there is to read into ``target``; gives its length. With ``grow``, a kind of
    preallocation, the target becomes as long; else it has to be long enough."""
    at = 0
    while data := read(CHUNK):
        length = whole(len(data))
        if grow is not None:
            target.resize(at + length, preallocation=cast(Preallocation, grow))
        elif target.size < at + len(data):
            raise VmbusError("InvalidArgument", "output file is smaller than input file")
        with _held(data, min(length, target.size - at)) as source:
            source.copy_to(target, shift=at, **how)
        at += len(data)
        done(at)
    return at


@contextlib.contextmanager
def _held(data: bytes, length: int) -> Iterator[Image]:
    """Bytes in memory as a raw image."""
    fd = os.memfd_create("chunk")
    try:
        _write_all(fd, data)
        os.ftruncate(fd, length)
        with Image([Layer(f"/proc/self/fd/{fd}", "raw")], read_only=True, locks=False) as one:
            yield one
    finally:
        os.close(fd)


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def write_out(images: Sequence[Image], text: str) -> None:
    """Write the images' bytes into a stream, one behind the other."""
    with open(1 if text == "-" else text, "wb", closefd=text != "-") as file:
        for one in images:
            for found in one.map():
                _write_range(one, file, found)
            file.write(bytes(whole(one.size) - one.size))


def _write_range(one: Image, file: BinaryIO, found: dict[str, Any]) -> None:
    start, end = found["start"], found["start"] + found["length"]
    zeros = memoryview(bytes(PIECE)) if found["zero"] else None
    for at in range(start, end, PIECE):
        length = min(PIECE, end - at)
        file.write(zeros[:length] if zeros is not None else one.read(at, length))
