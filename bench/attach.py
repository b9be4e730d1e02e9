# SPDX-License-Identifier: Apache-2.0
"""From the call that attaches a network interface to the guest's finding it, beside QEMU's ``device_add``.

The same bare-metal guest (tests/guests, mode plug) serves its hotplug slots as a PCIe driver would and says
what it finds. vmbus: an ordinary user's Machine.AttachNic, over the bus, with polkit's word and the broker's;
a tap is made on a bridge, with its rules, and handed over. QEMU: two QMP commands, for a tap that is there.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO

from bench import report
from bench.net import ip
from bench.peers import EMULATOR
from bench.save import Qmp
from bench.system import Measured
from tests.lab.bridge import RULE, bridge, grant
from tests.lab.system import ALICE
from tests.local.worker_guest import image

ROUNDS = 20
BRIDGE = f"vmbb{os.getpid()}"
PORTS = 8  # hotplug slots


def theirs() -> list[float]:
    """Seconds from netdev_add to the guest's word, once for each slot."""
    taps = [f"vmbt{os.getpid()}{port}" for port in range(PORTS)]
    with contextlib.ExitStack() as stack:
        for tap in taps:
            ip("tuntap", "add", tap, "mode", "tap", "vnet_hdr")
            stack.callback(ip, "link", "del", tap)
            ip("link", "set", tap, "master", BRIDGE, "up")
        place = stack.enter_context(tempfile.TemporaryDirectory())
        words = [EMULATOR, "-M", "q35,accel=kvm", "-m", "64", "-nodefaults", "-display", "none", "-no-reboot"]
        words += ["-serial", "stdio", "-kernel", str(image()), "-append", "plug"]
        words += ["-global", "ICH9-LPC.acpi-pci-hotplug-with-bridge-support=off"]  # PCIe's own, as ours is
        words += ["-qmp", f"unix:{place}/qmp,server=on,wait=off"]
        for port in range(PORTS):
            more = ",multifunction=on" if port == 0 else ""
            words += ["-device", f"pcie-root-port,id=p{port},addr=10.{port},chassis={port},slot={port}{more}"]
        process = stack.enter_context(subprocess.Popen(words, stdout=subprocess.PIPE))
        stack.callback(process.kill)
        assert process.stdout
        return _attached(process.stdout, Path(place, "qmp"), taps)


def _attached(console: IO[bytes], monitor: Path, taps: list[str]) -> list[float]:
    def said(what: str) -> float:
        while what.encode() not in (line := console.readline()):
            if not line:
                raise RuntimeError("QEMU has ended")
        return time.perf_counter()

    said("plug: ready")
    qmp = Qmp(monitor)
    samples = []
    for port, tap in enumerate(taps):
        begin = time.perf_counter()
        qmp.ask(
            "netdev_add", type="tap", id=f"n{port}", ifname=tap, script="no", downscript="no", vhost=False
        )
        qmp.ask("device_add", driver="virtio-net-pci", netdev=f"n{port}", bus=f"p{port}", romfile="")
        # Its structures are behind a BAR that the guest does not place; it has read all its capabilities.
        samples.append(said(f"plug: slot {port + 1}: no virtio device") - begin)
    return samples


def main() -> None:
    """Run and report. Argument: rounds."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS
    with bridge(BRIDGE), Measured(policy=grant(BRIDGE)) as system:
        system.rule(RULE)
        words = (str(system.kernel), BRIDGE, str(rounds))
        ours = json.loads(system.client(ALICE, "bench.attach_client", *words))
        qemu = theirs()
    found = [each for each, _ in ours]
    report.emit(
        "attach",
        **{
            "vmbus-found-s": report.spread(found),
            "vmbus-reply-s": report.spread([reply for _, reply in ours]),
            "qemu-found-s": report.spread(qemu),
        },
    )


if __name__ == "__main__":
    main()
