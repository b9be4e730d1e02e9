# SPDX-License-Identifier: Apache-2.0
"""vmbus-img: disk images from the command line, with qemu-img's sub-commands, options, output, JSON keys and
exit codes, so that a script works by changing the name. tests/local/test_image_as_qemu_img.py runs both side
by side and says why where they differ.

What it does not have is refused with a message that names it: formats other than qcow2 and raw.

It is started often and for little, so each sub-command is a module (``img_*.py``) that only it imports. This
file is the one boundary that turns errors into a line on stderr and an exit code; img_options.py has the
options, img_source.py which image a word means and with which passphrase, img_text.py what people read.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

import vmbus
from vmbus.cli import img_options
from vmbus.cli.img_options import COMMANDS, UsageError
from vmbus.wire.errors import VmbusError

CHECK_UNSUPPORTED = 63
COMPARE_CANNOT_OPEN = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run one sub-command; the exit code is qemu-img's."""
    words = list(sys.argv[1:] if argv is None else argv)
    name = ""
    try:
        name, rest = _command(words)
        if not name:
            return 0
        options = img_options.parse(name, rest)
        if options.help:
            print(img_options.help_of(name))
            return 0
        module, _, function = COMMANDS[name].place.partition(":")
        return int(getattr(importlib.import_module(f"vmbus.cli.{module}"), function)(options))
    except UsageError as error:
        print(f"vmbus-img{_after(str(error))}", file=sys.stderr)
        more = f" {error.command}" if error.command else ""
        print(f"Try 'vmbus-img{more} --help' for more info", file=sys.stderr)
        return 1
    except BrokenPipeError:
        return 1
    except VmbusError as error:
        message = str(error)
        unsupported = error.kind == "NotSupported" and name == "check"
    except OSError as error:
        message = (
            f"Could not open '{error.filename}': " * 2 + str(error.strerror) if error.filename else str(error)
        )
        unsupported = False
    except KeyboardInterrupt:
        return 130
    print(f"vmbus-img: {message}", file=sys.stderr)
    if unsupported:
        return CHECK_UNSUPPORTED
    return COMPARE_CANNOT_OPEN if name == "compare" else 1


def _after(text: str) -> str:
    """What follows the program's name: getopt's errors name the sub-command first."""
    return f" {text}" if text.partition(":")[0] in COMMANDS else f": {text}"


def _command(words: Sequence[str]) -> tuple[str, list[str]]:
    """The sub-command's name and its words; no name when all has been said."""
    match words:
        case []:
            raise UsageError("Not enough arguments")
        case ["-h" | "--help", *_]:
            print(img_options.help_of_all())
            return "", []
        case ["-V" | "--version", *_]:
            print(f"vmbus-img version {vmbus.__version__}")
            return "", []
        case ["-T"]:
            raise UsageError("option requires an argument -- 'T'")
        case ["-T" | "--trace", *_]:
            raise VmbusError("NotSupported", "trace events: there are none")
        case [option, *_] if option.startswith("-"):
            said = (
                f"unrecognized option '{option}'"
                if option.startswith("--")
                else f"invalid option -- '{option[1:2]}'"
            )
            raise UsageError(said)
        case [name, *_] if name not in COMMANDS:
            raise UsageError(f"Command not found: {name}")
        case [name, *rest]:
            return name, list(rest)
        case _:
            raise UsageError("Not enough arguments")


if __name__ == "__main__":
    sys.exit(main())
