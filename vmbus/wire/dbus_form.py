# SPDX-License-Identifier: Apache-2.0
"""A definition as it stands on D-Bus and in a TOML file: kebab-case keys, plain values.

The types and bounds are those of ``wire/definition.py``, read by ``msgspec.inspect``; nothing is
written down twice. What this adds is the conversion, in both directions, with errors for people: an
error names the argument by its path (``disks[0].layers[1].format``), says what was wrong and what
would work. Unknown keys are refused. ``parse`` also checks what no single field can say (a disk
without a path, a chain whose header names do not fit its layers).

Left out: whether the owner may have it. That is broker.toml's, asked by the service.
"""

from __future__ import annotations

import difflib
import ipaddress
import re
from collections.abc import Mapping
from typing import Any, Final, TypeVar

import msgspec
from msgspec import inspect

from vmbus.wire.definition import (
    BLOCK_DISKS,
    BOOT_CLASSES,
    CID_LEAST,
    FORWARD_PATTERN,
    ID_PATTERN,
    NAME_PATTERN,
    Definition,
    Disk,
    Kernel,
    Medium,
    Nic,
    huge_page_size,
    is_scsi,
    is_tapped,
)
from vmbus.wire.errors import VmbusError

Form = dict[str, tuple[str, Any]]
"""Key → (D-Bus signature, value); values of ``a{sv}`` are Forms again, of ``aa{sv}`` lists of them."""

_WORDS: Final = {
    NAME_PATTERN: "a name is 1 to 63 letters, digits, '_', '.' or '-', and begins with a letter or digit",
    ID_PATTERN: "an id is 1 to 20 lower-case letters, digits or '-', and begins with a letter",
    r"^[ -~]{0,20}$": "a serial is at most 20 printable ASCII characters",
    r"^[0-9a-f]{2}(:[0-9a-f]{2}){5}$": "a MAC address is six pairs of lower-case hex digits with ':' between",
    r"^[A-Za-z0-9_.-]{0,15}$": "an interface name is 1 to 15 letters, digits, '_', '.' or '-'",
    r"^(|[a-z][a-z0-9-]{0,19})$": "a network's name is 1 to 20 lower-case letters, digits or '-'",
    FORWARD_PATTERN: "a forward is tcp or udp, an address of the host's or none, its port and the guest's: "
    "tcp:8022:22, udp:192.0.2.1:5353:53",
    r"^[a-z0-9-]{1,40}$": "a CPU model is 1 to 40 lower-case letters, digits or '-'",
}

LEAST_PORT: Final = 1024
"""The first port that does not take CAP_NET_BIND_SERVICE."""
MOST_PORT: Final = 65535

S = TypeVar("S", bound=msgspec.Struct)


def parse(form: Mapping[str, object]) -> Definition:
    """A definition from plain values. Raises VmbusError InvalidArgument that names the argument."""
    definition = parse_struct(form, Definition)
    _check(definition)
    return definition


def parse_disk(form: Mapping[str, object]) -> Disk:
    """One disk, as ``parse``; errors are about ``disk.KEY``."""
    disk = parse_struct(form, Disk, "disk")
    _check_disk(disk, "disk")
    return disk


def parse_medium(form: Mapping[str, object], drive: Disk) -> Disk:
    """``drive`` with another medium, or none; errors are about ``medium.KEY``."""
    medium = parse_struct(form, Medium, "medium")
    changed = msgspec.structs.replace(drive, layers=medium.layers, source=medium.source)
    _check_disk(changed, "medium")
    return changed


def parse_nic(form: Mapping[str, object]) -> Nic:
    """One NIC, as ``parse``; errors are about ``nic.KEY``."""
    nic = parse_struct(form, Nic, "nic")
    _check_nic(nic, "nic")
    return nic


def parse_struct(form: object, cls: type[S], where: str = "") -> S:
    """Any struct of ours from its D-Bus form; ``where`` is the argument's name for errors."""
    info = inspect.type_info(cls)
    assert isinstance(info, inspect.StructType)
    result = _struct(form, info, where)
    assert isinstance(result, cls)
    return result


def build(definition: msgspec.Struct) -> Form:
    """The whole definition, defaults filled in, fields that are None left out."""
    info = inspect.type_info(type(definition))
    assert isinstance(info, inspect.StructType)
    form: Form = {}
    for field in info.fields:
        value = getattr(definition, field.name)
        if value is not None:
            form[_kebab(field.name)] = _build(value, field.type, field.name)
    return form


def plain(definition: msgspec.Struct) -> dict[str, Any]:
    """The same without signatures: what ``parse`` takes, what JSON and TOML hold."""
    return _plain(build(definition))


def _plain(form: Form) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, (signature, value) in form.items():
        if signature == "a{sv}":
            out[key] = _plain(value)
        elif signature == "aa{sv}":
            out[key] = [_plain(item) for item in value]
        else:
            out[key] = value
    return out


def _build(value: object, info: inspect.Type, name: str) -> tuple[str, Any]:
    if isinstance(value, msgspec.Struct):
        return "a{sv}", build(value)
    if isinstance(value, bool):
        return "b", value
    if isinstance(value, int):
        return ("t" if name in ("memory", "memory_minimum") else "u"), value
    if isinstance(value, str):
        return "s", value
    assert isinstance(value, list) and isinstance(info, inspect.ListType)
    if isinstance(info.item_type, inspect.IntType):
        return "au", value
    if isinstance(info.item_type, inspect.StrType):
        return "as", list(value)
    return "aa{sv}", [build(item) for item in value]


def _bad(where: str, message: str) -> VmbusError:
    return VmbusError("InvalidArgument", message, argument=where)


def _kebab(name: str) -> str:
    return name.replace("_", "-")


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


def _struct(form: object, info: inspect.StructType, where: str) -> object:
    if not isinstance(form, Mapping):
        raise _bad(where, f"{_show(form)} is not a dictionary (a{{sv}})")
    fields = {_kebab(field.name): field for field in info.fields}
    for key in form:
        if key not in fields:
            close = difflib.get_close_matches(str(key), fields, 1)
            hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(sorted(fields))}"
            raise _bad(_join(where, str(key)), f"there is no such key; {hint}")
    values: dict[str, object] = {}
    for key, field in fields.items():
        if key in form:
            values[field.name] = _value(form[key], field.type, _join(where, key))
        elif field.required:
            raise _bad(_join(where, key), "is missing and has no default")
    return info.cls(**values)


def _value(value: object, info: inspect.Type, where: str) -> object:
    if isinstance(info, inspect.UnionType):  # only ever "T or None"; None has no form on D-Bus
        (info,) = (kind for kind in info.types if not isinstance(kind, inspect.NoneType))
    if isinstance(info, inspect.StructType):
        return _struct(value, info, where)
    if isinstance(info, inspect.ListType):
        return _list(value, info, where)
    if isinstance(info, inspect.BoolType):
        if not isinstance(value, bool):
            raise _bad(where, f"{_show(value)} is not a boolean")
        return value
    if isinstance(info, inspect.IntType):
        return _integer(value, info, where)
    if isinstance(info, inspect.LiteralType):
        if value not in info.values:
            raise _bad(where, f"{_show(value)} is not one of {', '.join(map(str, info.values))}")
        return value
    assert isinstance(info, inspect.StrType), info
    return _string(value, info, where)


def _list(value: object, info: inspect.ListType, where: str) -> list[object]:
    if not isinstance(value, list):
        raise _bad(where, f"{_show(value)} is not an array")
    least, most = info.min_length or 0, info.max_length
    if len(value) < least or (most is not None and len(value) > most):
        raise _bad(where, f"has {len(value)} entries, not {least}–{most}")
    return [_value(item, info.item_type, f"{where}[{index}]") for index, item in enumerate(value)]


def _integer(value: object, info: inspect.IntType, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise _bad(where, f"{_show(value)} is not an integer")
    if (info.ge is not None and value < info.ge) or (info.le is not None and value > info.le):
        raise _bad(where, f"{value} is not in {info.ge}–{info.le}")
    if info.multiple_of is not None and value % info.multiple_of:
        raise _bad(where, f"{value} is not a multiple of {info.multiple_of}")
    return value


def _string(value: object, info: inspect.StrType, where: str) -> str:
    if not isinstance(value, str):
        raise _bad(where, f"{_show(value)} is not a string")
    least, most = info.min_length or 0, info.max_length
    if len(value) < least or (most is not None and len(value) > most):
        raise _bad(where, f"is {len(value)} characters long, not {least}–{most}")
    # fullmatch and not search: "$" would let a final newline through.
    if info.pattern is not None and not re.fullmatch(info.pattern.removeprefix("^").removesuffix("$"), value):
        raise _bad(where, f"{_show(value)}: {_WORDS.get(info.pattern, f'must match {info.pattern}')}")
    if "\0" in value:
        raise _bad(where, "holds a NUL character")
    return value


def _show(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _check(definition: Definition) -> None:
    _check_boot(definition)
    _check_memory(definition)
    seen: set[str] = set()
    named = [(f"disks[{i}].id", disk.id) for i, disk in enumerate(definition.disks)]
    named += [(f"nics[{i}].id", nic.id) for i, nic in enumerate(definition.nics)]
    for where, name in named:
        if name in seen:
            raise _bad(where, f"{name!r} is there twice; ids are unique within a machine")
        seen.add(name)
    if definition.memory_minimum > definition.memory:
        raise _bad(
            "memory-minimum", f"{definition.memory_minimum} is more than the memory, {definition.memory}"
        )
    for index, disk in enumerate(definition.disks):
        _check_disk(disk, f"disks[{index}]")
    for index, name in enumerate(definition.ports):
        if name in definition.ports[:index]:
            raise _bad(f"ports[{index}]", f"{name!r} is there twice; each port has a name of its own")
    if 0 < definition.vsock < CID_LEAST:
        raise _bad("vsock", f"{definition.vsock} is no CID of a guest: those from {CID_LEAST} on are")
    block = sum(not is_scsi(disk) for disk in definition.disks)
    if block > BLOCK_DISKS:
        raise _bad("disks", f"{block} have bus blk, and {BLOCK_DISKS} fit; give the others bus scsi")
    for index, nic in enumerate(definition.nics):
        _check_nic(nic, f"nics[{index}]")
    slots: set[int] = set()
    placed = [(f"disks[{i}].slot", disk.slot) for i, disk in enumerate(definition.disks)]
    placed += [(f"nics[{i}].slot", nic.slot) for i, nic in enumerate(definition.nics)]
    for where, slot in placed:
        if slot and slot in slots:
            raise _bad(where, f"slot {slot} is there twice; each holds one device")
        slots.add(slot)


def _check_nic(nic: Nic, where: str) -> None:
    for kind, key, value in (
        ("bridge", "bridge", nic.bridge),
        ("isolated", "network", nic.network),
        ("macvtap", "interface", nic.interface),
    ):
        if (nic.kind == kind) != bool(value):
            said = f"is for kind {kind} only" if value else f"is missing; a nic of kind {kind} names one"
            raise _bad(f"{where}.{key}", said)
    if nic.mode != "bridge" and nic.kind != "macvtap":
        raise _bad(f"{where}.mode", "is for kind macvtap only")
    if nic.address and (not is_tapped(nic) or not _is_ipv4(nic.address)):
        text = f"{nic.address!r} is not an IPv4 address of a nic of kind bridge or macvtap"
        raise _bad(f"{where}.address", text)
    _check_forwards(nic, where)
    if int(nic.mac[:2], 16) & 1:
        raise _bad(f"{where}.mac", f"{nic.mac} is a group address; its first byte must be even")


def _check_forwards(nic: Nic, where: str) -> None:
    for key, given in (("forwards", bool(nic.forwards)), ("reach-host", nic.reach_host)):
        if given and nic.kind != "user":
            raise _bad(f"{where}.{key}", "is for kind user only")
    seen: set[tuple[str, int]] = set()
    for index, forward in enumerate(nic.forwards):
        here = f"{where}.forwards[{index}]"
        protocol, *address, port, guests = forward.split(":")
        if not all(_is_ipv4(text) for text in address):
            raise _bad(here, f"{address[0]} is not an IPv4 address")
        if int(port) < LEAST_PORT:
            raise _bad(
                here, f"port {port} of the host is below {LEAST_PORT}: those take rights that no helper has"
            )
        if max(int(port), int(guests)) > MOST_PORT:
            raise _bad(here, f"there is no port above {MOST_PORT}")
        if protocol == "udp" and (not address or address[0].startswith("127.")):
            raise _bad(
                here,
                "udp names an address that other hosts reach, or 0.0.0.0: this host itself hears no answer",
            )
        if (protocol, int(port)) in seen:
            raise _bad(here, f"{protocol} port {port} is forwarded twice")
        seen.add((protocol, int(port)))


def _check_memory(definition: Definition) -> None:
    page = huge_page_size(definition)
    if definition.page_size is not None and not page:
        kind = definition.memory_kind
        raise _bad(
            "page-size", f"is for memory-kind huge; a machine's memory is one kind, and this is {kind}"
        )
    if page and definition.locked:
        raise _bad("locked", "huge memory is never swapped; leave it out")
    if len(set(definition.memory_nodes)) < len(definition.memory_nodes):
        raise _bad("memory-nodes", "a node is there twice")
    if page and definition.memory % page:
        size = definition.page_size or "2M"
        raise _bad("memory", f"{definition.memory} is not a multiple of {page}, a page of {size}")


def _is_ipv4(text: str) -> bool:
    try:
        return str(ipaddress.IPv4Address(text)) == text
    except ValueError:
        return False


def _check_boot(definition: Definition) -> None:
    if definition.kernel is None and definition.firmware == "none":
        raise _bad("kernel", "is missing, and so is firmware (bios or uefi): the machine would not begin")
    if definition.kernel is not None:
        for key, given in (
            ("firmware", definition.firmware != "none"),
            ("boot", bool(definition.boot)),
            ("boot-menu", definition.boot_menu),
        ):
            if given:
                raise _bad(key, "is for a machine without kernel: that is booted directly")
        _check_kernel(definition.kernel)
    ids = {disk.id for disk in definition.disks} | {nic.id for nic in definition.nics}
    for index, word in enumerate(definition.boot):
        if word not in BOOT_CLASSES and word not in ids:
            raise _bad(
                f"boot[{index}]", f"{word!r} is neither disk, cdrom or network nor the id of a disk or nic"
            )
        if word in definition.boot[:index]:
            raise _bad(f"boot[{index}]", f"{word!r} is there twice")


def _check_kernel(kernel: Kernel) -> None:
    if kernel.source == "fd":
        if kernel.path is not None or kernel.initrd_path is not None:
            raise _bad("kernel.source", "fd means that files are passed; leave path and initrd-path out")
        return
    if kernel.path is None:
        raise _bad("kernel.path", "is missing; with source fd it may be left out")
    if kernel.initrd:
        raise _bad("kernel.initrd", "is for source fd; name the file in initrd-path")
    _absolute(kernel.path, "kernel.path")
    if kernel.initrd_path is not None:
        _absolute(kernel.initrd_path, "kernel.initrd-path")


def _check_disk(disk: Disk, where: str) -> None:
    last = len(disk.layers) - 1
    if not disk.layers and not disk.cdrom:
        raise _bad(f"{where}.layers", "has no entry; only a cdrom may be without a medium")
    if is_scsi(disk):
        for key, given in (("slot", disk.slot), ("queues", disk.queues)):
            if given:
                raise _bad(f"{where}.{key}", "is for bus blk; all that is on the SCSI bus shares an adapter")
    for index, layer in enumerate(disk.layers):
        here = f"{where}.layers[{index}]"
        if disk.source == "fd":
            if layer.path is not None or layer.data_path is not None:
                raise _bad(f"{here}.path", "the disk's source is fd; leave path and data-path out")
        elif layer.path is None:
            raise _bad(f"{here}.path", "is missing; with the disk's source fd it may be left out")
        else:
            _absolute(layer.path, f"{here}.path")
            if layer.data_path is not None:
                _absolute(layer.data_path, f"{here}.data-path")
            if (layer.data_name is None) != (layer.data_path is None):
                raise _bad(f"{here}.data-path", "data-name and data-path come together")
        if layer.format == "raw" and (layer.backing_name is not None or layer.data_name is not None):
            raise _bad(f"{here}.format", "a raw image has no backing file and no data file")
        if layer.format == "raw" and layer.encrypted:
            raise _bad(f"{here}.encrypted", "a raw image is not encrypted; say qcow2")
        if layer.backing_name is None and index < last:
            raise _bad(
                f"{here}.backing-name", "is missing, and there is a layer below; give the name in the header"
            )
        if layer.backing_name is not None and index == last:
            raise _bad(
                f"{where}.layers",
                f"layer {index} has a backing file, {layer.backing_name!r}, but none is listed",
            )


def _absolute(path: str, where: str) -> None:
    if not path.startswith("/"):
        raise _bad(where, f"{_show(path)} is not an absolute path")
