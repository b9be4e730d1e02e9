# SPDX-License-Identifier: Apache-2.0
"""Debian's stock kernel on a bridge: pings, and bulk data both ways with its checksum."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.lab.bridge import granted
from tests.lab.guest import StockGuest
from tests.lab.system import SLOW, System

pytestmark = [pytest.mark.requires("kvm-hardware", "tap", "bridge"), pytest.mark.timeout(900)]

BRIDGE = f"vmbl{os.getpid()}"
HOST = "10.98.0.1"
BYTES = 16 << 20
DOWN, UP, PARK = 7000, 7001, 7002

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
nc {HOST} {PARK} </dev/null
poweroff -f
"""


@pytest.fixture(scope="module")
def system() -> Iterator[System]:
    """A whole system, and a bridge with an address that broker.toml grants."""
    with granted(BRIDGE, f"{HOST}/24") as whole:
        yield whole


class Server(threading.Thread):
    """Takes one connection to a port of the bridge's address."""

    def __init__(self, port: int, serve: Callable[[socket.socket], None]) -> None:
        super().__init__(daemon=True)
        self._serve = serve
        self._listener = socket.create_server((HOST, port))
        self._listener.settimeout(120 * SLOW)
        self.start()

    def run(self) -> None:
        with self._listener, self._listener.accept()[0] as connection:
            connection.settimeout(60 * SLOW)
            self._serve(connection)


def counters(guest: StockGuest) -> dict[str, dict[str, int]]:
    """What both pairs of the interface have moved: direction to figures."""
    stats = json.loads(guest.ctl("show", guest.name, "--stats", "--json"))["stats"]
    device: dict[str, Any] = stats["devices"]["nic/nic0"]
    assert device["faults"] == 0
    pairs = [device[name] for name in device if name.startswith("pair-")]
    return {
        direction: {
            figure: sum(pair[direction][figure] for pair in pairs) for figure in ("packets", "bytes", "drops")
        }
        for direction in ("received", "transmitted")
    }


@pytest.mark.parametrize("vcpus", [1, 2])
def test_bulk_data_goes_both_ways_unharmed(system: System, vcpus: int) -> None:
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
    with StockGuest(system, name, script=SCRIPT, vcpus=vcpus, bridge=BRIDGE) as guest:
        guest.make_disk()
        guest.define()
        guest.start()
        guest.console.wait_for(f"got {checksum}", 120)
        guest.console.wait_for("sent\n", 120)
        assert parked.wait(60 * SLOW)
        moved = counters(guest)
        leave.set()
        assert guest.wait_stopped()["state-reason"] == "guest-poweroff"
        text = guest.console.text
        [nic] = guest.show()["definition"]["nics"]
        guest.ctl("undefine", name)
    for server in servers:
        server.join(10 * SLOW)
        assert not server.is_alive()

    assert back.hexdigest() == checksum
    assert "small pings answered" in text and "fragmented pings answered" in text
    assert f"address {nic['mac']} mtu 1500\n" in text
    assert f"queues {vcpus}\n" in text
    # CSUM, GUEST_CSUM, MTU, MAC, GUEST_TSO4/6, GUEST_ECN, HOST_TSO4/6, HOST_ECN, MRG_RXBUF, STATUS, CTRL_VQ,
    # CTRL_RX, MQ, CTRL_MAC_ADDR, and the rings': what the kernel took is what there is.
    features = re.search(r"features ([01]{64})\n", text)
    assert features
    taken = {bit for bit, one in enumerate(features[1]) if one == "1"}
    assert taken == {0, 1, 3, 5, 7, 8, 9, 11, 12, 13, 15, 16, 17, 18, 22, 23, 28, 29, 32}
    for direction in ("received", "transmitted"):
        assert moved[direction]["bytes"] > BYTES
        # Segments of many frames each go through: that is what the offloads are for.
        assert moved[direction]["bytes"] / moved[direction]["packets"] > 2000, moved
    assert system.settle(before) == before
