# SPDX-License-Identifier: Apache-2.0
"""Options, the ``a{sv}`` of a method: known keys and their types, everything else refused by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from vmbus.wire.errors import VmbusError


def numbers(options: Mapping[str, object], **known: tuple[int, int, int]) -> dict[str, int]:
    """The values of options that are numbers: ``known`` has of each its default, least and most. Raises
    InvalidArgument."""
    found = {key: default for key, (default, _, _) in known.items()}
    for key, value in options.items():
        if key not in known:
            raise _unknown(key, known)
        _, least, most = known[key]
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise VmbusError(
                "InvalidArgument", f"{value!r} is no number from {least} to {most}", argument=key
            )
        found[key] = value
    return found


def booleans(options: Mapping[str, object], **defaults: bool) -> dict[str, bool]:
    """The values of boolean options; ``defaults`` names those there are. Raises InvalidArgument."""
    found = dict(defaults)
    for key, value in options.items():
        if key not in defaults:
            raise _unknown(key, defaults)
        if not isinstance(value, bool):
            raise VmbusError("InvalidArgument", f"{value!r} is not a boolean", argument=key)
        found[key] = value
    return found


def lists(options: Mapping[str, object], *known: str) -> tuple[dict[str, list[str]], dict[str, object]]:
    """The values of options that are lists of words, empty where there is none; and the other options. Raises
    InvalidArgument."""
    found: dict[str, list[str]] = {key: [] for key in known}
    for key in known:
        value = options.get(key, [])
        if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
            raise VmbusError("InvalidArgument", f"{value!r} is no list of words", argument=key)
        found[key] = list(value)
    return found, {key: value for key, value in options.items() if key not in known}


def _unknown(key: str, known: Iterable[str]) -> VmbusError:
    words = ", ".join(sorted(known)) or "none"
    return VmbusError("InvalidArgument", f"there is no such option; known are {words}", argument=key)
