# SPDX-License-Identifier: Apache-2.0
"""The words that images are described with."""

from __future__ import annotations

from typing import Final, Literal

Format = Literal["qcow2", "raw"]
FORMATS: Final[tuple[Format, ...]] = ("qcow2", "raw")
DetectZeroes = Literal["off", "on", "unmap"]
DETECT_ZEROES: Final[tuple[DetectZeroes, ...]] = ("off", "on", "unmap")
Preallocation = Literal["off", "metadata", "falloc", "full"]
PREALLOCATIONS: Final[tuple[Preallocation, ...]] = ("off", "metadata", "falloc", "full")
