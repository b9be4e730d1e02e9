# SPDX-License-Identifier: Apache-2.0
"""vmbusctl's command line. The man page and the shell completions are made from this parser (docs/make)."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, NoReturn

import vmbus

STATES: Final = ("stopped", "starting", "running", "paused", "stopping", "crashed")
Completion = Literal["machine", "file", "directory", "none"]


@dataclass(frozen=True)
class Command:
    """One verb: its sentence, examples with what they do, and what adds its arguments."""

    name: str
    summary: str
    detail: str
    examples: Sequence[tuple[str, str]]
    arguments: Callable[[argparse.ArgumentParser], None]


class Parser(argparse.ArgumentParser):
    """argparse, with errors of one line that say where help is."""

    def error(self, message: str) -> NoReturn:
        """Exit with status 2."""
        self.exit(2, f"vmbusctl: {message} (see '{self.prog} --help')\n")


class Format(argparse.RawDescriptionHelpFormatter):
    """Two columns, the first narrow enough for 80 characters."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=26, width=96)


def parser() -> Parser:
    """The whole command line."""
    top = Parser(
        prog="vmbusctl",
        description="Define, run and watch virtual machines of vmbus.",
        epilog="Every command has its own help with examples: vmbusctl COMMAND --help. More: man vmbusctl.",
        formatter_class=Format,
        allow_abbrev=False,
    )
    top.add_argument("--version", action="version", version=f"vmbusctl {vmbus.__version__}")
    _common(top)
    verbs = top.add_subparsers(dest="command", metavar="COMMAND", required=True, title="commands")
    for command in COMMANDS:
        sub = verbs.add_parser(
            command.name,
            help=command.summary,
            description=f"{command.summary[:1].upper()}{command.summary[1:]}.\n\n{command.detail}".strip(),
            epilog="examples:\n" + "\n".join(f"  {line}\n      {what}" for line, what in command.examples),
            formatter_class=Format,
            allow_abbrev=False,
        )
        command.arguments(sub)
        _common(sub)
    return top


def completion_of(action: argparse.Action) -> Completion:
    """What a shell offers for the value of this argument."""
    found: Completion = getattr(action, "vmbus_completion", "none")
    return found


def _common(to: argparse.ArgumentParser) -> None:
    """Options that may stand before or after the command."""
    group = to.add_argument_group("common options")
    add = group.add_argument
    add(
        "--json",
        action="store_true",
        default=argparse.SUPPRESS,
        help="one JSON document; errors as JSON too",
    )
    add(
        "--bus-address",
        metavar="ADDRESS",
        default=argparse.SUPPRESS,
        help="D-Bus address of the bus (default: DBUS_SYSTEM_BUS_ADDRESS, else the system bus)",
    )
    add(
        "--bus-name",
        metavar="NAME",
        default=argparse.SUPPRESS,
        help="bus name of the vmbusd to talk to (default: org.vmbus1)",
    )
    add(
        "--no-ask",
        action="store_true",
        default=argparse.SUPPRESS,
        help="fail rather than let polkit ask somebody for a password",
    )
    add(
        "--no-autostart",
        action="store_true",
        default=argparse.SUPPRESS,
        help="fail when vmbusd is not running, rather than let the bus start it",
    )


def _completed(action: argparse.Action, kind: Completion) -> None:
    action.vmbus_completion = kind  # type: ignore[attr-defined]


def _machine(to: argparse.ArgumentParser) -> None:
    _completed(to.add_argument("machine", metavar="MACHINE", help="a name of yours, or a UUID"), "machine")


def _machines(to: argparse.ArgumentParser) -> None:
    action = to.add_argument("machines", metavar="MACHINE", nargs="+", help="names of yours, or UUIDs")
    _completed(action, "machine")


def _description(to: argparse.ArgumentParser) -> None:
    """What a machine is: file and flags of define and run."""
    _completed(
        to.add_argument("file", metavar="FILE", nargs="?", help="a TOML file; see vmbus-machine(5)"), "file"
    )
    group = to.add_argument_group("the machine (each wins over the file)")
    add = group.add_argument
    add("--name", help="unique among your machines")
    add("--memory", metavar="SIZE", help="bytes, or with K, M, G, T: 512M")
    add("--vcpus", metavar="N", type=int, help="1 to 16 (default 1)")
    _completed(add("--kernel", metavar="PATH", help="a bzImage or PVH ELF kernel"), "file")
    _completed(add("--initrd", metavar="PATH", help="its initial RAM disk"), "file")
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
        "kind=isolated,network=NAME; mac= (default: made up, and kept), id=, queues=, slot=; "
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
    add("--machine-type", metavar="TYPE", help="vmbus-1 (default)")
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
    _secrets(to)


def _list(to: argparse.ArgumentParser) -> None:
    to.add_argument("--all", action="store_true", help="other users' machines too")
    to.add_argument("--names", action="store_true", help="names alone, one a line")


def _show(to: argparse.ArgumentParser) -> None:
    _machine(to)
    to.add_argument("--stats", action="store_true", help="with its counters and memory")


def _secrets(to: argparse.ArgumentParser) -> None:
    action = to.add_argument(
        "--secret",
        metavar="SLOT=PATH",
        action="append",
        default=[],
        dest="secrets",
        help="the passphrase of encrypted image disk/ID/N: a file's content, or - for standard input",
    )
    _completed(action, "file")


def _files(to: argparse.ArgumentParser, limit: str = "") -> None:
    action = to.add_argument(
        "--file",
        metavar="SLOT=PATH",
        action="append",
        default=[],
        dest="files",
        help=f'open PATH here and pass it for a slot with source = "fd"{limit}',
    )
    _completed(action, "file")


def _start(to: argparse.ArgumentParser) -> None:
    _machines(to)
    to.add_argument("--paused", action="store_true", help="stop before the first guest instruction")
    _files(to, " (one machine only)")
    _secrets(to)
    to.add_argument("--console", action="store_true", help="attach to its console (one machine only)")


def _save(to: argparse.ArgumentParser) -> None:
    _machine(to)
    _completed(to.add_argument("to", metavar="FILE", help="a new file"), "file")
    to.add_argument("--keep", action="store_true", help="the machine goes on")


def _restore(to: argparse.ArgumentParser) -> None:
    _machine(to)
    _completed(to.add_argument("source", metavar="FILE", help="what save wrote"), "file")
    to.add_argument("--paused", action="store_true", help="stop where it was saved")
    to.add_argument(
        "--changed-disks",
        action="store_true",
        help="even if its disks are other files (copies), or were written to since",
    )
    _files(to)
    _secrets(to)


def _snapshot(to: argparse.ArgumentParser) -> None:
    to.add_argument("action", choices=("create", "revert", "delete", "list", "tree"), help="what to do")
    _machine(to)
    to.add_argument("snapshot", metavar="NAME", nargs="?", help="the snapshot's; not for list and tree")
    to.add_argument("--paused", action="store_true", help="revert: stop where it was")
    _files(to)
    _secrets(to)


def _template(to: argparse.ArgumentParser) -> None:
    to.add_argument("action", choices=("import", "list", "delete"), help="what to do")
    to.add_argument("template", metavar="NAME", nargs="?", help="the template's; not for list")
    _completed(to.add_argument("source", metavar="FILE", nargs="?", help="import: what save wrote"), "file")


def _clone(to: argparse.ArgumentParser) -> None:
    _machine(to)
    to.add_argument("template", metavar="TEMPLATE", help="a template of yours")
    to.add_argument("--paused", action="store_true", help="stop where it was saved")
    _files(to)
    _secrets(to)


def _stop(to: argparse.ArgumentParser) -> None:
    _machines(to)
    to.add_argument(
        "--deadline",
        metavar="SECONDS",
        type=float,
        default=60.0,
        help="how long the guest gets to power off (default 60); 0: none",
    )
    to.add_argument("--no-wait", action="store_true", help="return at once")


def _shutdown(to: argparse.ArgumentParser) -> None:
    action = to.add_argument("machines", metavar="MACHINE", nargs="*", help="names of yours, or UUIDs")
    _completed(action, "machine")
    to.add_argument(
        "--all", action="store_true", help="all running machines that you may see (for root: all there are)"
    )
    to.add_argument("--wait", metavar="SECONDS", type=float, help="wait so long for them to stop")


def _console(to: argparse.ArgumentParser) -> None:
    _machine(to)
    to.add_argument("--read-only", action="store_true", help="only look")
    to.add_argument("--steal", action="store_true", help="take the place of who writes there now")


def _vsock(to: argparse.ArgumentParser) -> None:
    to.add_argument(
        "what",
        choices=("connect", "listen"),
        help="connect: to a port of the guest's; listen: take its connections to a port of the host's",
    )
    _machine(to)
    to.add_argument("port", metavar="PORT", type=int, help="0 to 4294967295")
    to.add_argument(
        "program",
        metavar="COMMAND",
        nargs=argparse.REMAINDER,
        help="of listen: serves each connection as its standard input and output; "
        "without it one connection is taken, here",
    )


def _port(to: argparse.ArgumentParser) -> None:
    _machine(to)
    to.add_argument("port", metavar="NAME", help="the port's name")
    to.add_argument("--read-only", action="store_true", help="only look")
    to.add_argument("--steal", action="store_true", help="take the place of who writes there now")


def _attach_nic(to: argparse.ArgumentParser) -> None:
    _machine(to)
    to.add_argument(
        "nic",
        metavar="BRIDGE[,mac=M]",
        help="as for define --nic: mac= (default: made up, and kept), id=, queues=, slot=",
    )


def _attach_disk(to: argparse.ArgumentParser) -> None:
    _machine(to)
    action = to.add_argument(
        "disk",
        metavar="PATH,format=F[,...]",
        help="as for define --disk: path, format=qcow2|raw, backing-format=, id=, serial=, queues=, slot=, "
        "read-only",
    )
    _completed(action, "file")
    to.add_argument(
        "--pass-files", action="store_true", help="open the images here, as you, and pass them (running only)"
    )
    _secrets(to)


def _detach(to: argparse.ArgumentParser) -> None:
    _machine(to)
    to.add_argument("id", metavar="ID", help="the device's id, as vmbusctl show has it")
    to.add_argument(
        "--deadline",
        metavar="SECONDS",
        type=float,
        default=30.0,
        help="how long the guest gets to let go of it (default 30); Linux takes five to begin",
    )


def _set_link(to: argparse.ArgumentParser) -> None:
    _machine(to)
    to.add_argument("id", metavar="ID", help="the interface's id, as vmbusctl show has it")
    to.add_argument("link", choices=("up", "down"), help="plugged in, or not")


def _resize_disk(to: argparse.ArgumentParser) -> None:
    _machine(to)
    to.add_argument("id", metavar="ID", help="the disk's id, as vmbusctl show has it")
    to.add_argument("size", metavar="SIZE", help="bytes, or with K, M, G, T: 20G")


def _change_media(to: argparse.ArgumentParser) -> None:
    _machine(to)
    to.add_argument("id", metavar="ID", help="the drive's id, as vmbusctl show has it")
    action = to.add_argument(
        "medium",
        metavar="PATH,format=F",
        nargs="?",
        help="what goes in: path, format=raw|qcow2, backing-format= (default: nothing; it is taken out)",
    )
    _completed(action, "file")
    to.add_argument("--force", action="store_true", help="even if the guest has locked it")
    to.add_argument(
        "--pass-files", action="store_true", help="open the medium here, as you, and pass it (running only)"
    )


def _wait(to: argparse.ArgumentParser) -> None:
    _machine(to)
    to.add_argument(
        "--state", choices=STATES, default="stopped", help="the state to wait for (default stopped)"
    )
    to.add_argument("--timeout", metavar="SECONDS", type=float, help="give up after so long (default: never)")


def _memory(to: argparse.ArgumentParser) -> None:
    action = to.add_argument(
        "machines",
        metavar="MACHINE",
        nargs="*",
        help="names of yours, or UUIDs (default: all that you may see)",
    )
    _completed(action, "machine")
    to.add_argument("--watch", action="store_true", help="again and again, until interrupted")
    to.add_argument(
        "--interval", metavar="SECONDS", type=float, default=2.0, help="between two looks (default 2)"
    )
    to.add_argument("--count", metavar="N", type=int, help="so many looks")
    _completed(
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
    _machine(to)
    to.add_argument("size", metavar="SIZE", help="bytes, or with K, M, G, T: 512M")
    to.add_argument("--wait", metavar="SECONDS", type=float, help="wait so long for the guest to get there")


def _nothing(_to: argparse.ArgumentParser) -> None:
    pass


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
    Command(
        "list",
        "list machines",
        "Your own; root's list is everybody's. Without a terminal there is no heading.",
        (("vmbusctl list", "your machines"), ("vmbusctl list --all --json", "everybody's, for a program")),
        _list,
    ),
    Command(
        "show",
        "show a machine",
        "",
        (
            ("vmbusctl show web", "state and definition"),
            ("vmbusctl show web --stats --json", "for a program"),
        ),
        _show,
    ),
    Command(
        "start",
        "start machines",
        "Returns when the guest runs, or says why it does not.",
        (
            ("vmbusctl start web", "start it"),
            ("vmbusctl start web --console", "and see it boot"),
            ("vmbusctl start web --file disk/data/0=./data.qcow2", "with a file of yours for a slot"),
            ("vmbusctl start web --secret disk/root/0=-", "with the passphrase of an encrypted image"),
        ),
        _start,
    ),
    Command(
        "stop",
        "stop machines: power button, deadline, then the plug (disks flushed)",
        "",
        (
            ("vmbusctl stop web", "give the guest 60 seconds"),
            ("vmbusctl stop web --deadline 0", "end it now, its disks flushed"),
        ),
        _stop,
    ),
    Command(
        "shutdown",
        "press the power button",
        "What the guest makes of it is its own affair; see stop.",
        (
            ("vmbusctl shutdown web", "press and return"),
            ("vmbusctl shutdown --all --wait 90", "all of them, and wait"),
        ),
        _shutdown,
    ),
    Command(
        "kill",
        "end machines at once; what the guest had not flushed is lost",
        "",
        (("vmbusctl kill web", "pull the plug"),),
        _machines,
    ),
    Command("reset", "pull the reset line", "", (("vmbusctl reset web", "as the reset button"),), _machines),
    Command("pause", "stop the vCPUs", "", (("vmbusctl pause web", "until resume"),), _machines),
    Command("resume", "let paused machines go on", "", (("vmbusctl resume web", "go on"),), _machines),
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
    Command(
        "console",
        "attach to the serial console; ^] leaves",
        "First comes the last output (up to 64 KiB). Many may look, one may write.",
        (
            ("vmbusctl console web", "read and write"),
            ("vmbusctl console web --read-only </dev/null >web.log", "record it"),
        ),
        _console,
    ),
    Command(
        "port",
        "connect to a named port of a machine",
        "The guest has it as /dev/virtio-ports/NAME. First comes what it wrote last (up to 64 KiB).",
        (
            ("vmbusctl port web agent", "read and write; ^] leaves"),
            ("vmbusctl port web log --read-only </dev/null >>web.log", "record it"),
        ),
        _port,
    ),
    Command(
        "vsock",
        "connect to a port of a guest's, or listen for its connections",
        "For a machine with vsock, the guest's CID, in its definition. The guest uses AF_VSOCK; the host is\n"
        "CID 2, and its ports are this machine's alone. An end of file on standard input is passed on.",
        (
            ("vmbusctl vsock connect web 1024", "read and write; ^] leaves"),
            ("vmbusctl vsock listen web 514 tee -a web.log", "a program for each connection"),
        ),
        _vsock,
    ),
    Command(
        "attach-nic",
        "give a machine a network interface, running or not",
        "It goes into the first free hotplug slot, or the one that slot= says; the definition keeps it.",
        (
            ("vmbusctl attach-nic web lan0", "an interface on the bridge lan0"),
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
    Command(
        "wait",
        "wait for a state",
        "Ends with status 7 after the timeout, and 8 when the machine crashed instead.",
        (
            ("vmbusctl wait web", "until it is stopped"),
            ("vmbusctl wait web --state running --timeout 10", "up to ten seconds"),
        ),
        _wait,
    ),
    Command(
        "undefine",
        "forget stopped machines; their images stay",
        "",
        (("vmbusctl undefine web", "forget it"),),
        _machines,
    ),
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
        _machine,
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


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; exits with status 2 if it is wrong, 0 after --help."""
    defaults: dict[str, Any] = {
        "json": False,
        "bus_address": None,
        "bus_name": "org.vmbus1",
        "no_ask": False,
        "no_autostart": False,
    }
    found = parser().parse_args(arguments)
    for key, value in defaults.items():
        if not hasattr(found, key):
            setattr(found, key, value)
    return found
