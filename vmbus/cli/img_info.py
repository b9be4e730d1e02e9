# SPDX-License-Identifier: Apache-2.0
"""``vmbus-img info``: what an image, or each of its chain, says of itself."""

from __future__ import annotations

import json
from types import SimpleNamespace

from vmbus import image
from vmbus.cli import img_options, img_source, img_text
from vmbus.wire.errors import VmbusError


def run(options: SimpleNamespace) -> int:
    """Show it."""
    output = img_options.one_of(options, "output", "human")
    [text] = img_options.operands(options, 1, "Expecting one image file name")
    source = img_source.of(options, text, options.format)
    described = []
    try:
        chain = image.chain(
            source.path, source.format, backing=options.chain, lock=not options.share, guess=True
        )
        for layer in chain:
            described.append(
                img_text.info(layer, image.info(layer.path, layer.format, lock=not options.share))
            )
    except VmbusError as error:
        raise VmbusError(error.kind, f"Could not open '{text}': {error}") from None
    except OSError as error:
        if options.chain or error.filename == source.path:
            raise
        raise img_source.not_below(text, error) from None
    if output == "json":
        print(json.dumps(described if options.chain else described[0], indent=4))
    else:
        print("\n\n".join(img_text.info_for_people(one) for one in described))
    return 0
