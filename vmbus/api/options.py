# SPDX-License-Identifier: Apache-2.0
"""Options, the ``a{sv}`` of a method: known keys and their types, everything else refused by name."""

from __future__ import annotations

from collections.abc import Mapping

from vmbus.wire.errors import VmbusError


def booleans(options: Mapping[str, object], **defaults: bool) -> dict[str, bool]:
    """The values of boolean options; ``defaults`` names those there are. Raises InvalidArgument."""
    found = dict(defaults)
    for key, value in options.items():
        if key not in defaults:
            known = ", ".join(sorted(defaults)) or "none"
            raise VmbusError("InvalidArgument", f"there is no such option; known are {known}", argument=key)
        if not isinstance(value, bool):
            raise VmbusError("InvalidArgument", f"{value!r} is not a boolean", argument=key)
        found[key] = value
    return found
