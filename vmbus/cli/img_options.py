# SPDX-License-Identifier: Apache-2.0
"""The command line of vmbus-img: sub-commands and their options, read as qemu-img reads them.

That is getopt_long's way: short options in one word, long ones abbreviated, options and operands in any
order. The tables below are all there is; help, the man page (docs/make/img_man_page.py) and the reading are
made from them. Values stay text here: each sub-command says what is wrong with one of its own.
"""

from __future__ import annotations

import getopt
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Final, NamedTuple


class Option(NamedTuple):
    """One option: where it goes, how it is written, what its value is called (none for a switch)."""

    dest: str
    flags: str
    value: str | None
    help: str
    many: bool = False


class Command(NamedTuple):
    """A sub-command: what it does, its operands, its options, and the module and function that do it."""

    summary: str
    operands: str
    place: str
    options: tuple[Option, ...]


class UsageError(Exception):
    """The command line is not one of ours; ``command`` is whose help tells more, "" for that of all."""

    def __init__(self, text: str, command: str = "") -> None:
        super().__init__(text)
        self.command = command


FORMATS: Final = "qcow2|raw"
CACHES: Final = "none|writeback|unsafe|directsync|writethrough"

QUIET: Final = Option("quiet", "-q --quiet", None, "say nothing but errors")
PROGRESS: Final = Option("progress", "-p --progress", None, "show the progress")
OBJECT: Final = Option(
    "objects", "--object", "OBJECT", "secret,id=ID,data=TEXT or file=PATH: a passphrase", many=True
)
FORMAT: Final = Option("format", "-f --format", FORMATS, "the image's format")
BY_OPTIONS: Final = Option("by_options", "--image-opts", None, "FILE is options, a=b,c=d")
SHARE: Final = Option("share", "-U --force-share", None, "take no locks; the image is only read")
OUTPUT: Final = Option("output", "--output", "human|json", "for people or for programs")
TARGET_FORMAT: Final = Option("target_format", "-O", FORMATS, "the target's format (raw)")
SETTINGS: Final = Option(
    "options", "-o --options", "OPTIONS", "options of the format, a=b,c=d; help lists them", many=True
)
ZEROES: Final = Option("detect_zeroes", "--detect-zeroes", "off|on|unmap", "what writes of zeros become")


def _cache(flags: str, of: str, usual: str = "writeback") -> Option:
    return Option(f"cache_{flags[1]}", flags, CACHES, f"how {of} is cached ({usual}); none: not by the host")


COMMANDS: Final[dict[str, Command]] = {
    "amend": Command("change an image's options, and an encrypted one's key slots", "FILE", "img_amend:run", (
        QUIET, PROGRESS, OBJECT, FORMAT, BY_OPTIONS, SETTINGS, _cache("-t --cache", "the image"),
        Option("force", "--force", None, "also where the content may be lost"),
    )),
    "bench": Command("put a load on an image and take the time", "FILE", "img_bench:run", (
        QUIET, OBJECT, FORMAT, BY_OPTIONS, SHARE, _cache("-t --cache", "the image"),
        Option("count", "-c --count", "N", "requests (75000)"),
        Option("depth", "-d --depth", "N", "requests under way at once (64)"),
        Option("bytes", "-s --buffer-size", "SIZE", "bytes of a request (4096)"),
        Option("offset", "-o --offset", "SIZE", "first byte (0)"),
        Option("step", "-S --step-size", "SIZE", "bytes from one request to the next (those of a request)"),
        Option("write", "-w --write", None, "write"),
        Option("pattern", "--pattern", "BYTE", "the byte to write (0)"),
        Option("flush_interval", "--flush-interval", "N", "a flush behind so many requests"),
        Option("no_drain", "--no-drain", None, "taken, and of no effect: flushes wait for nothing"),
        Option("aio", "-i --aio", "threads|native|io_uring", "taken, and of no effect: it is io_uring"),
        Option("native", "-n --native", None, "the same"),
        Option("random", "--random", None, "places in no order (not in qemu-img)"),
        ZEROES._replace(help=f"{ZEROES.help} (not in qemu-img)"),
    )),
    "bitmap": Command("change persistent bitmaps, in the options' order", "FILE BITMAP", "img_bitmap:run", (
        QUIET, OBJECT, FORMAT, BY_OPTIONS,
        Option("granularity", "-g --granularity", "SIZE", "with --add: bytes a bit stands for"),
        Option("add", "--add", None, "add it, enabled"),
        Option("remove", "--remove", None, "remove it"),
        Option("clear", "--clear", None, "let it say that nothing was written"),
        Option("enable", "--enable", None, "record writes"),
        Option("disable", "--disable", None, "record writes no more"),
        Option("merge", "--merge", "SOURCE", "add what another bitmap says", many=True),
        Option("source_file", "-b --source-file", "FILE", "the image with the other bitmap"),
        Option("source_format", "-F --source-format", FORMATS, "that image's format"),
    )),
    "check": Command("look for leaks and corruptions, and repair them", "FILE", "img_check:run", (
        QUIET, OBJECT, FORMAT, BY_OPTIONS, SHARE, OUTPUT, _cache("-T --cache", "the image"),
        Option("repair", "-r --repair", "leaks|all", "repair"),
        Option("memory", "--memory", "SIZE", "hold about this much at most (64M, from 29M; not in qemu-img)"),
    )),
    "commit": Command("write an overlay's content into its backing file", "FILE", "img_rebase:run_commit", (
        QUIET, PROGRESS, OBJECT, FORMAT, BY_OPTIONS, _cache("-t --cache", "the images"),
        Option("base", "-b --base", "FILE", "into this image of the chain; as with -d"),
        Option("drop", "-d --drop", None, "do not empty the overlay"),
        Option("rate", "-r --rate", "SIZE", "bytes a second at most"),
    )),
    "compare": Command("tell whether two images hold the same", "FILE OTHER", "img_compare:run", (
        QUIET, PROGRESS, OBJECT, BY_OPTIONS, SHARE, _cache("-T --cache", "the images"),
        Option("format", "-f --a-format", FORMATS, "the first image's format"),
        Option("other_format", "-F --b-format", FORMATS, "the second image's format"),
        Option("strict", "-s --strict", None, "sizes and what is allocated must be equal too"),
    )),
    "convert": Command("copy images, one behind the other, into one", "FILE... TARGET", "img_convert:run", (
        QUIET, PROGRESS, OBJECT, SHARE,
        Option("format", "-f --source-format", FORMATS, "the sources' format"),
        Option("by_options", "--image-opts --source-image-opts", None, "each FILE is options, a=b,c=d"),
        Option("snapshot", "-l --source-snapshot", "SNAPSHOT",
               "a snapshot of the source: ID, NAME, or snapshot.id=ID,snapshot.name=NAME"),
        _cache("-T --source-cache", "the source"),
        Option("target_format", "-O --target-format", FORMATS, "the target's format (raw)"),
        Option("target_by_options", "--target-image-opts", None, "with -n: TARGET is options"),
        SETTINGS._replace(flags="-o --target-options", help="the target's options; help lists them"),
        Option("compress", "-c --compress", None, "compress"),
        _cache("-t --target-cache", "the target", "unsafe"),
        Option("backing", "-B --backing", "FILE", "the target's backing file: what lies above it is copied"),
        Option("backing_format", "-F --backing-format", FORMATS, "that file's format"),
        Option("existing", "-n --no-create", None, "write into a target that is there"),
        Option("target_is_zero", "--target-is-zero", None, "with -n: the target reads as zeros"),
        Option("sparse", "-S --sparse-size", "SIZE", "zeros of this length are left out (4k); 0: none are"),
        Option("bitmaps", "--bitmaps", None, "copy the persistent bitmaps too"),
        Option("skip_broken_bitmaps", "--skip-broken-bitmaps", None, "but for the inconsistent ones"),
        Option("rate", "-r --rate", "SIZE", "bytes a second at most"),
        Option("threads", "-m --parallel", "N", "threads (1 to 16)"),
        Option("offload", "-C --copy-range-offloading", None, "taken, of no effect: the host never copies"),
        Option("salvage", "--salvage", None, "what cannot be read becomes zeros"),
        Option("unordered", "-W --oob-writes", None, "taken, and of no effect: it is always so"),
    )),
    "create": Command("make an image", "FILE [SIZE]", "img_create:run", (
        QUIET, OBJECT, SETTINGS,
        Option("format", "-f --format", FORMATS, "the format (raw)"),
        Option("backing", "-b --backing", "FILE", "the backing file"),
        Option("backing_format", "-F --backing-format", FORMATS, "the backing file's format"),
        Option("unsafe", "-u --backing-unsafe", None, "do not look at the backing file"),
    )),
    "dd": Command("copy a part of an image", "if=FILE of=FILE [bs=SIZE] [count=N] [skip=N]", "img_dd:run", (
        OBJECT, FORMAT, BY_OPTIONS, SHARE, TARGET_FORMAT._replace(flags="-O --output-format"),
    )),
    "info": Command("show what an image says of itself", "FILE", "img_info:run", (
        OBJECT, FORMAT, BY_OPTIONS, SHARE, OUTPUT,
        Option("chain", "-b --backing-chain", None, "the whole chain"),
    )),
    "map": Command("show where an image's ranges come from", "FILE", "img_map:run", (
        OBJECT, FORMAT, BY_OPTIONS, SHARE, OUTPUT,
        Option("start", "-s --start-offset", "SIZE", "first byte (0)"),
        Option("length", "-l --max-length", "SIZE", "bytes (all)"),
    )),
    "measure": Command("tell how large an image's file will be", "[FILE]", "img_measure:run", (
        OBJECT, FORMAT, BY_OPTIONS, SHARE, OUTPUT,
        TARGET_FORMAT._replace(flags="-O --target-format"),
        SETTINGS._replace(flags="-o"),
        Option("size", "-s --size", "SIZE", "for an empty disk of this size, instead of FILE"),
        Option("snapshot", "-l --snapshot", "SNAPSHOT", "a snapshot of FILE"),
    )),
    "rebase": Command("put an overlay on another backing file", "FILE", "img_rebase:run_rebase", (
        QUIET, PROGRESS, OBJECT, FORMAT, BY_OPTIONS, SHARE, _cache("-t --cache", "the image"),
        Option("backing", "-b --backing", "FILE", "the new backing file; empty for none"),
        Option("backing_format", "-F --backing-format", FORMATS, "that file's format"),
        _cache("-T --backing-cache", "the backing files"),
        Option("unsafe", "-u --backing-unsafe", None, "change the name only"),
        Option("compress", "-c --compress", None, "compress what is copied"),
        Option("new_secrets", "--backing-secret", "ID",
               "passphrase of the new backing file; again for the one below it (not in qemu-img)", many=True),
    )),
    "resize": Command("change a disk's size", "FILE [+-]SIZE", "img_resize:run", (
        QUIET, OBJECT, FORMAT, BY_OPTIONS,
        Option("shrink", "--shrink", None, "yes, the end will be lost"),
        Option("preallocation", "--preallocation", "off|metadata|falloc|full", "for the new end"),
    )),
    "serve": Command("serve an image over NBD (not in qemu-img)", "FILE", "img_serve:run", (
        OBJECT, FORMAT, BY_OPTIONS, SHARE,
        Option("socket", "-k --socket", "PATH", "a unix socket to make"),
        Option("fd", "--fd", "N", "a listening socket that is open already"),
        Option("export", "-x --export-name", "NAME", "the export's name"),
        Option("read_only", "-r --read-only", None, "no writes"),
        Option("persistent", "-t --persistent", None, "go on when the last client has left"),
        Option("connections", "-e --shared", "N", "clients at once (16)"),
        Option("snapshot", "-l --snapshot", "SNAPSHOT", "a snapshot (with -r)"),
        Option("bitmaps", "-B --bitmap", "NAME", "a bitmap to tell of", many=True),
        Option("cache", "--cache", "none|writeback", "none: not cached by the host"),
        ZEROES,
    )),
    "snapshot": Command("internal snapshots", "FILE", "img_snapshot:run", (
        QUIET, OBJECT, FORMAT, BY_OPTIONS, SHARE,
        Option("list", "-l --list", None, "list them (also without an option)"),
        Option("create", "-c --create", "NAME", "take one"),
        Option("apply", "-a --apply", "NAME", "go back to one"),
        Option("delete", "-d --delete", "NAME", "delete one"),
    )),
}  # fmt: skip


def parse(name: str, words: Sequence[str]) -> SimpleNamespace:
    """The options of a sub-command by their names, ``words`` for the operands, ``given`` for the options in
    their order. Raises UsageError; a wish for help comes as ``help``."""
    options = COMMANDS[name].options
    found = SimpleNamespace(command=name, words=[], given=[], help=False)
    short, long = "h", ["help"]
    by_flag: dict[str, Option] = {}
    for option in options:
        setattr(found, option.dest, [] if option.many else None if option.value else False)
        for flag in option.flags.split():
            by_flag[flag] = option
            if flag.startswith("--"):
                long.append(flag[2:] + ("=" if option.value else ""))
            else:
                short += flag[1] + (":" if option.value else "")
    last: list[str] = []
    if name == "resize" and len(words) > 1 and words[-1] not in {"-h", "--help"}:
        # A size may begin with a minus.
        words, last = words[:-1], [words[-1]]
    try:
        given, operands = getopt.gnu_getopt(list(words), short, long)
    except getopt.GetoptError as error:
        raise UsageError(_said(name, error), name) from None
    found.words = operands + last
    for flag, value in given:
        if flag in {"-h", "--help"}:
            found.help = True
            continue
        option = by_flag[flag]
        found.given.append((option.dest, value))
        if option.many:
            getattr(found, option.dest).append(value)
        else:
            setattr(found, option.dest, value if option.value else True)
    return found


def _said(name: str, error: getopt.GetoptError) -> str:
    """What getopt_long would say, behind ``vmbus-img``."""
    flag = error.opt
    is_long = len(flag) > 1
    match error.msg:
        case text if "requires argument" in text:
            said = (
                f"option '--{flag}' requires an argument"
                if is_long
                else f"option requires an argument -- '{flag}'"
            )
        case text if "must not have an argument" in text:
            said = f"option '--{flag}' doesn't allow an argument"
        case text if "unique" in text:
            known = (one[2:] for option in COMMANDS[name].options for one in option.flags.split())
            possible = " ".join(f"'--{one}'" for one in known if one.startswith(flag))
            said = f"option '--{flag}' is ambiguous; possibilities: {possible}"
        case _:
            said = f"unrecognized option '--{flag}'" if is_long else f"invalid option -- '{flag}'"
    return f"{name}: {said}"


def operands(options: SimpleNamespace, number: int, missing: str) -> list[str]:
    """The operands, if there are ``number`` of them."""
    if len(options.words) != number:
        raise UsageError(missing, options.command)
    return list(options.words)


def one_of(options: SimpleNamespace, dest: str, usual: str) -> str:
    """The value of an option whose table entry lists the words that it may be."""
    option = next(one for one in COMMANDS[options.command].options if one.dest == dest)
    value = getattr(options, dest)
    words = (option.value or "").split("|")
    if value is None:
        return usual
    if value not in words:
        flags = option.flags.split()
        name = flags[0] if len(flags) == 1 else f"{flags[1]} ({flags[0]})"
        quoted = " or ".join(f"'{word}'" for word in words)
        raise UsageError(f"{name} expects {quoted} not '{value}'", options.command)
    return str(value)


def help_of(name: str) -> str:
    """What ``vmbus-img NAME --help`` shows."""
    command = COMMANDS[name]
    lines = [f"{command.summary[:1].upper()}{command.summary[1:]}.", ""]
    lines.append(f"usage: vmbus-img {name} [OPTIONS] {command.operands}")
    lines.append("")
    for option in (Option("help", "-h --help", None, "this help"), *command.options):
        flags = ", ".join(option.flags.split()) + (f" {option.value}" if option.value else "")
        lines.append(f"  {flags}\n      {option.help}")
    return "\n".join(lines)


def help_of_all() -> str:
    """What ``vmbus-img --help`` shows."""
    lines = ["Disk images, as qemu-img has them.", "", "usage: vmbus-img COMMAND [OPTIONS] ...", ""]
    lines += ["  -h, --help     this help", "  -V, --version  the version", ""]
    lines += [f"  {name:10} {command.summary}" for name, command in COMMANDS.items()]
    lines += ["", "vmbus-img COMMAND --help tells of a command's options. Formats: qcow2, raw."]
    return "\n".join(lines)
