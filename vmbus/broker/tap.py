# SPDX-License-Identifier: Apache-2.0
"""Taps: what the broker itself does of them. The rest is done without uid 0, in dropped/taps.py."""

import msgspec
import prctl

from vmbus.broker.children import Work, nobody


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


def make(wanted: Wanted, slot: str) -> Work:
    """A child's work: make the tap, with CAP_NET_ADMIN only. Reports ``Made``."""
    opened = ["/dev/net/tun"] * wanted.queues
    return nobody("taps", "make", wanted, slot, capability=prctl.CAP_NET_ADMIN, opened=opened)


def sweep(keep: list[str], prefixes: list[str]) -> Work:
    """A child's work: delete the taps with a mark that begins with one of ``prefixes``, but for ``keep``."""
    return nobody("taps", "sweep", keep, prefixes, capability=prctl.CAP_NET_ADMIN)
