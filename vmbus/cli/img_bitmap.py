# SPDX-License-Identifier: Apache-2.0
"""Persistent bitmaps in vmbus-img: the sub-command ``bitmap``, what ``convert --bitmaps`` carries over, and
the room that ``measure`` plans for them.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from vmbus import image
from vmbus.cli.img_source import Source
from vmbus.image import Image
from vmbus.wire.errors import VmbusError


class Then(argparse.Action):
    """Append what is to be done to ``actions``: the order of the options is that of the work."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option: str | None = None,
    ) -> None:
        done = [*namespace.actions, ((option or "").removeprefix("--"), values)]
        namespace.actions = done


def arguments(one: argparse.ArgumentParser) -> None:
    """The options of ``bitmap`` beside those that all sub-commands have."""
    one.set_defaults(actions=[])
    one.add_argument("--add", nargs=0, action=Then, help="add it, enabled")
    one.add_argument("--remove", nargs=0, action=Then, help="remove it")
    one.add_argument("--clear", nargs=0, action=Then, help="let it say that nothing was written")
    one.add_argument("--enable", nargs=0, action=Then, help="record writes")
    one.add_argument("--disable", nargs=0, action=Then, help="record writes no more")
    one.add_argument("--merge", metavar="SOURCE", action=Then, help="add what another bitmap says")
    one.add_argument("-b", "--source-file", dest="source_file", help="the image with the other bitmap")
    one.add_argument("-F", "--source-format", dest="source_format", choices=image.FORMATS, help="its format")
    one.add_argument("file")
    one.add_argument("bitmap")


def run(source: Source, options: argparse.Namespace, merged: Source | None) -> None:
    """Do what the options say, one after the other."""
    names = [name for name, _ in options.actions]
    if not names:
        raise VmbusError(
            "InvalidArgument",
            "Need at least one of --add, --remove, --clear, --enable, --disable, or --merge",
        )
    if options.granularity is not None and "add" not in names:
        raise VmbusError("InvalidArgument", "granularity only supported with --add")
    if options.source_file is not None and "merge" not in names:
        raise VmbusError("InvalidArgument", "Merge bitmap source file only supported with --merge")
    if options.source_format is not None and options.source_file is None:
        raise VmbusError("InvalidArgument", "-F only supported with -b")
    with contextlib.ExitStack() as stack:
        path, format, secrets = source
        disk = stack.enter_context(image.open(path, format, secrets=secrets, guess=True))
        other = None
        if merged is not None:
            path, format, secrets = merged
            opened = image.open(path, format, secrets=secrets, read_only=True, guess=True)
            other = stack.enter_context(opened)
        for name, value in options.actions:
            try:
                _one(disk, name, options.bitmap, value, options.granularity, other)
            except VmbusError as error:
                raise VmbusError(
                    error.kind, f"Operation {name} on bitmap {options.bitmap} failed: {error}"
                ) from None


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
            "Try --skip-broken-bitmaps, or use 'vmbus-img bitmap --remove'",
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
