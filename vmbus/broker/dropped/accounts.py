# SPDX-License-Identifier: Apache-2.0
"""Who a uid is (NSS), and what broker.toml grants that user, as far as the host has it.

NSS may hang as long as an LDAP server does, and its modules have no business as root.
"""

import grp
import os
import pwd
import re
from pathlib import Path

from vmbus.broker.children import Channel
from vmbus.broker.dropped import policy
from vmbus.broker.policy import Rights, Survey
from vmbus.wire.errors import VmbusError

_VHOST_NET = Path("/sys/class/misc/vhost-net")
"""There if the kernel has it; a device node alone may be one whose module cannot be loaded."""
_DYNAMIC = range(61184, 65536)  # systemd's DynamicUser= range, nobody, 16-bit -1


def report(uid: int, text: bytes, survey: Survey, channel: Channel) -> None:
    """A child's work: reports ``look_up``'s."""
    channel.report(look_up(uid, text, survey))


def look_up(uid: int, text: bytes, survey: Survey) -> Rights:
    """The rights of ``uid`` by the policy ``text``.

    Raises AccessDenied for one that never owns machines, NotFound, InvalidArgument.
    """
    workers = range(survey.uid_first, survey.uid_first + survey.uid_count)
    if not survey.uid_min <= uid < 0xFFFFFFFF or uid in _DYNAMIC or uid in workers:
        message = f"uid {uid} cannot own machines: only ordinary users' do, from {survey.uid_min}"
        raise VmbusError("AccessDenied", message, argument="uid")
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
    return Rights(
        uid=uid,
        name=entry.pw_name,
        gids=[entry.pw_gid, *gids],
        prefixes=granted.prefixes(account),
        grants=[name for name in granted.grants(account) if name != "vhost-net" or _VHOST_NET.exists()],
        limits=granted.limits(account),
    )


def _gid(name: str) -> int:
    """The gid of group ``name``; -1 for one that this host does not have: it grants nothing."""
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        return -1
