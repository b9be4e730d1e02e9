# SPDX-License-Identifier: Apache-2.0
"""What vmbusctl prints: a table or lines for people, or one JSON document for programs, on stdout."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from typing import Any, Final

_UNITS: Final = ("B", "KiB", "MiB", "GiB", "TiB")


def print_json(document: Any) -> None:
    """One JSON document on one line."""
    sys.stdout.write(json.dumps(document, ensure_ascii=False, sort_keys=True) + "\n")


def print_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Columns as wide as their widest cell; no header when stdout is not a terminal's, as scripts want it."""
    cells = [[printable(str(cell)) for cell in row] for row in rows]
    lines = [list(header), *cells] if sys.stdout.isatty() else cells
    widths = [max((len(line[column]) for line in lines), default=0) for column in range(len(header))]
    for line in lines:
        text = "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        sys.stdout.write(text.rstrip() + "\n")


def print_fields(fields: Iterable[tuple[str, object]]) -> None:
    """``name: value`` lines, the names right-aligned."""
    pairs = [(name, printable(str(value))) for name, value in fields]
    width = max((len(name) for name, _ in pairs), default=0)
    for name, value in pairs:
        sys.stdout.write(f"{name.rjust(width)}: {value}\n")


def size(count: int) -> str:
    """Bytes in the largest unit that shows them exactly, or with one decimal: "512 MiB", "1.5 GiB"."""
    value, unit = float(count), 0
    while value >= 1024 and unit < len(_UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return f"{value:.0f} {_UNITS[unit]}" if value == int(value) else f"{value:.1f} {_UNITS[unit]}"


def printable(text: str) -> str:
    """``text`` without control characters: what a guest or another user wrote must not steer the terminal."""
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)


def warn(message: str) -> None:
    """One line on stderr."""
    sys.stderr.write(f"vmbusctl: {printable(message)}\n")
