# SPDX-License-Identifier: Apache-2.0
"""The two operations between an overlay and what lies below it: ``vmbus-img commit`` and ``rebase``.

Both leave the content that is seen through the overlay as it was, whenever they end. The overlay's
header or content changes only after everything else is durable; a commit that was cut short may have
written part of the overlay into the image below, and running it again completes it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from types import SimpleNamespace

from vmbus import image
from vmbus.cli import img_options, img_size, img_source
from vmbus.cli.img_progress import progress
from vmbus.cli.img_source import Cache, Source
from vmbus.cli.img_text import same_file
from vmbus.image import Image, Layer, Report, Secret
from vmbus.wire.errors import VmbusError


def run_commit(options: SimpleNamespace) -> int:
    """Write what the layers above the base (by default the next one) hold into it, then empty the overlay.

    With a base that was named, as with -d, the overlay is not emptied: further down, the layers between
    still lie above the base.
    """
    cache = img_source.cache(options.cache_t)
    rate = 0 if options.rate is None else img_size.number(options.rate, "rate limit")
    [text] = img_options.operands(options, 1, "Expecting one image file name")
    source = img_source.of(options, text, options.format)
    if source.guessed and source.format == "raw":
        img_source.warn_of_guess(text)
    layers = image.chain(source.path, source.format, guess=True, secrets=source.secrets)
    if len(layers) == 1:
        raise VmbusError("InvalidArgument", "Image does not have a backing file")
    depth = _depth(layers, options.base, text)
    with progress(options) as report:
        # The target's locks keep all others off the chain: who has the overlay open denies writes below it.
        with (
            Image(layers[depth:], direct=cache.direct, sync=cache.sync) as target,
            Image(layers, read_only=True, locks=False, direct=cache.direct) as overlay,
        ):
            overlay.commit_into(target, depth, rate=rate, report=report)
            target.flush()
        if not options.drop and options.base is None and layers[0].format == "qcow2":
            with Image(layers, direct=cache.direct, sync=cache.sync) as overlay:
                overlay.empty()
    if not options.quiet:
        print("Image committed.")
    return 0


def _depth(layers: Sequence[Layer], base: str | None, text: str) -> int:
    if base is None:
        return 1
    for depth, layer in enumerate(layers):
        with contextlib.suppress(OSError):
            if depth > 0 and same_file(layer.path, base):
                return depth
    raise VmbusError("InvalidArgument", f"Did not find '{base}' in the backing chain of '{text}'")


def run_rebase(options: SimpleNamespace) -> int:
    """Put the overlay on another backing file, or on none, copying into it what reads differently there."""
    caches = (
        img_source.cache(options.cache_t),
        img_source.cache(options.cache_T, wrong="Invalid source cache option: {}"),
    )
    [text] = img_options.operands(options, 1, "Expecting one image file name")
    if options.backing is None and not options.unsafe:
        raise img_options.UsageError("Must specify backing file (-b) or use unsafe mode (-u)", "rebase")
    source = img_source.of(options, text, options.format)
    backing, format = options.backing or None, options.backing_format
    if backing is not None and format is None:
        message = f"Could not change the backing file to '{backing}': backing format must be specified"
        raise VmbusError("InvalidArgument", message)
    if format is not None and format not in image.FORMATS:
        raise VmbusError("NotSupported", f"Invalid format name: '{format}'")
    if source.format == "raw":
        message = f"Could not change the backing file to '{options.backing}': Operation not supported"
        raise VmbusError("NotSupported", message)
    if not options.unsafe:
        new = img_source.secret_chain(options.new_secrets, img_source.secrets(options.objects))
        new_layers = _new_chain(source, backing, format, new, lock=not options.share)
        with progress(options) as report:
            _rebase(source, new_layers, caches, options, report)
    image.set_backing(source.path, backing, format if backing is not None else None)
    return 0


def _new_chain(
    source: Source,
    backing: str | None,
    format: image.Format | None,
    secrets: Sequence[Secret | None],
    *,
    lock: bool,
) -> list[Layer]:
    if backing is None:
        return []
    below = image.beside(source.path, backing)
    try:
        layers = image.chain(below, format or image.probe(below), guess=True, lock=lock, secrets=secrets)
    except OSError as error:
        message = f"Could not open new backing file '{backing}': Could not open '{below}': {error.strerror}"
        raise VmbusError("InvalidArgument", message) from None
    if any(same_file(layer.path, source.path) for layer in layers):
        raise VmbusError("InvalidArgument", f"'{source.path}' would be its own backing file")
    return layers


def _rebase(
    source: Source,
    new_layers: list[Layer],
    caches: tuple[Cache, Cache],
    options: SimpleNamespace,
    report: Report,
) -> None:
    layers = image.chain(source.path, "qcow2", guess=True, secrets=source.secrets)
    own, below = caches
    with contextlib.ExitStack() as stack:
        overlay = stack.enter_context(Image(layers, direct=own.direct, sync=own.sync))
        new = None
        if new_layers:
            # -U is about what is below: the overlay is written to.
            opened = Image(new_layers, read_only=True, locks=not options.share, direct=below.direct)
            new = stack.enter_context(opened)
        overlay.rebase(new, compress=options.compress, report=report)
