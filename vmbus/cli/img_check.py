# SPDX-License-Identifier: Apache-2.0
"""``vmbus-img check``: look for leaks and corruptions of a qcow2 image, and repair them.

| exit code | the image                        |
|-----------|----------------------------------|
| 0         | is consistent, perhaps now       |
| 1         | cannot be checked                |
| 2         | is corrupt                       |
| 3         | has leaked clusters, not worse   |
| 63        | has a format that has no checks  |
"""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace
from typing import Any, Final, Literal, cast

from vmbus import image
from vmbus.cli import img_options, img_size, img_source, img_text
from vmbus.wire.errors import VmbusError

CORRUPT: Final = 2
LEAKS: Final = 3


def run(options: SimpleNamespace) -> int:
    """Check, and say what was found."""
    output = img_options.one_of(options, "output", "human")
    repair = cast(Literal["none", "leaks", "all"], img_options.one_of(options, "repair", "none"))
    [text] = img_options.operands(options, 1, "Expecting one image file name")
    img_source.cache(options.cache_T, wrong="Invalid source cache option: {}")
    memory = None if options.memory is None else img_size.number(options.memory, "memory")
    source = img_source.of(options, text, options.format)
    if repair != "none" and options.share:
        message = "force-share=on can only be used with read-only images"
        raise VmbusError("InvalidArgument", f"Could not open '{source.path}': {message}")
    if source.format == "raw":
        if repair != "none" and source.guessed:
            img_source.warn_of_guess(source.path)
        raise VmbusError("NotSupported", "This image format does not support checks")
    found = image.check(source.path, repair=repair, lock=not options.share, memory=memory)
    for message in found["messages"]:
        print(message, file=sys.stderr)
    if output == "json":
        print(json.dumps(img_text.check(text, found), indent=4))
    elif not options.quiet:
        print(img_text.check_for_people(found), end="")
    return _code(found)


def _code(found: dict[str, Any]) -> int:
    if found["corruptions"]:
        return CORRUPT
    return LEAKS if found["leaks"] else 0
