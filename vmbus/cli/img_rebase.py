# SPDX-License-Identifier: Apache-2.0
"""The two operations between an overlay and what lies below it: commit and rebase.

Both leave the content that is seen through the overlay as it was, whenever they end. The overlay's
header or content changes only after everything else is durable; a commit that was cut short may have
written part of the overlay into the image below, and running it again completes it.
"""

from __future__ import annotations

from collections.abc import Sequence

from vmbus import image
from vmbus.cli.img_source import Source
from vmbus.cli.img_text import same_file
from vmbus.image import Format, Image, Report, Secret
from vmbus.wire.errors import VmbusError

_PIECE = 2 << 20


def commit(source: Source, *, base: str | None, empty: bool, report: Report | None) -> None:
    """Write what the layers above ``base`` (default: the next one) hold into it, then empty the overlay.

    With a base further down the overlay is not emptied, as the layers between still lie above the base.
    """
    path = source.path
    layers = image.chain(path, source.format, guess=True, secrets=source.secrets)
    if len(layers) == 1:
        raise VmbusError("InvalidArgument", "Image does not have a backing file")
    depth = 1
    if base is not None:
        places = [n for n, layer in enumerate(layers) if n > 0 and same_file(layer.path, base)]
        if not places:
            raise VmbusError("InvalidArgument", f"Did not find '{base}' in the backing chain of '{path}'")
        depth = places[0]
    # The target's locks keep everybody else off the chain: who has the overlay open denies writes below it.
    with Image(layers[depth:]) as target, Image(layers, read_only=True, locks=False) as overlay:
        if overlay.size > target.size:
            target.resize(overlay.size)
        overlay.copy_to(target, above=depth, target_is_zero=False, report=report)
        target.flush()
    if empty and depth == 1 and layers[0].format == "qcow2":
        with Image(layers) as overlay:
            overlay.empty()


def rebase(
    source: Source,
    backing: str | None,
    backing_format: Format | None,
    secrets: Sequence[Secret | None],
    *,
    report: Report | None,
) -> None:
    """Put the overlay on ``backing`` (None: on nothing), copying into it what reads differently there.

    ``secrets`` are the passphrases of the new backing file and those below it.
    """
    path = source.path
    layers = image.chain(path, "qcow2", guess=True, secrets=source.secrets)
    new_layers = []
    if backing is not None:
        below = image.beside(path, backing)
        new_layers = image.chain(below, backing_format or image.probe(below), guess=True, secrets=secrets)
        backing_format = new_layers[0].format
    if any(same_file(layer.path, path) for layer in new_layers):
        raise VmbusError("InvalidArgument", f"'{path}' would be its own backing file")
    with Image(layers) as overlay:
        old = Image(layers[1:], read_only=True) if layers[1:] else None
        new = Image(new_layers, read_only=True) if new_layers else None
        try:
            _copy_differences(overlay, old, new, report)
        finally:
            for one in (old, new):
                if one is not None:
                    one.close()
        overlay.flush()
    image.set_backing(path, backing, backing_format)


def _copy_differences(overlay: Image, old: Image | None, new: Image | None, report: Report | None) -> None:
    size = overlay.size
    at = 0
    while at < size:
        for found in overlay.map(at, min(at + 64 * _PIECE, size)):
            start, length = found["start"], found["length"]
            at = start + length
            if found["present"] and found["depth"] == 0:
                continue
            for piece in range(start, at, _PIECE):
                _copy_piece(overlay, old, new, piece, min(_PIECE, at - piece))
        if report is not None:
            report(at, size)


def _copy_piece(overlay: Image, old: Image | None, new: Image | None, start: int, length: int) -> None:
    seen, next_seen = _read(old, start, length), _read(new, start, length)
    if seen == next_seen:
        return
    unit = 65536
    for offset in range(0, length, unit):
        part = seen[offset : offset + unit]
        if part != next_seen[offset : offset + unit]:
            # Zeros too are written: below, it is the old backing file that reads as zeros there.
            overlay.write(start + offset, part)


def _read(below: Image | None, start: int, length: int) -> bytes:
    """A range of an image that may be shorter; zeros behind its end, and for no image."""
    inside = 0 if below is None else max(0, min(length, below.size - start))
    data = below.read(start, inside) if below is not None and inside else b""
    return data + bytes(length - inside)
