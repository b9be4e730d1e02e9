# SPDX-License-Identifier: Apache-2.0
"""vhost-net: the kernel moves a guest's frames, hands over and takes back, and the guest never knows."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.lab.bridge import RULE, bridge, grant
from tests.lab.guest import Console
from tests.lab.system import ALICE, SLOW, System
from tests.local.broker_bed import wait_until
from tests.local.ctl_bed import ctl, place_guest
from tests.local.test_network import say_to_some

pytestmark = [
    pytest.mark.requires("root", "kvm", "tap", "bridge", "vhost-net"),
    pytest.mark.timeout(900),
]

BRIDGE = f"vmbv{os.getpid()}"
DEVICE = Path("/dev/vhost-net")
GIVEN, DENIED = f'[vhost-net]\nusers = ["{ALICE}"]\n', "[vhost-net]\nusers = []\n"


@pytest.fixture(scope="module", autouse=True)
def module() -> Iterator[None]:
    """The kernel's module, as long as these tests run."""
    there = DEVICE.exists()
    if not there:
        subprocess.run(["modprobe", "vhost_net"], check=True)
    yield
    if not there:
        subprocess.run(["modprobe", "-r", "vhost_net"], check=False)


@pytest.fixture(scope="module")
def system() -> Iterator[System]:
    """A whole system with vhost-net, which broker.toml lets alice have, and a bridge."""
    with bridge(BRIDGE, "10.99.0.1/24"), System(policy=grant(BRIDGE) + GIVEN) as whole:
        whole.rule(RULE)
        yield whole


def allow(system: System, whom: str) -> None:
    """Let broker.toml say who has vhost-net, and wait until the broker has heard."""
    before = reloads(system)
    text = system.broker_toml.read_text()
    head, _, _ = text.partition("[vhost-net]")
    system.broker_toml.write_text(head + whom)
    os.kill(system.broker.pid, signal.SIGHUP)
    wait_until(lambda: reloads(system) > before, 20 * SLOW)


def reloads(system: System) -> int:
    return sum(text.count("policy reloaded") for text in system.logs().values())


def figures(system: System, name: str = "net", nic: str = "lan") -> dict[str, Any]:
    stats = json.loads(ctl(system, "show", name, "--stats", "--json"))["stats"]
    found: dict[str, Any] = stats["devices"][f"nic/{nic}"]
    return found


def served(system: System, queues: int, name: str = "net", nic: str = "lan") -> None:
    """Wait until the kernel serves so many queues."""
    wait_until(lambda: figures(system, name, nic)["vhost"] == queues, 20 * SLOW)


def answered(count: int, size: int = 1400) -> bool:
    """Whether the guest answers so many echo requests."""
    words = ["ping", "-i", "0.2", "-I", BRIDGE, "-W", str(10 * SLOW), "-c", str(count), "-s", str(size)]
    command = ["busybox", *words, "10.99.0.2"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120 * SLOW)
    return done.stdout.count("bytes from 10.99.0.2") == count


def started(system: System, mode: str, nic: str = "") -> Console:
    """Our own guest; its console, once it has its network."""
    kernel = place_guest(system)
    words = ["--name", "net", "--memory", "16M", "--kernel", str(kernel), "--cmdline", mode]
    ctl(system, "define", *words, "--nic", f"{BRIDGE},id=lan{nic}")
    ctl(system, "start", "net", "--paused")
    console = Console(system, ALICE, "net", "--read-only")
    ctl(system, "resume", "net")
    return console


def gone(system: System) -> None:
    ctl(system, "kill", "net")
    ctl(system, "undefine", "net")


def test_a_guest_goes_on_with_vhost_net_without_it_and_with_it_again(system: System) -> None:
    allow(system, GIVEN)
    before = system.counts()
    started(system, "net-echo count=1000").close()
    served(system, 2)
    assert answered(4)
    pair = figures(system)["pair-0"]
    assert pair["transmitted"]["packets"] == 0, "the kernel has sent them"

    ctl(system, "pause", "net")
    assert figures(system)["vhost"] == 0
    ctl(system, "resume", "net")
    assert answered(2)
    served(system, 2)
    ctl(system, "set-link", "net", "lan", "down")
    assert figures(system)["vhost"] == 0
    ctl(system, "set-link", "net", "lan", "up")
    assert answered(2)
    served(system, 2)

    # It is saved with the kernel's help, goes on without it, and the other way round.
    for whom, queues in ((DENIED, 0), (GIVEN, 2)):
        ctl(system, "save", "net", "saved")
        allow(system, whom)
        ctl(system, "restore", "net", "saved")
        assert answered(3)
        served(system, queues)
        assert (figures(system)["pair-0"]["transmitted"]["packets"] >= 3) == (not queues)
        system.run_as(ALICE, ["rm", "saved"])
    gone(system)
    assert system.settle(before) == before


def test_a_guest_that_breaks_a_ring_is_told_so_though_the_kernel_serves_it(system: System) -> None:
    allow(system, GIVEN)
    console = started(system, "net-break")
    console.wait_for("net: needs a reset\n", 60)
    console.close()
    ctl(system, "wait", "net", "--timeout", str(60 * SLOW))
    ctl(system, "undefine", "net")


def test_a_guest_hears_what_it_said_it_wants_through_the_kernel(system: System) -> None:
    allow(system, GIVEN)
    console = started(system, "net-sort")
    own = console.wait_for("net: mac ([0-9a-f:]+) ", 60)[1]
    console.wait_for("net: sorted: 0 0\n", 60)
    served(system, 2)
    say_to_some(BRIDGE, own)
    console.wait_for("heard Z\n", 60)
    assert re.findall("heard (.)\n", console.text) == ["X", "Y", "Z"]
    console.close()
    gone(system)


def test_a_guest_that_says_it_is_somebody_else_is_not_heard_through_the_kernel(system: System) -> None:
    allow(system, GIVEN)
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3)) as ear:
        ear.bind((BRIDGE, 0))
        ear.settimeout(60 * SLOW)
        console = started(system, "net-spoof", ",address=10.99.0.2")
        letters = set()
        while "M" not in letters:  # the last
            frame = ear.recv(2048)
            if frame[54:59] == b"vmbus":
                letters.add(chr(frame[59]))
        console.wait_for("net: done\n", 60)
        assert figures(system)["pair-0"]["transmitted"]["packets"] == 0, "the kernel has sent them"
        console.close()
    assert letters == set("JKLMN")
    gone(system)
