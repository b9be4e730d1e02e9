# SPDX-License-Identifier: Apache-2.0
"""What a worker's memory is made of, from the files of /proc that the broker opened for the service.

``smaps_rollup`` has the sums of the whole process; ``smaps`` has them by mapping, which tells the guest's
memory from what the VMM itself costs: only the guest's is both left out of core dumps and not inherited by
children (MADV_DONTDUMP, MADV_DONTFORK; flags ``dd`` and ``dc``). ``ksm_stat`` has what KSM made of it. The
kernel writes them, not the worker; the numbers are believed.

Reading walks page tables: a millisecond for a GiB in small pages. So it is done by a thread, on a copy of the
descriptor, and the loop goes on.

| figure | of the guest's memory |
|---|---|
| resident | bytes in memory: in small and transparent huge pages, and in pages of hugetlb |
| pss | the same, each page divided by how many share it; huge pages of hugetlb as a whole |
| huge | bytes in huge pages of either sort |
| saved | resident less pss, of mergeable memory: what sharing saves; it adds up to the host's saving |
| merged | bytes that KSM has merged with others or with each other |
| swapped | bytes in swap |
| overhead | pss of everything in the worker that is not the guest's memory |
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable
from typing import Final

import msgspec

from vmbus.service import descriptors
from vmbus.service.aside import aside

PAGE: Final = os.sysconf("SC_PAGESIZE")
_CHUNK: Final = 1 << 16
_MOST: Final = 16 << 20  # of one file: some 20,000 mappings
_MAPPING: Final = re.compile(r"^[0-9a-f]+-[0-9a-f]+ ")
_GUESTS: Final = frozenset({"dd", "dc"})
_HUGETLB: Final = ("Shared_Hugetlb", "Private_Hugetlb")
_HUGE: Final = ("AnonHugePages", "ShmemPmdMapped", "FilePmdMapped", *_HUGETLB)


class Usage(msgspec.Struct):
    """Bytes; see the table above."""

    resident: int = 0
    pss: int = 0
    huge: int = 0
    swapped: int = 0
    locked: int = 0
    overhead: int = 0
    merged: int = 0


def usage_of(smaps: Iterable[str]) -> Usage:
    """What /proc/PID/smaps (proc(5)) says, line by line."""
    usage = Usage()
    kib: dict[str, int] = {}
    for line in smaps:
        if _MAPPING.match(line):
            kib = {}
        elif line.startswith("VmFlags:"):
            _add(usage, kib, guests=_GUESTS.issubset(line.split()[1:]))
        else:
            name, _, rest = line.partition(":")
            if rest.endswith(" kB"):
                kib[name] = int(rest[:-3])
    return usage


def _add(usage: Usage, kib: dict[str, int], *, guests: bool) -> None:
    def found(*names: str) -> int:
        return 1024 * sum(kib.get(name, 0) for name in names)

    if guests:
        usage.resident += found("Rss", *_HUGETLB)
        usage.pss += found("Pss", *_HUGETLB)
        usage.huge += found(*_HUGE)
        usage.swapped += found("Swap")
        usage.locked += found("Locked")
    else:
        usage.overhead += found("Pss", *_HUGETLB)


class Figures:
    """The files of one worker; ``fds`` are taken over."""

    def __init__(self, fds: Iterable[int]) -> None:
        # What each is stands in its name; which there are depends on the kernel.
        self._files = {os.path.basename(os.readlink(f"/proc/self/fd/{fd}")): fd for fd in fds}

    def totals(self) -> dict[str, int]:
        """The worker's memory as a whole, in bytes: memory-pss, memory-rss, memory-swap, ksm-merged."""
        text = self._text("smaps_rollup")
        found = {}
        for key, name in (("memory-pss", "Pss"), ("memory-rss", "Rss"), ("memory-swap", "Swap")):
            if match := re.search(rf"^{name}:\s+(\d+) kB", text, re.MULTILINE):
                found[key] = int(match[1]) * 1024
        if "ksm_stat" in self._files:
            found["ksm-merged"] = merged(self._text("ksm_stat"))
        return found

    def ksm(self) -> dict[str, int]:
        """The numbers of ksm_stat by the kernel's names; empty without KSM."""
        found = re.findall(r"^(\w+):? (-?\d+)$", self._text("ksm_stat"), re.MULTILINE)
        return {name: int(number) for name, number in found}

    async def usage(self) -> Usage | None:
        """How the memory is used; None when the worker has just ended."""
        if "smaps" not in self._files:
            return None
        copy = os.dup(self._files["smaps"])
        try:
            text = await aside(_whole, copy)
        except OSError:
            return None
        finally:
            with contextlib.suppress(OSError):  # gone if a client's file was expelled meanwhile
                os.close(copy)
        if not text:
            return None
        usage = usage_of(text.splitlines())
        usage.merged = merged(self._text("ksm_stat"))
        return usage

    def close(self) -> None:
        """Close the files."""
        for fd in self._files.values():
            descriptors.close(fd)
        self._files = {}

    def _text(self, name: str) -> str:
        try:
            return os.pread(self._files[name], 8192, 0).decode("ascii", "replace")
        except (KeyError, OSError):
            return ""


def merged(ksm_stat: str) -> int:
    """Bytes that KSM has merged, by what ksm_stat says."""
    match = re.search(r"^ksm_merging_pages\s+(\d+)", ksm_stat, re.MULTILINE)
    return int(match[1]) * PAGE if match else 0


def _whole(fd: int) -> str:
    parts: list[bytes] = []
    size = 0
    while size < _MOST and (part := os.pread(fd, _CHUNK, size)):
        parts.append(part)
        size += len(part)
    return b"".join(parts).decode("ascii", "replace")
