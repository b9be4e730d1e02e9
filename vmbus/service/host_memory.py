# SPDX-License-Identifier: Apache-2.0
"""How the host's memory is just now, from /proc and /sys; anybody may see it.

``pressure`` is the kernel's own measure (PSI, Documentation/accounting/psi.rst): the share of the last ten
seconds in which some task, or every task, waited for memory.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final

import msgspec

from vmbus.wire.dbus_form import Form

PRESSURE: Final = Path("/proc/pressure/memory")
_KSM: Final = Path("/sys/kernel/mm/ksm")
_MEMINFO: Final = {
    "total": "MemTotal",
    "available": "MemAvailable",
    "free": "MemFree",
    "swap-total": "SwapTotal",
    "swap-free": "SwapFree",
    "huge": "Hugetlb",
}


class Pressure(msgspec.Struct, frozen=True):
    """Per cent of the last ten seconds."""

    some: float
    full: float


def figures(proc: Path = Path("/proc")) -> Form:
    """Host.GetMemory."""
    found: Form = {}
    kib = dict(re.findall(r"^(\w+):\s+(\d+) kB$", _read(proc / "meminfo"), re.MULTILINE))
    for key, name in _MEMINFO.items():
        if name in kib:
            found[key] = ("t", int(kib[name]) * 1024)
    page = os.sysconf("SC_PAGESIZE")
    for key, name in (("ksm-shared", "pages_shared"), ("ksm-saved", "pages_sharing")):
        text = _read(_KSM / name)
        if text.isdigit():
            found[key] = ("t", int(text) * page)
    pressure = read_pressure(proc / "pressure/memory")
    if pressure is not None:
        found["pressure-some"] = ("d", pressure.some)
        found["pressure-full"] = ("d", pressure.full)
    return found


def read_pressure(file: Path = PRESSURE) -> Pressure | None:
    """The pressure now; None where the kernel does not measure it (CONFIG_PSI, psi=1)."""
    averages = dict(re.findall(r"^(some|full) avg10=([0-9.]+) ", _read(file), re.MULTILINE))
    if "some" not in averages:
        return None
    return Pressure(float(averages["some"]), float(averages.get("full", 0.0)))


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
