# SPDX-License-Identifier: Apache-2.0
"""The verbs that describe a machine: it is defined, shown as its guest will see it, or run once.

What a machine is can be said by a file and by flags; the three take the same ones.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Final

from vmbus.cli.verbs.command import Command, completed, secrets


def _description(to: argparse.ArgumentParser) -> None:
    """What a machine is: file and flags of define and run."""
    completed(
        to.add_argument("file", metavar="FILE", nargs="?", help="a TOML file; see vmbus-machine(5)"), "file"
    )
    group = to.add_argument_group("the machine (each wins over the file)")
    add = group.add_argument
    add("--name", help="unique among your machines")
    add("--memory", metavar="SIZE", help="bytes, or with K, M, G, T: 512M")
    add("--vcpus", metavar="N", type=int, help="1 to 16 (default 1)")
    completed(add("--kernel", metavar="PATH", help="a bzImage or PVH ELF kernel"), "file")
    completed(add("--initrd", metavar="PATH", help="its initial RAM disk"), "file")
    add("--cmdline", metavar="TEXT", help="its command line")
    add("--firmware", choices=("bios", "uefi"), help="boot by it, without a given kernel")
    add(
        "--boot",
        metavar="WHAT[,...]",
        help="what the firmware tries, in this order, and nothing else: disk, cdrom, network, or ids of "
        "disks and nics (default disk,cdrom,network)",
    )
    add("--boot-menu", action="store_true", help="the BIOS offers its boot menu")
    add(
        "--disk",
        metavar="PATH,format=F[,...]",
        action="append",
        default=[],
        help="a disk: path, format=qcow2|raw, backing-format=, id=, serial=, queues=, slot=, detect-zeroes=, "
        "bus=scsi, read-only, cdrom; may be repeated, in order; a comma in a path is written twice",
    )
    add(
        "--nic",
        metavar="BRIDGE[,mac=M]|kind=KIND",
        action="append",
        default=[],
        help="a network interface on that bridge (address=: the one IPv4 address that it may have), or "
        "kind=user (forwards=tcp:8022:22: a port of the host's is one of the guest's; may be repeated; "
        "reach-host: its gateway is this host), or "
        "kind=isolated,network=NAME, or kind=macvtap,interface=NAME (mode=bridge, private or vepa; "
        "address=); mac= (default: made up, and kept), id=, queues=, slot=; "
        "may be repeated",
    )
    add(
        "--watchdog",
        choices=("off", "none", "reset", "poweroff", "pause"),
        help="what a watchdog does to a guest that lets its time pass; off (default): there is none",
    )
    add(
        "--port",
        metavar="NAME",
        action="append",
        default=[],
        dest="ports",
        help="a named port (/dev/virtio-ports/NAME); may be repeated",
    )
    add(
        "--vsock",
        metavar="CID",
        type=int,
        help="sockets between guest and host (AF_VSOCK): the guest's CID, from 3; others may have the same",
    )
    add("--cpu-model", metavar="MODEL", help="a CPU model, or host (default)")
    add("--machine-type", metavar="TYPE", help="vmbus-2 (default) or vmbus-1")
    add("--memory-kind", choices=("mergeable", "shareable", "huge"), help="default mergeable")
    add("--page-size", choices=("2M", "1G"), help="of huge memory (default 2M)")
    add(
        "--memory-minimum",
        metavar="SIZE",
        help="the least the guest is asked to get by with (default a quarter)",
    )
    add(
        "--memory-node",
        metavar="N",
        type=int,
        action="append",
        help="a NUMA node that memory may come from; repeat for several (default any)",
    )
    add(
        "--locked",
        action="store_true",
        help="memory stays in RAM, never in swap; takes locked in broker.toml",
    )
    add("--prefault", action="store_true", help="touch all memory before the guest runs")
    add("--no-balloon", action="store_true", help="no virtio balloon: the guest gives no memory back")
    add("--on-reset", choices=("restart", "end"), help="what a reset by the guest does (default restart)")
    add("--no-rng", action="store_true", help="no virtio random number generator")


def _define(to: argparse.ArgumentParser) -> None:
    _description(to)
    to.add_argument("--dry-run", action="store_true", help="show what would be defined; ask nobody")


def _abi(to: argparse.ArgumentParser) -> None:
    to.add_argument("what", choices=("dump",), help="dump: everything, as JSON with sorted keys")
    _description(to)
    to.add_argument("--uuid", help="the machine's UUID, which SMBIOS shows (default: zeroes)")


def _run(to: argparse.ArgumentParser) -> None:
    _description(to)
    to.add_argument("--detach", action="store_true", help="leave it running, with no console here")
    secrets(to)


COMMANDS: Final[Sequence[Command]] = (
    Command(
        "define",
        "store a machine",
        "The machine is described by a TOML file, by flags, or by both. The backing chain of each "
        "disk is looked up now, as you,\nand shown: a start opens these files and no others.",
        (
            ("vmbusctl define web.toml", "store the machine that web.toml describes"),
            (
                "vmbusctl define --name web --memory 512M --kernel vmlinuz --disk web.qcow2,format=qcow2",
                "the same with flags",
            ),
            ("vmbusctl define web.toml --name web2 --dry-run", "look at the chain and the definition only"),
        ),
        _define,
    ),
    Command(
        "abi",
        "show what a guest can see of a machine",
        "PCI, ACPI, SMBIOS, memory map, CPUID and firmware's files, as far as they follow from the machine "
        "type\nand the definition; no service and no /dev/kvm is needed. Equal texts are equal machines.",
        (
            ("vmbusctl abi dump web.toml", "everything, as JSON"),
            ("vmbusctl abi dump --name x --memory 1G --firmware uefi", "of a machine without devices"),
        ),
        _abi,
    ),
    Command(
        "run",
        "run a machine that is forgotten when it ends, with its console here",
        "Its files are opened here, by you, and passed on: at most 16, counting every image of every chain.\n"
        "^] leaves the console; the machine goes on. Status 0 if the guest powered off, 8 if it crashed.",
        (
            (
                "vmbusctl run --name try --memory 256M --kernel vmlinuz --cmdline console=ttyS0",
                "boot a kernel and look at it",
            ),
            ("vmbusctl run web.toml --name try --detach", "the machine of web.toml, in the background"),
        ),
        _run,
    ),
)
