# SPDX-License-Identifier: Apache-2.0
"""man/vmbus-img.1, from the tables of vmbus-img's options."""

from __future__ import annotations

from collections.abc import Iterator

from docs.make import roff
from vmbus.cli import img_options
from vmbus.cli.img_options import Option

OUTPUT = "man/vmbus-img.1"

_HEAD = """\
.\\" SPDX-License-Identifier: Apache-2.0
.\\" Made from vmbus/cli/img_options.py by docs/make/img_man_page.py (`make docs`); not to be edited.
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
What it does not have is refused by name: formats other than qcow2 and raw, and making images with the old
AES. .PP A source or target of convert that is .BR \\- , or a pipe, is a stream of raw bytes. Without \\-p the
progress is shown whenever SIGUSR1 comes. .PP Sizes are bytes, or carry b, k, M, G, T, P or E (powers of
1024). .SH COMMANDS
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
    lines = [_HEAD.rstrip("\n")]
    for name, command in img_options.COMMANDS.items():
        words = f"vmbus-img {name} [options] {command.operands}"
        lines += [f".SS {roff.escaped(words)}", roff.escaped(roff.sentence(command.summary))]
        for option in command.options:
            lines.extend(_option(option))
    lines.append(_TAIL.rstrip("\n"))
    return "\n".join(lines) + "\n"


def _option(option: Option) -> Iterator[str]:
    yield ".TP"
    flags = ", ".join(f"\\fB{roff.escaped(flag)}\\fR" for flag in option.flags.split())
    yield f"{flags} \\fI{roff.escaped(option.value)}\\fR" if option.value else flags
    yield roff.escaped(roff.sentence(option.help))
