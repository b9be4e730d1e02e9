# SPDX-License-Identifier: Apache-2.0
"""From a call on the bus to the first guest output, cold and with spare workers, beside ``virsh start``.

vmbus: an ordinary user's call of Machine.Start on a defined machine whose guest writes to its console at once
(bench/start_client.py says what is timed). libvirt: ``virsh start --paused``, from exec to exit, of a domain
without disks; its guest runs nothing, which spares it the firmware.

    chrt -f 10 python -m bench.start 4 alone    # at real-time priority, which libvirt does not bear
"""

from __future__ import annotations

import contextlib
import json
import sys
import time

from bench import report
from bench.peers import Libvirt
from bench.system import Measured
from tests.lab.system import ALICE

BLOCKS = 10
BLOCK = 5
SPARES = 2


def vmbus(system: Measured) -> list[tuple[float, float]]:
    """A block of starts."""
    words = (str(system.kernel), str(BLOCK), "0.5")  # a rest, in which spares are made again
    samples = json.loads(system.client(ALICE, "bench.start_client", *words))
    return [(first, reply) for first, reply in samples]


def libvirt(peer: Libvirt) -> list[float]:
    """A block of ``virsh start --paused``."""
    samples = []
    for _ in range(BLOCK):
        begin = time.perf_counter()
        peer.virsh("start", "--paused", "timed")
        samples.append(time.perf_counter() - begin)
        peer.virsh("destroy", "timed")
    return samples


def figures(samples: list[tuple[float, float]]) -> dict[str, object]:
    """Both times of vmbus."""
    return {
        "first-output-s": report.spread([first for first, _ in samples]),
        "start-reply-s": report.spread([reply for _, reply in samples]),
    }


def main() -> None:
    """Run blocks in turns, so that what else the host does meets all alike, and report."""
    blocks = int(sys.argv[1]) if len(sys.argv) > 1 else BLOCKS
    cold: list[tuple[float, float]] = []
    spare: list[tuple[float, float]] = []
    virsh: list[float] = []
    found: dict[str, object] = {}
    with Measured() as plain, Measured(spares=SPARES) as ready, contextlib.ExitStack() as stack:
        peer = None if sys.argv[2:] == ["alone"] else stack.enter_context(Libvirt(plain))
        if peer:
            peer.define("timed")
            found["libvirt"] = peer.version()
        time.sleep(3)  # spares are made when the broker is idle
        for _ in range(blocks):
            cold += vmbus(plain)
            spare += vmbus(ready)
            if peer:
                virsh += libvirt(peer)
    if virsh:
        found["virsh-start-paused-s"] = report.spread(virsh)
    found |= {"vmbus-cold": figures(cold), "vmbus-spare": figures(spare)}
    report.emit("start", **found, aims={"cold-s": 0.12, "spare-s": 0.03})


if __name__ == "__main__":
    main()
