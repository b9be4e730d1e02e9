# SPDX-License-Identifier: Apache-2.0
"""Who owns a machine: the root-kept record uuid -> (uid, user name), and the user behind a uid.

A record is made at the first definition and never changed: a service that was taken over cannot move a
machine to somebody else. uid 0, system users, the range of dynamic users and worker uids are never owners.
NSS may hang, so it is asked in a child (dropped/accounts.py); an answer is good for KEEP seconds.
"""

import os
import time
from pathlib import Path

import msgspec

from vmbus.broker.children import NOBODY, Channel, Crew, become
from vmbus.broker.loop import Task
from vmbus.broker.policy import Account, Policy
from vmbus.wire.errors import VmbusError

KEEP = 10.0
_DYNAMIC = range(61184, 65536)  # systemd's DynamicUser= range, nobody, 16-bit -1


class Owner(msgspec.Struct, frozen=True):
    """The record, as stored."""

    uid: int
    user: str


class Owners:
    """The records in ``directory`` (root 0700), one file a machine, and the accounts behind them."""

    def __init__(self, directory: Path, crew: Crew, uid_min: int) -> None:
        self._directory, self._crew, self._uid_min = directory, crew, uid_min
        self._accounts: dict[int, tuple[float, Account]] = {}
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)

    def of(self, uuid: str) -> Owner:
        """The record of ``uuid``. Raises NotFound."""
        try:
            return msgspec.json.decode((self._directory / uuid).read_bytes(), type=Owner)
        except FileNotFoundError:
            raise VmbusError("NotFound", f"machine {uuid} has no recorded owner", argument="uuid") from None

    def account(self, uid: int, policy: Policy) -> Task[Account]:
        """The user behind ``uid``. Raises AccessDenied if it never owns machines, NotFound, Timeout."""
        least = policy.owners.uid_min or self._uid_min
        workers = range(policy.workers.uid_first, policy.workers.uid_first + policy.workers.uid_count)
        if not least <= uid < 0xFFFFFFFF or uid in _DYNAMIC or uid in workers:
            message = f"uid {uid} cannot own machines: only ordinary users' do, from {least}"
            raise VmbusError("AccessDenied", message, argument="uid")
        asked, known = self._accounts.get(uid, (0.0, None))
        if known is not None and time.monotonic() - asked < KEEP:
            return known

        def ask(channel: Channel) -> None:
            become(NOBODY, [NOBODY])
            from vmbus.broker.dropped import accounts  # noqa: PLC0415

            channel.report(accounts.look_up(uid, policy.group_names()))

        account = yield from self._crew.run(uid, ask, Account, [])
        if len(self._accounts) > 4096:
            self._accounts.clear()
        self._accounts[uid] = (time.monotonic(), account)
        return account

    def account_of(self, uuid: str, policy: Policy) -> Task[Account]:
        """The owner of ``uuid``; refused if the name behind the uid is another now. Raises as the above."""
        owner = self.of(uuid)
        account = yield from self.account(owner.uid, policy)
        if account.name != owner.user:
            message = f"uid {owner.uid} is now {account.name}; the machine was defined by {owner.user}"
            raise VmbusError("AccessDenied", message, argument="uid")
        return account

    def own(self, uuid: str, uid: int, policy: Policy) -> Task[None]:
        """Record ``uuid`` as ``uid``'s; again is fine. Raises AccessDenied if another's; as ``account``."""
        account = yield from self.account(uid, policy)
        wanted, path = Owner(uid, account.name), self._directory / uuid
        if path.exists():
            if self.of(uuid) != wanted:
                raise VmbusError("AccessDenied", f"machine {uuid} is another user's", argument="uid")
            return
        draft = self._directory / f".{uuid}"
        with open(draft, "wb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
            file.write(msgspec.json.encode(wanted))
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)

    def disown(self, uuid: str) -> None:
        """Forget ``uuid``; one that is not known is fine."""
        (self._directory / uuid).unlink(missing_ok=True)

    def forget_accounts(self) -> None:
        """Ask NSS anew: the policy's groups may be others."""
        self._accounts.clear()
