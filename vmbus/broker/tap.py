# SPDX-License-Identifier: Apache-2.0
"""Taps and rules: what the broker itself does of them. The rest is done without uid 0, in dropped/."""

import prctl

from vmbus.broker.children import Work, dropped
from vmbus.wire.broker import Tap


def make(request: Tap, name: str, mark: str) -> Work:
    """A child's work: make tap ``name``, with CAP_NET_ADMIN only. Reports what was made."""
    opened = ["/dev/net/tun"] * request.queues
    return dropped("taps", "make", request, name, mark, caps=[prctl.CAP_NET_ADMIN], opened=opened)


def sweep(keep: list[str], prefixes: list[str]) -> Work:
    """A child's work: delete what has a mark that begins with one of ``prefixes``, but for ``keep``."""
    return dropped("taps", "sweep", keep, prefixes, caps=[prctl.CAP_NET_ADMIN])


def fence(uid: int, mark: str, command: list[str]) -> Work:
    """A child's work: what ``uid`` sends does not reach the host itself. Reports what was done."""
    return dropped("fence", "fence", uid, mark, command, caps=[prctl.CAP_NET_ADMIN])
