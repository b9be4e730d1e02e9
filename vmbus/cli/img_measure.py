# SPDX-License-Identifier: Apache-2.0
"""``vmbus-img measure``: how large an image's file will be. The arithmetic must give what QEMU's gives
(qcow2_measure in block/qcow2.c), so that a volume sized by the one holds what the other writes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

from vmbus.cli import img_bitmap, img_options, img_settings, img_size, img_source
from vmbus.image import Encryption
from vmbus.wire.errors import VmbusError


def run(options: SimpleNamespace) -> int:
    """Measure, and say it."""
    output = img_options.one_of(options, "output", "human")
    length = None if options.size is None else _length(options.size)
    if options.size is not None and options.words:
        raise VmbusError("InvalidArgument", "--size N cannot be used together with a filename.")
    if options.size is None and len(options.words) != 1:
        raise VmbusError("InvalidArgument", "Either --size N or one filename must be specified.")
    target = img_settings.known_format(options.target_format or "raw")
    try:
        given = img_settings.given(target, options.options)
    except VmbusError as error:
        message = f"{error}\nvmbus-img: Invalid options for file format '{target}'"
        raise VmbusError(error.kind, message) from None
    settings = img_settings.arguments(given, img_source.secrets(options.objects))
    ranges = bitmaps = None
    if length is None:
        source = img_source.of(options, options.words[0], options.format)
        snapshot = None
        if options.snapshot is not None:
            snapshot = img_source.snapshot_id(source, options.snapshot, share=options.share)
        with img_source.opened(source, share=options.share, snapshot=snapshot) as one:
            length, ranges = one.size, list(one.map())
            if source.format == "qcow2" and target == "qcow2" and settings.get("version", 3) == 3:
                cluster_size = settings.get("cluster_size", 65536)
                bitmaps = img_bitmap.room(one.bitmaps(), one.size, cluster_size)
    found = _sizes(target, length, ranges, settings)
    if bitmaps is not None:
        found["bitmaps"] = bitmaps
    if output == "json":
        print(json.dumps(found, indent=4))
    else:
        names = {"required": "required", "fully-allocated": "fully allocated", "bitmaps": "bitmaps"}
        for key, value in found.items():
            print(f"{names[key]} size: {value}")
    return 0


def _length(text: str) -> int:
    length = img_size.scaled(text)
    if length is None:
        raise VmbusError("InvalidArgument", f"Invalid image size specified: '{text}'.")
    return img_size.number(text, "image size")


def _sizes(
    target: str, length: int, ranges: list[dict[str, Any]] | None, settings: dict[str, Any]
) -> dict[str, int]:
    if target == "raw":
        return {"required": length, "fully-allocated": length}
    shape = {
        "cluster_size": settings.get("cluster_size", 65536),
        "refcount_bits": settings.get("refcount_bits", 16),
        "extended_l2": settings.get("extended_l2", False),
    }
    whole = fully_allocated(length, **shape)
    found = {"required": required(length, ranges, **shape), "fully-allocated": whole}
    if settings.get("preallocation") in {"falloc", "full"}:
        found["required"] = whole
    if "encrypt" in settings:
        header = luks_header(settings["encrypt"], shape["cluster_size"])
        found = {key: size + header for key, size in found.items()}
    return found


def _up(number: int, unit: int) -> int:
    return -(-number // unit) * unit


def fully_allocated(size: int, *, cluster_size: int, refcount_bits: int, extended_l2: bool = False) -> int:
    """Bytes of a qcow2 file with every cluster of a disk of ``size`` bytes allocated (no snapshots)."""
    size = _up(size, cluster_size)
    l2_entry = 16 if extended_l2 else 8
    l2_entries = _up(size // cluster_size, cluster_size // l2_entry)
    l1_entries = _up(l2_entries * l2_entry // cluster_size, cluster_size // 8)
    metadata = cluster_size + l2_entries * l2_entry + l1_entries * 8
    clusters = (metadata + size) // cluster_size
    per_block = cluster_size * 8 // refcount_bits
    blocks = table = 0
    while True:
        before = blocks, table
        blocks = -(-(clusters + blocks + table) // per_block)
        table = -(-blocks // (cluster_size // 8))
        if (blocks, table) == before:
            return metadata + size + (blocks + table) * cluster_size


def required(
    size: int,
    ranges: Iterable[dict[str, Any]] | None,
    *,
    cluster_size: int,
    refcount_bits: int,
    extended_l2: bool = False,
) -> int:
    """The same with only those clusters that hold something.

    ``ranges`` are those of ``Image.map``, None for an empty disk.
    """
    data = 0
    end = 0
    for one in ranges or ():
        if not one["data"] or one["zero"]:
            continue
        first = max(one["start"] // cluster_size * cluster_size, end)
        last = _up(one["start"] + one["length"], cluster_size)
        if last > first:
            data += last - first
            end = last
    whole = fully_allocated(
        size, cluster_size=cluster_size, refcount_bits=refcount_bits, extended_l2=extended_l2
    )
    return whole - _up(size, cluster_size) + data


def luks_header(encrypt: Encryption, cluster_size: int) -> int:
    """Bytes of an encrypted image's LUKS header with its key material, in whole clusters."""
    bits = int((encrypt.cipher or "aes-256").rpartition("-")[2])
    key = bits // 8 * (2 if (encrypt.mode or "xts") == "xts" else 1)
    header = 4096 + 8 * -(-key * 4000 // 4096) * 4096
    return -(-header // cluster_size) * cluster_size
