# SPDX-License-Identifier: Apache-2.0
"""vmbus-img: disk images from the command line, with qemu-img's sub-commands, options, JSON keys and
exit codes, so that a script works by changing the name.

What it does not have is refused with a message that names it: formats other than qcow2 and raw. As qemu-img
does, it looks at what a file is when no format is given; scripts that handle other people's images should
give one.

It is started often and for little, so what only one sub-command needs is imported by that one.

One boundary (``main``) turns errors into one line on stderr and an exit code. This file holds the options and
the sub-commands; img_source.py which image a word means and with which passphrase, img_amend.py changes of an
image's options, img_text.py what people read, img_rebase.py the two operations between
overlay and backing file.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final, NoReturn, cast

from vmbus import image
from vmbus.cli import img_amend, img_bitmap, img_measure, img_rebase, img_source, img_text
from vmbus.cli.img_size import size
from vmbus.cli.img_source import Secrets, Source
from vmbus.image import Encryption, Format, Image
from vmbus.wire.errors import VmbusError

if TYPE_CHECKING:
    import socket

MIB: Final = 1 << 20
CHECK_CORRUPT, CHECK_LEAKS, CHECK_UNSUPPORTED = 2, 3, 63
COMPARE_DIFFERENT, COMPARE_CANNOT_OPEN, COMPARE_CANNOT_READ = 1, 2, 4


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print(f"vmbus-img: {message}\nTry 'vmbus-img --help' for more information", file=sys.stderr)
        raise SystemExit(1)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one sub-command; the exit code is qemu-img's."""
    words = list(sys.argv[1:] if argv is None else argv)
    options = _arguments().parse_args(words)
    try:
        return int(options.run(options))
    except VmbusError as error:
        message = str(error)
        unsupported = error.kind == "NotSupported" and options.run is _check
    except OSError as error:
        message = f"Could not open '{error.filename}': {error.strerror}" if error.filename else str(error)
        unsupported = False
    except KeyboardInterrupt:
        return 130
    print(f"vmbus-img: {message}", file=sys.stderr)
    if unsupported:
        return CHECK_UNSUPPORTED
    return COMPARE_CANNOT_OPEN if options.run is _compare else 1


def _relative_size(text: str) -> tuple[str, int]:
    sign = text[0] if text[:1] in {"+", "-"} else ""
    return sign, size(text[len(sign) :])


def _arguments() -> argparse.ArgumentParser:
    parser = _Parser(prog="vmbus-img", description="Disk images, as qemu-img has them.")
    # With a prog argparse need not format a usage for it, which loads shutil and the compression modules.
    commands = parser.add_subparsers(required=True, metavar="COMMAND", prog="vmbus-img")

    def command(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        one = commands.add_parser(name, help=text, description=text)
        one.set_defaults(run=run)
        one.add_argument("-q", dest="quiet", action="store_true", help="say nothing but errors")
        one.add_argument(
            "--object", dest="objects", action="append", default=[], help="secret,id=ID,data=TEXT"
        )
        return one

    def common(one: argparse.ArgumentParser) -> None:
        one.add_argument("-f", dest="format", choices=image.FORMATS, help="the image's format")
        one.add_argument("-U", "--force-share", dest="share", action="store_true", help="no locks")
        by_options(one)

    def by_options(one: argparse.ArgumentParser) -> None:
        one.add_argument(
            "--image-opts", dest="by_options", action="store_true", help="FILE is options, a=b,c=d"
        )

    def cache(one: argparse.ArgumentParser, *flags: str) -> None:
        modes = ["none", "writeback", "unsafe", "directsync", "writethrough"]
        for flag in flags:
            one.add_argument(flag, dest=f"cache_{flag[1:]}", choices=modes, help="none: round the page cache")

    def zeroes(one: argparse.ArgumentParser) -> None:
        one.add_argument(
            "--detect-zeroes",
            choices=image.DETECT_ZEROES,
            default="off",
            help="what writes of zeros become",
        )

    output = {"choices": ["human", "json"], "default": "human", "help": "for people or for programs"}

    one = command("create", _create, "make an image")
    one.add_argument("-f", dest="format", choices=image.FORMATS, default="raw", help="the format")
    one.add_argument("-b", dest="backing", help="the backing file")
    one.add_argument("-F", dest="backing_format", choices=image.FORMATS, help="the backing file's format")
    one.add_argument("-u", dest="unsafe", action="store_true", help="do not look at the backing file")
    one.add_argument("-o", dest="options", action="append", default=[], help="options of the format, a=b,c=d")
    one.add_argument("file")
    one.add_argument("size", type=size, nargs="?")

    one = command("info", _info, "show what an image says of itself")
    common(one)
    one.add_argument("--output", **cast(Any, output))
    one.add_argument("--backing-chain", dest="chain", action="store_true", help="the whole chain")
    one.add_argument("file")

    one = command("check", _check, "look for leaks and corruptions, and repair them")
    common(one)
    one.add_argument("--output", **cast(Any, output))
    one.add_argument("-r", dest="repair", choices=["leaks", "all"], default="none", help="repair")
    one.add_argument(
        "--memory", type=size, metavar="SIZE", help="hold at most about this much (default 64M, at least 29M)"
    )
    cache(one, "-T")
    one.add_argument("file")

    one = command("convert", _convert, "copy an image into another format")
    common(one)
    one.add_argument(
        "-O", dest="target_format", choices=image.FORMATS, default="raw", help="the target's format"
    )
    one.add_argument("-o", dest="options", action="append", default=[], help="options of the target's format")
    one.add_argument("-c", dest="compress", action="store_true", help="compress")
    one.add_argument("-p", dest="progress", action="store_true", help="show the progress")
    one.add_argument("-n", dest="existing", action="store_true", help="write into an existing target")
    one.add_argument(
        "--target-image-opts",
        dest="target_by_options",
        action="store_true",
        help="with -n: TARGET is options",
    )
    one.add_argument("--target-is-zero", action="store_true", help="with -n: the target reads as zeros")
    one.add_argument("-S", dest="sparse", type=size, default=4096, help="zeros of this length are left out")
    one.add_argument("--bitmaps", action="store_true", help="copy the persistent bitmaps too")
    one.add_argument("--skip-broken-bitmaps", action="store_true", help="but for the inconsistent ones")
    one.add_argument("-m", dest="threads", type=int, help="threads")
    one.add_argument("-r", dest="rate", type=size, default=0, help="bytes a second at most")
    one.add_argument("--salvage", action="store_true", help="what cannot be read becomes zeros")
    one.add_argument("-C", dest="offload", action="store_true", help="let the host copy (not done)")
    one.add_argument("-W", dest="unordered", action="store_true", help="as it comes (always done)")
    one.add_argument("-l", dest="snapshot", help="a snapshot of the source")
    one.add_argument("-B", "-b", dest="backing", help="the target's backing file")
    one.add_argument("-F", dest="backing_format", choices=image.FORMATS, help="its format")
    cache(one, "-t", "-T")
    one.add_argument("file")
    one.add_argument("target")

    one = command("compare", _compare, "tell whether two images hold the same")
    one.add_argument("-f", dest="format", choices=image.FORMATS, help="the first image's format")
    one.add_argument("-F", dest="other_format", choices=image.FORMATS, help="the second image's format")
    one.add_argument("-U", "--force-share", dest="share", action="store_true", help="no locks")
    one.add_argument("-s", dest="strict", action="store_true", help="sizes must be equal too")
    one.add_argument("-p", dest="progress", action="store_true", help="show the progress")
    cache(one, "-T")
    by_options(one)
    one.add_argument("file")
    one.add_argument("other")

    one = command("dd", _dd, "copy a part of an image")
    common(one)
    one.add_argument(
        "-O", dest="target_format", choices=image.FORMATS, default="raw", help="the target's format"
    )
    one.add_argument("operands", nargs="+", metavar="if=FILE of=FILE [bs=SIZE] [count=N] [skip=N]")

    one = command("map", _map, "show where an image's ranges come from")
    common(one)
    one.add_argument("--output", **cast(Any, output))
    one.add_argument("-s", "--start-offset", dest="start", type=size, default=0, help="first byte")
    one.add_argument("-l", "--max-length", dest="length", type=size, help="bytes")
    one.add_argument("file")

    one = command("measure", _measure, "tell how large an image's file will be")
    common(one)
    one.add_argument("--output", **cast(Any, output))
    one.add_argument(
        "-O", dest="target_format", choices=image.FORMATS, default="raw", help="the target's format"
    )
    one.add_argument("-o", dest="options", action="append", default=[], help="options of the target's format")
    one.add_argument("-l", dest="snapshot", help="a snapshot of the source")
    one.add_argument("--size", type=size, help="an empty disk of this size, instead of a file")
    one.add_argument("file", nargs="?")

    one = command("amend", _amend, "change an image's options, and an encrypted one's key slots")
    one.add_argument("-f", dest="format", choices=image.FORMATS, help="the image's format")
    by_options(one)
    one.add_argument("-o", dest="options", action="append", default=[], help="options, a=b,c=d")
    one.add_argument("-p", dest="progress", action="store_true", help="show the progress")
    one.add_argument("--force", action="store_true", help="also where the content may be lost")
    cache(one, "-t")
    one.add_argument("file")

    one = command("resize", _resize, "change a disk's size")
    one.add_argument("-f", dest="format", choices=image.FORMATS, help="the image's format")
    one.add_argument("--shrink", action="store_true", help="yes, the end will be lost")
    by_options(one)
    one.add_argument("file")
    one.add_argument("size", type=_relative_size, help="SIZE, +MORE or -LESS")

    one = command("serve", _serve, "serve an image over NBD")
    common(one)
    where = one.add_mutually_exclusive_group()
    where.add_argument("-k", "--socket", dest="socket", help="a unix socket to make")
    where.add_argument("--fd", type=int, help="a listening socket that is open already")
    one.add_argument("-x", "--export-name", dest="export", default="", help="the export's name")
    one.add_argument("-r", "--read-only", dest="read_only", action="store_true", help="no writes")
    one.add_argument("-t", "--persistent", action="store_true", help="go on when the last client has left")
    one.add_argument("-e", "--shared", dest="connections", type=int, default=16, help="clients at once")
    one.add_argument("-l", dest="snapshot", help="a snapshot (with -r)")
    one.add_argument(
        "-B", "--bitmap", dest="bitmaps", action="append", default=[], help="a bitmap to tell of"
    )
    one.add_argument(
        "--cache", choices=["none", "writeback"], default="writeback", help="none: round the page cache"
    )
    zeroes(one)
    one.add_argument("file")

    one = command("bitmap", _bitmap, "persistent bitmaps")
    one.add_argument("-f", dest="format", choices=image.FORMATS, help="the image's format")
    one.add_argument("-g", "--granularity", dest="granularity", type=size, help="bytes a bit stands for")
    by_options(one)
    img_bitmap.arguments(one)

    one = command("snapshot", _snapshot, "internal snapshots")
    common(one)
    which = one.add_mutually_exclusive_group()
    which.add_argument("-l", dest="list", action="store_true", help="list them (also without an option)")
    which.add_argument("-c", dest="create", metavar="NAME", help="take one")
    which.add_argument("-a", dest="apply", metavar="NAME", help="go back to one")
    which.add_argument("-d", dest="delete", metavar="NAME", help="delete one")
    one.add_argument("file")

    one = command("bench", _bench, "put a load on an image and take the time")
    common(one)
    one.add_argument("-c", dest="count", type=int, default=75000, help="requests")
    one.add_argument("-d", dest="depth", type=int, default=64, help="requests under way at once")
    one.add_argument("-s", dest="bytes", type=size, default=4096, help="bytes of a request")
    one.add_argument("-o", dest="offset", type=size, default=0, help="first byte")
    one.add_argument("-S", dest="step", type=size, default=0, help="bytes from one request to the next")
    one.add_argument("-w", dest="write", action="store_true", help="write")
    one.add_argument("--pattern", type=int, default=0, help="the byte to write")
    one.add_argument("--flush-interval", type=int, default=0, help="a flush behind so many requests")
    one.add_argument("--no-drain", action="store_true", help="flushes do not wait (never done)")
    one.add_argument("--random", action="store_true", help="places in no order (not in qemu-img)")
    cache(one, "-t")
    zeroes(one)
    one.add_argument("file")

    one = command("commit", _commit, "write an overlay's content into its backing file")
    one.add_argument("-f", dest="format", choices=image.FORMATS, help="the image's format")
    one.add_argument("-b", dest="base", help="into this image of the chain")
    one.add_argument("-d", dest="drop", action="store_true", help="do not empty the overlay")
    one.add_argument("-p", dest="progress", action="store_true", help="show the progress")
    cache(one, "-t")
    by_options(one)
    one.add_argument("file")

    one = command("rebase", _rebase, "put an overlay on another backing file")
    one.add_argument("-f", dest="format", choices=image.FORMATS, help="the image's format")
    one.add_argument("-u", dest="unsafe", action="store_true", help="change the name only")
    one.add_argument("-b", dest="backing", help="the new backing file; empty for none")
    one.add_argument("-F", "-B", dest="backing_format", choices=image.FORMATS, help="its format")
    one.add_argument("-p", dest="progress", action="store_true", help="show the progress")
    cache(one, "-t", "-T")
    by_options(one)
    one.add_argument(
        "--backing-secret", dest="new_secrets", action="append", default=[], metavar="ID",
        help="passphrase of the new backing file; again for the one below it (not in qemu-img)",
    )  # fmt: skip
    one.add_argument("file")

    return parser


def _known(options: argparse.Namespace) -> Secrets:
    return img_source.secrets(options.objects)


def _source(options: argparse.Namespace, text: str | None = None, stated: str | None = None) -> Source:
    """The image that the command is about, or the one that ``text`` means."""
    if text is None:
        text, stated = options.file, options.format
    return img_source.source(text, stated, _known(options), options=options.by_options)


def _create(options: argparse.Namespace) -> int:
    _make(
        options.file, options.format, options.size, options.options, options.backing, options.backing_format,
        _known(options), look=not options.unsafe,
    )  # fmt: skip
    if not options.quiet:
        print(f"Formatting '{options.file}', fmt={options.format}")
    return 0


def _make(
    path: str,
    format: Format,
    length: int | None,
    listed: list[str],
    backing: str | None,
    backing_format: str | None,
    known: Secrets,
    *,
    look: bool,
) -> Source:
    """Make an image; gives how to open it."""
    settings = _settings(format, listed, known)
    backing = settings.pop("backing_file", backing)
    backing_format = settings.pop("backing_fmt", backing_format)
    length = settings.pop("size", length)
    if backing is not None and format == "raw":
        raise VmbusError("InvalidArgument", "Backing file not supported for file format 'raw'")
    if backing is not None and backing_format is None:
        raise VmbusError("InvalidArgument", "Backing file specified without backing format: use -F")
    if backing is not None and look:
        beside = image.beside(path, backing)
        below = image.info(beside, cast(Format, backing_format))["virtual-size"]
        length = below if length is None else length
    if length is None:
        raise VmbusError("InvalidArgument", "Image creation needs a size parameter")
    os.close(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o666))
    image.create(
        path,
        format,
        size=length,
        backing_name=backing,
        backing_format=cast("Format | None", backing_format),
        **settings,
    )
    encrypt = cast("Encryption | None", settings.get("encrypt"))
    return Source(path, format, (encrypt.secret,) if encrypt else ())


def _settings(format: Format, listed: list[str], known: Secrets) -> dict[str, Any]:
    """The options of -o as arguments of image.create."""
    settings: dict[str, Any] = {}
    encrypt: dict[str, str] = {}
    for name, value in img_source.pairs(",".join(listed)).items():
        pair = f"{name}={value}"
        match name:
            case "size":
                settings["size"] = size(value)
            case "preallocation":
                settings["preallocation"] = value
            case "cluster_size" if format == "qcow2":
                settings["cluster_size"] = size(value)
            case "refcount_bits" if format == "qcow2" and value.isdecimal():
                settings["refcount_bits"] = int(value)
            case "compat" if value in {"0.10", "v2", "1.1", "v3"}:
                settings["version"] = 2 if value in {"0.10", "v2"} else 3
            case "lazy_refcounts" if value in {"on", "off"}:
                settings["lazy_refcounts"] = value == "on"
            case "extended_l2" if value in {"on", "off"}:
                settings["extended_l2"] = value == "on"
            case "compression_type" if value in {"zlib", "zstd"}:
                settings["compression"] = value
            case "data_file":
                settings["data_file"] = value
            case "data_file_raw" if value in {"on", "off"}:
                settings["data_raw"] = value == "on"
            case "backing_file" | "backing_fmt":
                settings[name] = value
            case "encryption" if value == "off":
                pass
            case "encryption":
                raise VmbusError("NotSupported", f"option {pair}: the old AES is only read")
            case "nocow" | "extent_size_hint":
                raise VmbusError("NotSupported", f"option {pair}")
            case _ if name.startswith("encrypt.") and format == "qcow2":
                encrypt[name.removeprefix("encrypt.")] = value
            case _:
                raise VmbusError("InvalidArgument", f"Invalid parameter '{pair}' for format {format}")
    if encrypt:
        settings["encrypt"] = img_source.encryption(encrypt, known)
    return settings


def _info(options: argparse.Namespace) -> int:
    source = _source(options)
    described = []
    for layer in image.chain(
        source.path, source.format, backing=options.chain, lock=not options.share, guess=True
    ):
        described.append(img_text.info(layer, image.info(layer.path, layer.format, lock=not options.share)))
    if options.output == "json":
        print(json.dumps(described if options.chain else described[0], indent=4))
    else:
        print("\n\n".join(img_text.info_for_people(one) for one in described))
    return 0


def _check(options: argparse.Namespace) -> int:
    source = _source(options)
    if source.format == "raw":
        print("This image format does not support checks", file=sys.stderr)
        return CHECK_UNSUPPORTED
    found = image.check(source.path, repair=options.repair, lock=not options.share, memory=options.memory)
    if options.output == "json":
        print(json.dumps(img_text.check(source.path, found), indent=4))
    elif not options.quiet:
        print(img_text.check_for_people(found), end="")
    if found["corruptions"]:
        return CHECK_CORRUPT
    return CHECK_LEAKS if found["leaks"] else 0


def _convert(options: argparse.Namespace) -> int:
    known = _known(options)
    origin = _source(options)
    snapshot = options.snapshot.rpartition("=")[2] if options.snapshot else None
    target_format = cast(Format, options.target_format)
    if options.compress and target_format == "raw":
        raise VmbusError("InvalidArgument", "Compression not supported for file format 'raw'")
    if options.compress and "encrypt" in _settings(target_format, options.options, known):
        raise VmbusError("InvalidArgument", "Compression and encryption not supported at the same time")
    if options.offload and options.salvage:
        raise VmbusError("InvalidArgument", "Cannot use copy offloading in salvaging mode")
    if options.skip_broken_bitmaps and not options.bitmaps:
        raise VmbusError("InvalidArgument", "Use of --skip-broken-bitmaps requires --bitmaps")
    if options.bitmaps and "raw" in {format, target_format}:
        raise VmbusError("NotSupported", "Format driver 'raw' does not support bitmaps")
    with image.open(
        origin.path, origin.format, secrets=origin.secrets, read_only=True, locks=not options.share,
        snapshot=snapshot, guess=True,
        direct=options.cache_T in {"none", "directsync"},
    ) as source:  # fmt: skip
        carried = []
        if options.bitmaps:
            carried = img_bitmap.to_copy(source, skip_broken=options.skip_broken_bitmaps)
        if options.existing:
            made = img_source.source(options.target, target_format, known, options=options.target_by_options)
        else:
            made = _make(
                options.target, target_format, source.size, options.options, options.backing,
                options.backing_format, known, look=True,
            )  # fmt: skip
        zero = options.target_is_zero or not (options.existing or options.backing)
        mode = options.cache_t or "unsafe"
        with image.open(
            made.path, made.format, secrets=made.secrets, direct=mode in {"none", "directsync"},
            sync=mode != "unsafe",
        ) as target:  # fmt: skip
            lost = source.copy_to(
                target,
                compress=options.compress,
                sparse=options.sparse // 512 * 512,
                target_is_zero=zero,
                threads=options.threads,
                salvage=options.salvage,
                rate=options.rate,
                report=img_text.progress(shown=options.progress and not options.quiet),
            )
            if lost:
                print(f"vmbus-img: warning: {lost} bytes could not be read and are zeros", file=sys.stderr)
            img_bitmap.copy(source, target, carried)
    return 0


def _compare(options: argparse.Namespace) -> int:
    def say(text: str) -> None:
        if not options.quiet:
            print(text)

    with (
        _read_only(options, options.file, options.format) as one,
        _read_only(options, options.other, options.other_format) as other,
    ):
        if one.size != other.size and options.strict:
            say("Strict mode: Image size mismatch!")
            return COMPARE_DIFFERENT
        try:
            report = img_text.progress(shown=options.progress and not options.quiet)
            where = one.first_difference(other, report=report)
            if where is None and one.size != other.size:
                say("Warning: Image size mismatch!")
                longer, shorter = (one, other) if one.size > other.size else (other, one)
                where = longer.first_nonzero(shorter.size, longer.size)
        except VmbusError as error:
            print(f"vmbus-img: Error while reading: {error}", file=sys.stderr)
            return COMPARE_CANNOT_READ
    if where is not None:
        say(f"Content mismatch at offset {where // 512 * 512}!")
        return COMPARE_DIFFERENT
    say("Images are identical.")
    return 0


def _read_only(options: argparse.Namespace, text: str, stated: str | None) -> Image:
    path, format, secrets = _source(options, text, stated)
    return image.open(path, format, secrets=secrets, read_only=True, locks=not options.share, guess=True)


def _dd(options: argparse.Namespace) -> int:
    operands = dict(word.partition("=")[::2] for word in options.operands)
    if unknown := set(operands) - {"if", "of", "bs", "count", "skip"}:
        raise VmbusError("InvalidArgument", f"Unrecognized operand: '{min(unknown)}'")
    if "if" not in operands or "of" not in operands:
        raise VmbusError("InvalidArgument", "Must specify both input and output file names")
    try:
        block = size(operands.get("bs", "512"))
        count, skip = size(operands.get("count", "8191P")), size(operands.get("skip", "0"))
    except argparse.ArgumentTypeError as error:
        raise VmbusError("InvalidArgument", str(error)) from None
    if not 0 < block < 1 << 31:
        raise VmbusError("InvalidArgument", "bs must be at least 1 and below 2G")
    with _read_only(options, operands["if"], options.format) as source:
        # As in qemu-img, `count` includes what is skipped.
        end = min(source.size, count * block)
        start = skip * block
        _make(operands["of"], options.target_format, max(0, end - start), [], None, None, {}, look=False)
        if start > source.size:
            print("vmbus-img: cannot skip to specified offset", file=sys.stderr)
        with image.open(operands["of"], options.target_format, sync=False) as target:
            for at in range(start, end, MIB):
                data = source.read(at, min(MIB, end - at))
                if any(data):
                    target.write(at - start, data)
    return 0


def _map(options: argparse.Namespace) -> int:
    with _read_only(options, options.file, options.format) as one:
        end = one.size if options.length is None else min(one.size, options.start + options.length)
        ranges = one.map(options.start, end)
        paths = [layer.data_path or layer.path for layer in one.layers]
        if options.output == "json":
            img_text.map_as_json(ranges)
        else:
            img_text.map_for_people(ranges, paths)
    return 0


def _measure(options: argparse.Namespace) -> int:
    target = cast(Format, options.target_format)
    settings = _settings(target, options.options, _known(options))
    if (options.size is None) == (options.file is None):
        raise VmbusError("InvalidArgument", "Either --size N or one filename must be specified.")
    ranges = None
    bitmaps = None
    length = options.size
    if options.file is not None:
        path, format, secrets = _source(options)
        snapshot = options.snapshot.rpartition("=")[2] if options.snapshot else None
        with image.open(
            path,
            format,
            secrets=secrets,
            read_only=True,
            locks=not options.share,
            snapshot=snapshot,
            guess=True,
        ) as source:
            length, ranges = source.size, list(source.map())
            if format == "qcow2" and target == "qcow2" and settings.get("version", 3) == 3:
                cluster_size = settings.get("cluster_size", 65536)
                bitmaps = img_bitmap.room(source.bitmaps(), source.size, cluster_size)
    found = {"required": length, "fully-allocated": length}
    if target == "qcow2":
        shape = {
            "cluster_size": settings.get("cluster_size", 65536),
            "refcount_bits": settings.get("refcount_bits", 16),
            "extended_l2": settings.get("extended_l2", False),
        }
        found["fully-allocated"] = img_measure.fully_allocated(length, **shape)
        found["required"] = img_measure.required(length, ranges, **shape)
        if settings.get("preallocation") in {"falloc", "full"}:
            found["required"] = found["fully-allocated"]
        if "encrypt" in settings:
            header = img_measure.luks_header(settings["encrypt"], shape["cluster_size"])
            found = {key: size + header for key, size in found.items()}
    if bitmaps is not None:
        found["bitmaps"] = bitmaps
    if options.output == "json":
        print(json.dumps(found, indent=4))
    else:
        names = {"required": "required", "fully-allocated": "fully allocated", "bitmaps": "bitmaps"}
        for key, value in found.items():
            print(f"{names[key]} size: {value}")
    return 0


def _amend(options: argparse.Namespace) -> int:
    report = img_text.progress(shown=options.progress and not options.quiet)
    img_amend.amend(_source(options), options.options, _known(options), force=options.force, report=report)
    return 0


def _resize(options: argparse.Namespace) -> int:
    sign, length = options.size
    # The chain is needed: growing hides what a longer backing file would show.
    path, format, secrets = _source(options)
    with image.open(path, format, secrets=secrets, guess=True) as one:
        wanted = one.size + length if sign == "+" else one.size - length if sign == "-" else length
        if wanted < 0:
            raise VmbusError("InvalidArgument", "New image size must be positive")
        if wanted < one.size and not options.shrink:
            raise VmbusError("InvalidArgument", "Use the --shrink option to perform a shrink operation.")
        one.resize(wanted, shrink=options.shrink)
    if not options.quiet:
        print("Image resized.")
    return 0


def _bitmap(options: argparse.Namespace) -> int:
    merged = None
    if options.source_file is not None:
        merged = img_source.source(options.source_file, options.source_format, _known(options))
    img_bitmap.run(_source(options), options, merged)
    return 0


def _snapshot(options: argparse.Namespace) -> int:
    path, format, secrets = _source(options)
    if format == "raw":
        raise VmbusError("NotSupported", "snapshots in a raw image")
    changes = options.create or options.apply or options.delete
    with image.open(
        path, format, secrets=secrets, read_only=not changes, locks=not options.share, guess=True
    ) as one:
        if options.create:
            one.snapshot(options.create)
        elif options.apply:
            one.apply_snapshot(options.apply)
        elif options.delete:
            one.delete_snapshot(options.delete)
        else:
            print(img_text.snapshots_for_people(one.snapshots()), end="")
    return 0


def _bench(options: argparse.Namespace) -> int:
    mode = options.cache_t or "writeback"
    path, format, secrets = _source(options)
    with image.open(
        path,
        format,
        secrets=secrets,
        read_only=not options.write,
        locks=not options.share,
        guess=True,
        detect_zeroes=options.detect_zeroes,
        direct=mode in {"none", "directsync"},
    ) as one:
        kind = "write" if options.write else "read"
        print(
            f"Sending {options.count} {kind} requests, {options.bytes} bytes each, "
            f"{options.depth} in parallel "
            f"(starting at offset {options.offset}, step size {options.step or options.bytes})"
        )
        seconds = one.bench(
            count=options.count,
            depth=options.depth,
            size=options.bytes,
            offset=options.offset,
            step=options.step,
            random=options.random,
            write=options.write,
            pattern=options.pattern,
            fua=mode in {"directsync", "writethrough"},
            flush_interval=options.flush_interval,
        )
    print(f"Run completed in {seconds:.3f} seconds.")
    return 0


def _serve(options: argparse.Namespace) -> int:
    import signal  # noqa: PLC0415
    import threading  # noqa: PLC0415

    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    path, format, secrets = _source(options)
    with contextlib.ExitStack() as stack:
        disk = stack.enter_context(
            image.open(
                path,
                format,
                secrets=secrets,
                read_only=options.read_only,
                locks=not options.share,
                snapshot=options.snapshot,
                guess=True,
                detect_zeroes=options.detect_zeroes,
                direct=options.cache == "none",
            )
        )
        listener = stack.enter_context(_listener(options.socket, options.fd))
        if options.socket:
            stack.callback(_unlink, options.socket)
        disk.serve(
            listener,
            export=options.export,
            persistent=options.persistent,
            connections=options.connections,
            bitmaps=options.bitmaps,
            stop=stop,
        )
    return 0


def _unlink(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def _listener(path: str | None, fd: int | None) -> socket.socket:
    """The socket asked for; without one, the first that systemd passes (sd_listen_fds(3))."""
    import socket  # noqa: PLC0415

    if path is not None:
        if os.path.exists(path):
            raise VmbusError("AlreadyExists", f"{path} exists already", argument="socket")
        made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        # Under its name once it listens: who waits for the name to appear can connect.
        begun = f"{path}.{os.getpid()}"
        try:
            made.bind(begun)
            made.listen(16)
            os.rename(begun, path)
        except OSError as error:
            made.close()
            raise VmbusError("InvalidArgument", f"{path}: {error.strerror}", argument="socket") from None
        return made
    if (
        fd is None
        and os.environ.get("LISTEN_PID") == str(os.getpid())
        and os.environ.get("LISTEN_FDS") == "1"
    ):
        fd = 3
    if fd is None:
        raise VmbusError("InvalidArgument", "where to listen: -k SOCKET, --fd N, or a socket from systemd")
    return socket.socket(fileno=fd)


def _commit(options: argparse.Namespace) -> int:
    report = img_text.progress(shown=options.progress and not options.quiet)
    img_rebase.commit(_source(options), base=options.base, empty=not options.drop, report=report)
    if not options.quiet:
        print("Image committed.")
    return 0


def _rebase(options: argparse.Namespace) -> int:
    source = _source(options)
    if source.format == "raw":
        raise VmbusError("NotSupported", "a backing file under a raw image")
    if options.backing is None:
        raise VmbusError("InvalidArgument", "the new backing file is missing: -b FILE, or -b '' for none")
    backing = options.backing or None
    backing_format = cast("Format | None", options.backing_format)
    if options.unsafe:
        image.set_backing(source.path, backing, backing_format)
        return 0
    report = img_text.progress(shown=options.progress and not options.quiet)
    new = img_source.secret_chain(options.new_secrets, _known(options))
    img_rebase.rebase(source, backing, backing_format, new, report=report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
