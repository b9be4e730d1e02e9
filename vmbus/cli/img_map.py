# SPDX-License-Identifier: Apache-2.0
"""``vmbus-img map``: where the disk's ranges come from."""

from __future__ import annotations

from types import SimpleNamespace

from vmbus.cli import img_options, img_size, img_source, img_text


def run(options: SimpleNamespace) -> int:
    """Show the map."""
    output = img_options.one_of(options, "output", "human")
    start = 0 if options.start is None else img_size.number(options.start, "start offset")
    length = None if options.length is None else img_size.number(options.length, "max length")
    [text] = img_options.operands(options, 1, "Expecting one image file name")
    with img_source.opened(img_source.of(options, text, options.format), share=options.share) as one:
        end = one.size if length is None else min(one.size, start + length)
        ranges = one.map(start, end)
        if output == "json":
            img_text.map_as_json(ranges)
        else:
            img_text.map_for_people(ranges, [layer.data_path or layer.path for layer in one.layers])
    return 0
