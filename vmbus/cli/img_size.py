# SPDX-License-Identifier: Apache-2.0
"""Sizes and numbers as qemu-img takes them: decimal, perhaps with a fraction and a unit of powers of 1024
behind it, or hexadecimal without."""

from __future__ import annotations

import re
from typing import Final

from vmbus.wire.errors import VmbusError

UNITS: Final = {unit: 1 << (10 * power) for power, unit in enumerate("bkmgtpe")}
MAX: Final = (1 << 63) - 1
INT_MAX: Final = (1 << 31) - 1
_NUMBER: Final = re.compile(r"(-?)(?:(\d+)(\.\d*)?([bkmgtpeBKMGTPE])?|0[xX]([0-9a-fA-F]+))")


def scaled(text: str) -> int | None:
    """The number that ``text`` is, negative or of any size; None for no number."""
    found = _NUMBER.fullmatch(text)
    if found is None:
        return None
    minus, whole, fraction, unit, digits = found.groups()
    if digits is not None:
        value = int(digits, 16)
    else:
        scale = UNITS[(unit or "b").lower()]
        value = int(whole) * scale
        if fraction is not None and float(f"0{fraction}"):
            if scale == 1:
                return None
            value += int(float(f"0{fraction}") * scale)
    return -value if minus else value


def number(text: str, name: str, low: int = 0, high: int = MAX) -> int:
    """The value of an option. InvalidArgument says of ``name`` what it may be."""
    value = scaled(text)
    if value is None:
        raise VmbusError("InvalidArgument", f"Invalid {name} specified: '{text}'.")
    if not low <= value <= high:
        raise VmbusError("InvalidArgument", f"Invalid {name} specified. Must be between {low} and {high}.")
    return value


def parameter(name: str, text: str) -> int:
    """A size within the options of a format."""
    value = scaled(text)
    if value is None or not 0 <= value < 1 << 64:
        raise VmbusError(
            "InvalidArgument",
            f"Parameter '{name}' expects a non-negative number below 2^64\n"
            "Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-\n"
            "and exabytes, respectively.",
        )
    return value
