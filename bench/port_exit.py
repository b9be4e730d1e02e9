# SPDX-License-Identifier: Apache-2.0
"""What one port-I/O exit costs in vmbus's run loop, beside a bare KVM_RUN loop in C, and beside QEMU.

The same bare-metal guest (tests/guests, mode port-out) writes to a port that nobody has, again and again,
and tells the time by the PM timer; so the guest's own instructions are in all three figures. Many short
rounds take turns, and the least of each is compared: what disturbs can only add.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from bench import report
from bench.peers import EMULATOR
from bench.system import Measured
from tests.lab.system import ALICE
from tests.local.worker_guest import image

COUNT = 10_000
ROUNDS = 40
QEMU_EVERY = 5  # its firmware takes long
WRAP_US = (1 << 24) * 1_000_000 / 3_579_545
"""QEMU's PM timer has 24 bits (ACPI 6.5, 4.8.3.3); a run that meets their end looks longer by a multiple."""
SOURCE = Path(__file__).with_name("kvm_loop.c")


def bare_loop(build: Path) -> Path:
    """The C program, compiled."""
    program = build / "kvm_loop"
    subprocess.run(["gcc", "-O2", "-Wall", "-Wextra", "-Werror", "-o", program, SOURCE], check=True)
    return program


def microseconds(output: str, wrap: float = float("inf")) -> float:
    """Of one exit, from what the guest says; ``wrap`` is the timer's range in microseconds."""
    found = re.search(r"port-out: (\d+) in (\d+) us", output)
    if found is None:
        raise RuntimeError(f"the guest did not tell: {output[-500:]!r}")
    return int(found[2]) % wrap / int(found[1])


def console_of(argv: list[str]) -> str:
    """The output of a program that shows the guest's console on stdout."""
    return subprocess.run(argv, capture_output=True, text=True, timeout=120, check=True).stdout


def main() -> None:
    """Run and report."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS
    words = f"port-out count={COUNT}"
    bare, ours, qemu = [], [], []
    with Measured() as system:
        loop = bare_loop(system.place)
        machine = ["run", "--name", "exits", "--memory", "16M", "--kernel", "kernel", "--cmdline", words]
        emulator = [
            EMULATOR,
            "-M",
            "q35,accel=kvm",
            "-m",
            "64",
            "-nodefaults",
            "-display",
            "none",
            "-no-reboot",
        ]
        emulator += ["-serial", "stdio", "-kernel", str(image()), "-append", words]
        for number in range(rounds):
            bare.append(microseconds(console_of([str(loop), str(image()), words])))
            done = system.vmbusctl(ALICE, *machine, timeout=120)
            ours.append(microseconds(done.stdout))
            if number % QEMU_EVERY == 0:
                qemu.append(microseconds(console_of(emulator), WRAP_US))
    report.emit(
        "port-exit",
        exits=COUNT,
        **{
            "bare-us": report.spread(bare, digits=3),
            "vmbus-us": report.spread(ours, digits=3),
            "qemu-us": report.spread(qemu, digits=3),
            "vmbus-to-bare": round(min(ours) / min(bare), 3),
            "vmbus-to-qemu": round(min(ours) / min(qemu), 3),
        },
        aims={"vmbus-to-bare": 1.15},
    )


if __name__ == "__main__":
    main()
