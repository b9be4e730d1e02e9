# SPDX-License-Identifier: Apache-2.0
"""Who owns a machine: the root-kept record uuid -> (uid, user name), and the user behind a uid.

A record is made at the first definition and never changed: a service that was taken over cannot move a
machine to somebody else. uid 0, system users, the range of dynamic users and worker uids are never owners.
NSS may hang (LDAP, NIS), so it is asked in a child only; an answer is kept for KEEP seconds for quotas and
bridges. Opening a file does not use it: that child asks for itself.
"""

from __future__ import annotations

import grp
import os
import pwd
import re
import time
from pathlib import Path
from typing import Final

import msgspec

from vmbus.broker.children import Channel, Crew
from vmbus.broker.loop import Task
from vmbus.broker.policy import Account, Policy
from vmbus.wire.errors import VmbusError

KEEP: Final = 60.0
_DYNAMIC: Final = range(61184, 65536)  # systemd's DynamicUser= range, nobody, 16-bit -1


class Owner(msgspec.Struct, frozen=True):
    """The record, as stored."""

    uid: int
    user: str


def look_up(uid: int, group_names: list[str]) -> Account:
    """Ask NSS who ``uid`` is. Blocks: in a child only. Raises NotFound, InvalidArgument."""
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


def login_uid_min(path: Path = Path("/etc/login.defs")) -> int:
    """UID_MIN of login.defs, 1000 without one."""
    try:
        match = re.search(r"^UID_MIN\s+([0-9]+)", path.read_text(), re.MULTILINE)
    except OSError:
        match = None
    return int(match[1]) if match else 1000


class Owners:
    """The records in ``directory`` (root 0700), one file a machine, and the accounts behind them."""

    def __init__(self, directory: Path, crew: Crew) -> None:
        self._directory = directory
        self._crew = crew
        self._accounts: dict[int, tuple[float, Account]] = {}
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)

    def forget_accounts(self) -> None:
        """Ask NSS anew (the policy's groups may be others)."""
        self._accounts.clear()

    def of(self, uuid: str) -> Owner:
        """The record of ``uuid``. Raises NotFound."""
        try:
            return msgspec.json.decode((self._directory / uuid).read_bytes(), type=Owner)
        except FileNotFoundError:
            raise VmbusError("NotFound", f"machine {uuid} has no recorded owner", argument="uuid") from None

    def account(self, uid: int, policy: Policy) -> Task[Account]:
        """The user behind ``uid``, at most KEEP seconds old. Raises AccessDenied, NotFound, Timeout."""
        least = policy.owners.uid_min or login_uid_min()
        first, count = policy.workers.uid_first, policy.workers.uid_count
        if uid < max(least, 1) or uid in _DYNAMIC or uid in range(first, first + count) or uid >= 0xFFFFFFFF:
            message = f"uid {uid} cannot own machines: only ordinary users' do, from {least}"
            raise VmbusError("AccessDenied", message, argument="uid")
        known = self._accounts.get(uid)
        if known is not None and time.monotonic() - known[0] < KEEP:
            return known[1]
        names = policy.group_names()

        def ask(channel: Channel) -> None:
            channel.report(look_up(uid, names))

        account = yield from self._crew.run(uid, ask, Account, [])
        if len(self._accounts) > 4096:
            self._accounts.clear()
        self._accounts[uid] = (time.monotonic(), account)
        return account

    def own(self, uuid: str, uid: int, policy: Policy) -> Task[Owner]:
        """Record ``uuid`` as ``uid``'s; again is fine. Raises AccessDenied if another's; as ``account``."""
        account = yield from self.account(uid, policy)
        wanted = Owner(uid, account.name)
        path = self._directory / uuid
        if path.exists():
            if self.of(uuid) != wanted:
                raise VmbusError("AccessDenied", f"machine {uuid} is another user's", argument="uid")
            return wanted
        draft = self._directory / f".{uuid}"
        with open(draft, "wb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
            file.write(msgspec.json.encode(wanted))
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
        return wanted

    def disown(self, uuid: str) -> None:
        """Forget ``uuid``; one that is not known is fine."""
        (self._directory / uuid).unlink(missing_ok=True)
