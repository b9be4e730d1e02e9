# SPDX-License-Identifier: Apache-2.0
"""The broker's own policy, /etc/vmbus/broker.toml: what exists for whom (DESIGN rule 4).

Read once at start and again on SIGHUP; an unknown key or a wrong type is refused, so that a typo is never
a silent default. Nothing that is not granted here is done, whatever the service asks for.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

from vmbus.wire.errors import VmbusError

_UNITS: Final = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}

Size = Annotated[str, Meta(pattern=r"^[0-9]{1,15}[KMGT]?$")]
Prefix = Annotated[str, Meta(pattern=r"^(/|\{home\})")]


def size(text: str) -> int:
    """Bytes of "8G" and the like (powers of 1024)."""
    match = re.fullmatch(r"([0-9]+)([KMGT]?)", text)
    assert match is not None, text
    return int(match[1]) * _UNITS[match[2]]


class Account(msgspec.Struct, frozen=True):
    """A user as NSS tells it; ``groups`` are those of the policy's groups that the user is in."""

    uid: int
    name: str
    home: str
    gids: list[int]
    groups: list[str]


class _Whom(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    users: list[str] = []  # user names; "*" is every user
    groups: list[str] = []

    def fits(self, account: Account) -> bool:
        named = account.name in self.users or "*" in self.users
        return named or any(group in self.groups for group in account.groups)


class Grant(_Whom, frozen=True, kw_only=True):
    """Directories beneath which the named users' machines may have files."""

    prefixes: list[Prefix]


class Open(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """``[open]``"""

    fuse: bool = False
    grant: list[Grant] = []


class QuotaFor(_Whom, frozen=True, kw_only=True):
    """``[[quota.for]]``: limits for some, instead of the general ones."""

    memory: Size | None = None
    vcpus: int | None = None
    machines: int | None = None


class Quota(msgspec.Struct, forbid_unknown_fields=True, frozen=True, rename={"exceptions": "for"}):
    """``[quota]``: what all running machines of one owner may have together."""

    memory: Size = "4G"
    vcpus: int = 8
    machines: int = 8
    exceptions: list[QuotaFor] = []

    def of(self, account: Account) -> tuple[int, int, int]:
        """Memory in bytes, vCPUs, machines: the first exception that fits, and the general limits."""
        chosen = next((e for e in self.exceptions if e.fits(account)), QuotaFor())
        return (
            size(chosen.memory or self.memory),
            self.vcpus if chosen.vcpus is None else chosen.vcpus,
            self.machines if chosen.machines is None else chosen.machines,
        )


class Bridge(_Whom, frozen=True, kw_only=True):
    """``[bridges.NAME]``: who may have a tap on it."""


class Workers(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """``[workers]``: the uids of worker processes, and what one needs beyond its guest's memory."""

    uid_first: Annotated[int, Meta(ge=1000, le=0xFFFF0000)] = 2_000_000_000
    uid_count: Annotated[int, Meta(ge=16, le=1 << 20)] = 65536
    overhead: Size = "128M"


class Owners(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """``[owners]``: the lowest uid that may own machines; by default login.defs' UID_MIN."""

    uid_min: Annotated[int, Meta(ge=1)] | None = None


class Policy(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """The whole file."""

    open: Open = Open()
    quota: Quota = Quota()
    bridges: dict[str, Bridge] = {}
    workers: Workers = Workers()
    owners: Owners = Owners()

    def group_names(self) -> list[str]:
        """Every group that the policy names."""
        whom: list[_Whom] = [*self.open.grant, *self.quota.exceptions, *self.bridges.values()]
        return sorted({group for entry in whom for group in entry.groups})

    def prefixes(self, account: Account) -> list[str]:
        """The directories granted to ``account``, {user} and {home} filled in."""
        found = []
        for grant in self.open.grant:
            if grant.fits(account):
                for prefix in grant.prefixes:
                    found.append(prefix.replace("{user}", account.name).replace("{home}", account.home))
        return ["/" + "/".join(part for part in prefix.split("/") if part) for prefix in found]

    def check_path(self, account: Account, path: str) -> tuple[str, str]:
        """Split ``path`` into a granted prefix (the longest that fits) and the rest.

        Raises InvalidArgument for "." and "..", AccessDenied for a path that no grant covers.
        """
        parts = [part for part in path.split("/") if part]
        if not path.startswith("/") or "\0" in path or any(part in {".", ".."} for part in parts):
            raise VmbusError("InvalidArgument", f"'{path}' is not absolute without . and ..", argument="path")
        granted = sorted(self.prefixes(account), key=len, reverse=True)
        for prefix in granted:
            head = [part for part in prefix.split("/") if part]
            if ".." not in head and parts[: len(head)] == head and len(parts) > len(head):
                return prefix, "/".join(parts[len(head) :])
        places = ", ".join(granted) or "nothing"
        message = (
            f"'{path}' lies in no directory granted to {account.name} by [open] of broker.toml ({places})"
        )
        raise VmbusError("AccessDenied", message, argument="path")

    def check_bridge(self, account: Account, name: str) -> None:
        """Raises AccessDenied unless ``account`` may have a tap on bridge ``name``."""
        bridge = self.bridges.get(name)
        if bridge is None or not bridge.fits(account):
            message = f"bridge '{name}' is not granted to {account.name} by [bridges] of broker.toml"
            raise VmbusError("AccessDenied", message, argument="bridge")

    def check_quota(self, account: Account, used: tuple[int, int, int], memory: int, vcpus: int) -> None:
        """Raises QuotaExceeded if one more machine is too much beside ``used`` (memory, vCPUs, machines)."""
        limits = self.quota.of(account)
        wanted: list[tuple[Literal["memory", "vcpus", "machines"], int]] = [
            ("memory", memory),
            ("vcpus", vcpus),
            ("machines", 1),
        ]
        for (what, more), have, limit in zip(wanted, used, limits, strict=True):
            if have + more > limit:
                argument = "" if what == "machines" else what
                message = (
                    f"{account.name} may have {limit} {_UNIT[what]} in all, {have} in use, {more} asked for"
                )
                raise VmbusError("QuotaExceeded", message, argument=argument)


_UNIT: Final = {"memory": "bytes of guest memory", "vcpus": "vCPUs", "machines": "running machines"}


def load(path: Path) -> Policy:
    """Read ``path``. Raises VmbusError (InvalidArgument, NotFound) that names the place and the mistake."""
    try:
        with path.open("rb") as file:
            return msgspec.convert(tomllib.load(file), Policy)
    except FileNotFoundError:
        raise VmbusError("NotFound", f"{path} does not exist; an example is installed with vmbus") from None
    except (tomllib.TOMLDecodeError, msgspec.ValidationError, UnicodeDecodeError) as error:
        raise VmbusError("InvalidArgument", f"{path}: {error}") from None
