# SPDX-License-Identifier: Apache-2.0
"""``vmbus-img compare``: whether two images hold the same.

| exit code | meaning                                |
|-----------|----------------------------------------|
| 0         | they do                                |
| 1         | they differ; with -s also in what they have allocated |
| 2         | one of them cannot be opened           |
| 4         | one of them cannot be read             |
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, Final

from vmbus.cli import img_options, img_source
from vmbus.cli.img_progress import Progress, progress
from vmbus.image import Image
from vmbus.wire.errors import VmbusError

DIFFERENT: Final = 1
CANNOT_READ: Final = 4


def run(options: SimpleNamespace) -> int:
    """Compare, and say how it went."""
    cache = img_source.cache(options.cache_T, wrong="Invalid source cache option: {}")
    first, second = img_options.operands(options, 2, "Expecting two image file names")
    with progress(options) as line:
        opened = [
            img_source.of(options, first, options.format),
            img_source.of(options, second, options.other_format),
        ]
        with (
            img_source.opened(opened[0], share=options.share, cache=cache) as one,
            img_source.opened(opened[1], share=options.share, cache=cache) as other,
        ):
            return _compare(one, other, options, line)


def _compare(one: Image, other: Image, options: SimpleNamespace, line: Progress) -> int:
    def say(text: str) -> None:
        if not options.quiet:
            print(text)

    if one.size != other.size and options.strict:
        say("Strict mode: Image size mismatch!")
        return DIFFERENT
    try:
        where = one.first_difference(other, report=line)
        elsewhere = _first_otherwise(one, other) if options.strict else None
        if elsewhere is not None and (where is None or elsewhere <= where):
            say(f"Strict mode: Offset {elsewhere} block status mismatch!")
            return DIFFERENT
        if where is None and one.size != other.size:
            say("Warning: Image size mismatch!")
            longer, shorter = (one, other) if one.size > other.size else (other, one)
            where = longer.first_nonzero(shorter.size, longer.size)
    except VmbusError as error:
        print(f"vmbus-img: Error while reading: {error}", file=sys.stderr)
        return CANNOT_READ
    if where is not None:
        say(f"Content mismatch at offset {where // 512 * 512}!")
        return DIFFERENT
    say("Images are identical.")
    return 0


def _first_otherwise(one: Image, other: Image) -> int | None:
    """The first byte that is of another kind (data, zeros, allocated) in the other disk of this size."""
    left, right = _kinds(one), _kinds(other)
    (left_end, left_kind), (right_end, right_kind) = next(left, _END), next(right, _END)
    at = 0
    while at < one.size:
        if left_kind != right_kind:
            return at
        at = min(left_end, right_end)
        if left_end == at:
            left_end, left_kind = next(left, _END)
        if right_end == at:
            right_end, right_kind = next(right, _END)
    return None


_END: Final = (1 << 63, None)


def _kinds(one: Image) -> Iterator[tuple[int, Any]]:
    for found in one.map():
        end = found["start"] + found["length"]
        kind = (
            end == one.size,
            found["data"],
            found["zero"],
            found["present"],
            found["compressed"],
            "offset" in found,
        )
        yield end, kind
