# SPDX-License-Identifier: Apache-2.0
"""A machine's definition as people write it: a TOML file, command-line flags, or both (flags win).

Keys are those of the D-Bus definition (docs/dbus-api.md), with two conveniences, both resolved here so
that the definition holds only facts: sizes may carry a suffix (``512M``), and a disk may be given by the
path of its active image alone, whose chain is then looked up (``vmbus.cli.chain``). Relative paths are
taken from the directory of the TOML file, or from the working directory for flags. A missing MAC address
is made up, locally administered.
"""

from __future__ import annotations

import itertools
import os
import secrets
import tomllib
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec

from vmbus.cli import chain
from vmbus.wire import dbus_form
from vmbus.wire.definition import Definition, Disk, Nic
from vmbus.wire.errors import VmbusError

_SUFFIXES: Final = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_DISK_FLAG_KEYS: Final = frozenset(
    {
        "path",
        "format",
        "backing-format",
        "id",
        "read-only",
        "cdrom",
        "bus",
        "serial",
        "queues",
        "source",
        "slot",
        "detect-zeroes",
    }
)
_MEDIUM_KEYS: Final = frozenset({"path", "format", "backing-format"})
_NIC_FLAG_KEYS: Final = frozenset(
    {
        "bridge",
        "mac",
        "id",
        "queues",
        "kind",
        "interface",
        "mode",
        "address",
        "network",
        "slot",
        "carrier",
        "forwards",
        "reach-host",
    }
)


@dataclass(frozen=True)
class Flags:
    """What stood on the command line; None or empty for what did not."""

    name: str | None = None
    memory: str | None = None
    vcpus: int | None = None
    kernel: str | None = None
    initrd: str | None = None
    cmdline: str | None = None
    firmware: str | None = None
    boot: str | None = None
    boot_menu: bool | None = None
    cpu_model: str | None = None
    machine_type: str | None = None
    memory_kind: str | None = None
    page_size: str | None = None
    memory_minimum: str | None = None
    memory_nodes: Sequence[int] | None = None
    locked: bool | None = None
    prefault: bool | None = None
    balloon: bool | None = None
    on_reset: str | None = None
    rng: bool | None = None
    disks: Sequence[str] = field(default_factory=tuple)
    nics: Sequence[str] = field(default_factory=tuple)
    ports: Sequence[str] = field(default_factory=tuple)
    watchdog: str | None = None
    vsock: int | None = None


def build(file: str | None, flags: Flags) -> Definition:
    """The definition that ``file`` (a TOML file, None for none) and ``flags`` describe, chains resolved.

    Raises VmbusError with the key it is about.
    """
    tree: dict[str, Any] = {}
    base = os.getcwd()
    if file is not None:
        tree = _load(file)
        base = os.path.dirname(os.path.abspath(file))
    _make_paths_absolute(tree, base)
    _apply(tree, flags)
    for key in ("memory", "memory-minimum"):
        if key in tree:
            tree[key] = size(tree[key], argument=key)
    for required, flag in (("name", "--name"), ("memory", "--memory"), ("kernel", "--kernel or --firmware")):
        if required not in tree and not (required == "kernel" and "firmware" in tree):
            raise VmbusError(
                "InvalidArgument", f"is missing; give it in the file or with {flag}", argument=required
            )
    tree["disks"] = [_disk(disk, index) for index, disk in enumerate(_tables(tree, "disks"))]
    tree["nics"] = [_nic(nic, index) for index, nic in enumerate(_tables(tree, "nics"))]
    return dbus_form.parse(tree)


def one_disk(text: str, taken: Collection[str]) -> Disk:
    """A disk as ``--disk`` has it, its chain resolved, with an id that is not one of ``taken``."""
    table = _from_flag(text, _DISK_FLAG_KEYS, "path", "disk")
    return dbus_form.parse_disk(_disk({"id": _free("disk", taken), **table}, 0))


def one_medium(text: str, drive: str) -> Disk:
    """What goes into a CD-ROM drive, as PATH,format=F, its chain resolved; the drive with it."""
    table = _from_flag(text, _MEDIUM_KEYS, "path", "medium")
    return dbus_form.parse_disk(_disk({"id": drive, "cdrom": True, **table}, 0))


def one_nic(text: str, taken: Collection[str]) -> Nic:
    """A network interface as ``--nic`` has it, with an id that is not one of ``taken``."""
    table = _from_flag(text, _NIC_FLAG_KEYS, "bridge", "nic")
    return dbus_form.parse_nic(_nic({"id": _free("nic", taken), **table}, 0))


def _free(kind: str, taken: Collection[str]) -> str:
    return next(name for number in itertools.count() if (name := f"{kind}{number}") not in taken)


def disk_for_fds(disk: Disk) -> Disk:
    """The same disk with every file passed as an fd instead of opened by path."""
    layers = [msgspec.structs.replace(layer, path=None, data_path=None) for layer in disk.layers]
    return msgspec.structs.replace(disk, source="fd", layers=layers)


def for_fds(definition: Definition) -> Definition:
    """The same machine with every file passed as an fd instead of opened by path (for a transient one)."""
    kernel = definition.kernel
    if kernel is not None:
        kernel = msgspec.structs.replace(
            kernel,
            source="fd",
            path=None,
            initrd_path=None,
            initrd=kernel.initrd or kernel.initrd_path is not None,
        )
    return msgspec.structs.replace(
        definition,
        kernel=kernel,
        disks=[disk_for_fds(disk) for disk in definition.disks],
    )


def size(text: object, *, argument: str) -> int:
    """Bytes from a number or a string like ``512M`` (K, M, G, T: powers of 1024; "B" and "iB" may follow)."""
    if isinstance(text, int) and not isinstance(text, bool):
        return text
    plain = str(text).strip().upper().removesuffix("B").removesuffix("I")
    factor = _SUFFIXES.get(plain[-1:], 0)
    digits = plain[:-1] if factor else plain
    if not digits.isascii() or not digits.isdigit():
        raise VmbusError(
            "InvalidArgument",
            f"{text!r} is not a size; write bytes, or a number with K, M, G or T",
            argument=argument,
        )
    return int(digits) * (factor or 1)


def _load(file: str) -> dict[str, Any]:
    try:
        with open(file, "rb") as stream:
            return tomllib.load(stream)
    except FileNotFoundError:
        raise VmbusError("NotFound", f"{file} does not exist", argument="file") from None
    except OSError as error:
        raise VmbusError("AccessDenied", f"{file}: {error.strerror}", argument="file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise VmbusError("InvalidArgument", f"{file} is not TOML: {error}", argument="file") from None


def _make_paths_absolute(node: Any, base: str) -> None:
    if isinstance(node, dict):
        for key, value in node.items():
            if key in ("path", "initrd-path", "data-path") and isinstance(value, str) and value:
                node[key] = chain.absolute(os.path.join(base, value))
            else:
                _make_paths_absolute(value, base)
    elif isinstance(node, list):
        for item in node:
            _make_paths_absolute(item, base)


def _apply(tree: dict[str, Any], flags: Flags) -> None:
    for key, value in (
        ("name", flags.name),
        ("memory", flags.memory),
        ("vcpus", flags.vcpus),
        ("firmware", flags.firmware),
        ("boot", flags.boot.split(",") if flags.boot is not None else None),
        ("boot-menu", flags.boot_menu),
        ("cpu-model", flags.cpu_model),
        ("machine-type", flags.machine_type),
        ("memory-kind", flags.memory_kind),
        ("page-size", flags.page_size),
        ("memory-minimum", flags.memory_minimum),
        ("memory-nodes", flags.memory_nodes),
        ("locked", flags.locked),
        ("prefault", flags.prefault),
        ("balloon", flags.balloon),
        ("on-reset", flags.on_reset),
        ("watchdog", flags.watchdog),
        ("vsock", flags.vsock),
        ("rng", flags.rng),
    ):
        if value is not None:
            tree[key] = value
    for key, value in (("path", flags.kernel), ("initrd-path", flags.initrd)):
        if value is not None:
            _kernel(tree)[key] = chain.absolute(value)
    if flags.cmdline is not None:
        _kernel(tree)["cmdline"] = flags.cmdline
    if flags.disks:
        tree["disks"] = [_from_flag(text, _DISK_FLAG_KEYS, "path", "disk") for text in flags.disks]
    if flags.ports:
        tree["ports"] = list(flags.ports)
    if flags.nics:
        tree["nics"] = [_from_flag(text, _NIC_FLAG_KEYS, "bridge", "nic") for text in flags.nics]


def _kernel(tree: dict[str, Any]) -> dict[str, Any]:
    kernel = tree.setdefault("kernel", {})
    if not isinstance(kernel, dict):
        raise VmbusError(
            "InvalidArgument", "is a table with path, initrd-path and cmdline", argument="kernel"
        )
    return kernel


def _from_flag(text: str, known: frozenset[str], first: str, flag: str) -> dict[str, Any]:
    """``path=x,format=raw`` as a table; the first field may leave out ``path=``; ``,,`` is a comma."""
    table: dict[str, Any] = {}
    for index, part in enumerate(text.replace(",,", "\0").split(",")):
        key, equals, value = part.replace("\0", ",").partition("=")
        if index == 0 and (not equals or key not in known):
            key, value = first, part.replace("\0", ",")
        elif not equals:
            value = "yes"
        if key not in known:
            raise VmbusError(
                "InvalidArgument",
                f"{key!r} is not known; {', '.join(sorted(known))} are",
                argument=f"--{flag}",
            )
        if key == "forwards":
            table[key] = [*table.get(key, []), value]
            continue
        if key in table:
            raise VmbusError("InvalidArgument", f"{key} is given twice", argument=f"--{flag}")
        table[key] = _flag_value(key, value, flag)
    return table


def _flag_value(key: str, value: str, flag: str) -> Any:
    if key in ("read-only", "cdrom", "carrier", "reach-host"):
        words = {"yes": True, "on": True, "true": True, "no": False, "off": False, "false": False}
        if value not in words:
            raise VmbusError("InvalidArgument", f"{key} is yes or no, not {value!r}", argument=f"--{flag}")
        return words[value]
    if key in ("queues", "slot"):
        if not value.isdigit():
            raise VmbusError("InvalidArgument", f"{key} is a number, not {value!r}", argument=f"--{flag}")
        return int(value)
    return chain.absolute(value) if key == "path" else value


def _tables(tree: dict[str, Any], key: str) -> list[dict[str, Any]]:
    found = tree.get(key, [])
    if not isinstance(found, list) or not all(isinstance(item, dict) for item in found):
        raise VmbusError("InvalidArgument", f"is a list of tables: write [[{key}]] before each", argument=key)
    return found


def _disk(table: dict[str, Any], index: int) -> dict[str, Any]:
    """A disk with its layers; those of a disk given by path are looked up."""
    disk = {"id": f"disk{index}", **table}
    if "layers" in disk:
        for key in ("path", "format", "backing-format"):
            if key in disk:
                raise VmbusError(
                    "InvalidArgument",
                    "belongs into the layers when there are any",
                    argument=f"disks[{index}].{key}",
                )
        return disk
    where = f"disks[{index}]"
    if disk.get("cdrom") and disk.get("source") != "fd" and not {"path", "format"} & disk.keys():
        disk["layers"] = []
        return disk
    image_format = disk.pop("format", None)
    if image_format is None:
        raise VmbusError(
            "InvalidArgument", "is missing; it is never guessed: qcow2 or raw", argument=f"{where}.format"
        )
    backing_format = disk.pop("backing-format", None)
    path = disk.pop("path", None)
    if path is None:
        if disk.get("source") != "fd":
            raise VmbusError("InvalidArgument", "is missing: where is the image?", argument=f"{where}.path")
        disk["layers"] = [{"format": image_format, "encrypted": disk.pop("encrypted", False)}]
        return disk
    layers = chain.resolve(
        str(path), str(image_format), backing_format=backing_format, argument=f"{where}.path"
    )
    disk["layers"] = [dbus_form.plain(layer) for layer in layers]
    return disk


def _nic(table: dict[str, Any], index: int) -> dict[str, Any]:
    return {"id": f"nic{index}", "mac": _new_mac(), **table}


def _new_mac() -> str:
    """A locally administered unicast address (IEEE 802, the two low bits of the first octet: 1, 0)."""
    octets = bytearray(secrets.token_bytes(6))
    octets[0] = 0x52
    return ":".join(f"{octet:02x}" for octet in octets)
