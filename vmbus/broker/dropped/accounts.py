# SPDX-License-Identifier: Apache-2.0
"""Who a uid is (NSS), and what broker.toml grants that user.

NSS may hang as long as an LDAP server does, and its modules have no business as root.
"""

import grp
import os
import pwd
import re

from vmbus.broker.children import Channel
from vmbus.broker.dropped import policy
from vmbus.broker.policy import Rights
from vmbus.wire.errors import VmbusError


def report(uid: int, text: bytes, channel: Channel) -> None:
    """A child's work: reports ``look_up``'s."""
    channel.report(look_up(uid, text))


def look_up(uid: int, text: bytes) -> Rights:
    """The rights of ``uid`` by the policy ``text``. Raises NotFound, InvalidArgument."""
    try:
        entry = pwd.getpwuid(uid)
    except KeyError:
        raise VmbusError("NotFound", f"there is no user with uid {uid}", argument="uid") from None
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.@-]{0,254}\$?", entry.pw_name):
        raise VmbusError(
            "InvalidArgument", f"user name {entry.pw_name!r} cannot stand in a path", argument="uid"
        )
    granted = policy.load(text)
    gids = os.getgrouplist(entry.pw_name, entry.pw_gid)
    groups = [name for name in granted.group_names() if _gid(name) in gids]
    account = policy.Account(entry.pw_name, entry.pw_dir, groups)
    memory, vcpus, machines, hugepages = granted.limits(account)
    return Rights(
        uid=uid,
        name=entry.pw_name,
        gids=[entry.pw_gid, *gids],
        prefixes=granted.prefixes(account),
        bridges=[name for name, bridge in granted.bridges.items() if bridge.fits(account)],
        memory=memory,
        vcpus=vcpus,
        machines=machines,
        hugepages=hugepages,
    )


def _gid(name: str) -> int:
    """The gid of group ``name``; -1 for one that this host does not have: it grants nothing."""
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        return -1
