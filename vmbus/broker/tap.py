# SPDX-License-Identifier: Apache-2.0
"""Taps: what the broker itself does of them. The rest is done without uid 0, in dropped/taps.py."""

import os

import msgspec
import prctl

from vmbus.broker.children import NOBODY, Channel, Work, become, nobody


class Wanted(msgspec.Struct, frozen=True):
    """A tap to be made: ``mark`` goes into its ifalias."""

    name: str
    bridge: str
    queues: int
    mark: str


class Made(msgspec.Struct, frozen=True):
    """What was made, for the audit log."""

    what: str
    index: int


def make(wanted: Wanted, slot: str, channel: Channel) -> None:
    """A child's work: open /dev/net/tun, keep CAP_NET_ADMIN only, make the tap. Reports ``Made``."""
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK
    channel.fds += [os.open("/dev/net/tun", flags) for _ in range(wanted.queues)]
    become(NOBODY, [NOBODY], prctl.CAP_NET_ADMIN)
    from vmbus.broker.dropped import taps  # noqa: PLC0415

    taps.make(wanted, slot, channel)


def sweep(keep: list[str], prefixes: list[str]) -> Work:
    """A child's work: delete the taps with a mark that begins with one of ``prefixes``, but for ``keep``."""
    return nobody("taps", "sweep", keep, prefixes, capability=prctl.CAP_NET_ADMIN)
