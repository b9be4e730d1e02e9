# SPDX-License-Identifier: Apache-2.0
"""What /proc/PID/smaps tells of a guest's memory and of what the VMM costs besides."""

from __future__ import annotations

import asyncio
import mmap
import os

from vmbus.service.figures import Figures, merged, usage_of

SMAPS = """\
55d0c0000000-55d0c0100000 r-xp 00000000 fe:00 1234                       /usr/bin/python3
Size:               1024 kB
Rss:                 800 kB
Pss:                 100 kB
Swap:                  4 kB
VmFlags: rd ex mr mw me sd
7f0000000000-7f0004000000 rw-p 00000000 00:00 0
Size:              65536 kB
Rss:               40960 kB
Pss:               20480 kB
AnonHugePages:      4096 kB
ShmemPmdMapped:        0 kB
Shared_Hugetlb:        0 kB
Private_Hugetlb:       0 kB
Swap:                 16 kB
Locked:                8 kB
VmFlags: rd wr mr mw me dc nr dd mg
7f0010000000-7f0020000000 rw-s 00000000 00:10 5                          /memfd:guest-memory (deleted)
Size:             262144 kB
Rss:                   0 kB
Pss:                   0 kB
Shared_Hugetlb:     2048 kB
Private_Hugetlb:   10240 kB
VmFlags: rd wr sh mr mw me ms dc dd ht
7f0030000000-7f0030001000 rw-s 00000000 00:0e 9                          anon_inode:[io_uring]
Rss:                   4 kB
Pss:                   2 kB
VmFlags: rd wr sh mr mw me ms dd mm
"""


def test_the_guests_memory_is_told_from_all_the_rest() -> None:
    usage = usage_of(SMAPS.splitlines())
    assert usage.resident == (40960 + 12288) << 10
    assert usage.pss == (20480 + 12288) << 10
    assert usage.huge == (4096 + 12288) << 10
    assert (usage.swapped, usage.locked) == (16 << 10, 8 << 10)
    assert usage.overhead == 102 << 10


def test_what_ksm_has_merged_is_in_pages() -> None:
    assert merged("ksm_rmap_items 5\nksm_merging_pages 3\n") == 3 * os.sysconf("SC_PAGESIZE")
    assert merged("") == 0


async def _usage(figures: Figures) -> int:
    usage = await figures.usage()
    assert usage is not None
    return usage.resident


def test_memory_that_is_kept_from_dumps_and_children_is_found_in_a_real_process() -> None:
    fds = [os.open(f"/proc/self/{name}", os.O_RDONLY) for name in ("smaps_rollup", "smaps")]
    figures = Figures(fds)
    before = asyncio.run(_usage(figures))
    memory = mmap.mmap(-1, 8 << 20)
    memory.madvise(mmap.MADV_DONTDUMP)
    memory.madvise(mmap.MADV_DONTFORK)
    memory.write(b"x" * (8 << 20))
    assert asyncio.run(_usage(figures)) - before == 8 << 20
    assert figures.totals()["memory-rss"] > 8 << 20
    figures.close()
