# SPDX-License-Identifier: Apache-2.0
"""vmbusctl template and clone: machines that begin as one that was saved."""

from __future__ import annotations

import argparse
import os
import time

from vmbus.cli import files, output
from vmbus.cli.remote import Remote
from vmbus.wire.errors import VmbusError

_WANTED = {"import": (True, True), "list": (False, False), "delete": (True, False)}


async def template(remote: Remote, arguments: argparse.Namespace) -> int:
    """Manager.ImportTemplate, ListTemplates, DeleteTemplate."""
    given = (arguments.template is not None, arguments.source is not None)
    if given != _WANTED[arguments.action]:
        needs = {"import": "needs NAME and FILE", "list": "needs nothing", "delete": "needs NAME"}
        text = f"{arguments.action} {needs[arguments.action]}"
        raise VmbusError("InvalidArgument", text, argument="template")
    if arguments.action == "list":
        found = await remote.templates()
        if arguments.json:
            output.print_json(found)
            return 0
        rows = [
            (
                one["name"],
                time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(one["created"] / 1e6)),
                output.size(one["size"]),
                "verity" if one["verity"] else "",
            )
            for one in found
        ]
        output.print_table(("NAME", "CREATED", "SIZE", ""), rows)
        return 0
    if arguments.action == "import":
        await _import(remote, arguments)
    else:
        await remote.delete_template(arguments.template)
    if arguments.json:
        done = "imported" if arguments.action == "import" else "deleted"
        output.print_json({"done": done, "template": arguments.template})
    return 0


async def _import(remote: Remote, arguments: argparse.Namespace) -> None:
    try:
        fd = os.open(arguments.source, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        kind = "NotFound" if isinstance(error, FileNotFoundError) else "AccessDenied"
        raise VmbusError(kind, f"{arguments.source}: {error.strerror}", argument="FILE") from None
    try:
        await remote.finish(await remote.import_template(arguments.template, fd))
    finally:
        os.close(fd)


async def clone(remote: Remote, arguments: argparse.Namespace) -> int:
    """Machine.Clone."""
    path = await remote.find(arguments.machine)
    with files.opened(await files.asked_for(remote, path, arguments)) as fds:
        await remote.clone(path, arguments.template, fds, paused=arguments.paused)
    if arguments.json:
        output.print_json({"machine": arguments.machine, "state": "cloned"})
    return 0
