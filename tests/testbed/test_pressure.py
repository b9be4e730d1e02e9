# SPDX-License-Identifier: Apache-2.0
"""The pressure policy on the kernel's own measure: a stock guest gives memory while tasks wait for some."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.guest import StockGuest
from tests.lab.system import SLOW, System

pytestmark = [
    pytest.mark.requires("kvm-hardware", "psi", "cgroup-v2-controllers"),
    pytest.mark.timeout(600),
]

MIB = 1 << 20
MEMORY = 192 * MIB
FLOOR = MEMORY // 4
GROUP = Path("/sys/fs/cgroup/vmbus-pressed")
CONFIG = (
    "[pressure]\non = true\nlow = 5\nhigh = 15\nstep = 0.2\ninterval = 1\n"  # source: /proc/pressure/memory
)

# A process that wants more and more memory, in a cgroup that may have 4 MiB (memory.high): the kernel makes
# it wait at every step, and that is what PSI counts.
GREEDY = """
import sys
open(sys.argv[1] + "/cgroup.procs", "w").write("0")
blocks = []
while len(blocks) < 64:
    blocks.append(bytearray(b"x" * (1 << 20)))
while True:
    blocks = [bytearray(block) for block in blocks]
"""


@pytest.fixture
def waiting() -> Iterator[list[subprocess.Popen[bytes]]]:
    """Processes that wait for memory, once the list is filled by ``press``; all end with the test."""
    GROUP.mkdir()
    (GROUP / "memory.high").write_text(f"{4 * MIB}")
    (GROUP / "memory.max").write_text(f"{256 * MIB}")
    started: list[subprocess.Popen[bytes]] = []
    yield started
    end(started)
    GROUP.rmdir()


def press(started: list[subprocess.Popen[bytes]]) -> None:
    started.extend(subprocess.Popen([sys.executable, "-c", GREEDY, str(GROUP)]) for _ in range(2))


def end(started: list[subprocess.Popen[bytes]]) -> None:
    for process in started:
        process.kill()
        process.wait()


def pressure() -> float:
    return float(Path("/proc/pressure/memory").read_text().split()[1].removeprefix("avg10="))


def target(guest: StockGuest) -> int:
    return int(guest.show()["memory-target"])


def until(guest: StockGuest, wanted: int, seconds: float) -> list[int]:
    """The targets that are seen until it is ``wanted``."""
    seen = [target(guest)]
    deadline = time.monotonic() + seconds * SLOW
    while seen[-1] != wanted:
        assert time.monotonic() < deadline, (seen, pressure())
        time.sleep(0.5)
        seen.append(target(guest))
    return seen


def test_while_tasks_wait_for_memory_a_guest_gives_down_to_its_floor_and_gets_it_back(
    waiting: list[subprocess.Popen[bytes]],
) -> None:
    script = 'echo "up"\nread word\necho "well"\npoweroff -f\n'
    with System(config=CONFIG) as system, StockGuest(system, "pressed", script=script, memory=192) as guest:
        guest.make_disk("8M")
        guest.define()
        guest.start()
        guest.console.wait_for("up\n", 60)
        until(guest, MEMORY, 30)  # the boot of the guest itself may have pressed the host

        press(waiting)
        deadline = time.monotonic() + 60 * SLOW
        lowest = MEMORY
        while lowest > MEMORY * 3 // 4:
            assert time.monotonic() < deadline, (lowest, pressure())
            time.sleep(0.5)
            lowest = min(lowest, target(guest))
        pressed = pressure()
        assert pressed >= 5, pressed
        deadline = time.monotonic() + 30 * SLOW
        while int(guest.show()["memory-actual"]) > MEMORY * 3 // 4:  # the guest's own driver gave it
            assert time.monotonic() < deadline
            time.sleep(0.5)

        end(waiting)
        seen = until(guest, MEMORY, 120)
        assert min(seen) >= FLOOR, seen
        assert "memory pressure" in system.logs()["service"]
        guest.console.send("x")
        guest.console.wait_for("well\n", 60)
        guest.wait_stopped()
