# SPDX-License-Identifier: Apache-2.0
"""Helpers: programs that work for one machine, begun by the broker with a uid of their own and no rights."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.uplink import uplink
from tests.local.broker_bed import BOB, Bed, Client, Machine, broker, new_uuid, wait_until
from vmbus.wire import broker as wire

pytestmark = pytest.mark.requires("root", "kvm", "bridge")


@pytest.fixture
def bed() -> Iterator[Bed]:
    with uplink(), broker() as started:
        yield started


def helper(bed: Bed, client: Client, machine: Machine, slot: str = "nic/a") -> int:
    """Spawn one; its pid."""
    before = set(bed.worker_pids())
    reply = client.ask(wire.Spawn, uuid=machine.uuid, kind="passt", slot=slot)
    assert reply.error is None, reply
    [pid] = set(bed.worker_pids()) - before
    return pid


def status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {key: value.strip() for key, value in (line.split(":", 1) for line in lines)}


def command(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/cmdline").read_text().split("\0")[:-1]


def test_a_helper_has_a_uid_of_its_own_and_no_right(bed: Bed) -> None:
    client = bed.connect()
    machine = bed.machine(client)
    pid = helper(bed, client, machine)
    assert command(pid)[0] == "/usr/bin/passt" and "--no-map-gw" in command(pid)
    wait_until(lambda: status(pid)["Seccomp"] == "2")  # its own, once it has begun
    seen = status(pid)
    assert len(set(seen["Uid"].split())) == 1 and seen["Uid"] != status(machine.pid)["Uid"]
    assert seen["Gid"] == seen["Uid"] and seen["Groups"] == "" and seen["NoNewPrivs"] == "1"
    # It is in a user namespace that it made, where a full bounding set is worth nothing outside.
    assert {seen[name] for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")} == {"0" * 16}
    for name in ("mnt", "pid", "ipc", "uts", "cgroup"):
        assert os.readlink(f"/proc/{pid}/ns/{name}") != os.readlink(f"/proc/self/ns/{name}"), name
    assert os.listdir(f"/proc/{pid}/root") == []
    assert Path(f"/proc/{pid}/environ").read_bytes() == b""
    held = [os.readlink(f"/proc/{pid}/fd/{n}") for n in os.listdir(f"/proc/{pid}/fd")]
    assert not [name for name in held if "kvm" in name or name.startswith(str(bed.place))]
    wait_until(lambda: machine.ask(do="files").get("nic/a", {}).get("fds") == 1)
    assert bed.said(f"spawn uuid='{machine.uuid}'") == 2
    machine.close()


def test_helpers_end_with_their_machine_and_leave_nothing(bed: Bed) -> None:
    client = bed.connect()
    machine, other = bed.machine(client), bed.machine(client)
    for slot in ("nic/a", "nic/b"):
        helper(bed, client, machine, slot)
    kept = helper(bed, client, other)
    assert [w.uuid for w in client.ask(wire.Workers).workers] == sorted([machine.uuid, other.uuid])
    client.ask(wire.Kill, uuid=machine.uuid)
    client.wait_ended(machine.uuid)
    wait_until(lambda: sorted(bed.worker_pids()) == sorted([other.pid, kept]))
    wait_until(lambda: len(list((bed.run / "workers").iterdir())) == 2)
    machine.close()
    other.close()


def test_a_helper_that_ends_is_told_of_and_its_machine_goes_on(bed: Bed) -> None:
    client = bed.connect()
    machine = bed.machine(client)
    os.kill(helper(bed, client, machine), signal.SIGKILL)
    wanted = wire.Ended(uuid=machine.uuid, slot="nic/a")
    wait_until(lambda: bool(client.ask(wire.Workers).workers) and wanted in client.ended)
    assert machine.ask(do="look")["pid"] == 1
    helper(bed, client, machine)
    machine.close()


def test_a_restarted_broker_finds_helpers_and_ends_those_of_machines_that_are_gone(bed: Bed) -> None:
    client = bed.connect()
    machine, gone = bed.machine(client), bed.machine(client)
    kept = helper(bed, client, machine)
    orphan = helper(bed, client, gone)
    os.kill(orphan, signal.SIGSTOP)  # it does not see its machine's end
    bed.stop(kill=True)
    os.kill(gone.pid, signal.SIGKILL)
    wait_until(lambda: gone.pid not in bed.worker_pids())
    bed.start()
    wait_until(lambda: sorted(bed.worker_pids()) == sorted([machine.pid, kept]))
    client = bed.connect()
    client.ask(wire.Kill, uuid=machine.uuid)
    wait_until(lambda: bed.worker_pids() == [] and list((bed.run / "workers").iterdir()) == [])
    machine.close()
    gone.close()


def test_what_has_no_grant_no_worker_or_too_many_is_refused(bed: Bed) -> None:
    client = bed.connect()
    theirs = bed.machine(client, owner=BOB)
    reply = client.ask(wire.Spawn, uuid=theirs.uuid, kind="passt", slot="nic/a")
    assert (reply.error, reply.argument) == ("AccessDenied", "user-network")
    idle = new_uuid()
    client.ask(wire.Own, uuid=idle, uid=61010)
    assert client.ask(wire.Spawn, uuid=idle, kind="passt", slot="nic/a").error == "InvalidState"
    mine = bed.machine(client)
    # That somebody has the one is not enough for the other.
    reply = client.ask(wire.Spawn, uuid=mine.uuid, kind="passt-host", slot="nic/a")
    assert (reply.error, reply.argument) == ("AccessDenied", "user-network-host")
    for number in range(16):
        assert client.ask(wire.Spawn, uuid=mine.uuid, kind="passt", slot=f"nic/{number}").error is None
    reply = client.ask(wire.Spawn, uuid=mine.uuid, kind="passt", slot="nic/x")
    assert (reply.error, reply.argument) == ("QuotaExceeded", "slot")
    assert len(bed.worker_pids()) == 18
    mine.close()
    theirs.close()
