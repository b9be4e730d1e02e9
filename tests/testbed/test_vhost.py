# SPDX-License-Identifier: Apache-2.0
"""vhost-net: the kernel moves a guest's frames, hands over and takes back, and the guest never knows."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.lab.bridge import RULE, bridge, grant
from tests.lab.guest import Console, StockGuest
from tests.lab.system import ALICE, SLOW, System
from tests.local.broker_bed import wait_until
from tests.local.ctl_bed import ctl, place_guest
from tests.local.migration_bed import SHARED
from tests.local.test_network import say_to_some
from tests.testbed.test_network import FEATURES, Server

pytestmark = [
    pytest.mark.requires("root", "kvm", "kvm-hardware", "tap", "bridge", "vhost-net"),
    pytest.mark.timeout(900),
]

BRIDGE = f"vmbv{os.getpid()}"
DEVICE = Path("/dev/vhost-net")
GIVEN, DENIED = f'[vhost-net]\nusers = ["{ALICE}"]\n', "[vhost-net]\nusers = []\n"
HOST = "10.98.0.1"
BYTES = 8 << 20
DOWN, UP = 7010, 7011

DEBIAN = f"""\
carrier() {{ cat /sys/class/net/eth0/carrier; }}
echo "ready"
while [ ! -e /sys/class/net/eth0 ]; do sleep 0.1; done
ip link set eth0 up
ip address add 10.98.0.2/24 dev eth0
echo "queues $(ls -d /sys/class/net/eth0/queues/rx-* | wc -l)"
echo "features $(cat /sys/class/net/eth0/device/features)"
ping -c 3 -W 20 -s 8000 {HOST} >/dev/null && echo "fragmented pings answered"
nc {HOST} {DOWN} >/tmp/data
echo "got $(sha256sum </tmp/data)"
nc {HOST} {UP} </tmp/data
echo "sent"
while [ "$(carrier)" != 0 ]; do sleep 0.1; done
echo "unplugged"
while [ "$(carrier)" != 1 ]; do sleep 0.1; done
ping -c 2 -W 20 {HOST} >/dev/null && echo "plugged in again"
ping {HOST} >/dev/null 2>&1 &
while [ -e /sys/class/net/eth0 ]; do sleep 0.1; done
echo "gone"
poweroff -f
"""


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
        subprocess.run(["ip", "address", "add", f"{HOST}/24", "dev", BRIDGE], check=True)
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


def answered(count: int, by: str = BRIDGE, address: str = "10.99.0.2") -> bool:
    """Whether the guest answers so many echo requests."""
    words = ["ping", "-i", "0.2", "-I", by, "-W", str(10 * SLOW), "-c", str(count), "-s", "1400", address]
    done = subprocess.run(
        ["busybox", *words], check=False, capture_output=True, text=True, timeout=120 * SLOW
    )
    return done.stdout.count(f"bytes from {address}") == count


def started(system: System, mode: str, nic: str = BRIDGE, *words: str) -> Console:
    """Our own guest; its console."""
    kernel = place_guest(system)
    given = ["--name", "net", "--memory", "16M", "--kernel", str(kernel), "--cmdline", mode, *words]
    ctl(system, "define", *given, "--nic", f"{nic},id=lan")
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
        console = started(system, "net-spoof", f"{BRIDGE},address=10.99.0.2")
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


def test_nothing_is_left_of_a_worker_that_is_killed(system: System) -> None:
    allow(system, GIVEN)
    before = system.counts()
    links = set(os.listdir("/sys/class/net"))
    started(system, "net-echo count=1000").close()
    served(system, 2)
    [pid] = system.workers()
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: json.loads(ctl(system, "show", "net", "--json"))["state"] == "crashed", 20 * SLOW)
    ctl(system, "undefine", "net")
    assert system.settle(before) == before
    assert set(os.listdir("/sys/class/net")) == links


def test_debian_moves_data_loses_its_cable_and_its_interface_with_the_kernel_s_help(system: System) -> None:
    """Two queue pairs, and the features that there are without."""
    allow(system, GIVEN)
    data = random.Random(7).randbytes(BYTES)
    back = hashlib.sha256()

    def take(connection: socket.socket) -> None:
        while piece := connection.recv(1 << 16):
            back.update(piece)

    servers = [Server(DOWN, lambda to: to.sendall(data), HOST), Server(UP, take, HOST)]
    before = system.counts()
    with StockGuest(system, "debian", script=DEBIAN, vcpus=2) as guest:
        guest.make_disk()
        guest.define()
        guest.start()
        guest.console.wait_for("ready\n", 120)
        guest.ctl("attach-nic", guest.name, f"{BRIDGE},id=lan", timeout=60 * SLOW)
        guest.console.wait_for(f"got {hashlib.sha256(data).hexdigest()}", 120)
        guest.console.wait_for("sent\n", 120)
        found = figures(system, "debian")
        guest.ctl("set-link", guest.name, "lan", "down")
        guest.console.wait_for("unplugged\n", 60)
        assert figures(system, guest.name)["vhost"] == 0
        guest.ctl("set-link", guest.name, "lan", "up")
        guest.console.wait_for("plugged in again\n", 60)
        served(system, 4, guest.name)
        guest.ctl("detach-nic", guest.name, "lan", "--deadline", str(60 * SLOW), timeout=90)
        assert guest.wait_stopped()["state-reason"] == "guest-poweroff"
        text = guest.console.text
        guest.ctl("undefine", guest.name)
    for server in servers:
        server.join(10 * SLOW)
        assert not server.is_alive()
    assert back.hexdigest() == hashlib.sha256(data).hexdigest()
    assert "fragmented pings answered" in text and "queues 2\n" in text and "gone\n" in text
    features = re.search(r"features ([01]{64})\n", text)
    assert features and {bit for bit, one in enumerate(features[1]) if one == "1"} == FEATURES
    assert (found["vhost"], found["faults"]) == (4, 0)
    ours = sum(found[f"pair-{n}"][way]["bytes"] for n in (0, 1) for way in ("received", "transmitted"))
    assert ours < BYTES, "the kernel has moved it"
    assert system.settle(before) == before


def test_a_running_guest_moves_to_a_host_without_vhost_net_and_back(system: System) -> None:
    allow(system, GIVEN)
    policy = grant(BRIDGE) + DENIED + SHARED.format(place=system.place)
    with System(policy=policy) as other:
        other.rule(RULE)
        # One of a named model: what the host has besides stays there.
        started(system, "net-echo count=1000", BRIDGE, "--cpu-model", "x86-64-v2-amd-1").close()
        served(system, 2)
        assert answered(2)
        for source, target, queues in ((system, other, 0), (other, system, 2)):
            ctl(source, "migrate", "net", "--to", target.bus_address)
            assert answered(2)
            served(target, queues)
        gone(system)
