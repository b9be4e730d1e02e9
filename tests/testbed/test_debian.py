# SPDX-License-Identifier: Apache-2.0
"""Debian's stock kernel on a qcow2 disk with ext4: what was written is there, and the image is sound.

Also: the service, the broker or both are killed while it runs, and started again.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator

import pytest

from tests.lab import kernels
from tests.lab.guest import StockGuest
from tests.lab.system import ALICE, NESTED, SLOW, System

pytestmark = [pytest.mark.requires("kvm-hardware"), pytest.mark.timeout(900)]

BACK_ON_THE_BUS = 30.0 if NESTED else 2.0  # seconds from the exec (SPECIFICATION.md)

CYCLES = """\
mount -t ext4 /dev/vda /mnt || echo "cannot mount"
echo "processors: $(grep -c ^processor /proc/cpuinfo)"
cd /mnt
for sum in *.sum; do
    [ -e $sum ] && { sha256sum -c $sum || echo "DAMAGED $sum"; }
done
n=$(ls *.sum 2>/dev/null | wc -l)
dd if=/dev/urandom of=data.$n bs=64k count=32 2>/dev/null
sha256sum data.$n >data.$n.sum
echo "cycle $n on $(uname -r)" >>log
cd /
umount /mnt && echo "unmounted"
poweroff -f
"""

HEARTBEAT = """\
mount -t ext4 /dev/vda /mnt || echo "cannot mount"
acpid -d -c /etc/acpi >/dev/null 2>&1 &
echo "first words"
n=0
while [ ! -e /run/power-button ]; do
    n=$((n + 1))
    for i in 1 2 3 4 5 6 7 8; do dd if=/dev/zero of=/mnt/busy$i bs=64k count=16 conv=fsync 2>/dev/null; done
    echo "beat $n"
done
echo "end after beat $n" >/mnt/log
umount /mnt && echo "unmounted"
poweroff -f
"""
BUTTON = {"etc/acpi/PWRF/00000080": b"#!/bin/sh\ntouch /run/power-button\n"}


@pytest.fixture(scope="module")
def system() -> Iterator[System]:
    with System() as whole:
        yield whole


def cycle(guest: StockGuest, number: int) -> None:
    """One start to power off; the guest finds what the cycles before it wrote."""
    guest.start_at_console()
    guest.wait_for("unmounted", 60)
    text = guest.console.text
    ended = guest.wait_stopped()
    assert (ended["state"], ended["state-reason"]) == ("stopped", "guest-poweroff")
    assert f"processors: {guest.vcpus}\n" in text
    assert "cannot mount" not in text and "DAMAGED" not in text and "FAILED" not in text
    assert text.count(": OK") == number
    guest.check_disk()
    log = guest.read_back("/log").splitlines()
    assert log == [f"cycle {n} on {guest.kernel.release}" for n in range(number + 1)]


def cycles(system: System, name: str, *, vcpus: int, rounds: int, series: str = "6.12") -> None:
    """Define, ``rounds`` cycles, undefine; nothing is left over."""
    before = system.counts()
    with StockGuest(system, name, script=CYCLES, vcpus=vcpus, kernel=kernels.stock(series)) as guest:
        guest.make_disk()
        guest.define()
        for number in range(rounds):
            cycle(guest, number)
        guest.ctl("undefine", name)
    assert system.settle(before) == before


@pytest.mark.parametrize("vcpus", [1, 2])
def test_what_was_written_is_there_after_a_restart_of_the_machine(system: System, vcpus: int) -> None:
    cycles(system, f"cycle-{vcpus}", vcpus=vcpus, rounds=2)


def test_the_oldest_supported_kernel_runs_too(system: System) -> None:
    cycles(system, "oldest", vcpus=1, rounds=1, series="6.1")


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("vcpus", [1, 2, 4])
def test_what_was_written_is_there_after_ten_restarts(system: System, vcpus: int) -> None:
    cycles(system, f"soak-{vcpus}", vcpus=vcpus, rounds=10)


def state_on_the_bus(guest: StockGuest) -> str:
    """The machine's public State, asked with busctl; "" when nobody answers."""
    path = f"/org/vmbus1/machine/{guest.uuid.replace('-', '_')}"
    words = ["busctl", "get-property", "org.vmbus1", path, "org.vmbus1.Machine", "State"]
    return guest.system.run_as(guest.user, words).stdout.strip().removeprefix("s ").strip('"')


@pytest.mark.parametrize(
    "killed",
    [
        pytest.param(("service",), marks=pytest.mark.soak),
        pytest.param(("broker",), marks=pytest.mark.soak),
        ("service", "broker"),
    ],
    ids="+".join,
)
def test_debian_goes_on_when_what_serves_it_is_killed(system: System, killed: tuple[str, ...]) -> None:
    name = "beat-" + "-".join(killed)
    daemons = [daemon for daemon in (system.broker, system.service) if daemon.name in killed]
    with StockGuest(system, name, script=HEARTBEAT, files=BUTTON) as guest:
        guest.make_disk()
        guest.define()
        guest.start()
        guest.console.wait_for("beat 3\n", 60)
        [worker] = system.workers()

        for daemon in daemons:
            daemon.kill(signal.SIGKILL)
        for daemon in daemons:
            daemon.start(wait=False)
        began = time.monotonic()
        while state_on_the_bus(guest) != "running":
            assert time.monotonic() - began < BACK_ON_THE_BUS, system.logs()
            time.sleep(0.1)

        assert guest.show()["state"] == "running"
        assert list(system.workers()) == [worker]
        console = guest.open_console()
        console.wait_for("first words", 20)  # the history
        last = console.text.count("beat ")
        deadline = time.monotonic() + 30 * SLOW
        while console.text.count("beat ") < last + 2:
            assert time.monotonic() < deadline, f"the guest stands still:\n{console.text[-2000:]}"
            time.sleep(0.1)

        guest.ctl("shutdown", name)
        console.wait_for("unmounted", 60)
        ended = guest.wait_stopped()
        assert (ended["state"], ended["state-reason"]) == ("stopped", "guest-poweroff")
        assert guest.read_back("/log").startswith("end after beat ")
        guest.check_disk()
        guest.ctl("undefine", name)


def test_the_image_belongs_to_its_owner_alone(system: System) -> None:
    guest = StockGuest(system, "owned", script="poweroff -f", user=ALICE)
    assert guest.make_disk().startswith("-rw------- 1 vmbus-alice vmbus-alice ")
    assert system.run_as("vmbus-bob", ["qemu-img", "check", guest.disk]).returncode != 0
