# SPDX-License-Identifier: Apache-2.0
"""A machine's definition: what its owner asked for, as stored and as sent to its worker.

The bounds here are those of the format; an owner's quota is broker.toml's. Unknown keys are
refused (rule: a typo must not be a silent default). Files are named by *slots*:
``kernel``, ``initrd``, ``disk/<id>/<layer>`` (0 is the active layer) and
``disk/<id>/<layer>/data`` for an external data file; the service itself fills those of firmware. The
passphrase of an encrypted image is a file, too, with the slot ``disk/<id>/<layer>/secret``: it is given at
each start, and stands nowhere. Sizes are bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

from vmbus.wire.errors import VmbusError

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$"
ID_PATTERN = r"^[a-z][a-z0-9-]{0,19}$"

Name = Annotated[str, Meta(pattern=NAME_PATTERN)]
Id = Annotated[str, Meta(pattern=ID_PATTERN)]
Path = Annotated[str, Meta(min_length=1, max_length=4096)]
HOTPLUG_SLOTS = 8
HotplugSlot = Annotated[int, Meta(ge=0, le=HOTPLUG_SLOTS)]
"""The slot that a device can be attached to and detached from; 0: it is there from start to end."""
MIB = 1 << 20
# What a machine takes: up to 2 GiB below the 32-bit hole, the rest between 4 and 512 GiB.
MEMORY_LEAST = 4 * MIB
MEMORY_MOST = 510 * 1024 * MIB
PAGE_SIZES = {"2M": 2 * MIB, "1G": 1024 * MIB}


BLOCK_DISKS = 16
"""The most disks with a device of their own."""
DISKS_MOST = 64
"""The most disks and drives in all: as many as the SCSI host adapter has targets."""


class Layer(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True, frozen=True):
    """One image of a chain. ``path`` is None when the slot is filled by an fd (source="fd").

    ``backing_name`` is the backing file name exactly as the qcow2 header has it, None for
    none; at start a header that says otherwise is refused with BackingChanged.
    """

    format: Literal["qcow2", "raw"]
    path: Path | None = None
    backing_name: str | None = None
    data_name: str | None = None
    data_path: Path | None = None
    encrypted: bool = False  # its passphrase comes with each start


class Disk(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True, frozen=True):
    """A disk or CD-ROM drive: its whole chain, active layer first (at most 200 layers).

    A disk is a virtio-blk device of its own, or on the bus of the machine's SCSI host adapter, where a CD-ROM
    drive always is. That may have no medium: no layers.
    """

    id: Id
    layers: Annotated[list[Layer], Meta(max_length=200)]
    source: Literal["path", "fd"] = "path"
    read_only: bool = False
    bus: Literal["blk", "scsi"] = "blk"
    cdrom: bool = False  # a CD-ROM drive; "cdrom" in the boot order
    serial: Annotated[str, Meta(pattern=r"^[ -~]{0,20}$")] = ""
    queues: Annotated[int, Meta(ge=0, le=16)] = 0  # 0: one per vCPU
    slot: HotplugSlot = 0
    # Writes of zeros are written, or done by the image's mapping, or that and their space given back.
    detect_zeroes: Literal["off", "on", "unmap"] = "off"


class Medium(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True, frozen=True):
    """What is put into a CD-ROM drive: a disk's layers, or none."""

    layers: Annotated[list[Layer], Meta(max_length=200)] = []
    source: Literal["path", "fd"] = "path"


class Kernel(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True, frozen=True):
    """Direct boot: a bzImage or a PVH ELF, an initrd and a command line."""

    path: Path | None = None
    initrd_path: Path | None = None
    initrd: bool = False  # with source="fd": whether slot `initrd` will be filled
    cmdline: Annotated[str, Meta(max_length=2047)] = ""
    source: Literal["path", "fd"] = "path"


FORWARD_PATTERN: Final = r"^(tcp|udp):([0-9]{1,3}(\.[0-9]{1,3}){3}:)?[1-9][0-9]{0,4}:[1-9][0-9]{0,4}$"
"""A port that a network of kind user forwards: PROTOCOL:[ADDRESS:]PORT:PORT-OF-THE-GUEST."""


class Nic(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True, frozen=True):
    """A virtio-net device. The guest cannot tell its kinds apart.

    ``bridge``: on a tap, which is a port of an allowed bridge; the guest can speak as ``mac`` only and, where
    it is given, as ``address``. ``macvtap``: the same beside the host, on an allowed ``interface`` of it.
    ``user``: what it sends goes out as traffic of a process of the host (passt), which the host's loopback
    does not hear. ``isolated``: with the owner's machines that name the same ``network``, and nobody else.
    """

    id: Id
    mac: Annotated[str, Meta(pattern=r"^[0-9a-f]{2}(:[0-9a-f]{2}){5}$")]
    kind: Literal["bridge", "user", "isolated", "macvtap"] = "bridge"
    bridge: Annotated[str, Meta(pattern=r"^[A-Za-z0-9_.-]{0,15}$")] = ""
    network: Annotated[str, Meta(pattern=r"^(|[a-z][a-z0-9-]{0,19})$")] = ""  # of kind isolated
    interface: Annotated[str, Meta(pattern=r"^[A-Za-z0-9_.-]{0,15}$")] = ""  # of kind macvtap
    mode: Literal["bridge", "private", "vepa"] = "bridge"  # of macvtap: whom of its neighbours there it hears
    address: Annotated[str, Meta(pattern=r"^(|[0-9]{1,3}(\.[0-9]{1,3}){3})$")] = ""  # IPv4; "" for any
    queues: Annotated[int, Meta(ge=0, le=8)] = 0  # queue pairs; 0: one per vCPU, at most 8
    slot: HotplugSlot = 0
    carrier: bool = True  # whether the cable is plugged in
    reach_host: bool = False  # of kind user: the gateway's address is the host's loopback
    forwards: Annotated[
        list[Annotated[str, Meta(pattern=FORWARD_PATTERN)]], Meta(max_length=64)
    ] = []  # of user


def is_tapped(nic: Nic) -> bool:
    """Whether the broker makes a tap or macvtap for it."""
    return nic.kind in {"bridge", "macvtap"}


def passt_options(nic: Nic) -> list[str]:
    """passt's for the ports that ``nic`` forwards; without an address those of this host's loopback."""
    options = []
    for forward in nic.forwards:
        protocol, *address, port, guests = forward.split(":")
        options.append(f"-{protocol[0]}{address[0] if address else '127.0.0.1'}/{port}:{guests}")
    return options


def passt_grant(nic: Nic) -> str:
    """The table of broker.toml that grants its owner a network of kind user."""
    return "user-network-host" if nic.reach_host else "user-network"


def queue_pairs(nic: Nic, vcpus: int) -> int:
    """How many queue pairs ``nic`` has in a machine of ``vcpus``, and so how many queues its tap."""
    return nic.queues or min(vcpus, 8)


CID_LEAST: Final = 3
"""The least CID that a guest may have in virtio-vsock; those below are reserved."""


NEWEST_TYPE: Final = "vmbus-2"
"""The machine type of a definition that says none."""
ENDED_TYPE: Final = "vmbus-0"
"""The one that there was before the first was frozen. What was stored then did not say it; none of it runs
any more."""


class Definition(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True, frozen=True):
    """A machine. ``machine_type`` and ``cpu_model`` never change after definition."""

    name: Name
    memory: Annotated[int, Meta(ge=MEMORY_LEAST, le=MEMORY_MOST, multiple_of=MIB)]
    kernel: Kernel | None = None  # direct boot; else firmware boots
    firmware: Literal["none", "bios", "uefi"] = "none"
    boot: Annotated[list[Id], Meta(max_length=DISKS_MOST + 19)] = []  # see ``boot_order``
    boot_menu: bool = False  # the BIOS offers its menu, for 2.5 s
    vcpus: Annotated[int, Meta(ge=1, le=16)] = 1
    # Always written down, whatever the newest is then: a machine keeps the type it was defined with.
    machine_type: Literal["vmbus-0", "vmbus-1", "vmbus-2"] = msgspec.field(
        default_factory=lambda: NEWEST_TYPE
    )
    cpu_model: Annotated[str, Meta(pattern=r"^[a-z0-9-]{1,40}$")] = "host"
    memory_kind: Literal["mergeable", "shareable", "huge"] = "mergeable"
    page_size: Literal["2M", "1G"] | None = None  # of huge memory; None: 2M
    disks: Annotated[list[Disk], Meta(max_length=DISKS_MOST)] = []
    nics: Annotated[list[Nic], Meta(max_length=16)] = []
    ports: Annotated[list[Name], Meta(max_length=15)] = []  # of virtio-console
    vsock: Annotated[int, Meta(ge=0, le=(1 << 32) - 2)] = 0  # the guest's CID, from 3; 0: no virtio-vsock
    rng: bool = True
    balloon: bool = True  # virtio-balloon; see ``has_balloon``
    prefault: bool = False  # memory is touched before the guest runs
    locked: bool = False  # memory is never swapped; broker.toml says who may
    memory_nodes: Annotated[list[Annotated[int, Meta(ge=0, lt=1024)]], Meta(max_length=64)] = []  # NUMA
    memory_minimum: Annotated[int, Meta(ge=0, le=MEMORY_MOST, multiple_of=MIB)] = 0  # see ``memory_floor``
    on_reset: Literal["restart", "end"] = "restart"
    watchdog: Literal["off", "none", "reset", "poweroff", "pause"] = "off"  # what it does; off: there is none


def check_machine_type(definition: Definition) -> None:
    """Raise NotSupported for a machine of the type that has ended."""
    if definition.machine_type == ENDED_TYPE:
        text = f"{ENDED_TYPE} was never frozen and has ended; define the machine anew, as {NEWEST_TYPE}: "
        text += "its disks stay as they are"
        raise VmbusError("NotSupported", text, argument="machine-type")


BOOT_CLASSES: Final = ("disk", "cdrom", "network")
"""Words of ``boot`` that mean all devices of a kind, in the definition's order; other words are ids."""


def boot_order(definition: Definition) -> list[str]:
    """``disk/ID`` and ``nic/ID`` in the order in which firmware tries them; it tries nothing else."""
    ids = {
        "disk": [f"disk/{disk.id}" for disk in definition.disks if not disk.cdrom],
        "cdrom": [f"disk/{disk.id}" for disk in definition.disks if disk.cdrom],
        "network": [f"nic/{nic.id}" for nic in definition.nics],
    }
    known = {name.partition("/")[2]: name for names in ids.values() for name in names}
    order: list[str] = []
    for word in definition.boot or BOOT_CLASSES:
        order += ids[word] if word in ids else [known[word]]
    return list(dict.fromkeys(order))


def is_scsi(disk: Disk) -> bool:
    """Whether it is on the bus of the SCSI host adapter."""
    return disk.cdrom or disk.bus == "scsi"


def is_read_only(disk: Disk) -> bool:
    """Whether the guest may not write to it."""
    return disk.read_only or disk.cdrom


FIRMWARE_CODE: Final = "firmware"
FIRMWARE_VARIABLES: Final = "firmware/variables"
FIRMWARE_NIC_ROM: Final = "firmware/nic-rom"
"""Slots that the service fills from its own store."""


def huge_page_size(definition: Definition) -> Literal[0, 0x200000, 0x40000000]:
    """Bytes of one page of a machine's huge memory, 0 if it has none."""
    if definition.memory_kind != "huge":
        return 0
    return 0x40000000 if definition.page_size == "1G" else 0x200000


def has_balloon(definition: Definition) -> bool:
    """Whether the machine has a balloon: not when its memory is reserved for it, or has to stay."""
    return definition.balloon and not definition.locked and definition.memory_kind != "huge"


def memory_floor(definition: Definition) -> int:
    """The least that the machine is ever asked to get by with; a quarter of its memory if nothing is said."""
    return definition.memory_minimum or max(definition.memory // 4 // MIB * MIB, MEMORY_LEAST)


def grants(nics: Iterable[Nic]) -> list[str]:
    """The tables of broker.toml that must grant its owner something: ``bridges.br0``, ``interfaces.eth0``,
    ``user-network``."""
    nics = list(nics)
    found = {f"bridges.{nic.bridge}" for nic in nics if nic.kind == "bridge"}
    found |= {f"interfaces.{nic.interface}" for nic in nics if nic.kind == "macvtap"}
    return sorted(found | {passt_grant(nic) for nic in nics if nic.kind == "user"})


def brought(nics: Iterable[Nic]) -> set[str]:
    """The names under which dbus/*.xml asks for further actions for these: ``bridge``, ``interface``,
    ``user-network``."""
    return {grant.partition(".")[0].removesuffix("s").removesuffix("-host") for grant in grants(nics)}


class Slot(msgspec.Struct, frozen=True):
    """A file that a worker needs before it can build the machine."""

    name: str
    path: str | None  # None: filled by an fd
    writable: bool
    kind: Literal["image", "boot", "secret"] = "image"

    @property
    def regular(self) -> bool:
        """Only a regular file will do."""
        return self.kind != "image"


def slots(definition: Definition) -> Iterator[Slot]:
    """All the files of the owner's that a start needs, in a stable order."""
    if (kernel := definition.kernel) is not None:
        by_fd = kernel.source == "fd"
        yield Slot("kernel", None if by_fd else kernel.path, False, "boot")
        if kernel.initrd if by_fd else kernel.initrd_path is not None:
            yield Slot("initrd", None if by_fd else kernel.initrd_path, False, "boot")
    for disk in definition.disks:
        yield from disk_slots(disk)


def disk_slots(disk: Disk) -> Iterator[Slot]:
    """The files of one disk."""
    for index, layer in enumerate(disk.layers):
        writable = index == 0 and not is_read_only(disk)
        yield Slot(f"disk/{disk.id}/{index}", layer.path, writable)
        if layer.data_name is not None:
            yield Slot(f"disk/{disk.id}/{index}/data", layer.data_path, writable)
        if layer.encrypted:
            yield Slot(f"disk/{disk.id}/{index}/secret", None, False, "secret")
