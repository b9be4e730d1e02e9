# SPDX-License-Identifier: Apache-2.0
"""The verbs of memory and of the host.

What machines use and may use, the host's huge pages, its merging of equal pages, and what it can do at all.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Final

from vmbus.cli.verbs.command import Command, completed, machine


def _memory(to: argparse.ArgumentParser) -> None:
    action = to.add_argument(
        "machines",
        metavar="MACHINE",
        nargs="*",
        help="names of yours, or UUIDs (default: all that you may see)",
    )
    completed(action, "machine")
    to.add_argument("--watch", action="store_true", help="again and again, until interrupted")
    to.add_argument(
        "--interval", metavar="SECONDS", type=float, default=2.0, help="between two looks (default 2)"
    )
    to.add_argument("--count", metavar="N", type=int, help="so many looks")
    completed(
        to.add_argument("--plot", metavar="FILE", help="record, then draw it into this SVG file"), "file"
    )
    to.add_argument(
        "--for",
        metavar="SECONDS",
        dest="duration",
        type=float,
        default=60.0,
        help="how long to record for --plot (default 60)",
    )


def _set_memory(to: argparse.ArgumentParser) -> None:
    machine(to)
    to.add_argument("size", metavar="SIZE", help="bytes, or with K, M, G, T: 512M")
    to.add_argument("--wait", metavar="SECONDS", type=float, help="wait so long for the guest to get there")


def _hugepages(to: argparse.ArgumentParser) -> None:
    to.add_argument(
        "action", nargs="?", choices=("list", "grow", "shrink"), default="list", help="default list"
    )
    to.add_argument("pages", metavar="PAGES", type=int, nargs="?", help="how many more, or fewer")
    to.add_argument("--page-size", choices=("2M", "1G"), default="2M", help="which pool (default 2M)")
    to.add_argument("--node", metavar="N", type=int, help="which NUMA node's pool (default: the first)")


def _ksm(to: argparse.ArgumentParser) -> None:
    actions = ("show", "set", "restore", "machines", "others")
    to.add_argument("action", nargs="?", choices=actions, default="show", help="default show")
    to.add_argument("settings", metavar="NAME=VALUE", nargs="*", help="what to set; names as show has them")


def _nothing(_to: argparse.ArgumentParser) -> None:
    pass


COMMANDS: Final[Sequence[Command]] = (
    Command(
        "memory",
        "show what machines' memory is made of, and the host's",
        "Of the guest's memory: size; target (what it should get by with); resident on the host; pss "
        "(each page divided by\nhow many share it); huge (in huge pages); merged (by KSM); saved (by "
        "sharing); ballooned (given back); swapped.\noverhead is what the VMM itself needs. Without a "
        "terminal there is no heading; with --json each look is a line.",
        (
            ("vmbusctl memory", "one look at all machines"),
            ("vmbusctl memory web --watch --interval 1", "every second"),
            ("vmbusctl memory --plot memory.svg --for 300", "five minutes, drawn (needs matplotlib)"),
        ),
        _memory,
    ),
    Command(
        "set-memory",
        "ask a guest to get by with less of its memory, or let it have it back",
        "Between the machine's memory-minimum and its memory. The guest's balloon driver gives back "
        "what it can spare;\na guest in need takes memory back by itself.",
        (
            ("vmbusctl set-memory web 256M", "ask and return"),
            ("vmbusctl set-memory web 256M --wait 10", "and wait until it has done so"),
        ),
        _set_memory,
    ),
    Command(
        "prefault",
        "touch all of a running machine's memory, so that the guest waits for none later",
        "With prefault in the definition this is part of each start. ^C stops it; what was touched stays so.",
        (("vmbusctl prefault web", "and wait until it is done"),),
        machine,
    ),
    Command(
        "hugepages",
        "show the host's pools of huge pages, or change them",
        "A pool is one size of page on one NUMA node. Pages that are added go back to the host when the\n"
        "last machine of huge pages has ended; pages that the administrator had are never taken away.",
        (
            ("vmbusctl hugepages", "each pool: pages in all, free, idle, added by vmbus"),
            ("vmbusctl hugepages grow 512", "add 1 GiB in pages of 2 MiB"),
            ("vmbusctl hugepages shrink 2 --page-size 1G --node 1", "take two large pages away from node 1"),
        ),
        _hugepages,
    ),
    Command(
        "ksm",
        "show how the host merges equal pages of machines, or change it",
        "Settings are put back as they were found by restore, and when vmbusd ends. Pages of different\n"
        "owners merge only where vmbusd.toml puts them into one domain; others shows processes beyond\n"
        "vmbus that use KSM.",
        (
            ("vmbusctl ksm", "settings and figures"),
            ("vmbusctl ksm set run=1 pages-to-scan=2000", "switch it on"),
            ("vmbusctl ksm machines", "what it saves for each of your machines"),
        ),
        _ksm,
    ),
    Command("host", "show what this host can do", "", (("vmbusctl host", "KVM, CPUs, memory"),), _nothing),
)
