# SPDX-License-Identifier: Apache-2.0
"""Taps on bridges that broker.toml grants."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab import rules
from tests.local.broker_bed import BOB, Bed, broker, wait_until
from vmbus.wire import broker as wire

pytestmark = pytest.mark.requires("root", "kvm", "tap", "bridge")
NET = Path("/sys/class/net")
MAC = "52:54:00:00:00:01"


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


@pytest.fixture
def bed() -> Iterator[Bed]:
    """A broker, and bridge vmbt0, in whatever network the tests run in."""
    ip("link", "add", "vmbt0", "type", "bridge")
    try:
        with broker() as started:
            yield started
    finally:
        ip("link", "del", "vmbt0")


def ports() -> list[str]:
    return sorted(os.listdir(NET / "vmbt0/brif"))


def test_a_tap_is_a_port_of_its_bridge_and_goes_with_its_machine(bed: Bed) -> None:
    client = bed.connect()
    machine = bed.machine(client)
    for slot, queues in (("nic/a", 1), ("nic/b", 4)):
        reply = client.ask(wire.Tap, uuid=machine.uuid, slot=slot, mac=MAC, bridge="vmbt0", queues=queues)
        assert reply.error is None, reply
    assert len(ports()) == 2
    for name in ports():
        assert (
            (NET / name / "ifalias").read_text().strip().startswith(f"vmbus:{bed.instance}:{machine.uuid}:")
        )
        assert int((NET / name / "flags").read_text(), 16) & 1  # up
    wait_until(lambda: len(machine.ask(do="files")) == 2)
    tables = rules.of(bed.instance)
    assert len(tables) == 2 and all(machine.uuid.replace("-", "/") in name for name in tables)
    assert [entry["fds"] for _, entry in sorted(machine.ask(do="files").items())] == [1, 4]
    client.ask(wire.Kill, uuid=machine.uuid)
    client.wait_ended(machine.uuid)
    wait_until(lambda: ports() == [] and rules.of(bed.instance) == [])
    machine.close()


def seen_with(bed: Bed, mac: str) -> tuple[str, str]:
    """The addresses of the bridge and of the tap while a machine with this address is there."""
    client = bed.connect()
    machine = bed.machine(client)
    before = set(ports())
    assert client.ask(wire.Tap, uuid=machine.uuid, slot="nic/a", mac=mac, bridge="vmbt0").error is None
    (tap,) = set(ports()) - before
    found = [(NET / name / "address").read_text().strip() for name in ("vmbt0", tap)]
    client.ask(wire.Kill, uuid=machine.uuid)
    client.wait_ended(machine.uuid)
    wait_until(lambda: set(ports()) == before)
    machine.close()
    return found[0], found[1]


def test_a_bridge_has_one_address_whatever_machines_come_and_go(bed: Bed) -> None:
    own = "fe:54:00:00:00:01"
    # Without a port or an address of its own it has the machine's: the same with the same machine.
    assert [seen_with(bed, MAC) for _ in range(2)] == [(own, own)] * 2
    assert seen_with(bed, "fe:54:00:00:00:01")[1] == "fa:54:00:00:00:01", "never the guest's"
    ip("link", "add", "vmbt1", "address", "52:54:00:00:00:02", "type", "veth", "peer", "name", "vmbt2")
    try:
        ip("link", "set", "vmbt1", "master", "vmbt0")
        assert seen_with(bed, MAC) == ("52:54:00:00:00:02", own)
    finally:
        ip("link", "del", "vmbt1")


def test_a_tap_that_its_worker_made_persistent_goes_all_the_same(bed: Bed) -> None:
    client = bed.connect()
    machine = bed.machine(client)
    client.ask(wire.Tap, uuid=machine.uuid, slot="nic/a", mac=MAC, bridge="vmbt0")
    wait_until(lambda: len(machine.ask(do="files")) == 1)
    machine.ask(do="persist", slot="nic/a")
    client.ask(wire.Kill, uuid=machine.uuid)
    client.wait_ended(machine.uuid)
    wait_until(lambda: ports() == [])
    machine.close()


def test_a_restarted_broker_sweeps_its_own_taps_only(bed: Bed) -> None:
    client = bed.connect()
    machine = bed.machine(client)
    client.ask(wire.Tap, uuid=machine.uuid, slot="nic/a", mac=MAC, bridge="vmbt0")
    wait_until(lambda: len(machine.ask(do="files")) == 1)
    machine.ask(do="persist", slot="nic/a")
    ip("tuntap", "add", "vmbtother", "mode", "tap")
    ip("link", "set", "vmbtother", "alias", f"vmbus:another:{machine.uuid}:1;", "master", "vmbt0")
    subprocess.run(["nft", "add table netdev vmbus.another/x.y."], check=True)
    try:
        bed.stop(kill=True)
        os.kill(machine.pid, 9)
        wait_until(lambda: machine.pid not in bed.worker_pids())
        assert len(ports()) == 2
        bed.start()
        wait_until(lambda: ports() == ["vmbtother"] and rules.of(bed.instance) == [])
        assert rules.of("another-x") == ["netdev vmbus.another/x.y."]
    finally:
        ip("link", "del", "vmbtother")
        subprocess.run(["nft", "delete table netdev vmbus.another/x.y."], check=True)
    machine.close()


def test_a_bridge_that_is_not_granted_or_not_there_is_refused(bed: Bed) -> None:
    client = bed.connect()
    mine, theirs = bed.machine(client), bed.machine(client, owner=BOB)
    for machine, bridge, error in (
        (theirs, "vmbt0", "AccessDenied"),
        (mine, "br0", "AccessDenied"),
        (mine, "../lo", "AccessDenied"),
    ):
        reply = client.ask(wire.Tap, uuid=machine.uuid, slot="nic/a", mac=MAC, bridge=bridge)
        assert (reply.error, reply.argument) == (error, "bridge")
    ip("link", "del", "vmbt0")
    assert client.ask(wire.Tap, uuid=mine.uuid, slot="n", mac=MAC, bridge="vmbt0").error == "NotFound"
    ip("link", "add", "vmbt0", "type", "bridge")
    assert ports() == []
    wait_until(lambda: not [name for name in os.listdir(NET) if name.startswith("vt")])
    mine.close()
    theirs.close()
