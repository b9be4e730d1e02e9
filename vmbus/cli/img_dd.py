# SPDX-License-Identifier: Apache-2.0
"""``vmbus-img dd``: copy a part of an image into a new one."""

from __future__ import annotations

import os
import stat
import sys
from types import SimpleNamespace
from typing import Final, cast

from vmbus.cli import img_create, img_settings, img_size, img_source
from vmbus.image import Format
from vmbus.wire.errors import VmbusError

PIECE: Final = 1 << 20


def run(options: SimpleNamespace) -> int:
    """Copy."""
    operands = dict(word.partition("=")[::2] for word in options.words)
    for name in operands:
        if name not in {"if", "of", "bs", "count", "skip"}:
            raise VmbusError("InvalidArgument", f"unrecognized operand {name}")
    block = img_size.number(operands.get("bs", "512"), "bs", 1, img_size.INT_MAX)
    count = img_size.number(operands["count"], "count") if "count" in operands else None
    skip = img_size.number(operands.get("skip", "0"), "skip")
    if "if" not in operands or "of" not in operands:
        raise VmbusError("InvalidArgument", "Must specify both input and output files")
    format = options.target_format or "raw"
    origin = img_source.of(options, operands["if"], options.format)
    with img_source.opened(origin, share=options.share) as source, img_create.finished(operands["of"]):
        if format not in img_settings.TABLES:
            raise VmbusError("NotSupported", "Unknown file format")
        # As in qemu-img, `count` includes what is skipped.
        end = source.size if count is None else min(source.size, count * block)
        start = skip * block
        made = img_create.make(operands["of"], cast(Format, format), {"size": max(0, end - start)}, {})
        if start > source.size:
            print(f"vmbus-img: {operands['if']}: cannot skip to specified offset", file=sys.stderr)
        zero = format == "qcow2" or stat.S_ISREG(os.stat(made.path).st_mode)
        with img_source.opened(made, write=True, cache=img_source.CACHES["unsafe"]) as target:
            for at in range(start, end, PIECE):
                data = source.read(at, min(PIECE, end - at))
                if any(data):
                    target.write(at - start, data)
                elif not zero:
                    target.write_zeroes(at - start, len(data))
    return 0
