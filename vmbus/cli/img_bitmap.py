# SPDX-License-Identifier: Apache-2.0
"""Persistent bitmaps in vmbus-img: the sub-command ``bitmap``, what ``convert --bitmaps`` carries over, and
the room that ``measure`` plans for them.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

from vmbus.cli import img_size, img_source
from vmbus.image import Image
from vmbus.wire.errors import VmbusError

ACTIONS = ("add", "remove", "clear", "enable", "disable", "merge")


def run(options: SimpleNamespace) -> int:
    """Do what the options say, one after the other."""
    granularity = None
    if options.granularity is not None:
        granularity = img_size.number(options.granularity, "granularity", 1)
    actions = [(name, value) for name, value in options.given if name in ACTIONS]
    names = [name for name, _ in actions]
    if not names:
        raise VmbusError(
            "InvalidArgument",
            "Need at least one of --add, --remove, --clear, --enable, --disable, or --merge",
        )
    if granularity is not None and "add" not in names:
        raise VmbusError("InvalidArgument", "granularity only supported with --add")
    if options.source_file is not None and "merge" not in names:
        raise VmbusError("InvalidArgument", "Merge bitmap source file only supported with --merge")
    if options.source_format is not None and options.source_file is None:
        raise VmbusError("InvalidArgument", "-F only supported with -b")
    if len(options.words) != 2:
        raise VmbusError("InvalidArgument", "Expecting filename and bitmap name")
    text, bitmap = options.words
    source = img_source.of(options, text, options.format)
    with contextlib.ExitStack() as stack:
        disk = stack.enter_context(img_source.opened(source, write=True))
        other = None
        if options.source_file is not None:
            known = img_source.secrets(options.objects)
            merged = img_source.source(options.source_file, options.source_format, known)
            other = (
                disk if _same(merged.path, source.path) else stack.enter_context(img_source.opened(merged))
            )
        for name, value in actions:
            try:
                _one(disk, name, bitmap, value, granularity, other)
            except VmbusError as error:
                raise VmbusError(error.kind, f"Operation {name} on bitmap {bitmap} failed: {error}") from None
    return 0


def _same(one: str, other: str) -> bool:
    return os.path.exists(one) and os.path.samefile(one, other)


def _one(
    disk: Image, action: str, bitmap: str, source: str, granularity: int | None, other: Image | None
) -> None:
    match action:
        case "add":
            disk.add_bitmap(bitmap, granularity=granularity)
        case "remove":
            disk.remove_bitmap(bitmap)
        case "clear":
            disk.clear_bitmap(bitmap)
        case "enable" | "disable":
            disk.enable_bitmap(bitmap, enabled=action == "enable")
        case "merge":
            disk.merge_bitmap(bitmap, source, other=other)


def to_copy(source: Image, *, skip_broken: bool) -> list[dict[str, Any]]:
    """The bitmaps to carry over; those that cannot be trusted are refused, or named and left out."""
    found = source.bitmaps()
    broken = [one["name"] for one in found if "in-use" in one["flags"]]
    if broken and not skip_broken:
        raise VmbusError(
            "InvalidState",
            f"Cannot copy inconsistent bitmap '{broken[0]}'\n"
            'Try --skip-broken-bitmaps, or use "vmbus-img bitmap --remove"',
        )
    for name in broken:
        print(f"vmbus-img: warning: Skipping inconsistent bitmap '{name}'", file=sys.stderr)
    return [one for one in found if one["name"] not in broken]


def copy(source: Image, target: Image, bitmaps: Iterable[dict[str, Any]]) -> None:
    """Give ``target`` the same bitmaps."""
    for one in bitmaps:
        name = one["name"]
        target.add_bitmap(name, granularity=one["granularity"], enabled=False)
        target.merge_bitmap(name, name, other=source)
        if "auto" in one["flags"]:
            target.enable_bitmap(name)


def room(bitmaps: Iterable[dict[str, Any]], size: int, cluster_size: int) -> int:
    """Bytes that the bitmaps of a disk of ``size`` bytes take at most, by QEMU's arithmetic."""

    def clusters(length: int) -> int:
        return -(-length // cluster_size)

    total = directory = 0
    for one in bitmaps:
        if "in-use" in one["flags"]:
            continue
        bits = -(-size // one["granularity"])
        data = clusters(-(-bits // 8))
        total += (data + clusters(data * 8)) * cluster_size
        directory += -(-(24 + len(one["name"].encode())) // 8) * 8
    return total + clusters(directory) * cluster_size
