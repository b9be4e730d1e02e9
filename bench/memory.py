# SPDX-License-Identifier: Apache-2.0
"""What an idle machine costs beside its guest's own memory: PSS of its processes with 20 running.

PSS (proportional set size) counts a page that n processes share as 1/n of a page. From each process's
/proc/PID/smaps all mappings are added up, less those that hold the guest's RAM (by their size). The broker's,
the service's and libvirtd's own memory is told apart from that, once, not a machine.

vmbus: 20 machines of 64 MiB whose guest halts. libvirt: 20 domains of 64 MiB, started paused, so that the
firmware does not even run.
"""

from __future__ import annotations

import sys
from pathlib import Path

from bench import report
from bench.peers import Libvirt
from bench.system import Measured
from tests.lab.system import ALICE

MACHINES = 20
GUEST_MIB = 64


def beside_guest(pid: int, guest_mib: int = GUEST_MIB) -> tuple[float, float]:
    """MB of PSS that are not the guest's RAM, and MB of RSS in all, of a process."""
    pss = rss = 0
    size = 0
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        key, _, value = line.partition(":")
        if key == "Size":
            size = int(value.split()[0]) // 1024
        elif key == "Rss":
            rss += int(value.split()[0])
        elif key == "Pss" and size != guest_mib:
            pss += int(value.split()[0])
    return pss * 1024 / 1e6, rss * 1024 / 1e6


def figures(pids: list[int]) -> dict[str, object]:
    """Spread over processes of one kind."""
    found = [beside_guest(pid) for pid in pids]
    return {
        "pss-mb": report.spread([pss for pss, _ in found], digits=2),
        "rss-mb": report.spread([rss for _, rss in found], digits=2),
    }


def main() -> None:
    """Run and report."""
    machines = int(sys.argv[1]) if len(sys.argv) > 1 else MACHINES
    with Measured() as system:
        system.client(ALICE, "bench.many_client", "start", str(machines), str(system.kernel))
        workers = figures(list(system.workers()))
        daemons = {
            "broker-mb": round(beside_guest(system.broker.pid)[0], 2),
            "service-mb": round(beside_guest(system.service.pid)[0], 2),
        }
    with Measured() as system, Libvirt(system) as peer:
        for number in range(machines):
            peer.define(f"idle{number}", memory=GUEST_MIB)
            peer.virsh("start", "--paused", f"idle{number}")
        qemu = figures(peer.processes())
        version = peer.version()
    report.emit(
        "memory",
        machines=machines,
        **{"vmbus-worker": workers, "vmbus-daemons": daemons, "qemu": qemu, "libvirt": version},
        aims={"pss-mb": 12, "hoped-mb": 7},
    )


if __name__ == "__main__":
    main()
