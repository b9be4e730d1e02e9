# SPDX-License-Identifier: Apache-2.0
"""argparse's actions as the man macros (groff_man(7)) of a page."""

from __future__ import annotations

import argparse
from collections.abc import Iterator


def option(action: argparse.Action) -> Iterator[str]:
    """A tagged paragraph: what is typed, then its sentence."""
    yield ".TP"
    if action.option_strings:
        name = ", ".join(f"\\fB{escaped(one)}\\fR" for one in action.option_strings)
        yield f"{name} \\fI{escaped(metavar(action))}\\fR" if action.nargs != 0 else name
    else:
        yield f"\\fI{escaped(metavar(action))}\\fR"
    yield escaped(sentence(action.help or ""))


def sentence(words: str) -> str:
    """A help text with a capital letter and a full stop."""
    return f"{words[:1].upper()}{words[1:].rstrip('.')}." if words else ""


def metavar(action: argparse.Action) -> str:
    """What stands for the value; choices as A|B, what may be left out in brackets."""
    if action.choices is not None:
        name = "|".join(map(str, action.choices))
    else:
        name = str(action.metavar or action.dest.upper())
    if action.nargs == "?":
        return f"[{name}]"
    if action.nargs in ("+", "*"):
        return f"{name}..." if action.nargs == "+" else f"[{name}...]"
    return name


def escaped(words: str) -> str:
    """``words`` as text that roff leaves alone."""
    plain = words.replace("\\", "\\e").replace("-", "\\-").replace("^", "\\(ha")
    return f"\\&{plain}" if plain[:1] in (".", "'") else plain
