# SPDX-License-Identifier: Apache-2.0
"""NSS: who a uid is. It may hang as long as an LDAP server does, and its modules have no business as root."""

import grp
import os
import pwd
import re

from vmbus.broker.policy import Account
from vmbus.wire.errors import VmbusError


def look_up(uid: int, group_names: list[str]) -> Account:
    """The account of ``uid``, with those of ``group_names`` it is in. Raises NotFound, InvalidArgument."""
    try:
        entry = pwd.getpwuid(uid)
    except KeyError:
        raise VmbusError("NotFound", f"there is no user with uid {uid}", argument="uid") from None
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.@-]{0,254}\$?", entry.pw_name):
        raise VmbusError(
            "InvalidArgument", f"user name {entry.pw_name!r} cannot stand in a path", argument="uid"
        )
    gids = os.getgrouplist(entry.pw_name, entry.pw_gid)
    groups = []
    for name in group_names:
        try:
            if grp.getgrnam(name).gr_gid in gids:
                groups.append(name)
        except KeyError:
            pass  # a group that this host does not have grants nothing
    return Account(uid, entry.pw_name, entry.pw_dir, [entry.pw_gid, *gids], groups)
