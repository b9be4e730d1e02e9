# SPDX-License-Identifier: Apache-2.0
"""Messages on a worker's listening socket.

Whoever connects (only root can) says who it is with one Greeting: the broker's connection for the
service is ``control``; one that brings a file is ``inlet``. A new control connection replaces the
old one; epochs only grow. A worker never sends an fd on any of them.

The *lifeline* (greeting, hello, state, events and their acknowledgement, console, shutdown, stop,
reset, pause, resume, save) is version 1 and frozen: tests replay its recorded transcript. Unknown
optional fields are ignored.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from vmbus.wire.definition import Definition, Disk, Nic
from vmbus.wire.inlet import Delivery as Delivery  # noqa: PLC0414 (handed on)
from vmbus.wire.inlet import Greeting as Greeting  # noqa: PLC0414

LIFELINE = 1
VERSION = 1

Disks = Annotated[list[Annotated[str, Meta(max_length=64)]], Meta(max_length=32)]
"""Names of disks, such as ``disk/root``."""

State = Literal["ready", "configured", "running", "paused", "ended"]


class _Request(msgspec.Struct, tag_field="op", frozen=True, kw_only=True):
    id: int


class Hello(_Request, tag="hello", frozen=True, kw_only=True):
    """First request on a control connection. Result: Welcome fields."""

    versions: list[int]


class Ack(_Request, tag="ack", frozen=True, kw_only=True):
    """All events up to ``seq`` are stored by the service; the worker forgets them. No result."""

    seq: int


class AddFile(_Request, tag="add-file", frozen=True, kw_only=True):
    """A client's fd for ``slot`` (beside the message), already shown harmless by the service.

    Slot port/N, for the definition's N-th named port, has both ends of a socketpair of the service's own.
    """

    slot: str


class AddLink(_Request, tag="add-link", frozen=True, kw_only=True):
    """Another machine has come to the isolated network of ``device`` (nic/ID); a socket to it is beside this.

    One of the same name before it is replaced.
    """

    device: str
    peer: Annotated[str, Meta(min_length=1, max_length=64)]


class Configure(_Request, tag="configure", frozen=True, kw_only=True):
    """Build the machine from the delivered files. Result when it is built or cannot be."""

    uuid: str
    definition: Definition
    merge: bool = True  # offer mergeable memory to KSM
    restore: bool = False  # it goes on from a file: Restore follows, not Run; its disks are not used before
    clone: bool = False  # with restore: memory is the file's, mapped copy-on-write


class Save(_Request, tag="save", frozen=True, kw_only=True):
    """Write the machine to the empty file beside this. Result when that is durable, or cannot be: then the
    machine is what it was. Stats shows how far it is. ``end``: the machine ends then, with reason ``saved``.
    """

    end: bool = True


class Restore(_Request, tag="restore", frozen=True, kw_only=True):
    """Go on from the file that was delivered for slot ``restore`` before Configure: the machine is paused
    when that is done, and ends if it cannot be.

    ``changed_disks``: even if the files of its disks are others, or were written since. ``revert_to``: its
    disks go back to the internal snapshot of that name, and what they held becomes one named ``aside``.
    """

    changed_disks: bool = False
    revert_to: str = ""
    aside: str = ""


class Send(_Request, tag="send", frozen=True, kw_only=True):
    """Have the machine go on at the other end of the connected stream socket beside this, where another
    worker was told Receive. It runs meanwhile, and stands for about ``downtime`` ms at last; at most
    ``bandwidth`` bytes a second, 0 for as many as go. Result when it runs there, with the statistics in
    ``stats``; it ends then, with reason ``migrated``. Anything else leaves it what it was; but for one
    case: Disconnected about ``unsure``, and it is paused, when nobody can know whether it runs there. Stats
    shows how far it is (``migration``); it can be paused, resumed, reset and stopped until it stands.
    ``copy``: disks whose content goes along, such as ``disk/root``; the other worker is told the same ones.
    """

    downtime: Annotated[int, Meta(ge=1, le=3_600_000)] = 300
    bandwidth: Annotated[int, Meta(ge=0, le=(1 << 63) - 1)] = 0
    copy: Disks = []


class Receive(_Request, tag="receive", frozen=True, kw_only=True):
    """Go on with the machine that is sent from the other end of the connected stream socket beside this, to
    one that was configured with ``restore`` (and without ``clone``). Result when it runs (or is paused:
    with ``paused``, or if it was), with the statistics in ``stats``; it ends if it cannot. Its disks are
    not touched before, but for those of ``copy``, which are written with what comes. ``separate``: disks
    whose files are others than the source's, and hold what those hold. Stats shows how far it is.
    """

    paused: bool = False
    copy: Disks = []
    separate: Disks = []


class Snapshot(_Request, tag="snapshot", frozen=True, kw_only=True):
    """Write the machine to the empty file beside this, take an internal snapshot ``name`` of each disk that
    can be written to, and go on. Result when all that is durable; if anything fails, nothing of it is
    there.
    """

    name: str


class Tidy(_Request, tag="tidy", frozen=True, kw_only=True):
    """Of each disk: go back to the internal snapshots ``undo`` and delete them, and delete those of ``drop``,
    where they are there.
    """

    undo: list[str] = []
    drop: list[str] = []


class CancelSave(_Request, tag="cancel-save", frozen=True, kw_only=True):
    """Stop a save or a restore, Send or Receive: its result is Cancelled, unless it is too late. No error if
    there is nothing to stop."""


class Run(_Request, tag="run", frozen=True, kw_only=True):
    """Let the vCPUs go for the first time."""


class Shutdown(_Request, tag="shutdown", frozen=True, kw_only=True):
    """Press the ACPI power button."""


class Stop(_Request, tag="stop", frozen=True, kw_only=True):
    """Stop the vCPUs, flush the disks and end with reason ``stopped``."""


class Reset(_Request, tag="reset", frozen=True, kw_only=True):
    """Pull the reset line."""


class Pause(_Request, tag="pause", frozen=True, kw_only=True):
    """Stop all vCPUs; devices finish what they have begun. Result when they stand still."""


class Resume(_Request, tag="resume", frozen=True, kw_only=True):
    """Let them go on."""


class Console(_Request, tag="console", frozen=True, kw_only=True):
    """A reader (and writer, if ``write``) of the serial console: one end of a socketpair beside it.

    The history (up to 64 KiB) is written first. At most one writer: InUse unless ``steal``.
    """

    write: bool = False
    steal: bool = False


class Attach(_Request, tag="attach", frozen=True, kw_only=True):
    """Put one device, a disk or a NIC with a hotplug slot, into it; its files were delivered before.

    Result when the guest has been told, or the device cannot be."""

    disk: Disk | None = None
    nic: Nic | None = None


class Detach(_Request, tag="detach", frozen=True, kw_only=True):
    """Ask the guest to let go of ``device`` (``nic/ID`` or ``disk/ID``). Result when it was asked; event
    ``detached`` when it has."""

    device: str


class Keep(_Request, tag="keep", frozen=True, kw_only=True):
    """The guest may keep ``device`` after all."""

    device: str


class Change(_Request, tag="change", frozen=True, kw_only=True):
    """Change ``device`` (``nic/ID`` or ``disk/ID``) while the guest has it, in one way: the cable of an
    interface, the bytes of a disk. Result when the guest has been told."""

    device: str
    carrier: bool | None = None
    size: Annotated[int, Meta(ge=1, le=(1 << 63) - 1)] | None = None


class OpenPort(_Request, tag="open-port", frozen=True, kw_only=True):
    """As Console, for the named port ``name``; one end of a socketpair beside it."""

    name: str
    write: bool = True
    steal: bool = False


class Vsock(_Request, tag="vsock", frozen=True, kw_only=True):
    """A socket for a connection between guest and host, one end of a non-blocking pair, is beside this.

    It is connected with ``port`` of the guest's; result when the guest has said yes (Unavailable if it says
    no). ``accept``: it is given to the guest's next connection to ``port`` of the host's; result then, with
    the guest's port (``port``) in ``stats``. Closing the other end takes either back.
    """

    port: Annotated[int, Meta(ge=0, le=(1 << 32) - 1)]
    accept: bool = False


class Media(_Request, tag="media", frozen=True, kw_only=True):
    """Put the medium that the layers of ``disk`` are, delivered before, into that CD-ROM drive, or take its
    medium out, if there are none. Result when it is done; InUse if the guest has locked it, unless
    ``force``."""

    disk: Disk
    force: bool = False


class Stats(_Request, tag="stats", frozen=True, kw_only=True):
    """Result ``stats``: counters of vCPUs and devices."""


class MemoryTarget(_Request, tag="memory-target", frozen=True, kw_only=True):
    """Ask the guest to get by with so much of its memory, by its balloon. Result at once."""

    bytes: Annotated[int, Meta(ge=0)]


class Prefault(_Request, tag="prefault", frozen=True, kw_only=True):
    """Touch all of the guest's memory. Result when that is done; Stats shows how far it is."""


class CancelPrefault(_Request, tag="cancel-prefault", frozen=True, kw_only=True):
    """Stop that: its result is Cancelled. No error if there is nothing to stop."""


Request = (
    Hello
    | Ack
    | AddFile
    | AddLink
    | Configure
    | Run
    | Shutdown
    | Stop
    | Reset
    | Pause
    | Resume
    | Console
    | Stats
    | MemoryTarget
    | Prefault
    | CancelPrefault
    | Attach
    | Detach
    | Keep
    | Change
    | Save
    | Restore
    | CancelSave
    | Send
    | Receive
    | Snapshot
    | Tidy
    | Media
    | OpenPort
    | Vsock
)


class Result(msgspec.Struct, tag_field="op", tag="result", frozen=True, omit_defaults=True, kw_only=True):
    """The answer to request ``id``; ``error`` is a kind of wire.errors, None for success.

    For Hello: version, lifeline, state, epoch, and the end reason if ``state`` is ``ended``.
    """

    id: int
    error: str | None = None
    message: str = ""
    argument: str = ""
    version: int = 0
    lifeline: int = 0
    epoch: int = 0
    state: State = "ready"
    reason: str = ""
    stats: dict[str, Any] = {}


EndReason = Literal[
    "guest-poweroff",
    "guest-reset",
    "stopped",
    "saved",
    "migrated",
    "guest-panic",
    "triple-fault",
    "kvm-internal-error",
    "guest-misbehaved",
    "watchdog",
    "io-error",
    "error",
]


class Event(msgspec.Struct, tag_field="op", tag="event", frozen=True, omit_defaults=True, kw_only=True):
    """Numbered from 1; sent again on a new connection until acknowledged (at least once).

    ``state``: ``state`` is the new one; ``reason`` is ``watchdog`` when the guest let its watchdog's time
    pass, and ``detail`` what the watchdog does. ``ended``: ``reason`` and ``detail``; the worker exits
    once it is acknowledged or after 30 s without a control connection. ``console``: output since the last
    one, at most one a second. ``reset``: the guest was reset and goes on. ``detached``: the guest has let
    go of ``device``, whose files are closed; ``detail`` says what went wrong when it was flushed.
    """

    seq: Annotated[int, Meta(ge=1)]
    kind: Literal["state", "ended", "console", "reset", "detached"]
    state: State = "ready"
    reason: str = ""
    detail: str = ""
    device: str = ""


Answer = Result | Event
