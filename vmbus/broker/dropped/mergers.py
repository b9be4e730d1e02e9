# SPDX-License-Identifier: Apache-2.0
"""Which processes offer memory to KSM, and the CPU time of ksmd.

/proc/PID/ksm_stat is its owner's to read, hence CAP_DAC_READ_SEARCH, the one capability of this child, which
reads nothing else. ``ksm_rmap_items`` counts the pages that KSM keeps account of (Documentation/
admin-guide/mm/ksm.rst); a process without any has offered none, or none that was looked at.
"""

import os
import re
from pathlib import Path

from vmbus.broker.children import Channel
from vmbus.wire.memory import Merger, Seen

_PROC = Path("/proc")


def look(channel: Channel) -> None:
    """Reports a ``Seen``."""
    mergers, seconds = [], 0.0
    for entry in _PROC.iterdir():
        if not entry.name.isdigit():
            continue
        try:
            text = (entry / "ksm_stat").read_text()
            if not text and (entry / "comm").read_text() == "ksmd\n":  # a kernel thread has no memory
                seconds = _cpu_seconds(entry)
            elif text and not text.startswith("ksm_rmap_items 0\n"):
                mergers.append(_merger(entry, text))
        except (OSError, ValueError):
            continue  # it has ended
    channel.report(Seen(mergers=mergers[:500], ksmd_seconds=seconds))


def _merger(entry: Path, text: str) -> Merger:
    figures = dict(re.findall(r"^(\w+):? (-?[0-9]+)$", text, re.MULTILINE))
    return Merger(
        pid=int(entry.name),
        uid=int((entry / "status").read_text().partition("\nUid:")[2].split()[0]),
        name=(entry / "comm").read_text().strip(),
        merged=int(figures.get("ksm_merging_pages", 0)),
        profit=int(figures.get("ksm_process_profit", 0)),
    )


def _cpu_seconds(entry: Path) -> float:
    """proc(5), stat: fields 14 and 15, utime and stime."""
    fields = (entry / "stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
