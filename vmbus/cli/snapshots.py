# SPDX-License-Identifier: Apache-2.0
"""vmbusctl snapshot: machines as they were."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping
from typing import Any

from vmbus.cli import files, output
from vmbus.cli.remote import Remote
from vmbus.wire.errors import VmbusError

Found = Mapping[str, Any]


async def snapshot(remote: Remote, arguments: argparse.Namespace) -> int:
    """Machine.CreateSnapshot, RevertToSnapshot, DeleteSnapshot, ListSnapshots."""
    looks = arguments.action in ("list", "tree")
    if looks != (arguments.snapshot is None):
        text = "is not for list and tree" if looks else f"is needed: which snapshot to {arguments.action}"
        raise VmbusError("InvalidArgument", text, argument="NAME")
    path = await remote.find(arguments.machine)
    if looks:
        found = await remote.snapshots(path)
        if arguments.json:
            output.print_json(found)
        elif arguments.action == "tree":
            sys.stdout.writelines(f"{output.printable(line)}\n" for line in tree(found))
        else:
            _table(found)
        return 0
    if arguments.action == "create":
        await remote.finish(await remote.create_snapshot(path, arguments.snapshot))
    else:
        await _with_files(remote, path, arguments)
    if arguments.json:
        words = {"create": "created", "revert": "reverted", "delete": "deleted"}
        done = words[arguments.action]
        output.print_json({"done": done, "machine": arguments.machine, "snapshot": arguments.snapshot})
    return 0


async def _with_files(remote: Remote, path: str, arguments: argparse.Namespace) -> None:
    with files.opened(await files.asked_for(remote, path, arguments)) as fds:
        if arguments.action == "revert":
            await remote.revert_to_snapshot(path, arguments.snapshot, fds, paused=arguments.paused)
        else:
            await remote.finish(await remote.delete_snapshot(path, arguments.snapshot, fds))


def _table(found: list[Found]) -> None:
    rows = [
        (
            "*" if one["current"] else "",
            one["name"],
            time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(one["created"] / 1e6)),
            output.size(one["memory"]),
            one["parent"],
        )
        for one in found
    ]
    output.print_table(("", "NAME", "CREATED", "MEMORY", "PARENT"), rows)


def tree(found: list[Found]) -> list[str]:
    """The snapshots, each below the one that it was made from, as lines."""
    children: dict[str, list[Found]] = {}
    for one in found:
        children.setdefault(one["parent"], []).append(one)
    lines: list[str] = []

    def grow(parent: str, indent: str) -> None:
        below = children.get(parent, [])
        for one in below:
            last = one is below[-1]
            branch = ("└── " if last else "├── ") if parent else ""
            lines.append(f"{indent}{branch}{one['name']}{' *' if one['current'] else ''}")
            grow(one["name"], indent + (("    " if last else "│   ") if parent else ""))

    grow("", "")
    return lines
