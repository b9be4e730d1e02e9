# SPDX-License-Identifier: Apache-2.0
"""Sizes as qemu-img takes them."""

from __future__ import annotations

import argparse
from typing import Final

UNITS: Final = {
    "": 1,
    "b": 1,
    "k": 1 << 10,
    "m": 1 << 20,
    "g": 1 << 30,
    "t": 1 << 40,
    "p": 1 << 50,
    "e": 1 << 60,
}


def size(text: str) -> int:
    """A size as qemu-img takes it: a number, perhaps with a fraction, and a unit of powers of 1024."""
    number, unit = (text[:-1], text[-1].lower()) if text[-1:].isalpha() else (text, "")
    try:
        if unit not in UNITS:
            raise ValueError
        value = int(number, 0) * UNITS[unit] if "." not in number else int(float(number) * UNITS[unit])
    except ValueError:
        message = f"Invalid image size '{text}': a number with k, M, G, T, P or E behind it"
        raise argparse.ArgumentTypeError(message) from None
    if not 0 <= value < 1 << 63:
        raise argparse.ArgumentTypeError(f"Image size '{text}' must be less than 8 EiB")
    return value
