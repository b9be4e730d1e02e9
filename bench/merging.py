# SPDX-License-Identifier: Apache-2.0
"""Eight equal guests whose memory merges: what KSM saves, how soon, what ksmd takes for it, what all costs.

The guest is the tests' own: of its 128 MiB it writes to 96 MiB, a word a page, and 32 MiB of that are unlike
any other guest's. vmbus: its tuner, without and with the kernel's advisor, and fixed settings. Peer: QEMU
under libvirt, which has no tuner of its own on Debian, with the same settings. All with smart scan off,
for the host has no history.

saved: of what can be saved, 64 MiB of each guest but one, by PSS. to-90: seconds until that is 90 %.
ksmd: its CPU seconds until then. total: PSS of all processes (guests, VMMs, daemons) at that moment.

What else uses KSM on the host meanwhile costs ksmd time too.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Final

from bench import report
from bench.peers import Libvirt
from bench.system import Measured
from tests.lab import ksm
from tests.lab.system import ALICE
from tests.local.test_service_ksm import ksmd_seconds

MACHINES: Final = 8
EQUAL: Final = 64  # MiB
UNLIKE: Final = 32
FIXED: Final = {"smart_scan": "0", "pages_to_scan": "1000", "sleep_millisecs": "20", "run": "1"}
DEADLINE: Final = 120.0
TUNER: Final = "[ksm.tuner]\non = true\nmost-cpu = 20\nadvisor = {advisor}\n"


class Tuned(Measured):
    """A measured system that may manage KSM."""

    def __init__(self, config: str) -> None:
        super().__init__()
        self.broker_toml.write_text(self.broker_toml.read_text() + "[ksm]\nmanage = true\n")
        self.vmbusd_toml.write_text(config)


def merge(machines: int, pids: list[int]) -> dict[str, object]:
    """Wait until 90 % of what is possible is saved, or for DEADLINE seconds."""
    possible = (machines - 1) * EQUAL
    begun, used = time.monotonic(), ksmd_seconds()
    before = pss(pids)
    while (saved := before - pss(pids)) < 0.9 * possible:
        if time.monotonic() - begun > DEADLINE:
            break
        time.sleep(0.5)
    return {
        "saved-share": round(saved / possible, 3),
        "to-90-s": round(time.monotonic() - begun, 1),
        "ksmd-s": round(ksmd_seconds() - used, 2),
        "total-before-mib": before,
        "total-mib": pss(pids),
    }


def pss(pids: list[int]) -> int:
    """MiB."""
    texts = [Path(f"/proc/{pid}/smaps_rollup").read_text() for pid in pids]
    return sum(int(text.partition("\nPss:")[2].split()[0]) for text in texts) >> 10


def cmdline(number: int) -> str:
    """The guest's."""
    return f"fill equal={EQUAL} unlike={UNLIKE} seed={number + 1}"


def vmbus(machines: int, config: str, fixed: dict[str, str]) -> dict[str, object]:
    """Machines of Alice."""
    with Tuned(config) as system:
        for number in range(machines):
            words = ["--memory", "128M", "--kernel", str(system.kernel), "--cmdline", cmdline(number)]
            done = system.vmbusctl(ALICE, "run", "--detach", "--name", f"m{number}", *words, timeout=120)
            if done.returncode:
                raise RuntimeError(done.stderr)
        put(fixed)
        pids = [*system.workers(), system.broker.pid, system.service.pid]
        return merge(machines, pids)


def libvirt(machines: int) -> dict[str, object]:
    """Domains with the same guest."""
    with Measured() as system, Libvirt(system) as peer:
        for number in range(machines):
            peer.define(f"m{number}", memory=128, kernel=system.kernel, cmdline=cmdline(number))
            peer.virsh("start", f"m{number}")
        processes = peer.processes()
        least, last = (EQUAL + UNLIKE) * machines, 0
        end = time.monotonic() + DEADLINE
        while not least < (now := pss(processes)) <= last and time.monotonic() < end:
            last = now  # until all have filled their memory
            time.sleep(5)
        put(FIXED)
        figures = merge(machines, [*processes, *peer.daemons()])
        return {**figures, "version": peer.version()}


def put(settings: dict[str, str]) -> None:
    """Write KSM's settings, as an administrator does."""
    for name, value in settings.items():
        if (ksm.KSM / name).exists():
            (ksm.KSM / name).write_text(value)


def main() -> None:
    """Run and report."""
    machines = int(sys.argv[1]) if len(sys.argv) > 1 else MACHINES
    runs: dict[str, object] = {}
    with ksm.alone():
        for name, config, fixed in (
            ("vmbus-tuner", TUNER.format(advisor="false"), {}),
            ("vmbus-advisor", TUNER.format(advisor="true"), {}),
            ("vmbus-fixed", "", FIXED),
        ):
            put({"smart_scan": "0"})
            runs[name] = vmbus(machines, config, fixed)
            put({"run": "2"})
        put({"run": "0"})
        runs["libvirt-fixed"] = libvirt(machines)
    report.emit(
        "merging",
        machines=machines,
        **runs,
        aims={"saved": "libvirt's", "ksmd-s": "0.5 of libvirt's", "total-mib": "0.6 of libvirt's"},
    )


if __name__ == "__main__":
    main()
