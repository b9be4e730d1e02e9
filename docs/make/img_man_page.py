# SPDX-License-Identifier: Apache-2.0
"""man/vmbus-img.1, from the parser of vmbus-img."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from docs.make import roff
from vmbus.cli import img

OUTPUT = "man/vmbus-img.1"

_HEAD = """\
.\\" SPDX-License-Identifier: Apache-2.0
.\\" Made from vmbus/cli/img.py by docs/make/img_man_page.py (`make docs`); not to be edited.
.TH VMBUS\\-IMG 1 "" "vmbus" "User Commands"
.SH NAME
vmbus\\-img \\- disk images of vmbus
.SH SYNOPSIS
.B vmbus\\-img
.I COMMAND
.RI [ options ]
.SH DESCRIPTION
vmbus\\-img makes, examines and changes qcow2 and raw images. It has the sub-commands, options, JSON keys and
exit codes of
.BR qemu\\-img (1),
so that a script works by changing the name. It needs no service and no rights but those on the files.
What it does not have is refused by name: persistent bitmaps, subclusters, other formats.
.PP
Sizes are bytes, or carry b, k, M, G, T, P or E (powers of 1024).
.SH COMMANDS
"""
_TAIL = """\
.SH EXIT STATUS
.TP
.B 0
Done; compare: they hold the same.
.TP
.B 1
It failed; compare: they differ.
.TP
.B 2
check: the image is corrupt; compare: an image cannot be opened.
.TP
.B 3
check: there are leaked clusters, and nothing worse; compare: something cannot be read.
.TP
.B 63
check: the format cannot be checked.
.SH SEE ALSO
.BR vmbusctl (1),
.BR vmbus (7),
.BR qemu\\-img (1)
"""


def text() -> str:
    """The whole page."""
    top = img._arguments()
    verbs = next(action for action in top._actions if isinstance(action, argparse._SubParsersAction))
    summaries = {choice.dest: choice.help or "" for choice in verbs._choices_actions}
    lines = [_HEAD.rstrip("\n")]
    for name, parser in verbs.choices.items():
        lines.extend(_command(name, summaries.get(name, ""), parser))
    lines.append(_TAIL.rstrip("\n"))
    return "\n".join(lines) + "\n"


def _command(name: str, summary: str, parser: argparse.ArgumentParser) -> Iterator[str]:
    positionals = [roff.metavar(action) for action in parser._actions if not action.option_strings]
    yield f".SS {roff.escaped(' '.join(['vmbus-img', name, '[options]', *positionals]))}"
    yield roff.escaped(roff.sentence(summary))
    for action in parser._actions:
        if action.option_strings and action.dest != "help":
            yield from roff.option(action)
