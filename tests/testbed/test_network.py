# SPDX-License-Identifier: Apache-2.0
"""Debian's stock kernel on a bridge, and on a network of kind user: pings, and bulk data both ways with its
checksum."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.lab.bridge import RULE, bridge, grant
from tests.lab.guest import StockGuest
from tests.lab.system import ALICE, SLOW, System
from tests.lab.uplink import OUTSIDE, uplink

pytestmark = [pytest.mark.requires("kvm-hardware", "tap", "bridge"), pytest.mark.timeout(900)]

BRIDGE = f"vmbl{os.getpid()}"
HOST = "10.98.0.1"
BYTES = 8 << 20
DOWN, UP, PARK = 7000, 7001, 7002
FEATURES = {0, 1, 3, 5, 7, 8, 9, 11, 12, 13, 15, 16, 17, 18, 22, 23, 28, 29, 32}
"""CSUM, GUEST_CSUM, MTU, MAC, GUEST_TSO4/6, GUEST_ECN, HOST_TSO4/6, HOST_ECN, MRG_RXBUF, STATUS, CTRL_VQ,
CTRL_RX, MQ, CTRL_MAC_ADDR, and the rings': what the kernel takes is what there is."""
FEWER = 1 << 20
"""For passt's stream, on which each segment is cut in software."""

SCRIPT = f"""\
ip link set eth0 up
ip address add 10.98.0.2/24 dev eth0
echo "address $(cat /sys/class/net/eth0/address) mtu $(cat /sys/class/net/eth0/mtu)"
echo "queues $(ls -d /sys/class/net/eth0/queues/rx-* | wc -l)"
echo "features $(cat /sys/class/net/eth0/device/features)"
ping -c 3 -W 20 {HOST} >/dev/null && echo "small pings answered"
ping -c 3 -W 20 -s 8000 {HOST} >/dev/null && echo "fragmented pings answered"
nc {HOST} {DOWN} >/tmp/data
echo "got $(sha256sum </tmp/data)"
nc {HOST} {UP} </tmp/data
echo "sent"
ip link set eth1 up
udhcpc -i eth1 -n -q -s /lease >/dev/null
ip address show eth1 | grep -o "inet .*/"
head -c {FEWER} /tmp/data >/tmp/fewer
nc {OUTSIDE} {UP} </tmp/fewer
nc {OUTSIDE} {DOWN} >/tmp/fewer
echo "from outside $(sha256sum </tmp/fewer)"
nc {HOST} {PARK} </dev/null
poweroff -f
"""
LEASE = b"""\
#!/bin/sh
[ "$1" = bound ] && ip address add $ip/$mask dev $interface && ip route add default via $router
exit 0
"""
ELSEWHERE = f"""
import hashlib, socket
up, down = socket.create_server(("{OUTSIDE}", {UP})), socket.create_server(("{OUTSIDE}", {DOWN}))
print("ready", flush=True)
data = b""
with up.accept()[0] as connection:
    while piece := connection.recv(1 << 16):
        data += piece
print(hashlib.sha256(data).hexdigest(), flush=True)
with down.accept()[0] as connection:
    connection.sendall(data[::-1])
"""
"""Somebody beyond the host: takes what comes, and then sends it back to front."""


@pytest.fixture(scope="module")
def system() -> Iterator[System]:
    """A whole system, and a bridge with an address that broker.toml grants."""
    policy = f'{grant(BRIDGE)}[user-network]\nusers = ["{ALICE}"]\n'
    with bridge(BRIDGE, f"{HOST}/24"), System(policy=policy) as whole:
        whole.rule(RULE)
        yield whole


@pytest.fixture
def elsewhere() -> Iterator[subprocess.Popen[str]]:
    """Somebody beyond the host."""
    with uplink() as space:
        inside = ["ip", "netns", "exec", space, "python3", "-c", ELSEWHERE]
        with subprocess.Popen(inside, stdout=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout and process.stdout.readline() == "ready\n"
                yield process
            finally:
                process.kill()


class Server(threading.Thread):
    """Takes one connection to a port of the bridge's address."""

    def __init__(self, port: int, serve: Callable[[socket.socket], None], address: str = HOST) -> None:
        super().__init__(daemon=True)
        self._serve = serve
        self._listener = socket.create_server((address, port))
        self._listener.settimeout(120 * SLOW)
        self.start()

    def run(self) -> None:
        with self._listener, self._listener.accept()[0] as connection:
            connection.settimeout(60 * SLOW)
            self._serve(connection)


def counters(guest: StockGuest, nic: str) -> dict[str, dict[str, int]]:
    """What all pairs of the interface have moved: direction to figures."""
    stats = json.loads(guest.ctl("show", guest.name, "--stats", "--json"))["stats"]
    device: dict[str, Any] = stats["devices"][f"nic/{nic}"]
    assert device["faults"] == 0
    pairs = [device[name] for name in device if name.startswith("pair-")]
    return {
        direction: {
            figure: sum(pair[direction][figure] for pair in pairs) for figure in ("packets", "bytes", "drops")
        }
        for direction in ("received", "transmitted")
    }


@pytest.mark.parametrize("vcpus", [1, 2])
def test_bulk_data_goes_both_ways_unharmed(
    system: System, elsewhere: subprocess.Popen[str], vcpus: int
) -> None:
    data = random.Random(vcpus).randbytes(BYTES)
    checksum = hashlib.sha256(data).hexdigest()
    back = hashlib.sha256()
    parked, leave = threading.Event(), threading.Event()

    def take(connection: socket.socket) -> None:
        while piece := connection.recv(1 << 16):
            back.update(piece)

    def park(connection: socket.socket) -> None:
        parked.set()
        leave.wait(60 * SLOW)

    servers = [Server(DOWN, lambda to: to.sendall(data)), Server(UP, take), Server(PARK, park)]
    before = system.counts()
    name = f"network-{vcpus}"
    files = {"lease": LEASE}
    with StockGuest(system, name, script=SCRIPT, vcpus=vcpus, bridge=BRIDGE, files=files) as guest:
        guest.make_disk()
        guest.define("--nic", "kind=user,id=user")
        guest.start()
        guest.console.wait_for(f"got {checksum}", 120)
        guest.console.wait_for("sent\n", 120)
        fewer = hashlib.sha256(data[:FEWER][::-1]).hexdigest()
        guest.console.wait_for(f"from outside {fewer}", 120)
        assert parked.wait(60 * SLOW)
        moved, users = counters(guest, "nic0"), counters(guest, "user")
        leave.set()
        assert guest.wait_stopped()["state-reason"] == "guest-poweroff"
        text = guest.console.text
        nic, _ = guest.show()["definition"]["nics"]
        guest.ctl("undefine", name)
    for server in servers:
        server.join(10 * SLOW)
        assert not server.is_alive()

    assert back.hexdigest() == checksum
    assert "small pings answered" in text and "fragmented pings answered" in text
    assert f"address {nic['mac']} mtu 1500\n" in text
    assert f"queues {vcpus}\n" in text
    features = re.search(r"features ([01]{64})\n", text)
    assert features
    taken = {bit for bit, one in enumerate(features[1]) if one == "1"}
    assert taken == FEATURES
    for direction in ("received", "transmitted"):
        assert moved[direction]["bytes"] > BYTES
        # Segments of many frames each go through: that is what the offloads are for.
        assert moved[direction]["bytes"] / moved[direction]["packets"] > 2000, moved
    assert elsewhere.stdout
    assert elsewhere.stdout.readline().strip() == hashlib.sha256(data[:FEWER]).hexdigest()
    assert "inet 198.51.100.2/" in text  # by DHCP
    assert users["received"]["bytes"] > FEWER and users["transmitted"]["bytes"] > FEWER
    assert system.settle(before) == before
