# SPDX-License-Identifier: Apache-2.0
"""Eight equal guests whose memory merges: what KSM saves, how soon, what ksmd takes for it, what all costs.

The guest is the tests' own: of its 128 MiB it writes to 96 MiB, a word a page, and 32 MiB of that are unlike
any other guest's. vmbus: its tuner, the kernel's advisor set up by the tuner, and fixed settings. Peer: QEMU
under libvirt, which has no tuner of its own on Debian, with the same fixed settings. All with smart scan off,
for the host has no history.

Each run is watched for a window (an argument; default 120 s) from the moment when all guests are there.
saved-share: of what can be saved, 64 MiB of each guest but one, by RSS less PSS of the guests' RAM, at its
end. to-90-s: seconds until
that was 90 %, null if it was not. ksmd-to-90-s: ksmd's CPU seconds until then; ksmd-s: in the whole window;
ksmd-share: of a CPU, the greatest in any 10 s. total-mib: PSS of all processes at the end (guests, VMMs,
daemons); guests-mib: of that, the guests' memory.

    python -m bench.merging [MACHINES [WINDOW [RUN ...]]]

What else uses KSM on the host meanwhile costs ksmd time too.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench import report
from bench.peers import Libvirt
from bench.system import Measured
from tests.lab import ksm
from tests.lab.system import ALICE
from tests.local.test_service_ksm import ksmd_seconds

MACHINES: Final = 8
MEMORY: Final = 128  # MiB, as the next two
EQUAL: Final = 64
UNLIKE: Final = 32
FIXED: Final = {"smart_scan": "0", "pages_to_scan": "1000", "sleep_millisecs": "20", "run": "1"}
DEFAULTS: Final = FIXED | {"pages_to_scan": "100"}  # the kernel's own
WINDOW: Final = 120.0
FILLING: Final = 120.0
SHARE_OVER: Final = 10.0
TUNER: Final = "[ksm.tuner]\non = true\nmost-cpu = 20\nadvisor = {advisor}\nscan-time = {scan_time}\n"


class Tuned(Measured):
    """A measured system that may manage KSM."""

    def __init__(self, config: str) -> None:
        super().__init__()
        self.broker_toml.write_text(self.broker_toml.read_text() + "[ksm]\nmanage = true\n")
        self.vmbusd_toml.write_text(config)


def merge(machines: int, pids: list[int], window: float) -> dict[str, object]:
    """What happens in ``window`` seconds."""
    possible = (machines - 1) * EQUAL
    begun, used = time.monotonic(), ksmd_seconds()
    before = Memory.of(pids)
    reached: tuple[float, float] | None = None
    samples = [(0.0, 0.0)]
    while samples[-1][0] < window:
        time.sleep(0.5)
        samples.append((time.monotonic() - begun, ksmd_seconds() - used))
        if reached is None and Memory.of(pids).saved >= 0.9 * possible:
            reached = samples[-1]
    after = Memory.of(pids)
    return {
        "saved-share": round(after.saved / possible, 3),
        "to-90-s": reached and round(reached[0], 1),
        "ksmd-to-90-s": reached and round(reached[1], 2),
        "ksmd-s": round(samples[-1][1], 2),
        "ksmd-share": round(greatest_share(samples), 3),
        "saved-before-mib": before.saved,
        "total-before-mib": before.total,
        "total-mib": after.total,
        "guests-mib": after.guests,
    }


def greatest_share(samples: list[tuple[float, float]]) -> float:
    """Of one CPU, over SHARE_OVER seconds or a little more."""
    shares = [0.0]
    for moment, used in samples:
        later = next((s for s in samples if s[0] >= moment + SHARE_OVER), None)
        if later:
            shares.append((later[1] - used) / (later[0] - moment))
    return max(shares)


@dataclass(frozen=True)
class Memory:
    """MiB: PSS of processes, of that guests' RAM (told by its size), and what that is less than its RSS."""

    total: int
    guests: int
    saved: int

    @classmethod
    def of(cls, pids: list[int]) -> Memory:
        """Now."""
        total = guests = resident = size = 0
        for pid in pids:
            for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
                key, _, value = line.partition(":")
                if key == "Size":
                    size = int(value.split()[0]) >> 10
                elif key == "Rss" and size == MEMORY:
                    resident += int(value.split()[0])
                elif key == "Pss":
                    total += int(value.split()[0])
                    guests += int(value.split()[0]) if size == MEMORY else 0
        return cls(total >> 10, guests >> 10, (resident - guests) >> 10)


def filled(pids: list[int]) -> None:
    """Wait until the guests have filled their memory."""
    end = time.monotonic() + FILLING
    while (now := Memory.of(pids)).guests + now.saved < (EQUAL + UNLIKE) * len(pids):
        if time.monotonic() > end:
            raise RuntimeError(f"the guests have filled {now} only")
        time.sleep(0.5)


def cmdline(number: int) -> str:
    """The guest's."""
    return f"fill equal={EQUAL} unlike={UNLIKE} seed={number + 1}"


def vmbus(machines: int, window: float, config: str, fixed: dict[str, str]) -> dict[str, object]:
    """Machines of Alice."""
    with Tuned(config) as system:
        for number in range(machines):
            words = ["--memory", f"{MEMORY}M", "--kernel", str(system.kernel), "--cmdline", cmdline(number)]
            done = system.vmbusctl(ALICE, "run", "--detach", "--name", f"m{number}", *words, timeout=120)
            if done.returncode:
                raise RuntimeError(done.stderr)
        workers = list(system.workers())
        filled(workers)
        put(fixed)
        pids = [*workers, system.broker.pid, system.service.pid]
        return merge(machines, pids, window)


def libvirt(machines: int, window: float) -> dict[str, object]:
    """Domains with the same guest."""
    with Measured() as system, Libvirt(system) as peer:
        for number in range(machines):
            peer.define(f"m{number}", memory=MEMORY, kernel=system.kernel, cmdline=cmdline(number))
            peer.virsh("start", f"m{number}")
        processes = peer.processes()
        filled(processes)
        put(FIXED)
        figures = merge(machines, [*processes, *peer.daemons()], window)
        return {**figures, "version": peer.version()}


def put(settings: dict[str, str]) -> None:
    """Write KSM's settings, as an administrator does."""
    for name, value in settings.items():
        if (ksm.KSM / name).exists():
            (ksm.KSM / name).write_text(value)


RUNS: Final = {
    "vmbus-tuner": (TUNER.format(advisor="false", scan_time=60), {}),
    "vmbus-advisor": (TUNER.format(advisor="true", scan_time=60), {}),
    "vmbus-advisor-20-s": (TUNER.format(advisor="true", scan_time=20), {}),
    "vmbus-fixed": ("", FIXED),
    "vmbus-kernel-defaults": ("", DEFAULTS),
}


def main() -> None:
    """Run and report."""
    machines = int(sys.argv[1]) if len(sys.argv) > 1 else MACHINES
    window = float(sys.argv[2]) if len(sys.argv) > 2 else WINDOW
    chosen = sys.argv[3:] or [*RUNS, "libvirt-fixed"]
    runs: dict[str, object] = {}
    with ksm.alone():
        for name in chosen:
            put({"run": "2"})
            put({"run": "0", "smart_scan": "0"})
            print(f"merging: {name}", file=sys.stderr)
            runs[name] = vmbus(machines, window, *RUNS[name]) if name in RUNS else libvirt(machines, window)
            print(f"merging: {runs[name]}", file=sys.stderr)
    report.emit(
        "merging",
        machines=machines,
        window=window,
        **runs,
        aims={"saved": "libvirt's", "ksmd-s": "0.5 of libvirt's", "total-mib": "0.6 of libvirt's"},
    )


if __name__ == "__main__":
    main()
