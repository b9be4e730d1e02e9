# SPDX-License-Identifier: Apache-2.0
"""What /proc says of a process's rights: for the table of ``make run`` and for tests that count them."""

from __future__ import annotations

import os
import pwd
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

NAMESPACES: Final = ("mnt", "pid", "net", "ipc", "uts", "cgroup", "user")
HEAD: Final = ("process", "pid", "user", "capabilities", "nnp", "seccomp", "own namespaces", "cgroup", "fds")
SECCOMP: Final = {0: "off", 1: "strict", 2: "filter"}


@dataclass(frozen=True)
class Process:
    """A process at one moment. ``namespaces`` are those that it does not share with this one."""

    pid: int
    name: str
    uids: tuple[int, ...]  # real, effective, saved, file system
    groups: tuple[int, ...]
    capabilities: dict[str, int]  # Inh, Prm, Eff, Bnd, Amb
    no_new_privs: bool
    seccomp: int
    namespaces: tuple[str, ...]
    cgroup: str
    fds: dict[int, str]


def look(pid: int) -> Process:
    """Read /proc/PID. Raises OSError when it is gone."""
    place = Path("/proc") / str(pid)
    fields = dict(re.findall(r"^(\w+):\t?(.*)$", (place / "status").read_text(), re.MULTILINE))
    fds: dict[int, str] = {}
    for number in os.listdir(place / "fd"):
        try:
            fds[int(number)] = os.readlink(place / "fd" / number)
        except FileNotFoundError:
            continue
    return Process(
        pid=pid,
        name=fields["Name"].strip(),
        uids=tuple(int(word) for word in fields["Uid"].split()),
        groups=tuple(int(word) for word in fields["Groups"].split()),
        capabilities={kind: int(fields[f"Cap{kind}"], 16) for kind in ("Inh", "Prm", "Eff", "Bnd", "Amb")},
        no_new_privs=fields["NoNewPrivs"].strip() == "1",
        seccomp=int(fields["Seccomp"]),
        namespaces=tuple(
            name for name in NAMESPACES if _namespace(place, name) != _namespace(Path("/proc/self"), name)
        ),
        cgroup=_cgroup((place / "cgroup").read_text()),
        fds=dict(sorted(fds.items())),
    )


def _namespace(place: Path, name: str) -> str:
    return os.readlink(place / "ns" / name)


def _cgroup(text: str) -> str:
    """The path in the unified hierarchy, "" where there is none."""
    found = re.search(r"^0::(.*)$", text, re.MULTILINE)
    return found[1] if found else ""


def table(processes: Iterable[tuple[str, Process]]) -> str:
    """Lines for people: a head, then one a process; the first of each pair says what it is."""
    rows: list[Sequence[str]] = [HEAD]
    for name, process in processes:
        rows.append(
            (
                name,
                str(process.pid),
                _user(process.uids[1]),
                _capabilities(process),
                "yes" if process.no_new_privs else "no",
                SECCOMP.get(process.seccomp, str(process.seccomp)),
                " ".join(process.namespaces) or "-",
                process.cgroup or "-",
                str(len(process.fds)),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEAD))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _capabilities(process: Process) -> str:
    sets = {kind: process.capabilities[kind].bit_count() for kind in ("Eff", "Prm", "Bnd")}
    if not any(sets.values()):
        return "none"
    return " ".join(f"{kind}:{count}" for kind, count in sets.items())
