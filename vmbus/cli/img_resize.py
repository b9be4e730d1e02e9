# SPDX-License-Identifier: Apache-2.0
"""``vmbus-img resize``: a disk's size, stated or by how much it changes."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import cast

from vmbus import image
from vmbus.cli import img_options, img_size, img_source
from vmbus.image import Preallocation
from vmbus.wire.errors import VmbusError


def run(options: SimpleNamespace) -> int:
    """Change it."""
    if len(options.words) > 2:
        raise img_options.UsageError("Extra argument(s) in command line", "resize")
    text, wanted = img_options.operands(options, 2, "Expecting image file name and size")
    sign = wanted[0] if wanted[0] in "+-" else ""
    amount = img_size.parameter("size", wanted[len(sign) :])
    if options.preallocation not in {None, *image.PREALLOCATIONS}:
        raise VmbusError("InvalidArgument", f"Invalid preallocation mode '{options.preallocation}'")
    preallocation = cast(Preallocation, options.preallocation or "off")
    # The chain is needed: growing hides what a longer backing file would show.
    with img_source.opened(img_source.of(options, text, options.format), write=True) as one:
        size = {"+": one.size + amount, "-": one.size - amount, "": amount}[sign]
        if size <= 0:
            raise VmbusError("InvalidArgument", "New image size must be positive")
        if size <= one.size and preallocation != "off":
            raise VmbusError("InvalidArgument", "Preallocation can only be used for growing images")
        if size < one.size and not options.shrink:
            print(
                "vmbus-img: Use the --shrink option to perform a shrink operation.\n"
                "vmbus-img: warning: Shrinking an image will delete all data beyond the shrunken image's "
                "end. Before performing such an operation, make sure there is no important data there.",
                file=sys.stderr,
            )
            return 1
        one.resize(size, shrink=options.shrink, preallocation=preallocation)
    if not options.quiet:
        print("Image resized.")
    return 0
