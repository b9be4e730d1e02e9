# SPDX-License-Identifier: Apache-2.0
"""``vmbus-img convert``: copy one image, or several one behind the other, into a new or an existing one.

A source or target that is ``-``, or a pipe, is a stream of raw bytes (img_stream.py).
"""

from __future__ import annotations

import contextlib
import os
import stat
import sys
from types import SimpleNamespace
from typing import Any, cast

from vmbus.cli import img_bitmap, img_create, img_settings, img_size, img_source, img_stream
from vmbus.cli.img_progress import Progress, progress
from vmbus.cli.img_source import Source
from vmbus.image import Format, Image
from vmbus.wire.errors import VmbusError


class _Plan:
    """What the options say, as far as they need no image. VmbusError for what contradicts itself."""

    def __init__(self, options: SimpleNamespace) -> None:
        sparse = options.sparse
        self.sparse = 4096 if sparse is None else _sparse(sparse)
        self.rate = 0 if options.rate is None else img_size.number(options.rate, "rate limit")
        self.threads = None
        if options.threads is not None:
            self.threads = img_size.number(options.threads, "number of coroutines", 1, 16)
        if options.target_by_options and options.target_format is not None:
            raise VmbusError("InvalidArgument", "--image-opts and --format are mutually exclusive")
        self.format = cast(Format, options.target_format or "raw")
        self.from_cache = img_source.cache(options.cache_T, wrong="Invalid source cache option: {}")
        self.to_cache = img_source.cache(options.cache_t, "unsafe")
        _compatible(options)
        *self.sources, self.target = options.words
        self.settings: dict[str, str | int] = {}
        if not options.existing or not options.target_by_options:
            img_settings.known_format(self.format)
        if not options.existing:
            given = img_settings.given(self.format, options.options)
            self.settings = img_create.with_backing(
                self.format, given, options.backing, options.backing_format
            )
        backing = self.settings.get("backing_file")
        if backing is not None and len(self.sources) > 1:
            message = "a backing file for the target makes no sense when concatenating multiple input images"
            raise VmbusError("InvalidArgument", f"Having {message}")
        if backing is not None and "backing_fmt" not in self.settings:
            raise VmbusError("InvalidArgument", "Use of backing file requires explicit backing format")
        # Into an overlay goes only what lies above its backing file.
        self.above = None if backing is None else 1
        if options.compress:
            self._compressible()
        if options.bitmaps and len(self.sources) > 1:
            raise VmbusError("InvalidArgument", "Copying bitmaps only possible with single source")

    def _compressible(self) -> None:
        if self.format == "raw":
            raise VmbusError("InvalidArgument", "Compression not supported for this file format")
        if any(name.startswith("encrypt.") for name in self.settings):
            raise VmbusError("InvalidArgument", "Compression and encryption not supported at the same time")
        if self.settings.get("preallocation", "off") != "off":
            raise VmbusError(
                "InvalidArgument", "Compression and preallocation not supported at the same time"
            )


def _sparse(text: str) -> int:
    name = "buffer size for sparse output"
    value = img_size.scaled(text)
    if value is not None and (value % 512 or not 0 <= value <= 16 << 20):
        raise VmbusError(
            "InvalidArgument",
            f"Invalid {name} specified. Valid sizes are multiples of 512 up to {16 << 20}. Select 0 to "
            "disable sparse detection (fully allocates output).",
        )
    return img_size.number(text, name)


def _compatible(options: SimpleNamespace) -> None:
    """Refuse options that exclude each other, in qemu-img's order."""
    wrong = [
        (options.target_by_options and not options.existing, "--target-image-opts requires use of -n flag"),
        (options.existing and options.options, "-o has no effect when skipping image creation"),
        (options.target_is_zero and not options.existing, "--target-is-zero requires use of -n flag"),
        (
            options.skip_broken_bitmaps and not options.bitmaps,
            "Use of --skip-broken-bitmaps requires --bitmaps",
        ),
        (len(options.words) < 2, "Must specify image file name"),
        (options.offload and options.sparse is not None, "Cannot enable copy offloading when -S is used"),
        (options.offload and options.compress, "Cannot enable copy offloading when -c is used"),
        (options.offload and options.salvage, "Cannot use copy offloading in salvaging mode"),
        (
            options.snapshot is not None and len(options.words) > 2,
            "No support for concatenating multiple snapshot",
        ),
        (
            options.target_is_zero and options.backing is not None,
            "Cannot use --target-is-zero when the destination image has a backing file",
        ),
    ]
    for is_so, message in wrong:
        if is_so:
            raise VmbusError("InvalidArgument", message)


def run(options: SimpleNamespace) -> int:
    """Copy."""
    if img_settings.wants_help(options.options):
        format = img_settings.known_format(options.target_format or "raw")
        print(img_settings.listing(f"Supported {format} options:", img_settings.TABLES[format]))
        return 0
    plan = _Plan(options)
    with contextlib.ExitStack() as stack:
        if any(img_stream.is_stream(text) for text in plan.sources):
            return _from_stream(options, plan)
        sources = [stack.enter_context(_source(options, plan, text)) for text in plan.sources]
        if img_stream.is_stream(plan.target):
            _only_raw(options, plan)
            img_stream.write_out(sources, plan.target)
            return 0
        carried = _bitmaps(options, sources[0])
        length = sum(img_stream.whole(one.size) for one in sources)
        made = stack.enter_context(_target(options, plan, length))
        with _opened(options, plan, made) as target, progress(options) as line:
            if target.size < length:
                raise VmbusError("InvalidArgument", "output file is smaller than input file")
            if options.compress and len(sources) > 1:
                _in_chunks(sources, target, options, plan, line)
            else:
                _each(sources, target, options, plan, line)
            img_bitmap.copy(sources[0], target, carried)
    return 0


def _source(options: SimpleNamespace, plan: _Plan, text: str) -> Image:
    source = img_source.of(options, text, options.format)
    snapshot = None
    if options.snapshot is not None:
        snapshot = img_source.snapshot_id(source, options.snapshot, share=options.share)
    return img_source.opened(source, share=options.share, cache=plan.from_cache, snapshot=snapshot)


def _bitmaps(options: SimpleNamespace, source: Image) -> list[dict[str, Any]]:
    if not options.bitmaps:
        return []
    if source.layers[0].format == "raw":
        raise VmbusError("NotSupported", "Source lacks bitmap support")
    if (options.target_format or "raw") == "raw" and not options.target_by_options:
        raise VmbusError("NotSupported", "Format driver 'raw' does not support bitmaps")
    return img_bitmap.to_copy(source, skip_broken=options.skip_broken_bitmaps)


@contextlib.contextmanager
def _target(options: SimpleNamespace, plan: _Plan, length: int) -> Any:
    """The image to write into; one that was made for it goes when it cannot be finished."""
    known = img_source.secrets(options.objects)
    if options.existing:
        format = None if options.target_by_options else plan.format
        yield img_source.source(plan.target, format, known, options=options.target_by_options)
        return
    with img_create.finished(plan.target):
        settings = plan.settings | {"size": length}
        try:
            made = img_create.make(plan.target, plan.format, settings, known)
        except VmbusError as error:
            message = f"{plan.target}: error while converting {plan.format}: {error}"
            raise VmbusError(error.kind, message) from None
        yield made


def _opened(options: SimpleNamespace, plan: _Plan, made: Source) -> Image:
    return img_source.opened(made, write=True, cache=plan.to_cache)


def _is_zero(options: SimpleNamespace, plan: _Plan) -> bool:
    """Whether the target reads as zeros where nothing is written."""
    if options.existing or plan.above is not None:
        return bool(options.target_is_zero)
    return plan.format == "qcow2" or stat.S_ISREG(os.stat(plan.target).st_mode)


def _how(options: SimpleNamespace, plan: _Plan) -> dict[str, Any]:
    return {
        "compress": options.compress,
        "sparse": plan.sparse,
        "target_is_zero": _is_zero(options, plan),
        "above": plan.above,
        "threads": plan.threads,
        "salvage": options.salvage,
        "rate": plan.rate,
    }


def _each(sources: list[Image], target: Image, options: SimpleNamespace, plan: _Plan, line: Progress) -> None:
    how = _how(options, plan)
    whole, at, lost = sum(img_stream.whole(one.size) for one in sources), 0, 0
    for source in sources:
        lost += source.copy_to(target, shift=at, report=line.part(at, source.size, whole), **how)
        at += img_stream.whole(source.size)
    if lost and not options.quiet:
        print(f"vmbus-img: warning: {lost} bytes could not be read and are zeros", file=sys.stderr)


def _in_chunks(
    sources: list[Image], target: Image, options: SimpleNamespace, plan: _Plan, line: Progress
) -> None:
    """Copy what is compressed: a cluster may hold the end of one source and the beginning of the next."""
    whole = sum(img_stream.whole(one.size) for one in sources)

    def done(at: int) -> None:
        line(at, whole)

    img_stream.copy(img_stream.joined(sources), target, _how(options, plan), grow=None, done=done)


def _from_stream(options: SimpleNamespace, plan: _Plan) -> int:
    """Copy raw bytes whose number is not known before their end."""
    if len(plan.sources) > 1 or options.by_options or options.snapshot or options.bitmaps:
        raise VmbusError(
            "NotSupported", "A stream is the only source, raw, and has neither snapshots nor bitmaps"
        )
    if (options.format or "raw") != "raw":
        raise VmbusError(
            "NotSupported", f"A stream is raw: '{options.format}' cannot be read from front to end"
        )
    if img_stream.is_stream(plan.target):
        raise VmbusError("NotSupported", "Source and target are both streams")
    with (
        img_stream.reading(plan.sources[0]) as read,
        _target(options, plan, 0) as made,
        _opened(options, plan, made) as target,
        progress(options) as line,
    ):
        grow = None if options.existing else str(plan.settings.get("preallocation", "off"))
        size = img_stream.copy(read, target, _how(options, plan), grow=grow, done=lambda at: line(at, 0))
        if "size" in plan.settings and grow is not None and int(plan.settings["size"]) > size:
            target.resize(int(plan.settings["size"]))
    return 0


def _only_raw(options: SimpleNamespace, plan: _Plan) -> None:
    if plan.format != "raw" or options.target_by_options or options.options or options.bitmaps:
        raise VmbusError("NotSupported", "A stream is raw, without options: it is written from front to end")
