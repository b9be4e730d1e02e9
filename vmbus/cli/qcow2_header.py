# SPDX-License-Identifier: Apache-2.0
"""What a qcow2 header says of other files: its backing file, that file's format, its external data file.

vmbusctl reads this, and nothing more of an image, to write the whole chain into a definition. It runs as
the caller, on the caller's own files; the core reads the header again at start, behind its sandbox, and
refuses the machine when the names differ. Nothing named here is opened here.

Layout: QEMU's docs/interop/qcow2.txt, "Header" and "Header extensions". All numbers are big-endian.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import BinaryIO, Final

MAGIC: Final = b"QFI\xfb"
_V2_HEADER: Final = struct.Struct(">4sIQIIQIIQQIIQ")  # up to snapshots_offset, 72 bytes
_INCOMPATIBLE_OFFSET: Final = 72
_HEADER_LENGTH_OFFSET: Final = 100
_EXTENSION_END: Final = 0
_EXTENSION_BACKING_FORMAT: Final = 0xE2792ACA
_EXTENSION_DATA_FILE: Final = 0x44415441
_INCOMPATIBLE_DATA_FILE: Final = 1 << 2
_MAX_NAME: Final = 1023


class HeaderError(Exception):
    """The file is not a qcow2 image, or its header contradicts itself; says which."""


@dataclass(frozen=True)
class Header:
    """The names in a header, exactly as they stand there; None for none."""

    version: int
    virtual_size: int  # bytes
    backing_name: str | None
    backing_format: str | None
    data_name: str | None
    encrypted: bool


def read(file: BinaryIO) -> Header:
    """Read the header of an opened image. Raises HeaderError, or OSError from reading."""
    file.seek(0)
    start = file.read(_V2_HEADER.size)
    if start[:4] != MAGIC:
        raise HeaderError("it does not begin with a qcow2 header")
    if len(start) < _V2_HEADER.size:
        raise HeaderError("its qcow2 header is cut short")
    _, version, backing_offset, backing_size, cluster_bits, size, crypt_method, *_ = _V2_HEADER.unpack(start)
    if version not in (2, 3):
        raise HeaderError(f"its qcow2 version is {version}; 2 and 3 are known")
    if not 9 <= cluster_bits <= 21:
        raise HeaderError(f"its cluster size is 2^{cluster_bits} bytes; 2^9 to 2^21 are possible")
    # Header, extensions and backing name all lie in the first cluster.
    file.seek(0)
    cluster = file.read(1 << cluster_bits)

    incompatible, extensions = 0, _V2_HEADER.size
    if version == 3:
        if len(cluster) < 104:
            raise HeaderError("its qcow2 header is cut short")
        (incompatible,) = struct.unpack_from(">Q", cluster, _INCOMPATIBLE_OFFSET)
        (extensions,) = struct.unpack_from(">I", cluster, _HEADER_LENGTH_OFFSET)
        if extensions < 104 or extensions % 8:
            raise HeaderError(f"its header length is {extensions}")

    backing_name = None
    if backing_offset:
        if not 1 <= backing_size <= _MAX_NAME or backing_offset + backing_size > len(cluster):
            raise HeaderError("the name of its backing file lies outside the header")
        backing_name = _text(cluster[backing_offset : backing_offset + backing_size], "backing file")

    found = _extensions(cluster, extensions, backing_offset or len(cluster))
    backing_format = found.get(_EXTENSION_BACKING_FORMAT)
    data_name = None
    if incompatible & _INCOMPATIBLE_DATA_FILE:
        name = found.get(_EXTENSION_DATA_FILE)
        if not name:
            raise HeaderError("it has an external data file, but does not name it")
        data_name = _text(name, "data file")
    return Header(
        version=version,
        virtual_size=size,
        backing_name=backing_name,
        backing_format=_text(backing_format, "backing format") if backing_format else None,
        data_name=data_name,
        encrypted=crypt_method != 0,
    )


def _extensions(cluster: bytes, at: int, end: int) -> dict[int, bytes]:
    found: dict[int, bytes] = {}
    while at + 8 <= end:
        kind, length = struct.unpack_from(">II", cluster, at)
        at += 8
        if kind == _EXTENSION_END:
            break
        if at + length > end:
            raise HeaderError("a header extension reaches beyond the header")
        found[kind] = cluster[at : at + length]
        at += (length + 7) & ~7
    return found


def _text(raw: bytes, what: str) -> str:
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        raise HeaderError(f"the name of its {what} is not UTF-8") from None
    if "\0" in text:
        raise HeaderError(f"the name of its {what} contains a NUL byte")
    return text
