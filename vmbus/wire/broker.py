# SPDX-License-Identifier: Apache-2.0
"""Messages between the service and the broker (protocol version 1; N and N-1 are kept).

The service sends requests, each with an ``id`` of its own choosing; the broker answers each
with exactly one Reply (fds beside it as each request says) and sends Ended on its own.
The broker trusts nothing here: every request is checked against broker.toml and against the
record uuid -> (uid, user) before anything is done.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

VERSION = 1

Uuid = Annotated[str, Meta(pattern=r"^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$")]
SlotName = Annotated[str, Meta(pattern=r"^[a-z0-9/-]{1,64}$")]

_POOL = r"(kernel/mm|devices/system/node/node[0-9]{1,4})/hugepages/hugepages-[0-9]{1,9}kB/nr_hugepages"
Setting = Annotated[str, Meta(pattern=rf"^(kernel/mm/ksm/[a-z_]{{1,64}}|{_POOL})\Z")]

Bytes = Annotated[int, Meta(ge=0)]
Mac = Annotated[str, Meta(pattern=r"^[0-9a-f]{2}(:[0-9a-f]{2}){5}$")]
Ipv4 = Annotated[str, Meta(pattern=r"^(|[0-9]{1,3}(\.[0-9]{1,3}){3})$")]


class _Request(msgspec.Struct, tag_field="op", frozen=True, kw_only=True):
    id: int


class Hello(_Request, tag="hello", frozen=True, kw_only=True):
    """First message of a connection. Reply: version, instance, notes.

    ``notes``: what this host lacks for the workers, one sentence each (no delegated cgroup, …).
    """

    versions: list[int]


class Own(_Request, tag="own", frozen=True, kw_only=True):
    """Record that machine ``uuid`` belongs to ``uid``. Idempotent; a change is refused."""

    uuid: Uuid
    uid: int


class Disown(_Request, tag="disown", frozen=True, kw_only=True):
    """Forget the record of ``uuid`` (undefine, end of a transient). Refused while a worker lives."""

    uuid: Uuid


class Check(_Request, tag="check", frozen=True, kw_only=True):
    """Would broker.toml let ``uid`` have this? (asked when a definition is made)."""

    uid: int
    memory: Bytes = 0  # 0: not asked
    vcpus: Annotated[int, Meta(ge=0, le=16)] = 0
    hugepages: Bytes = 0  # memory that is huge pages
    locked: Bytes = 0  # memory that is never swapped
    grants: list[str] = []  # tables of broker.toml: bridges.NAME, user-network
    paths: list[str] = []


class Spawn(_Request, tag="spawn", frozen=True, kw_only=True):
    """Start a process of a kind for ``uuid``.

    ``worker`` (a spare one when there is one of the right profile). Reply fds: the control connection; of
    /proc/PID smaps_rollup, smaps, and ksm_stat if the kernel has it; ``workers``: that one. It already holds
    /dev/kvm.

    Any other kind is a helper of the machine's worker, which gets a socket to it under ``slot``; it ends with
    the worker. ``passt``: the network of a NIC of kind ``user``; ``options`` are ports that it forwards.
    ``passt-host``: the same, and the guest reaches this host by its gateway's address.
    """

    uuid: Uuid
    # Of a worker: bytes of guest memory; cgroup limit = this + overhead.
    memory: Annotated[int, Meta(ge=1, le=510 << 30)] = 1
    vcpus: Annotated[int, Meta(ge=1, le=16)] = 1
    memory_kind: Literal["mergeable", "shareable", "huge"] = "mergeable"
    page_size: Literal[0, 0x200000, 0x40000000] = 0  # bytes; not 0 for huge memory
    kind: Literal["worker", "passt", "passt-host"] = "worker"
    slot: SlotName = "-"  # of a helper
    options: list[Annotated[str, Meta(pattern=r"^-[tu][0-9.]{7,15}/[0-9]{4,5}:[0-9]{1,5}\Z")]] = []
    locked: Bytes = 0  # memory that the worker may lock

    @property
    def hugepages(self) -> int:
        """Bytes of memory that are huge pages."""
        return self.memory if self.page_size else 0


class Open(_Request, tag="open", frozen=True, kw_only=True):
    """Open ``path`` as the owner of ``uuid`` and send the fd to its worker under ``slot``.

    Reply: ``identity``. The fd goes from the child to the worker; the broker never sees it.
    """

    uuid: Uuid
    slot: SlotName
    path: Annotated[str, Meta(min_length=1, max_length=4096, pattern=r"^/")]
    writable: bool = False


class Tap(_Request, tag="tap", frozen=True, kw_only=True):
    """Make a tap on ``bridge``, or a macvtap on ``interface``, and send it to the worker under ``slot``.

    What does not come from ``mac``, and where it is given from IPv4 ``address``, is dropped at the tap. No
    ``queues``: what was made for ``slot`` is taken away instead.
    """

    uuid: Uuid
    slot: SlotName
    bridge: str = ""
    mac: Mac
    address: Ipv4 = ""
    queues: Annotated[int, Meta(ge=0, le=16)] = 1
    interface: str = ""
    mode: Literal["bridge", "private", "vepa"] = "bridge"  # of a macvtap


class Tune(_Request, tag="tune", frozen=True, kw_only=True):
    """Write settings of KSM and of the pools of huge pages, files below /sys, in this order; none: ask only.

    Within what broker.toml allows, and with a record of what was found. "" for one of KSM's puts it back as
    it was found. Reply: ``report`` is a wire.memory.Tuned.
    """

    settings: dict[Setting, str]


class Look(_Request, tag="look", frozen=True, kw_only=True):
    """Which processes KSM works for, and how long it has. Reply: ``report`` is a wire.memory.Seen."""


class Kill(_Request, tag="kill", frozen=True, kw_only=True):
    """End the worker of ``uuid`` now (cgroup.kill where there is one, else SIGKILL by pidfd)."""

    uuid: Uuid


class Workers(_Request, tag="workers", frozen=True, kw_only=True):
    """List the workers of this instance. Reply: ``workers``."""


class Connect(_Request, tag="connect", frozen=True, kw_only=True):
    """A new control connection to a living worker; it replaces the old one. Reply fds as Spawn."""

    uuid: Uuid


Request = Hello | Own | Disown | Check | Spawn | Open | Tap | Tune | Look | Kill | Workers | Connect


class Identity(msgspec.Struct, frozen=True):
    """What was opened, as fstat says."""

    dev: int
    ino: int
    rdev: int
    mode: int
    size: int


class WorkerInfo(msgspec.Struct, frozen=True):
    """A living worker."""

    uuid: Uuid
    pid: int


class Reply(msgspec.Struct, tag_field="op", tag="reply", frozen=True, omit_defaults=True, kw_only=True):
    """The answer to request ``id``; ``error`` is a kind of wire.errors, None for success."""

    id: int
    error: str | None = None
    message: str = ""
    argument: str = ""
    version: int = 0
    instance: str = ""
    identity: Identity | None = None
    workers: list[WorkerInfo] = []
    notes: list[str] = []
    report: dict[str, Any] = {}


class Ended(msgspec.Struct, tag_field="op", tag="ended", frozen=True, kw_only=True):
    """A worker's pidfd signalled. ``stuck``: it was killed and has not ended within 5 s.

    With ``slot``: a helper's that served this slot of a machine.
    """

    uuid: Uuid
    stuck: bool = False
    slot: str = ""


Answer = Reply | Ended
