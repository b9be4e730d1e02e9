# SPDX-License-Identifier: Apache-2.0
"""Touching 4 GiB of huge memory: Machine.Prefault beside mmap with MAP_POPULATE in two threads.

vmbus: a machine of huge pages, started paused; timed is the job, from the call on the bus to its end as its
signal tells it (bench/prefault_client.py). The peer: two threads of one process, each of which maps half of
the memory with MAP_HUGETLB | MAP_POPULATE. Both clear every page anew; they take turns, so that what else the
host does meets both. An argument makes it another number of MiB.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import sys
import threading
import time

from bench import report
from bench.system import Measured
from tests.lab.hugepages import enlarged
from tests.lab.system import ALICE

MIB = 4096
ROUNDS = 5
PAGE_MIB = 2
MAP_POPULATE = 0x8000
MAP_HUGETLB = 0x40000
RULE = """polkit.addRule(function(action, subject) {
    if (action.id == "org.vmbus1.hugepages.use") return polkit.Result.YES;
});"""


def populate(size: int) -> float:
    """Seconds that two threads take for ``size`` bytes; the memory is given back."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_HUGETLB | MAP_POPULATE
    half, places = size // 2, [0, 0]

    def work(number: int) -> None:
        places[number] = libc.mmap(None, half, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    begin = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    took = time.perf_counter() - begin
    failed = ctypes.c_void_p(-1).value
    if failed in places:
        raise OSError("there are fewer huge pages than were asked for")
    for place in places:
        libc.munmap(ctypes.c_void_p(place), ctypes.c_size_t(half))
    return took


def main() -> None:
    """Run in turns and report."""
    mib = int(sys.argv[1]) if len(sys.argv) > 1 else MIB
    ours: list[float] = []
    theirs: list[float] = []
    with Measured(hugepages=f"{mib}M") as system, enlarged(mib // PAGE_MIB):
        system.rule(RULE)
        populate(mib << 20)  # on a virtual host, memory that nobody has had before is slow the first time
        for _ in range(ROUNDS):
            ours += json.loads(
                system.client(ALICE, "bench.prefault_client", str(system.kernel), str(mib << 20))
            )
            theirs.append(populate(mib << 20))
    gib = mib / 1024
    report.emit(
        "prefault",
        mib=mib,
        **{
            "vmbus-gib-per-s": report.spread([gib / took for took in ours], digits=2),
            "map-populate-2-threads-gib-per-s": report.spread([gib / took for took in theirs], digits=2),
            "ratio": report.spread([b / a for a, b in zip(ours, theirs, strict=True)], digits=2),
        },
        aims={"ratio": 0.9},
    )


if __name__ == "__main__":
    main()
