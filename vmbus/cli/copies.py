# SPDX-License-Identifier: Apache-2.0
"""Disks that go along with a machine that migrates (``--copy-disk``): which, to which images there, and these
images made where they are not there yet.

An image that is made here is a qcow2 (or raw, if that is said) of the disk's size, the caller's own file; it
goes again when the migration fails, unless a machine may run on it (``Images.keep``). What is in an image
that is there already is overwritten; its format is stated, for a raw disk may hold what looks like anything.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Final, NamedTuple

import msgspec

from vmbus.cli import chain, qcow2_header
from vmbus.wire.definition import Definition, Disk, Layer
from vmbus.wire.errors import VmbusError

_FLAG: Final = "--copy-disk"


class Copy(NamedTuple):
    """One disk; ``path`` is None if its image there is where the definition there says."""

    disk: Disk
    path: str | None
    format: chain.Format


def wanted(definition: Definition, words: list[str]) -> list[Copy]:
    """What ID, ID=PATH and ID=PATH,format=FORMAT mean; ID may be ``disk/ID``. Raises VmbusError."""
    found: list[Copy] = []
    for word in words:
        name, equals, path = word.partition("=")
        stated = "qcow2"
        if ",format=" in path:
            path, _, stated = path.rpartition(",format=")
        if equals and not path:
            raise VmbusError("InvalidArgument", f"{word!r} is not DISK or DISK=PATH", argument=_FLAG)
        if stated not in chain.FORMATS:
            raise VmbusError("InvalidArgument", f"format {stated!r}: qcow2 or raw", argument=_FLAG)
        disk = writable(definition, name, argument=_FLAG)
        if any(other.disk.id == disk.id for other in found):
            raise VmbusError("InvalidArgument", f"{name} is there twice", argument=_FLAG)
        where = chain.absolute(path) if equals else None
        found.append(Copy(disk, where, "raw" if stated == "raw" else "qcow2"))
    return found


def writable(definition: Definition, name: str, *, argument: str) -> Disk:
    """The disk of that name, with or without ``disk/``, which the guest may write. Raises VmbusError."""
    disks = {disk.id: disk for disk in definition.disks if not (disk.read_only or disk.cdrom)}
    disk = disks.get(name.removeprefix("disk/"))
    if disk is None:
        known = ", ".join(sorted(disks)) or "none"
        text = f"{name!r} is no disk that the guest may write; these are: {known}"
        raise VmbusError("InvalidArgument", text, argument=argument)
    return disk


class Images:
    """The disks of a definition there, by their ids, and the images that were made for them."""

    def __init__(self) -> None:
        self.disks: dict[str, Disk] = {}
        self.new: list[str] = []

    def keep(self) -> None:
        """Whatever happens: somebody may use them."""
        self.new.clear()


@contextlib.contextmanager
def made(copies: list[Copy]) -> Iterator[Images]:
    """They are made; if this fails, what was made goes again."""
    images = Images()
    try:
        for copy in copies:
            if copy.path is not None:
                images.disks[copy.disk.id] = _image(copy, copy.path, images.new)
        yield images
    except BaseException:
        for path in images.new:
            with contextlib.suppress(OSError):
                os.unlink(path)
        raise


def _image(copy: Copy, path: str, new: list[str]) -> Disk:
    """The disk with the image at ``path``, which is made, and then among ``new``, if it is not there."""
    if os.path.lexists(path):
        layers = chain.resolve(path, copy.format, argument=_FLAG)
        return msgspec.structs.replace(copy.disk, layers=layers, source="path")
    size = _size(copy.disk)
    # The core is loaded for this alone.
    from vmbus import image  # noqa: PLC0415

    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600))
    except OSError as error:
        raise VmbusError("InvalidArgument", f"{path}: {error.strerror}", argument=_FLAG) from None
    new.append(path)
    image.create(path, copy.format, size=size)
    layer = Layer(format=copy.format, path=path)
    return msgspec.structs.replace(copy.disk, layers=[layer], source="path")


def _size(disk: Disk) -> int:
    """A disk's bytes, by the image that it has here."""
    layer = disk.layers[0]
    if layer.encrypted:
        text = f"{disk.id} is encrypted: make its image there yourself, encrypted or not"
        raise VmbusError("NotSupported", text, argument=_FLAG)
    if layer.path is None:
        text = f"the size of {disk.id} is not known, since its file was passed: make its image there yourself"
        raise VmbusError("NotSupported", text, argument=_FLAG)
    try:
        with open(layer.path, "rb", buffering=0) as file:
            if layer.format == "raw":
                return file.seek(0, os.SEEK_END)
            return qcow2_header.read(file).virtual_size
    except qcow2_header.HeaderError as error:
        raise VmbusError("ImageInvalid", f"{layer.path}: {error}", argument=_FLAG) from None
    except OSError as error:
        kind = "NotFound" if isinstance(error, FileNotFoundError) else "AccessDenied"
        raise VmbusError(kind, f"{layer.path}: {error.strerror}", argument=_FLAG) from None
