# SPDX-License-Identifier: Apache-2.0
"""The verbs that attach, detach and change a machine's devices, running or not."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Final

from vmbus.cli.verbs.command import Command, completed, machine, secrets


def _attach_nic(to: argparse.ArgumentParser) -> None:
    machine(to)
    to.add_argument(
        "nic",
        metavar="BRIDGE[,mac=M]|kind=KIND",
        help="as for define --nic: mac= (default: made up, and kept), id=, queues=, slot=",
    )


def _attach_disk(to: argparse.ArgumentParser) -> None:
    machine(to)
    action = to.add_argument(
        "disk",
        metavar="PATH,format=F[,...]",
        help="as for define --disk: path, format=qcow2|raw, backing-format=, id=, serial=, queues=, slot=, "
        "read-only",
    )
    completed(action, "file")
    to.add_argument(
        "--pass-files", action="store_true", help="open the images here, as you, and pass them (running only)"
    )
    secrets(to)


def _detach(to: argparse.ArgumentParser) -> None:
    machine(to)
    to.add_argument("id", metavar="ID", help="the device's id, as vmbusctl show has it")
    to.add_argument(
        "--deadline",
        metavar="SECONDS",
        type=float,
        default=30.0,
        help="how long the guest gets to let go of it (default 30); Linux takes five to begin",
    )


def _set_link(to: argparse.ArgumentParser) -> None:
    machine(to)
    to.add_argument("id", metavar="ID", help="the interface's id, as vmbusctl show has it")
    to.add_argument("link", choices=("up", "down"), help="plugged in, or not")


def _resize_disk(to: argparse.ArgumentParser) -> None:
    machine(to)
    to.add_argument("id", metavar="ID", help="the disk's id, as vmbusctl show has it")
    to.add_argument("size", metavar="SIZE", help="bytes, or with K, M, G, T: 20G")


def _change_media(to: argparse.ArgumentParser) -> None:
    machine(to)
    to.add_argument("id", metavar="ID", help="the drive's id, as vmbusctl show has it")
    action = to.add_argument(
        "medium",
        metavar="PATH,format=F",
        nargs="?",
        help="what goes in: path, format=raw|qcow2, backing-format= (default: nothing; it is taken out)",
    )
    completed(action, "file")
    to.add_argument("--force", action="store_true", help="even if the guest has locked it")
    to.add_argument(
        "--pass-files", action="store_true", help="open the medium here, as you, and pass it (running only)"
    )


COMMANDS: Final[Sequence[Command]] = (
    Command(
        "attach-nic",
        "give a machine a network interface, running or not",
        "It goes into the first free hotplug slot, or the one that slot= says; the definition keeps it.",
        (
            ("vmbusctl attach-nic web lan0", "an interface on the bridge lan0"),
            ("vmbusctl attach-nic web kind=macvtap,interface=eth0", "one beside the host, on its eth0"),
            ("vmbusctl attach-nic web lan0,id=lan,slot=2", "with a name and a place"),
        ),
        _attach_nic,
    ),
    Command(
        "detach-nic",
        "take a network interface away",
        "A running guest is asked to let go of it. If it does not in time it keeps it, and the status is 1.",
        (("vmbusctl detach-nic web nic0", "ask, and wait up to 30 seconds"),),
        _detach,
    ),
    Command(
        "attach-disk",
        "give a machine a disk, running or not",
        "It goes into the first free hotplug slot, or the one that slot= says; the definition keeps it.",
        (
            ("vmbusctl attach-disk web data.qcow2,format=qcow2", "a disk of yours"),
            ("vmbusctl attach-disk web iso,format=raw,read-only --pass-files", "opened here, and passed"),
        ),
        _attach_disk,
    ),
    Command(
        "detach-disk",
        "take a disk away",
        "A running guest is asked to let go of it; then all it wrote is in the image. If it does not in "
        "time\nit keeps it, and the status is 1.",
        (("vmbusctl detach-disk web disk1 --deadline 60", "ask, and wait up to a minute"),),
        _detach,
    ),
    Command(
        "set-link",
        "plug the cable of a network interface in, or pull it",
        "The guest sees its link go up or down; while it is down nothing passes. The definition keeps it.",
        (("vmbusctl set-link web nic0 down", "pull the cable"),),
        _set_link,
    ),
    Command(
        "resize-disk",
        "let a disk of a running machine grow",
        "The image grows, and the guest is told. That of a stopped machine is resized by vmbus-img.",
        (("vmbusctl resize-disk web disk0 20G", "to 20 GiB in all"),),
        _resize_disk,
    ),
    Command(
        "change-media",
        "put another medium into a CD-ROM drive, or take it out",
        "A guest that has locked the drive (it uses the medium) is asked for it, and the status is 1; try "
        "again\na little later.",
        (
            ("vmbusctl change-media web cd disc2.iso,format=raw", "the next disc"),
            ("vmbusctl change-media web cd", "take it out"),
        ),
        _change_media,
    ),
)
