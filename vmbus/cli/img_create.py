# SPDX-License-Identifier: Apache-2.0
"""``vmbus-img create``, and the targets of the sub-commands that make one."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import cast

from vmbus import image
from vmbus.cli import img_options, img_settings, img_size, img_source
from vmbus.cli.img_source import Secrets, Source
from vmbus.image import Encryption, Format
from vmbus.wire.errors import VmbusError


def run(options: SimpleNamespace) -> int:
    """Make an image, and say what of."""
    format = options.format or "raw"
    if img_settings.wants_help(options.options):
        print(img_settings.listing(f"Supported {format} options:", img_settings.TABLES[_known(format)]))
        return 0
    match options.words:
        case [path]:
            length = None
        case [path, text]:
            length = img_size.scaled(text)
            if length is None or length < 0:
                raise VmbusError("InvalidArgument", f"Invalid image size specified: '{text}'.")
            if length > img_size.MAX:
                img_size.number(text, "image size")
        case []:
            raise img_options.UsageError("Expecting image file name", "create")
        case _:
            raise img_options.UsageError(f"Unexpected argument: {options.words[2]}", "create")
    try:
        settings = img_settings.given(format, options.options)
        settings = with_backing(format, settings, options.backing, options.backing_format)
        if length is not None and "size" in settings:
            raise VmbusError("InvalidArgument", "The image size must be specified only once")
        settings |= {"size": _size(path, settings, length, look=not options.unsafe)}
        if not options.quiet:
            print(f"Formatting '{path}', fmt={format} {img_settings.described(format, settings)}", flush=True)
        make(path, cast(Format, format), settings, img_source.secrets(options.objects))
    except VmbusError as error:
        raise VmbusError(error.kind, f"{path}: {error}") from None
    return 0


def _known(format: str) -> str:
    return img_settings.known_format(format)


def with_backing(
    format: str, settings: Mapping[str, str | int], backing: str | None, backing_format: str | None
) -> dict[str, str | int]:
    """The settings with what -b and -F say."""
    if format == "raw" and (backing is not None or backing_format is not None):
        what = "file" if backing is not None else "format"
        raise VmbusError("InvalidArgument", f"Backing {what} not supported for file format 'raw'")
    more = {"backing_file": backing, "backing_fmt": backing_format}
    return {**settings, **{name: value for name, value in more.items() if value is not None}}


def _size(path: str, settings: Mapping[str, str | int], length: int | None, *, look: bool) -> int:
    """The new disk's size: stated, or the backing file's, which must be there if we ``look``."""
    length = cast("int | None", settings.get("size", length))
    backing = settings.get("backing_file")
    if backing is not None:
        backing_format = settings.get("backing_fmt")
        if backing_format is not None and backing_format not in image.FORMATS:
            message = f"Unknown driver '{backing_format}'\nCould not open backing image."
            raise VmbusError("NotSupported", message)
        below = image.beside(path, str(backing))
        if os.path.realpath(below) == os.path.realpath(path):
            message = "Error: Trying to create an image with the same filename as the backing file"
            raise VmbusError("InvalidArgument", message)
        if look:
            found = _look(below, backing_format)
            length = found if length is None else length
        elif backing_format is None:
            raise VmbusError("InvalidArgument", "Backing file specified without backing format: use -F")
    if length is None:
        raise VmbusError("InvalidArgument", "Image creation needs a size parameter")
    return length


def _look(below: str, format: Format | None) -> int:
    """The size of a backing file whose format must be stated."""
    try:
        probed = format or image.probe(below)
        length = int(image.info(below, probed)["virtual-size"])
    except OSError as error:
        message = f"Could not open '{below}': {error.strerror}\nCould not open backing image."
        raise VmbusError("InvalidArgument", message) from None
    except VmbusError as error:
        message = f"Could not open '{below}': {error}\nCould not open backing image."
        raise VmbusError(error.kind, message) from None
    if format is None:
        message = f"Backing file specified without backing format\nDetected format of {probed}."
        raise VmbusError("InvalidArgument", message)
    return length


def make(path: str, format: Format, settings: Mapping[str, str | int], known: Secrets) -> Source:
    """Make an image of these settings, ``size`` among them; gives how to open it."""
    if "backing_fmt" in settings and "backing_file" not in settings:
        raise VmbusError("InvalidArgument", "Backing format cannot be used without backing file")
    arguments = img_settings.arguments(settings, known)
    if format == "raw" and arguments.get("preallocation") == "metadata":
        raise VmbusError("InvalidArgument", "Unsupported preallocation mode: metadata")
    with finished(path), _created(path):
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o666))
        image.create(
            path,
            format,
            size=int(settings["size"]),
            backing_name=cast("str | None", settings.get("backing_file")),
            backing_format=cast("Format | None", settings.get("backing_fmt")),
            **arguments,
        )
    encrypt = cast("Encryption | None", arguments.get("encrypt"))
    return Source(path, format, (encrypt.secret,) if encrypt else ())


@contextlib.contextmanager
def _created(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise VmbusError("InvalidArgument", f"Could not create '{path}': {error.strerror}") from None


@contextlib.contextmanager
def finished(path: str) -> Iterator[None]:
    """What is made at ``path`` meanwhile goes if it cannot be finished."""
    was_there = os.path.exists(path)
    try:
        yield
    except BaseException:
        if not was_there:
            with contextlib.suppress(OSError):
                os.unlink(path)
        raise
