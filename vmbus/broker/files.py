# SPDX-License-Identifier: Apache-2.0
"""A user's file: the part of opening it that is done as root, namely to stop being root."""

from vmbus.broker.children import Channel, become
from vmbus.broker.policy import Rights
from vmbus.wire.broker import Open


def open_for(rights: Rights, request: Open, fuse: bool, channel: Channel) -> None:
    """A child's work; the worker's inlet is its one kept descriptor. Reports an ``Identity``."""
    become(rights.uid, rights.gids)
    from vmbus.broker.dropped import files, paths  # noqa: PLC0415

    files.deliver(request, *paths.split(rights, request.path), channel, fuse=fuse)
