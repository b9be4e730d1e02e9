# SPDX-License-Identifier: Apache-2.0
"""From a call on the bus to the first guest output, cold and with spare workers, beside ``virsh start``.

vmbus: an ordinary user's call of Machine.Start on a defined machine whose guest writes to its console at once
(bench/start_client.py says what is timed). libvirt: ``virsh start --paused``, from exec to exit, of a domain
without disks; its guest runs nothing, which spares it the firmware.
"""

from __future__ import annotations

import json
import sys
import time

from bench import report
from bench.peers import Libvirt
from bench.system import Measured
from tests.lab.system import ALICE

ROUNDS = 50
SPARES = 2


def vmbus(spares: int, rounds: int) -> dict[str, object]:
    """Figures of one system."""
    with Measured(spares=spares) as system:
        time.sleep(3)  # spares are made when the broker is idle
        rest = "1.0" if spares else "0.2"
        samples = json.loads(
            system.client(ALICE, "bench.start_client", str(system.kernel), str(rounds), rest)
        )
    return {
        "first-output-s": report.spread([first for first, _ in samples]),
        "start-reply-s": report.spread([reply for _, reply in samples]),
    }


def libvirt(rounds: int) -> tuple[dict[str, float | int], str]:
    """Figures of ``virsh start --paused``, and what ran."""
    samples = []
    with Measured() as system, Libvirt(system) as peer:
        peer.define("timed")
        for _ in range(rounds):
            begin = time.perf_counter()
            peer.virsh("start", "--paused", "timed")
            samples.append(time.perf_counter() - begin)
            peer.virsh("destroy", "timed")
        return report.spread(samples), peer.version()


def main() -> None:
    """Run and report."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS
    cold, spare = vmbus(0, rounds), vmbus(SPARES, rounds)
    virsh, version = libvirt(rounds)
    report.emit(
        "start",
        **{"vmbus-cold": cold, "vmbus-spare": spare, "virsh-start-paused-s": virsh, "libvirt": version},
        aims={"cold-s": 0.12, "spare-s": 0.03},
    )


if __name__ == "__main__":
    main()
