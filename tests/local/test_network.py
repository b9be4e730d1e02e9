# SPDX-License-Identifier: Apache-2.0
"""A machine on a bridge through the whole system: who may have it, and what goes over it."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.lab.bridge import RULE, granted
from tests.lab.guest import Console
from tests.lab.system import ALICE, BOB, SLOW, System
from tests.local.broker_bed import wait_until
from tests.local.ctl_bed import ctl, place_guest

pytestmark = [pytest.mark.requires("root", "kvm", "tap", "bridge"), pytest.mark.long]

BRIDGE = f"vmbn{os.getpid()}"
NET = Path("/sys/class/net")


def ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


@pytest.fixture
def system() -> Iterator[System]:
    """A whole system, and a bridge that broker.toml grants to alice, with address 10.99.0.1."""
    with granted(BRIDGE, "10.99.0.1/30", rule="") as whole:
        yield whole


def ports() -> list[str]:
    return sorted(os.listdir(NET / BRIDGE / "brif"))


def ping(count: int, size: int) -> int:
    """How many of ``count`` echo requests with so many bytes the guest answers."""
    words = ["ping", "-i", "0.2", "-I", BRIDGE, "-W", str(10 * SLOW), "-c", str(count), "-s", str(size)]
    words += ["10.99.0.2"]
    timeout = 120 * SLOW
    done = subprocess.run(["busybox", *words], check=False, capture_output=True, text=True, timeout=timeout)
    return done.stdout.count("bytes from 10.99.0.2")


def definition(system: System, user: str, *words: str) -> list[str]:
    """The words of ``define`` for the bare-metal guest that answers pings."""
    kernel = place_guest(system, user)
    return ["define", "--name", "net", "--memory", "16M", "--kernel", str(kernel), *words]


def show(system: System) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(ctl(system, "show", "net", "--json"))
    return found


def printed(system: System, pattern: str, seconds: float, *, name: str = "net") -> str:
    """Start a machine, with somebody listening before its first word: all until ``pattern`` is printed."""
    ctl(system, "start", name, "--paused")
    reader = Console(system, ALICE, name, "--read-only")
    try:
        ctl(system, "resume", name)
        reader.wait_for(pattern, seconds)
        return reader.text
    finally:
        reader.close()


def start(system: System) -> None:
    """Start it, and wait until its driver runs and what its tap had before was thrown away.

    The network's thread takes its commands in order: it answers a pause after it has begun.
    """
    printed(system, "net: mac .*\n", 30)
    ctl(system, "pause", "net")
    ctl(system, "resume", "net")


def neighbour() -> str:
    """The hardware address behind the guest's."""
    found = re.search(r"lladdr (\S+)", ip("neighbour", "show", "10.99.0.2", "dev", BRIDGE))
    assert found
    return found[1]


def test_a_machine_on_a_bridge_is_reached_and_keeps_its_address(system: System) -> None:
    before = system.counts()
    define = definition(system, ALICE, "--vcpus", "2", "--cmdline", "net-echo count=5", "--nic", BRIDGE)
    refused = system.vmbusctl(ALICE, *define)
    assert refused.returncode != 0
    assert "org.vmbus1.bridge.use" in refused.stderr

    system.rule(RULE)
    ctl(system, *define)
    system.rule("")  # asked when it is defined, not when it starts
    [nic] = show(system)["definition"]["nics"]
    assert re.fullmatch(r"52(:[0-9a-f]{2}){5}", nic["mac"])

    for _ in range(2):
        start(system)
        [port] = ports()
        # A queue for each vCPU, in a worker that has no network of its own.
        wait_until(lambda port=port: len(list((NET / port / "queues").glob("rx-*"))) == 2)  # type: ignore[misc]
        assert ping(4, 1400) == 4
        assert neighbour() == nic["mac"]
        assert ping(1, 56) == 1
        ctl(system, "wait", "net", "--state", "stopped", "--timeout", str(30 * SLOW))
        assert show(system)["state-reason"] == "guest-poweroff"
        wait_until(lambda: ports() == [])
        ip("neighbour", "flush", "dev", BRIDGE)

    ctl(system, "undefine", "net")
    assert system.settle(before) == before


def test_the_counters_and_a_pause(system: System) -> None:
    system.rule(RULE)
    ctl(system, *definition(system, ALICE, "--cmdline", "net-echo count=100", "--nic", f"{BRIDGE},id=lan"))
    start(system)
    assert ping(3, 1000) == 3
    stats = json.loads(ctl(system, "show", "net", "--stats", "--json"))["stats"]
    moved = stats["devices"]["nic/lan"]["pair-0"]
    assert moved["transmitted"]["packets"] >= 3
    assert moved["received"]["bytes"] > 3000
    ctl(system, "pause", "net")
    ctl(system, "resume", "net")
    assert ping(2, 56) == 2
    ctl(system, "kill", "net")
    wait_until(lambda: ports() == [])


def say_to_some(bridge: str, own: str) -> None:
    """To a guest in mode net-sort whose address is ``own``: X, Y, Z are for it, the small letters are not."""
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as mouth:
        mouth.bind((bridge, 0))
        for to, letter in (
            ("52:54:00:99:99:99", "a"),  # somebody else
            ("01:00:5e:00:00:07", "b"),  # groups that it is not in
            ("33:33:00:00:00:01", "c"),
            (own, "X"),
            ("01:00:5e:00:00:05", "Y"),  # the one that it is in
            ("ff:ff:ff:ff:ff:ff", "Z"),
        ):
            frame = bytes(int(part, 16) for part in to.split(":")) + bytes(6) + b"\x88\xb5"
            mouth.send(frame.ljust(54, b"\0") + b"vmbus" + letter.encode())


def test_a_guest_hears_what_it_said_it_wants(system: System) -> None:
    system.rule(RULE)
    ctl(system, *definition(system, ALICE, "--cmdline", "net-sort", "--nic", BRIDGE))
    start(system)
    console = Console(system, ALICE, "net", "--read-only")
    own = console.wait_for("net: mac ([0-9a-f:]+) ", 30)[1]
    console.wait_for("net: sorted: 0 0\n", 30)
    say_to_some(BRIDGE, own)
    console.wait_for("heard Z\n", 30)
    assert re.findall("heard (.)\n", console.text) == ["X", "Y", "Z"]
    console.close()
    ctl(system, "kill", "net")


@pytest.mark.parametrize(("address", "heard"), [("", "cefhijJKLMN"), (",address=10.99.0.2", "JKLMN")])
def test_a_guest_that_says_it_is_somebody_else_is_not_heard(system: System, address: str, heard: str) -> None:
    system.rule(RULE)
    ctl(system, *definition(system, ALICE, "--cmdline", "net-spoof", "--nic", f"{BRIDGE}{address}"))
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3)) as ear:
        ear.bind((BRIDGE, 0))
        ear.settimeout(20 * SLOW)
        printed(system, "net: done", 30)
        letters = set()
        while "M" not in letters:  # the last
            frame = ear.recv(2000)
            if frame[54:59] == b"vmbus":
                letters.add(chr(frame[59]))
    assert "".join(sorted(letters)) == "".join(sorted(heard))
    ctl(system, "kill", "net")


def test_a_bridge_that_broker_toml_does_not_grant_is_refused_whatever_polkit_says(system: System) -> None:
    system.rule(RULE)
    refused = system.vmbusctl(BOB, *definition(system, BOB, "--nic", BRIDGE))
    assert refused.returncode != 0
    assert BRIDGE in refused.stderr
    assert ctl(system, "list", user=BOB).count("net") == 0


@pytest.mark.parametrize(
    ("flag", "argument"),
    [
        (f"{BRIDGE},queues=9", "nics[0].queues"),
        (f"{BRIDGE},mac=53:00:00:00:00:01", "nics[0].mac"),
        ("a-bridge-with-a-long-name", "nics[0].bridge"),
    ],
)
def test_a_nic_that_is_out_of_range_is_named(system: System, flag: str, argument: str) -> None:
    refused = system.vmbusctl(ALICE, *definition(system, ALICE, "--nic", flag))
    assert refused.returncode != 0
    assert argument in refused.stderr
