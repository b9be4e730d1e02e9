# SPDX-License-Identifier: Apache-2.0
"""vmbusctl: machines from the command line, for people and for scripts.

One boundary turns errors into one line on stderr and an exit status; the statuses are promised in
vmbusctl(1).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from collections.abc import Sequence
from typing import Final

from vmbus.cli import arguments as command_line
from vmbus.cli import commands, output
from vmbus.cli.remote import Remote
from vmbus.wire.errors import VmbusError

STATUS: Final = {
    "InvalidArgument": 2,
    "ImageInvalid": 2,
    "BackingChanged": 2,
    "NotFound": 3,
    "AccessDenied": 4,
    "NotAuthorized": 4,
    "QuotaExceeded": 4,
    "InvalidState": 5,
    "InUse": 5,
    "AlreadyExists": 5,
    "Changed": 5,
    "Unavailable": 6,
    "Disconnected": 6,
    "Timeout": commands.TIMED_OUT,
}
OTHERWISE: Final = 1
INTERRUPTED: Final = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status."""
    arguments = command_line.parse(argv)
    try:
        if arguments.command == "define" and arguments.dry_run:
            return commands.dry_run(arguments)
        if arguments.command == "abi":
            return commands.abi_dump(arguments)
        return asyncio.run(_connected(arguments))
    except VmbusError as error:
        _complain(error, as_json=arguments.json)
        return STATUS.get(error.kind, OTHERWISE)
    except BrokenPipeError:
        # The reader of our output has seen enough; keep the interpreter from finding out again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OTHERWISE
    except KeyboardInterrupt:
        return INTERRUPTED


async def _connected(arguments: argparse.Namespace) -> int:
    # A D-Bus library is slow to import; a mistyped flag or a dry run need not wait for it.
    from vmbus.cli.connection import connect  # noqa: PLC0415

    async with connect(
        address=arguments.bus_address,
        name=arguments.bus_name,
        interactive=not arguments.no_ask,
        autostart=not arguments.no_autostart,
    ) as bus:
        return await commands.ACTIONS[arguments.command](Remote(bus), arguments)


def _complain(error: VmbusError, *, as_json: bool) -> None:
    if as_json:
        document = {"error": {"kind": error.kind, "argument": error.argument, "message": error.message}}
        sys.stderr.write(json.dumps(document, ensure_ascii=False, sort_keys=True) + "\n")
    else:
        output.warn(str(error))


if __name__ == "__main__":
    sys.exit(main())
