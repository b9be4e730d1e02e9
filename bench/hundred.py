# SPDX-License-Identifier: Apache-2.0
"""A hundred machines, defined and started one after the other, and all at once.

What a definition and a start cost must not grow with the machines that there are: the last tenth is compared
with the first. Memory is PSS beside the guest's own with all of them running, as in bench/memory.py; the
guests halt. A start at once is from the first call to the last reply.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys

from bench import report
from bench.memory import beside_guest
from bench.system import ROOT, Measured
from tests.lab.system import ALICE

MACHINES = 100
GUEST_MIB = 16


def growth(samples: list[float]) -> float:
    """The median of the last tenth to that of the first."""
    tenth = max(1, len(samples) // 10)
    return round(statistics.median(samples[-tenth:]) / statistics.median(samples[:tenth]), 2)


def main() -> None:
    """Run and report. Argument: how many machines."""
    machines = int(sys.argv[1]) if len(sys.argv) > 1 else MACHINES
    with Measured() as system:
        client = system.popen(
            ALICE,
            [sys.executable, "-m", "bench.hundred_client", str(machines), str(system.kernel)],
            env={"PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert client.stdin and client.stdout
        one_by_one = json.loads(client.stdout.readline())
        memory = [beside_guest(pid, GUEST_MIB)[0] for pid in system.workers()]
        daemons = [beside_guest(daemon.pid, GUEST_MIB)[0] for daemon in (system.broker, system.service)]
        client.stdin.write(b"\n")
        client.stdin.flush()
        line = client.stdout.readline()
        if client.wait(60) or not line:
            raise RuntimeError(f"the client failed\n{system.logs()}")
    at_once = json.loads(line)
    definitions, starts = one_by_one["definitions"], one_by_one["starts"]
    report.emit(
        "hundred",
        machines=machines,
        **{
            "definition-s": report.spread(definitions),
            "definition-growth": growth(definitions),
            "start-s": report.spread(starts),
            "start-growth": growth(starts),
            "starts-a-second": round(machines / sum(starts), 1),
            "starts-a-second-at-once": round(machines / at_once, 1),
            "pss-mb-a-machine": report.spread(memory, digits=2),
            "daemons-mb": [round(each, 1) for each in daemons],
        },
        aims={"definition-growth": 1, "start-growth": 1},
    )


if __name__ == "__main__":
    main()
