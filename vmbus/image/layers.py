# SPDX-License-Identifier: Apache-2.0
"""The files of a chain: which a header names, and how they are found from the image that holds it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Final, NamedTuple, cast

from vmbus.image.kinds import FORMATS, Format
from vmbus.image.secret import Secret
from vmbus.image.whole import info, probe
from vmbus.wire.errors import VmbusError

MAX_LAYERS: Final = 200


class Layer(NamedTuple):
    """One file of a chain, as its overlay names it."""

    path: str
    format: Format
    backing_name: str | None = None
    data_name: str | None = None
    data_path: str | None = None
    secret: Secret | None = None


def beside(path: str, name: str) -> str:
    """The file that a header of the image at ``path`` names: relative to that image's directory."""
    return os.path.join(os.path.dirname(path), name.removeprefix("file:"))


def chain(
    path: str,
    format: Format,
    *,
    backing: bool = True,
    lock: bool = True,
    guess: bool = False,
    secrets: Sequence[Secret | None] = (),
) -> list[Layer]:
    """The whole chain of an image, active layer first; ``secrets`` are the layers' passphrases.

    A backing file whose format its overlay does not state is refused, unless ``guess``. Raises
    VmbusError ImageInvalid for a chain that loops or is deeper than MAX_LAYERS.
    """
    layers: list[Layer] = []
    while True:
        if len(layers) == MAX_LAYERS:
            raise VmbusError("ImageInvalid", f"the chain is deeper than {MAX_LAYERS}, or a loop")
        header = info(path, format, lock=lock, snapshots=False).get("qcow2") or {}
        data_name = header.get("data-name")
        data_path = None if data_name is None else beside(path, data_name)
        name = header.get("backing-name")
        secret = secrets[len(layers)] if len(layers) < len(secrets) else None
        layers.append(Layer(path, format, name, data_name, data_path, secret))
        if name is None or not backing:
            return layers
        stated = header.get("backing-format")
        path = beside(path, name)
        if stated is None and guess:
            stated = probe(path)
        if stated not in FORMATS:
            said = "no format" if stated is None else f"format '{stated}'"
            raise VmbusError("NotSupported", f"{layers[-1].path} states {said} for its backing file {name}")
        format = cast(Format, stated)
