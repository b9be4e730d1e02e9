# SPDX-License-Identifier: Apache-2.0
"""The broker's own policy, /etc/vmbus/broker.toml: what exists for whom (DESIGN rule 4).

Read at start and again on SIGHUP; an unknown key or a wrong type is refused, so that a typo is never a silent
default. Nothing that is not granted here is done, whatever the service asks for.
"""

import tomllib
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from vmbus.wire.errors import VmbusError

Size = Annotated[str, Meta(pattern=r"^[0-9]{1,15}[KMGT]?$")]
Prefix = Annotated[str, Meta(pattern=r"^(/|\{home\})")]


def size(text: str) -> int:
    """Bytes of "8G" and the like (powers of 1024)."""
    unit = "KMGT".find(text[-1]) + 1
    return int(text.rstrip("KMGT")) << 10 * unit


class Account(msgspec.Struct, frozen=True):
    """A user as NSS tells it; ``groups`` are those of the policy's groups that the user is in."""

    uid: int
    name: str
    home: str
    gids: list[int]
    groups: list[str]


class _Strict(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    pass


class _Whom(_Strict, frozen=True, kw_only=True):
    users: list[str] = []  # user names; "*" is every user
    groups: list[str] = []

    def fits(self, account: Account) -> bool:
        return not {"*", account.name}.isdisjoint(self.users) or not set(account.groups).isdisjoint(
            self.groups
        )


class Grant(_Whom, frozen=True, kw_only=True):
    """``[[open.grant]]``: directories beneath which the named users' machines may have files."""

    prefixes: list[Prefix]


class Open(_Strict, frozen=True, kw_only=True):
    """``[open]``: whether files on FUSE file systems may be opened by path, and the grants."""

    fuse: bool = False
    grant: list[Grant] = []


class QuotaFor(_Whom, frozen=True, kw_only=True):
    """``[[quota.for]]``: limits for some, instead of the general ones."""

    memory: Size | None = None
    vcpus: int | None = None
    machines: int | None = None


class Quota(_Strict, frozen=True, kw_only=True, rename={"exceptions": "for"}):
    """``[quota]``: what all running machines of one owner may have together."""

    memory: Size = "4G"
    vcpus: int = 8
    machines: int = 8
    exceptions: list[QuotaFor] = []


class Bridge(_Whom, frozen=True, kw_only=True):
    """``[bridges.NAME]``: who may have a tap on it."""


class Workers(_Strict, frozen=True, kw_only=True):
    """``[workers]``: the uids of worker processes, and what one needs beyond its guest's memory."""

    uid_first: Annotated[int, Meta(ge=1000, le=0xFFFF0000)] = 2_000_000_000
    uid_count: Annotated[int, Meta(ge=16, le=1 << 18)] = 65536
    overhead: Size = "128M"


class Owners(_Strict, frozen=True, kw_only=True):
    """``[owners]``: the lowest uid that may own machines; by default login.defs' UID_MIN."""

    uid_min: Annotated[int, Meta(ge=1)] | None = None


class Policy(_Strict, frozen=True, kw_only=True):
    """The whole file."""

    open: Open = Open()
    quota: Quota = Quota()
    bridges: dict[str, Bridge] = {}
    workers: Workers = Workers()
    owners: Owners = Owners()

    def group_names(self) -> list[str]:
        """Every group that the policy names."""
        entries: list[_Whom] = [*self.open.grant, *self.quota.exceptions, *self.bridges.values()]
        return sorted({group for entry in entries for group in entry.groups})

    def split_path(self, account: Account, path: str) -> tuple[str, str]:
        """Split ``path`` into a prefix granted to ``account`` (the longest that fits) and the rest.

        Raises InvalidArgument for "." and "..", AccessDenied for a path that no grant covers.
        """
        parts = [part for part in path.split("/") if part]
        if not path.startswith("/") or "\0" in path or not {".", ".."}.isdisjoint(parts):
            raise VmbusError("InvalidArgument", f"'{path}' is not absolute without . and ..", argument="path")
        granted = [prefix for grant in self.open.grant if grant.fits(account) for prefix in grant.prefixes]
        granted = [p.replace("{user}", account.name).replace("{home}", account.home) for p in granted]
        for prefix in sorted(granted, key=len, reverse=True):
            head = [part for part in prefix.split("/") if part]
            if ".." not in head and parts[: len(head)] == head and len(parts) > len(head):
                return "/" + "/".join(head), "/".join(parts[len(head) :])
        places = ", ".join(granted) or "nothing"
        message = (
            f"'{path}' lies in no directory granted to {account.name} by [open] of broker.toml ({places})"
        )
        raise VmbusError("AccessDenied", message, argument="path")

    def check_bridge(self, account: Account, name: str) -> None:
        """Raises AccessDenied unless ``account`` may have a tap on bridge ``name``."""
        if name not in self.bridges or not self.bridges[name].fits(account):
            message = f"bridge '{name}' is not granted to {account.name} by [bridges] of broker.toml"
            raise VmbusError("AccessDenied", message, argument="bridge")

    def check_quota(self, account: Account, used: tuple[int, int, int], memory: int, vcpus: int) -> None:
        """Raises QuotaExceeded if one more machine is too much beside ``used`` (memory, vCPUs, machines)."""
        chosen = next((entry for entry in self.quota.exceptions if entry.fits(account)), QuotaFor())
        vcpus_limit = self.quota.vcpus if chosen.vcpus is None else chosen.vcpus
        machines_limit = self.quota.machines if chosen.machines is None else chosen.machines
        for argument, what, have, more, limit in (
            ("memory", "bytes of guest memory", used[0], memory, size(chosen.memory or self.quota.memory)),
            ("vcpus", "vCPUs", used[1], vcpus, vcpus_limit),
            ("", "running machines", used[2], 1, machines_limit),
        ):
            if have + more > limit:
                message = f"{account.name} may have {limit} {what} in all; {have} in use, {more} asked for"
                raise VmbusError("QuotaExceeded", message, argument=argument)


def load(path: Path) -> Policy:
    """Read ``path``. Raises VmbusError (InvalidArgument, NotFound) that names the place and the mistake."""
    try:
        return msgspec.convert(tomllib.loads(path.read_text()), Policy)
    except FileNotFoundError:
        raise VmbusError("NotFound", f"{path} does not exist; an example is installed with vmbus") from None
    except (msgspec.ValidationError, ValueError) as error:  # ValueError: not TOML, not UTF-8
        raise VmbusError("InvalidArgument", f"{path}: {error}") from None
