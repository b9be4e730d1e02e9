# SPDX-License-Identifier: Apache-2.0
"""The verbs that keep a machine of one moment: in a file, a snapshot or a template, and go on from there."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Final

from vmbus.cli.verbs.command import Command, completed, files, machine, secrets


def _save(to: argparse.ArgumentParser) -> None:
    machine(to)
    completed(to.add_argument("to", metavar="FILE", help="a new file"), "file")
    to.add_argument("--keep", action="store_true", help="the machine goes on")


def _restore(to: argparse.ArgumentParser) -> None:
    machine(to)
    completed(to.add_argument("source", metavar="FILE", help="what save wrote"), "file")
    to.add_argument("--paused", action="store_true", help="stop where it was saved")
    to.add_argument(
        "--changed-disks",
        action="store_true",
        help="even if its disks are other files (copies), or were written to since",
    )
    files(to)
    secrets(to)


def _migrate(to: argparse.ArgumentParser) -> None:
    machine(to)
    to.add_argument(
        "--to", metavar="ADDRESS", required=True, help="the D-Bus address of the bus of the other vmbusd"
    )
    to.add_argument("--to-name", metavar="NAME", help="its name there (default: as --bus-name)")
    to.add_argument(
        "--downtime",
        metavar="MS",
        type=int,
        default=100,
        help="how long the guest may stand still, in milliseconds (default 100)",
    )
    to.add_argument(
        "--bandwidth", metavar="SIZE", help="bytes a second, such as 100M (default: all there is)"
    )
    to.add_argument("--paused", action="store_true", help="stop there, where it was sent")
    to.add_argument("--undefine-source", action="store_true", help="forget it here when it runs there")
    files(to, ", or that is another path there")
    copied = to.add_argument(
        "--copy-disk",
        metavar="DISK[=PATH]",
        action="append",
        default=[],
        dest="copied",
        help="send what is on the disk, and what the guest writes to it meanwhile, to an image of its own "
        "there: at PATH, which is made here if there is none (qcow2, or raw with ',format=raw' behind it)",
    )
    completed(copied, "file")
    to.add_argument(
        "--separate-disk",
        metavar="DISK",
        action="append",
        default=[],
        dest="separate",
        help="the disk's file there is another, and something else sees to it that both hold the same",
    )
    secrets(to)


def _snapshot(to: argparse.ArgumentParser) -> None:
    to.add_argument("action", choices=("create", "revert", "delete", "list", "tree"), help="what to do")
    machine(to)
    to.add_argument("snapshot", metavar="NAME", nargs="?", help="the snapshot's; not for list and tree")
    to.add_argument("--paused", action="store_true", help="revert: stop where it was")
    files(to)
    secrets(to)


def _template(to: argparse.ArgumentParser) -> None:
    to.add_argument("action", choices=("import", "list", "delete"), help="what to do")
    to.add_argument("template", metavar="NAME", nargs="?", help="the template's; not for list")
    completed(to.add_argument("source", metavar="FILE", nargs="?", help="import: what save wrote"), "file")


def _clone(to: argparse.ArgumentParser) -> None:
    machine(to)
    to.add_argument("template", metavar="TEMPLATE", help="a template of yours")
    to.add_argument("--paused", action="store_true", help="stop where it was saved")
    files(to)
    secrets(to)


COMMANDS: Final[Sequence[Command]] = (
    Command(
        "save",
        "write a machine to a file and end it",
        "restore goes on from there. Its disks are not in the file: leave them as they are. "
        "^C, or a full disk, leaves the machine running and no file.",
        (
            ("vmbusctl save web web.saved", "and shut the host down"),
            ("vmbusctl save web web.saved --keep", "leave it running"),
        ),
        _save,
    ),
    Command(
        "restore",
        "start a machine where it was saved",
        "All of the file is checked before the guest goes on.",
        (("vmbusctl restore web web.saved", "go on"),),
        _restore,
    ),
    Command(
        "migrate",
        "have a running machine go on in another vmbusd",
        "The machine is defined there, with its UUID and addresses, unless it is; its disks are the same\n"
        "files there, copies of files that nobody writes to, or go along (--copy-disk). The guest runs\n"
        "until little is left to be sent, and is slowed if it writes faster than that. ^C, or whatever\n"
        "fails, leaves it running here.",
        (
            ("vmbusctl migrate web --to unix:path=/run/other/bus", "on shared disks"),
            (
                "vmbusctl migrate web --to unix:path=/run/other/bus --downtime 20 --undefine-source",
                "for good",
            ),
            (
                "vmbusctl migrate web --to unix:path=/run/other/bus --file disk/cd/0=/srv/copy.iso",
                "with a copy of a disk that is only read",
            ),
            (
                "vmbusctl migrate web --to unix:path=/run/other/bus --copy-disk root=/srv/there/web.qcow2",
                "to a disk of its own there",
            ),
        ),
        _migrate,
    ),
    Command(
        "snapshot",
        "keep a machine's memory and disks of one moment, and go back to it",
        "Memory is kept by vmbus, the rest in the disks: those that can be written to have to be qcow2. All\n"
        "of a snapshot is there, or nothing. To go back the machine has to be as it was: devices, memory,\n"
        "processors; what it does now is lost, unless it is in a snapshot. tree shows which was made from\n"
        "which.",
        (
            ("vmbusctl snapshot create web before", "the running machine goes on"),
            ("vmbusctl snapshot revert web before", "and goes on from there"),
            ("vmbusctl snapshot tree web", "* is where it is"),
            ("vmbusctl snapshot delete web before", "those that were made from it stay"),
        ),
        _snapshot,
    ),
    Command(
        "template",
        "keep a saved machine, for others to begin as",
        "vmbus copies the file once, to one that nobody can change; import checks nothing of it, clone does.",
        (
            ("vmbusctl template import worker web.saved", "from what save wrote"),
            ("vmbusctl template list", "yours, and what they take"),
            ("vmbusctl template delete worker", "clones that run go on"),
        ),
        _template,
    ),
    Command(
        "clone",
        "start a machine as a template, at once",
        "The machine is defined like the one that was saved, and its disks hold what that one's did, in\n"
        "other files (copies, or overlays). Memory is read when the guest uses it, and copied when it\n"
        "writes. Cables on bridges are pulled, since all clones have one address: set-link plugs them in.",
        (("vmbusctl clone web-2 worker", "goes on where the template was saved"),),
        _clone,
    ),
)
