# SPDX-License-Identifier: Apache-2.0
"""Disk images: the qcow2 engine of the native core, for scripts, tests and vmbus-img.

Example::

    from vmbus import image

    image.create("disk.qcow2", size=10 << 30)
    with image.open("disk.qcow2", "qcow2") as disk:
        disk.write(0, b"hello")
        disk.snapshot("before")
    print(image.info("disk.qcow2", "qcow2"))

An image is opened *by the caller's rights*: the names of backing and data files are followed here, in
Python, relative to the directory of the image that holds them; the core opens nothing. Formats are
stated, never guessed. Errors are VmbusError with the kinds of ``vmbus.wire.errors``, OSError where a
file cannot be opened. An open image is locked as QEMU locks it. All sizes and offsets are bytes.

| module     | job                                                |
|------------|----------------------------------------------------|
| `creation` | making an image                                    |
| `whole`    | images that are not open: header, check, key slots |
| `layers`   | the files that an image's headers name             |
| `disk`     | an open image                                      |
| `secret`   | passphrases                                        |
| `kinds`    | the words that images are described with           |
| `core`     | the native core's face                             |
"""

from vmbus.image.core import Report
from vmbus.image.creation import create
from vmbus.image.disk import Image, open
from vmbus.image.kinds import (
    DETECT_ZEROES,
    FORMATS,
    PREALLOCATIONS,
    DetectZeroes,
    Format,
    Preallocation,
)
from vmbus.image.layers import MAX_LAYERS, Layer, beside, chain
from vmbus.image.secret import Encryption, Secret
from vmbus.image.whole import add_key, check, erase_key, info, probe, set_backing, set_refcount_bits

__all__ = [
    "DETECT_ZEROES",
    "FORMATS",
    "MAX_LAYERS",
    "PREALLOCATIONS",
    "DetectZeroes",
    "Encryption",
    "Format",
    "Image",
    "Layer",
    "Preallocation",
    "Report",
    "Secret",
    "add_key",
    "beside",
    "chain",
    "check",
    "create",
    "erase_key",
    "info",
    "open",
    "probe",
    "set_backing",
    "set_refcount_bits",
]
