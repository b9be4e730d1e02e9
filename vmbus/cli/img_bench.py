# SPDX-License-Identifier: Apache-2.0
"""``vmbus-img bench``: put a load on an image and take the time."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

from vmbus import image
from vmbus.cli import img_options, img_size, img_source
from vmbus.image import DetectZeroes
from vmbus.wire.errors import VmbusError


def run(options: SimpleNamespace) -> int:
    """Run it, and say how long it took."""

    def number(dest: str, usual: int, name: str, low: int = 0, high: int = img_size.INT_MAX) -> int:
        text = getattr(options, dest)
        return usual if text is None else img_size.number(text, name, low, high)

    count = number("count", 75000, "request count", 1)
    depth = number("depth", 64, "queue depth", 1)
    size = number("bytes", 4096, "buffer size", 1)
    offset = number("offset", 0, "offset", 0, img_size.MAX)
    step = number("step", 0, "step size")
    pattern = number("pattern", 0, "pattern byte", 0, 255)
    interval = number("flush_interval", 0, "flush interval")
    if options.aio not in {None, "threads", "native", "io_uring"}:
        raise VmbusError("InvalidArgument", f"Invalid aio option: {options.aio}")
    mode = img_source.cache(options.cache_t, wrong="Invalid cache mode")
    [text] = img_options.operands(options, 1, "Expecting one image file name")
    if interval and not options.write:
        raise VmbusError("InvalidArgument", "--flush-interval is only available in write tests")
    if interval and interval < depth:
        raise VmbusError("InvalidArgument", "Flush interval can't be smaller than depth")
    source = img_source.of(options, text, options.format)
    zeroes = cast(DetectZeroes, options.detect_zeroes or "off")
    if zeroes not in image.DETECT_ZEROES:
        raise VmbusError("InvalidArgument", f"Invalid detect-zeroes mode '{zeroes}'")
    with img_source.opened(
        source, write=options.write, share=options.share, cache=mode, detect_zeroes=zeroes
    ) as one:
        kind = "write" if options.write else "read"
        print(
            f"Sending {count} {kind} requests, {size} bytes each, {depth} in parallel "
            f"(starting at offset {offset}, step size {step or size})"
        )
        if interval:
            print(f"Sending flush every {interval} requests")
        try:
            seconds = one.bench(
                count=count, depth=depth, size=size, offset=offset, step=step, random=options.random,
                write=options.write, pattern=pattern, fua=mode.through, flush_interval=interval,
            )  # fmt: skip
        except VmbusError as error:
            raise VmbusError(error.kind, f"Failed request: {error}") from None
    print(f"Run completed in {seconds:.3f} seconds.")
    return 0
