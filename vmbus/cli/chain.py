# SPDX-License-Identifier: Apache-2.0
"""Resolving a disk's backing chain, as the caller, at definition time.

Nothing that an image names is opened when a machine starts: the whole chain stands in its definition. So
whoever writes the definition follows the names once, with the caller's own rights, and shows what was
found. A name is followed as QEMU does it: relative to the directory of the image that holds it, an
optional ``file:`` taken off. Formats are stated, never guessed: the active image's by the caller, a
backing file's by its overlay's header (or by the caller when the header does not say).

A path is made absolute with the symbolic links of its *directory* followed, since the broker opens it
beneath a granted directory without leaving that directory; the last component stays as it is.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from typing import Final, Literal, cast, get_args

from vmbus.cli import qcow2_header
from vmbus.wire.definition import Layer
from vmbus.wire.errors import VmbusError

MAX_LAYERS: Final = 200
Format = Literal["qcow2", "raw"]
FORMATS: Final = get_args(Format)


def resolve(path: str, image_format: str, *, backing_format: str | None = None, argument: str) -> list[Layer]:
    """The whole chain of the image at ``path``, active layer first, every path absolute.

    ``backing_format`` is used where a header names a backing file without its format. Raises VmbusError
    about ``argument``: NotFound, AccessDenied, ImageInvalid, InvalidArgument.
    """
    layers: list[Layer] = []
    seen: set[tuple[int, int]] = set()
    current, current_format = absolute(path), _format(image_format, argument)
    while True:
        header, identity = _look(current, current_format, argument)
        if identity in seen:
            raise VmbusError(
                "ImageInvalid", f"{current} is its own backing file, by way of others", argument=argument
            )
        seen.add(identity)
        data_path = None
        if header and header.data_name is not None:
            data_path = follow(header.data_name, current, argument)
            _look(data_path, "raw", argument)
        layers.append(
            Layer(
                format=current_format,
                path=current,
                backing_name=header.backing_name if header else None,
                data_name=header.data_name if header else None,
                data_path=data_path,
                encrypted=header.encrypted if header else False,
            )
        )
        if header is None or header.backing_name is None:
            return layers
        if len(layers) == MAX_LAYERS:
            raise VmbusError(
                "ImageInvalid", f"the chain has more than {MAX_LAYERS} images", argument=argument
            )
        stated = header.backing_format or backing_format
        if stated is None:
            raise VmbusError(
                "InvalidArgument",
                f"{current} does not say the format of its backing file {header.backing_name!r}; state it "
                f"with backing-format=, or in the image: 'qemu-img rebase -u -b FILE -F FORMAT'",
                argument=argument,
            )
        current, current_format = follow(header.backing_name, current, argument), _format(stated, argument)


def follow(name: str, image: str, argument: str) -> str:
    """The absolute path that ``name`` in the header of ``image`` means."""
    plain = name.removeprefix("file:")
    scheme, colon, _ = plain.partition(":")
    if colon and "/" not in scheme:
        raise VmbusError(
            "NotSupported",
            f"{image} names {name!r}; only names of local files are followed. If that is a file name, "
            f"write it as './{plain}' into the image",
            argument=argument,
        )
    return absolute(os.path.join(os.path.dirname(image), plain))


def absolute(path: str) -> str:
    """``path`` made absolute, its directory free of symbolic links, its last component as it is."""
    directory, name = os.path.split(os.path.abspath(path) if not path.startswith("/") else path)
    if name in ("", ".", ".."):
        return os.path.realpath(path)
    return os.path.join(os.path.realpath(directory), name)


def describe(layers: list[Layer]) -> Iterator[str]:
    """The chain as lines for people, the active image first."""
    for depth, layer in enumerate(layers):
        arrow = "   " * (depth - 1) + "└─ " if depth else ""
        yield f"{arrow}{layer.path} ({layer.format}{', encrypted' if layer.encrypted else ''})"
        if layer.data_path is not None:
            yield f"{'   ' * depth}   data in {layer.data_path}"


def _look(path: str, image_format: str, argument: str) -> tuple[qcow2_header.Header | None, tuple[int, int]]:
    """The header (None for raw) and the identity of the file at ``path``."""
    try:
        # O_NONBLOCK: a FIFO in the place of an image must not hang us.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise VmbusError("NotFound", f"{path} does not exist", argument=argument) from None
    except PermissionError:
        raise VmbusError("AccessDenied", f"{path} cannot be read by you", argument=argument) from None
    except OSError as error:
        raise VmbusError("InvalidArgument", f"{path}: {error.strerror}", argument=argument) from None
    try:
        status = os.fstat(fd)
        if not (stat.S_ISREG(status.st_mode) or stat.S_ISBLK(status.st_mode)):
            raise VmbusError(
                "InvalidArgument", f"{path} is neither a regular file nor a block device", argument=argument
            )
        header = None
        if image_format == "qcow2":
            with os.fdopen(fd, "rb", buffering=0, closefd=False) as file:
                header = qcow2_header.read(file)
        return header, (status.st_dev, status.st_ino)
    except qcow2_header.HeaderError as error:
        raise VmbusError(
            "ImageInvalid", f"{path} is not a usable qcow2 image: {error}", argument=argument
        ) from None
    except OSError as error:
        raise VmbusError("ImageInvalid", f"{path}: {error.strerror}", argument=argument) from None
    finally:
        os.close(fd)


def _format(stated: str, argument: str) -> Format:
    if stated not in FORMATS:
        raise VmbusError(
            "InvalidArgument", f"format {stated!r} is not known; qcow2 and raw are", argument=argument
        )
    return cast(Format, stated)
