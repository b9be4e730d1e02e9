# SPDX-License-Identifier: Apache-2.0
"""Taps and rules: what the broker itself does of them. The rest is done without uid 0, in dropped/."""

import prctl

from vmbus.broker.children import Work, dropped
from vmbus.wire.broker import Tap


def prepare(request: Tap, name: str, mark: str) -> Work:
    """A child's work: make macvtap ``name``, with CAP_NET_ADMIN only. Reports its index, for /dev/tapN."""
    return dropped("macvtaps", "prepare", request, name, mark, caps=[prctl.CAP_NET_ADMIN])


def make(request: Tap, name: str, mark: str, opened: list[str], helped: bool) -> Work:
    """The same, for a tap; or hand over macvtap ``name``, which ``opened`` is. Reports what was made.

    One that is ``helped`` comes with /dev/vhost-net, once a queue.
    """
    module = "macvtaps" if request.interface else "taps"
    opened = opened + ["/dev/vhost-net"] * (len(opened) if helped else 0)
    return dropped(module, "make", request, name, mark, caps=[prctl.CAP_NET_ADMIN], opened=opened)


def sweep(keep: list[str], prefixes: list[str], uids: range = range(0)) -> Work:
    """A child's work: delete what has a mark that begins with one of ``prefixes``, but for ``keep``."""
    return dropped("links", "sweep", keep, prefixes, uids, caps=[prctl.CAP_NET_ADMIN])


def fence(uid: int, mark: str, command: list[str]) -> Work:
    """A child's work: what ``uid`` sends does not reach the host itself. Reports what was done."""
    return dropped("fence", "fence", uid, mark, command, caps=[prctl.CAP_NET_ADMIN])
