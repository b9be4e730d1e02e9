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

from vmbus.broker.children import dropped
from vmbus.broker.loop import Task
from vmbus.broker.policy import Policy, Rights
from vmbus.wire.errors import VmbusError

KEEP = 10.0
MOST = 16384  # records, lest a service that was taken over fills the disk


class Owner(msgspec.Struct, frozen=True):
    """The record, as stored."""

    uid: int
    user: str


class Owners:
    """The records in ``directory`` (root 0700), one file a machine, and the users behind them."""

    def __init__(self, directory: Path, policy: Policy) -> None:
        self._directory, self._policy = directory, policy
        self._known: dict[int, tuple[float, Rights]] = {}
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)

    def of(self, uuid: str) -> Owner:
        """The record of ``uuid``. Raises NotFound."""
        try:
            return msgspec.json.decode((self._directory / uuid).read_bytes(), type=Owner)
        except FileNotFoundError:
            raise VmbusError("NotFound", f"machine {uuid} has no recorded owner", argument="uuid") from None

    def known(self, uuid: str) -> str:
        """The user name in the record of ``uuid``, for the log; "nobody" without one."""
        return self.of(uuid).user if (self._directory / uuid).exists() else "nobody"

    def rights(self, uid: int) -> Task[Rights]:
        """What ``uid`` may have. Raises AccessDenied if it never owns machines, NotFound, Timeout."""
        asked, known = self._known.get(uid, (0.0, None))
        if known is not None and time.monotonic() - asked < KEEP:
            return known
        ask = dropped("accounts", "report", uid, self._policy.text, self._policy.survey)
        rights = yield from self._policy.crew.run(uid, ask, Rights, [])
        if len(self._known) > 4096:
            self._known.clear()
        self._known[uid] = (time.monotonic(), rights)
        return rights

    def rights_of(self, uuid: str) -> Task[Rights]:
        """What the owner of ``uuid`` may have; refused if the name behind the uid is another now."""
        owner = self.of(uuid)
        rights = yield from self.rights(owner.uid)
        if rights.name != owner.user:
            message = f"uid {owner.uid} is now {rights.name}; the machine was defined by {owner.user}"
            raise VmbusError("AccessDenied", message, argument="uid")
        return rights

    def own(self, uuid: str, uid: int) -> Task[None]:
        """Record ``uuid`` as ``uid``'s; again is fine. Raises AccessDenied if another's; as ``rights``."""
        wanted, path = Owner(uid, (yield from self.rights(uid)).name), self._directory / uuid
        if path.exists():
            if self.of(uuid) != wanted:
                raise VmbusError("AccessDenied", f"machine {uuid} is another user's", argument="uid")
            return
        if len(os.listdir(self._directory)) >= MOST:
            raise VmbusError("QuotaExceeded", f"{MOST} machines are defined on this host; undefine some")
        draft = self._directory / f".{uuid}"
        with open(draft, "wb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
            file.write(msgspec.json.encode(wanted))
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)

    def disown(self, uuid: str) -> None:
        """Forget ``uuid``; one that is not known is fine."""
        (self._directory / uuid).unlink(missing_ok=True)

    def forget_rights(self) -> None:
        """Ask anew: the policy is another."""
        self._known.clear()
