# SPDX-License-Identifier: Apache-2.0
"""What broker.toml grants, as far as the broker itself has to know it.

The file is parsed and matched with NSS by children that are not root (dropped/policy.py and accounts.py); the
broker keeps its text, which is replaced on SIGHUP only and only by one that can be parsed, and decides by
the ``Rights`` of a user. ``Survey`` is what a child finds out at start.
"""

from pathlib import Path
from typing import Any

import msgspec
import prctl

from vmbus.broker.children import Crew, dropped
from vmbus.broker.loop import Task
from vmbus.broker.root import Image
from vmbus.broker.steps import log
from vmbus.wire.errors import VmbusError

# What is limited, in the order of ``amounts``, and the argument that asks for it.
_QUOTAS = ("bytes of guest memory", "vCPUs", "running machines", "bytes of huge pages", "bytes of locked RAM")
_NAMES = ("memory", "vcpus", "", "memory", "locked")


def amounts(machine: Any) -> list[int]:
    """What a machine adds to its owner's: see _QUOTAS."""
    return [machine.memory, machine.vcpus, 1, machine.hugepages, machine.locked]


class Survey(msgspec.Struct, frozen=True):
    """The host, and those parts of broker.toml that are about nobody in particular."""

    image: Image  # of a worker's root
    label: str  # SELinux label of workers and helpers: places for which, and two categories; "" for none
    uid_first: int  # uids of workers
    uid_count: int
    uid_min: int  # least uid of an owner
    overhead: int  # bytes of memory that a worker may need beyond its guest's
    fuse: bool  # whether files on FUSE may be opened by path
    helpers: dict[str, list[str]]  # the command of each kind that is installed; its socket is fd 3


class Policy:
    """The text of broker.toml, and the survey made with it."""

    survey: Survey

    def __init__(self, config: Path, crew: Crew, instance: str, mounts: str) -> None:
        """``mounts``: the namespace in which file systems are mounted that the file wants."""
        self.config, self.crew, self.text = config, crew, b""
        self._instance, self._mounts = instance, mounts

    def read(self) -> Task[None]:
        """Read the file (again). Raises VmbusError or OSError, and the old text stays."""
        seen, text = self.config.stat(), self.config.read_bytes()
        if seen.st_uid != 0 or seen.st_mode & 0o022:
            raise VmbusError("AccessDenied", f"{self.config} can be written by others than root")
        self.survey = yield from self.crew.run(0, dropped("survey", "report", text), Survey, [])
        self.text = text
        yield from self.mount()

    def mount(self) -> Task[None]:
        """Have the file systems that the file wants, and log what was done. The next call tries again."""
        caps = [prctl.CAP_SYS_ADMIN, prctl.CAP_SYS_CHROOT]  # mount(2), setns(2)
        work = dropped("mounts", "settle", self._instance, self.text, caps=caps)
        try:
            with open(self._mounts, "rb") as place:
                for line in (yield from self.crew.run(0, work, list[str], [place.fileno()])):
                    log(line)
        except (VmbusError, OSError) as error:
            log(f"no file system was mounted: {error}")


class Rights(msgspec.Struct, frozen=True):
    """A user as NSS tells it, and its grants: directories, networks, limits on all its machines together."""

    uid: int
    name: str
    gids: list[int]
    prefixes: list[str]
    grants: list[str]  # tables of broker.toml: bridges.NAME, user-network
    limits: list[int]  # of all its running machines together, as ``amounts``

    def check_grant(self, grant: str) -> None:
        """Raises AccessDenied unless the table ``grant`` of broker.toml (bridges.br0, …) names the user."""
        if grant not in self.grants:
            message = f"[{grant}] of broker.toml is not there, or does not grant it to {self.name}"
            raise VmbusError("AccessDenied", message, argument=grant.partition(".")[0].rstrip("s"))

    def check_quota(self, used: list[int], wanted: list[int]) -> None:
        """Raises QuotaExceeded if ``wanted`` is too much beside ``used``, both as ``amounts`` has them."""
        for argument, what, have, more, limit in zip(_NAMES, _QUOTAS, used, wanted, self.limits, strict=True):
            if have + more > limit:
                message = f"{self.name} may have {limit} {what} in all; {have} in use, {more} asked for"
                raise VmbusError("QuotaExceeded", message, argument=argument)
