# SPDX-License-Identifier: Apache-2.0
"""Manager.ListMachines beside libvirt-dbus's ListDomains: 10 machines each, on one bus, in turns.

Both return an array of object paths, filtered by who asks; neither asks polkit. Calls per second with 32
under way at once on one connection; the time of a call alone; and ListMachines again with 1,000 machines.
With dbus-next and with dbus-fast in vmbusd. The client is bench/bus_client.py, the same for both.
"""

from __future__ import annotations

import json
import sys

from bench import report
from bench.peers import Libvirt
from bench.system import Measured
from tests.lab.system import ALICE

MACHINES = 10
MANY = 1000
AT_ONCE = 32
ROUNDS = 9

VMBUS = ("org.vmbus1", "/org/vmbus1", "org.vmbus1.Manager", "ListMachines", "")
LIBVIRT = ("org.libvirt", "/org/libvirt/QEMU", "org.libvirt.Connect", "ListDomains", "u")


def timed(system: Measured, user: str, call: tuple[str, ...], calls: int, at_once: int) -> dict[str, object]:
    """One run of the client."""
    words = ("/run/dbus/system_bus_socket", *call, str(calls), str(at_once))
    found: dict[str, object] = json.loads(system.client(user, "bench.bus_client", *words))
    return found


def rate(system: Measured, user: str, call: tuple[str, ...], calls: int) -> float:
    """Calls per second with 32 under way."""
    seconds = timed(system, user, call, calls, AT_ONCE)["seconds"]
    assert isinstance(seconds, float)
    return calls / seconds


def alone(system: Measured, user: str, call: tuple[str, ...], calls: int) -> dict[str, float | int]:
    """Milliseconds of a call with nothing else under way."""
    single = timed(system, user, call, calls, 1)["single"]
    assert isinstance(single, list)
    return report.spread([1000 * seconds for seconds in single], digits=3)


def one_library(library: str, calls: int) -> dict[str, object]:
    """vmbusd with ``library`` and libvirt-dbus in turns."""
    with Measured(library=library) as system, Libvirt(system) as peer:
        system.client(ALICE, "bench.many_client", "define", str(MACHINES), str(system.kernel))
        for number in range(MACHINES):
            peer.define(f"listed{number}")
        ours, theirs = [], []
        for _ in range(ROUNDS):
            ours.append(rate(system, ALICE, VMBUS, calls))
            theirs.append(rate(system, "root", LIBVIRT, calls))
        figures: dict[str, object] = {
            "vmbus-calls-per-s": round(max(ours)),
            "libvirt-dbus-calls-per-s": round(max(theirs)),
            "ratio": round(max(ours) / max(theirs), 2),
            "vmbus-alone-ms": alone(system, ALICE, VMBUS, calls // 4),
            "libvirt-dbus-alone-ms": alone(system, "root", LIBVIRT, calls // 4),
        }
        system.client(ALICE, "bench.many_client", "define", str(MANY), str(system.kernel))
        figures["vmbus-calls-per-s-with-1000"] = round(rate(system, ALICE, VMBUS, calls // 4))
        figures["vmbus-alone-ms-with-1000"] = alone(system, ALICE, VMBUS, calls // 10)
    return figures


def main() -> None:
    """Run and report."""
    calls = int(sys.argv[1]) if len(sys.argv) > 1 else 2000
    report.emit(
        "list-machines",
        **{
            "at-once": AT_ONCE,
            "dbus-next": one_library("dbus_next", calls),
            "dbus-fast": one_library("dbus_fast", calls),
        },
        aims={"dbus-next-ratio": 1, "dbus-fast-ratio": 3},
    )


if __name__ == "__main__":
    main()
