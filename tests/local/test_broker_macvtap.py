# SPDX-License-Identifier: Apache-2.0
"""Macvtaps on interfaces that broker.toml grants: made, handed over, and swept by their marks."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab import rules
from tests.local.broker_bed import BOB, Bed, broker, wait_until
from vmbus.wire import broker as wire

pytestmark = pytest.mark.requires("root", "kvm", "macvtap")

NET = Path("/sys/class/net")
MAC = "52:54:00:00:00:01"
WANTED = {"slot": "nic/a", "mac": MAC, "interface": "vmbt3"}


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


@pytest.fixture
def bed() -> Iterator[Bed]:
    """A broker, and interface vmbt3, whose other end is vmbt4."""
    ip("link", "add", "vmbt3", "type", "veth", "peer", "name", "vmbt4")
    ip("link", "set", "vmbt3", "up")
    try:
        with broker() as started:
            yield started
    finally:
        ip("link", "del", "vmbt3")


def macvtaps() -> list[Path]:
    return [link for link in NET.iterdir() if (link / "lower_vmbt3").exists()]


def test_it_carries_its_mark_and_goes_with_its_slot_or_its_machine(bed: Bed) -> None:
    client = bed.connect()
    machine = bed.machine(client)
    for queues in (1, 4):
        assert client.ask(wire.Tap, uuid=machine.uuid, queues=queues, **WANTED).error is None
        [link] = macvtaps()
        mark = (link / "ifalias").read_text().strip()
        assert mark.startswith(f"vmbus:{bed.instance}:{machine.uuid}:") and mark.endswith(";nic/a;")
        assert (link / "address").read_text().strip() == MAC
        assert int((link / "flags").read_text(), 16) & 1
        assert len(rules.of(bed.instance)) == 1
        wait_until(lambda queues=queues: machine.ask(do="files")["nic/a"]["fds"] == queues)  # type: ignore[misc]
        if queues == 1:
            assert client.ask(wire.Tap, uuid=machine.uuid, queues=0, **WANTED).error is None
            assert macvtaps() == [] and rules.of(bed.instance) == []
            assert client.ask(wire.Tap, uuid=machine.uuid, queues=0, **WANTED).error is None  # idempotent
    client.ask(wire.Kill, uuid=machine.uuid)
    client.wait_ended(machine.uuid)
    wait_until(lambda: macvtaps() == [] and rules.of(bed.instance) == [])
    machine.close()


def test_a_slot_whose_name_another_s_begins_with_is_its_own(bed: Bed) -> None:
    client = bed.connect()
    machine = bed.machine(client)
    for slot, mac in (("nic/a", MAC), ("nic/a1", "52:54:00:00:00:02")):
        wanted = {**WANTED, "slot": slot, "mac": mac}
        assert client.ask(wire.Tap, uuid=machine.uuid, **wanted).error is None
    assert client.ask(wire.Tap, uuid=machine.uuid, queues=0, **WANTED).error is None
    assert [(link / "ifalias").read_text().split(";")[1] for link in macvtaps()] == ["nic/a1"]
    machine.close()


def test_an_address_that_somebody_has_there_is_refused_and_nothing_is_left(bed: Bed) -> None:
    client = bed.connect()
    first, second = bed.machine(client), bed.machine(client)
    assert client.ask(wire.Tap, uuid=first.uuid, **WANTED).error is None
    reply = client.ask(wire.Tap, uuid=second.uuid, **WANTED)
    assert (reply.error, reply.argument) == ("InUse", "mac") and MAC in reply.message
    assert len(macvtaps()) == 1 and len(rules.of(bed.instance)) == 1
    first.close()
    second.close()


def test_a_restarted_broker_sweeps_its_own_marked_or_not(bed: Bed) -> None:
    client = bed.connect()
    machine = bed.machine(client)
    assert client.ask(wire.Tap, uuid=machine.uuid, **WANTED).error is None
    # One that was killed between making it and marking it; one of another instance; one of nobody's.
    add = ("link", "add", "link", "vmbt3", "name")
    ip(*add, f"vt{bed.uid_first + 9:08x}7", "type", "macvtap")
    ip(*add, f"vt{bed.uid_first - 9:08x}7", "type", "macvtap")
    ip(*add, "vmbt5", "type", "macvtap")
    bed.stop(kill=True)
    bed.start()
    others = {f"vt{bed.uid_first - 9:08x}7", "vmbt5"}
    wait_until(lambda: len(macvtaps()) == 3)
    assert others < {link.name for link in macvtaps()}, "the machine's is the third: it lives"
    bed.stop(kill=True)
    os.kill(machine.pid, 9)
    wait_until(lambda: machine.pid not in bed.worker_pids())
    bed.start()
    wait_until(lambda: {link.name for link in macvtaps()} == others and rules.of(bed.instance) == [])
    machine.close()


def test_what_is_not_granted_or_not_there_is_refused(bed: Bed) -> None:
    client = bed.connect()
    mine, theirs = bed.machine(client), bed.machine(client, owner=BOB)
    for machine, interface in ((theirs, "vmbt3"), (mine, "vmbt4"), (mine, "../lo")):
        reply = client.ask(wire.Tap, uuid=machine.uuid, **{**WANTED, "interface": interface})
        assert (reply.error, reply.argument) == ("AccessDenied", "interface")
    reply = client.ask(wire.Tap, uuid=mine.uuid, **{**WANTED, "interface": "vmbt6"})
    assert (reply.error, reply.argument) == ("NotFound", "interface")
    assert macvtaps() == [] and rules.of(bed.instance) == []
    mine.close()
    theirs.close()
