# SPDX-License-Identifier: Apache-2.0
"""/etc/vmbus/broker.toml: what exists for whom.

An unknown key or a wrong type is refused, so that a typo is never a silent default. Nothing that is not
granted here is done, whatever the service asks for.
"""

import tomllib
from typing import Annotated, Literal

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

    name: str
    home: str
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
    hugepages: Size | None = None
    locked: Size | None = None


class Quota(_Strict, frozen=True, kw_only=True, rename={"exceptions": "for"}):
    """``[quota]``: what all running machines of one owner may have together."""

    memory: Size = "4G"
    vcpus: int = 8
    machines: int = 8
    hugepages: Size = "0"
    locked: Size = "0"
    exceptions: list[QuotaFor] = []


class Bridge(_Whom, frozen=True, kw_only=True):
    """``[bridges.NAME]``: who may have a tap on it."""


class Interface(_Whom, frozen=True, kw_only=True):
    """``[interfaces.NAME]``: who may have a macvtap on it."""


class UserNetwork(_Whom, frozen=True, kw_only=True):
    """``[user-network]``: who may have interfaces of kind ``user``, for which a process of the host sends."""


class VhostNet(_Whom, frozen=True, kw_only=True):
    """``[vhost-net]``: for whose guests the host's kernel moves frames by itself, where it can."""


class UserNetworkHost(_Whom, frozen=True, kw_only=True):
    """``[user-network-host]``: whose guests may, by such an interface, reach what listens on this host."""


class Ksm(_Strict, frozen=True, kw_only=True):
    """``[ksm]``: whether vmbus may change the host's settings of KSM."""

    manage: bool = False


class Mount(_Strict, frozen=True, kw_only=True, rename="kebab"):
    """``[[hugepages.mount]]``: a hugetlbfs for other programs, which finds its directory there."""

    path: Annotated[str, Meta(pattern=r"^(/[A-Za-z0-9_+-][A-Za-z0-9_.+-]*)+\Z")]
    page_size: Literal["2M", "1G"] = "2M"
    size: Size  # the most that it takes
    min_size: Size = "0"  # of that, what is reserved for it as long as it is mounted
    user: str = "root"
    group: str = "root"
    mode: Annotated[str, Meta(pattern=r"^[01]?[0-7]{3}\Z")] = "755"

    def __post_init__(self) -> None:
        whole, least, page = size(self.size), size(self.min_size), size(self.page_size)
        if whole % page or least % page or not least <= whole or not whole:
            message = "is no multiple of the page size, or there is no more in all than is reserved"
            raise ValueError(
                f"[[hugepages.mount]] {self.path}: size {self.size}, min-size {self.min_size}: {message}"
            )


class HugePages(_Strict, frozen=True, kw_only=True):
    """``[hugepages]``: by how much vmbus may enlarge the host's pools, all together; file systems of them."""

    grow: Size = "0"
    mount: list[Mount] = []

    def __post_init__(self) -> None:
        if len({mount.path for mount in self.mount}) < len(self.mount):
            raise ValueError("[[hugepages.mount]] names a path twice")


class Workers(_Strict, frozen=True, kw_only=True):
    """``[workers]``: the uids of worker processes, and what one needs beyond its guest's memory."""

    uid_first: Annotated[int, Meta(ge=1000, le=0xFFFF0000)] = 2_000_000_000
    uid_count: Annotated[int, Meta(ge=16, le=1 << 18)] = 65536
    overhead: Size = "128M"


class Owners(_Strict, frozen=True, kw_only=True):
    """``[owners]``: the lowest uid that may own machines; by default login.defs' UID_MIN."""

    uid_min: Annotated[int, Meta(ge=1)] | None = None


class Policy(_Strict, frozen=True, kw_only=True, rename="kebab"):
    """The whole file."""

    open: Open = Open()
    quota: Quota = Quota()
    bridges: dict[str, Bridge] = {}
    interfaces: dict[str, Interface] = {}
    user_network: UserNetwork = UserNetwork()
    user_network_host: UserNetworkHost = UserNetworkHost()
    vhost_net: VhostNet = VhostNet()
    ksm: Ksm = Ksm()
    hugepages: HugePages = HugePages()
    workers: Workers = Workers()
    owners: Owners = Owners()

    def group_names(self) -> list[str]:
        """Every group that the policy names."""
        entries: list[_Whom] = [*self.open.grant, *self.quota.exceptions, *self._tables().values()]
        return sorted({group for entry in entries for group in entry.groups})

    def _tables(self) -> dict[str, _Whom]:
        """The tables that grant something to those whom they name."""
        tables: dict[str, _Whom] = {f"bridges.{name}": bridge for name, bridge in self.bridges.items()}
        return {
            **tables,
            **{f"interfaces.{name}": interface for name, interface in self.interfaces.items()},
            "user-network": self.user_network,
            "user-network-host": self.user_network_host,
            "vhost-net": self.vhost_net,
        }

    def grants(self, account: Account) -> list[str]:
        """The names of those that fit ``account``."""
        return [name for name, table in self._tables().items() if table.fits(account)]

    def prefixes(self, account: Account) -> list[str]:
        """The directories granted to ``account``, {user} and {home} filled in."""
        granted = [prefix for grant in self.open.grant if grant.fits(account) for prefix in grant.prefixes]
        if not account.home.strip("/"):  # that would be everything
            granted = [prefix for prefix in granted if "{home}" not in prefix]
        return [p.replace("{user}", account.name).replace("{home}", account.home) for p in granted]

    def limits(self, account: Account) -> list[int]:
        """Memory in bytes, vCPUs, machines, bytes of huge pages and of locked memory: the first exception
        that fits, and the general limits."""
        chosen = next((entry for entry in self.quota.exceptions if entry.fits(account)), QuotaFor())
        return [
            size(chosen.memory or self.quota.memory),
            self.quota.vcpus if chosen.vcpus is None else chosen.vcpus,
            self.quota.machines if chosen.machines is None else chosen.machines,
            size(chosen.hugepages or self.quota.hugepages),
            size(chosen.locked or self.quota.locked),
        ]


def load(text: bytes) -> Policy:
    """Parse the file. Raises InvalidArgument that names the place and the mistake."""
    try:
        return msgspec.convert(tomllib.loads(text.decode()), Policy)
    except (msgspec.ValidationError, ValueError) as error:  # ValueError: not TOML, not UTF-8
        raise VmbusError("InvalidArgument", f"broker.toml: {error}") from None
