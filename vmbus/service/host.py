# SPDX-License-Identifier: Apache-2.0
"""What this host can do, from /proc and /sys; anybody may see it."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
from msgspec import inspect

from vmbus.wire.dbus_form import Form
from vmbus.wire.definition import ENDED_TYPE, Definition, Layer


def capabilities(*, broker: bool, polkit: bool, notes: list[str]) -> Form:
    """Host.GetCapabilities; ``notes`` are the broker's sentences about what the host lacks."""
    return {
        "kernel": ("s", os.uname().release),
        "kvm": ("b", Path("/dev/kvm").exists()),
        "cpu-vendor": ("s", _cpu_vendor()),
        "cpu-count": ("u", os.cpu_count() or 1),
        "memory": ("t", os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGESIZE")),
        "numa-nodes": ("au", numa_nodes()),
        "machine-types": (
            "as",
            [kind for kind in _choices(Definition, "machine_type") if kind != ENDED_TYPE],
        ),
        "memory-kinds": ("as", _choices(Definition, "memory_kind")),
        "max-vcpus": ("u", _most(Definition, "vcpus")),
        "image-formats": ("as", _choices(Layer, "format")),
        "cgroup": ("s", "v2" if Path("/sys/fs/cgroup/cgroup.controllers").exists() else "none"),
        "io-uring": ("b", _read("/proc/sys/kernel/io_uring_disabled") in ("0", "")),
        "selinux": ("s", _selinux()),
        "broker": ("b", broker),
        "polkit": ("b", polkit),
        "notes": ("as", notes),
    }


def numa_nodes() -> list[int]:
    """The nodes that have memory; [0] on a host without NUMA."""
    nodes: list[int] = []
    for part in _read("/sys/devices/system/node/has_memory").split(","):
        first, _, last = part.partition("-")
        if first.isdigit():
            nodes += range(int(first), int(last or first) + 1)
    return nodes or [0]


def _field(struct: type[msgspec.Struct], name: str) -> inspect.Type:
    info = inspect.type_info(struct)
    assert isinstance(info, inspect.StructType)
    return next(field.type for field in info.fields if field.name == name)


def _choices(struct: type[msgspec.Struct], name: str) -> list[str]:
    info = _field(struct, name)
    assert isinstance(info, inspect.LiteralType)
    return sorted(str(value) for value in info.values)


def _most(struct: type[msgspec.Struct], name: str) -> int:
    info = _field(struct, name)
    assert isinstance(info, inspect.IntType) and info.le is not None
    return info.le


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _cpu_vendor() -> str:
    for line in _read("/proc/cpuinfo").splitlines():
        if line.startswith("vendor_id"):
            return line.partition(":")[2].strip()
    return ""


def _selinux() -> str:
    return {"1": "enforcing", "0": "permissive"}.get(_read("/sys/fs/selinux/enforce"), "off")
