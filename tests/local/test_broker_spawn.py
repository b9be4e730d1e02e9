# SPDX-License-Identifier: Apache-2.0
"""A worker as the broker makes it: what it is, what it holds, and that nothing is left when it has ended."""

from __future__ import annotations

import fcntl
import os
import re
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.local.broker_bed import ALICE, MIB, UID_COUNT, Bed, Machine, broker, new_uuid, wait_until
from vmbus.wire import broker as wire

pytestmark = pytest.mark.requires("root", "kvm")


@pytest.fixture(scope="module")
def bed() -> Iterator[Bed]:
    with broker() as started:
        yield started


@pytest.fixture
def machine(bed: Bed) -> Iterator[Machine]:
    client = bed.connect()
    made = bed.machine(client)
    made.ask(do="look")  # its root is gone by then
    yield made
    client.ask(wire.Kill, uuid=made.uuid)
    client.wait_ended(made.uuid)
    made.close()
    client.close()


def status(pid: int) -> dict[str, str]:
    """/proc/PID/status."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def test_it_has_a_uid_of_its_own_and_no_rights(bed: Bed, machine: Machine) -> None:
    seen = status(machine.pid)
    assert {seen[name] for name in ("CapEff", "CapPrm", "CapBnd", "CapInh", "CapAmb")} == {"0" * 16}
    assert seen["NoNewPrivs"] == "1"
    uid = int(seen["Uid"].split()[0])
    assert bed.uid_first <= uid < bed.uid_first + UID_COUNT
    assert seen["Uid"].split() == seen["Gid"].split() == [str(uid)] * 4
    assert seen["Groups"] == ""
    other = bed.machine(machine.client)
    assert status(other.pid)["Uid"] != seen["Uid"]
    machine.client.ask(wire.Kill, uuid=other.uuid)
    machine.client.wait_ended(other.uuid)
    other.close()


def test_each_of_its_namespaces_is_its_own(machine: Machine) -> None:
    for name in ("mnt", "pid", "net", "ipc", "uts", "cgroup"):
        assert os.readlink(f"/proc/{machine.pid}/ns/{name}") != os.readlink(f"/proc/self/ns/{name}"), name
    seen = machine.ask(do="look")
    assert seen["pid"] == 1
    assert seen["interfaces"] == ["lo"]


def test_it_can_open_no_path_and_reach_nobody(machine: Machine) -> None:
    seen = machine.ask(do="look")
    assert seen["root"] == []
    assert all(seen["refused"].values()), seen["refused"]
    assert seen["environment"] == {}
    mounts = Path(f"/proc/{machine.pid}/mountinfo").read_text().splitlines()
    assert len(mounts) == 1
    assert mounts[0].split()[5].startswith("ro,")


def test_it_holds_exactly_the_fds_it_was_given(machine: Machine) -> None:
    held = {int(n): os.readlink(f"/proc/{machine.pid}/fd/{n}") for n in os.listdir(f"/proc/{machine.pid}/fd")}
    assert held[4] == "/dev/kvm"
    assert held[0].startswith("pipe:")
    assert held[1] == held[2]
    assert held[2].startswith("pipe:")
    assert held[3].startswith("socket:")
    assert held[5].startswith("socket:")  # the control connection, in the place of the closed status pipe
    assert set(held) == {0, 1, 2, 3, 4, 5}


def test_it_cannot_read_the_code_of_the_broker_while_it_imports(bed: Bed) -> None:
    with broker(worker="late") as late:
        client = late.connect()
        machine = late.machine(client)
        root = Path(f"/proc/{machine.pid}/root")
        assert sorted(p.name for p in (root / "code/vmbus").iterdir() if p.name != "__pycache__") == [
            "__init__.py",
            "wire",
            "worker",
        ]
        for line in Path(f"/proc/{machine.pid}/mountinfo").read_text().splitlines()[1:]:
            assert line.split()[5].startswith("ro,nosuid,nodev"), line
        machine.close()


def test_its_limits_fit_its_memory(machine: Machine) -> None:
    limits = Path(f"/proc/{machine.pid}/limits").read_text()
    space = next(line for line in limits.splitlines() if line.startswith("Max address space")).split()[3]
    assert 2048 * MIB < int(space) < 4096 * MIB
    assert re.search(r"Max core file size +0 +0 ", limits)


def test_the_reply_brings_its_figures(machine: Machine) -> None:
    names = [os.path.basename(os.readlink(f"/proc/self/fd/{fd}")) for fd in machine.figures]
    texts = dict(zip(names, (os.pread(fd, 4096, 0).decode() for fd in machine.figures), strict=True))
    assert "Pss:" in texts["smaps_rollup"]
    assert "Pss:" in texts["smaps"]
    if os.path.exists("/proc/self/ksm_stat"):
        assert "ksm" in texts["ksm_stat"]


def test_its_record_is_root_s_alone(bed: Bed, machine: Machine) -> None:
    directory = bed.run / "workers" / machine.uuid
    assert directory.stat().st_mode & 0o777 == 0o700
    assert sorted(os.listdir(directory)) == ["record.json", "socket"]


def test_killing_it_leaves_nothing(bed: Bed) -> None:
    client = bed.connect()
    machine = bed.machine(client)
    assert bed.process is not None
    assert client.ask(wire.Kill, uuid=machine.uuid).error is None
    client.wait_ended(machine.uuid)
    machine.close()
    wait_until(lambda: not Path(f"/proc/{machine.pid}").exists())
    assert list((bed.run / "workers").iterdir()) == []
    assert client.ask(wire.Workers).workers == []
    assert client.ask(wire.Disown, uuid=machine.uuid).error is None
    assert not (bed.state / "owners" / machine.uuid).exists()
    client.close()


def test_without_kvm_nothing_is_started_and_nothing_left(bed: Bed) -> None:
    client = bed.connect()
    name = new_uuid()
    client.ask(wire.Own, uuid=name, uid=ALICE)
    assert bed.process is not None
    fds = Path(f"/proc/{bed.process.pid}/fd")
    inside = ["nsenter", f"--mount=/proc/{bed.process.pid}/ns/mnt", "sh", "-c"]
    cover = f"mount --bind {bed.config} /dev/kvm && mount -o remount,ro,bind /dev/kvm"
    subprocess.run([*inside, cover], check=True)
    time.sleep(0.2)
    before = len(os.listdir(fds))
    try:
        reply = client.ask(wire.Spawn, uuid=name, memory=MIB, vcpus=1)
        assert reply.error == "Unavailable"
        assert "/dev/kvm" in reply.message
        assert client.ask(wire.Workers).workers == []
        wait_until(lambda: len(os.listdir(fds)) == before)
        assert list((bed.run / "workers").iterdir()) == []
    finally:
        subprocess.run([*inside, "umount /dev/kvm"], check=True)
    machine = bed.machine(client, name=name)
    client.ask(wire.Kill, uuid=name)
    client.wait_ended(name)
    machine.close()
    client.close()


def test_a_hundred_starts_leak_no_descriptor_and_no_process(bed: Bed) -> None:
    client = bed.connect()
    assert bed.process is not None
    fds = Path(f"/proc/{bed.process.pid}/fd")

    def once() -> None:
        machine = bed.machine(client)
        client.ask(wire.Kill, uuid=machine.uuid)
        client.wait_ended(machine.uuid)
        machine.close()

    once()
    time.sleep(0.2)
    before = len(os.listdir(fds))
    for _ in range(100):  # more than the range has uids: they are used again
        once()
    time.sleep(0.2)
    assert len(os.listdir(fds)) == before
    assert Path(f"/proc/{bed.process.pid}/task/{bed.process.pid}/children").read_text() == ""
    client.close()


def test_a_machine_has_one_worker(bed: Bed, machine: Machine) -> None:
    reply = machine.client.ask(wire.Spawn, uuid=machine.uuid, memory=MIB, vcpus=1)
    assert reply.error == "InvalidState"
    assert machine.client.ask(wire.Disown, uuid=machine.uuid).error == "InvalidState"


def test_a_machine_nobody_owns_is_not_started(bed: Bed) -> None:
    client = bed.connect()
    reply = client.ask(wire.Spawn, uuid=new_uuid(), memory=MIB, vcpus=1)
    assert (reply.error, reply.argument) == ("NotFound", "uuid")
    client.close()


@pytest.mark.parametrize(
    ("memory", "vcpus", "error", "argument"),
    [
        (3 << 30, 1, "QuotaExceeded", "memory"),
        (MIB, 9, "QuotaExceeded", "vcpus"),
    ],
)
def test_what_is_above_the_quota_is_refused(
    bed: Bed, memory: int, vcpus: int, error: str, argument: str
) -> None:
    client = bed.connect()
    name = new_uuid()
    client.ask(wire.Own, uuid=name, uid=ALICE)
    reply = client.ask(wire.Spawn, uuid=name, memory=memory, vcpus=vcpus)
    assert (reply.error, reply.argument) == (error, argument)
    assert client.ask(wire.Workers).workers == []
    client.close()


def test_shareable_memory_comes_as_a_sealed_memfd(bed: Bed) -> None:
    client = bed.connect()
    name = new_uuid()
    client.ask(wire.Own, uuid=name, uid=ALICE)
    number = client.post(wire.Spawn, uuid=name, memory=64 * MIB, vcpus=1, memory_kind="shareable")
    reply, fds = client.reply(number)
    assert reply.error is None
    machine = Machine(client, name, fds)
    wait_until(lambda: "memory" in machine.ask(do="files"))
    seen = machine.ask(do="seals", slot="memory")
    assert seen["size"] == 64 * MIB
    assert seen["seals"] == fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
    client.ask(wire.Kill, uuid=name)
    client.wait_ended(name)
    machine.close()
    client.close()


def test_two_starts_at_once_do_not_share_one_quota(bed: Bed) -> None:
    client = bed.connect()
    names = [new_uuid() for _ in range(6)]
    for name in names:
        client.ask(wire.Own, uuid=name, uid=ALICE)
    numbers = [client.post(wire.Spawn, uuid=name, memory=MIB, vcpus=1) for name in names]
    outcomes = []
    for number in numbers:
        reply, fds = client.reply(number)
        outcomes.append(reply.error)
        for fd in fds:
            os.close(fd)
    assert sorted(outcome or "" for outcome in outcomes) == ["", "", "", "", "QuotaExceeded", "QuotaExceeded"]
    for info in client.ask(wire.Workers).workers:
        client.ask(wire.Kill, uuid=info.uuid)
        client.wait_ended(info.uuid)
    client.close()


def test_a_new_connection_replaces_the_worker_s_old_one(machine: Machine) -> None:
    reply, fds = machine.client.reply(machine.client.post(wire.Connect, uuid=machine.uuid))
    assert reply.error is None
    again = Machine(machine.client, machine.uuid, fds)
    assert again.ask(do="look")["epoch"] == 2
    assert machine.control.recv(10) == b""
    again.close()


def test_a_worker_that_dies_before_it_has_imported_is_told_of(bed: Bed) -> None:
    with broker(worker="dies") as dying:
        client = dying.connect()
        machine = dying.machine(client)
        client.wait_ended(machine.uuid)
        machine.close()
        assert list((dying.run / "workers").iterdir()) == []


def test_a_worker_that_never_says_imported_is_ended(bed: Bed) -> None:
    with broker(worker="late", import_deadline=1.0) as late:
        client = late.connect()
        machine = late.machine(client)
        client.wait_ended(machine.uuid)
        assert late.said("its root was not taken away") == 1
        assert late.worker_pids() == []
        machine.close()


def test_a_worker_that_does_not_accept_holds_nobody_up(bed: Bed) -> None:
    with broker(worker="deaf") as deaf:
        client = deaf.connect()
        machine = deaf.machine(client)
        path = deaf.file("disk")
        began = time.monotonic()
        outcomes = [machine.open(path).error for _ in range(50)]
        assert time.monotonic() - began < 10
        assert outcomes[0] is None
        assert outcomes[-1] == "Disconnected"
        client.ask(wire.Kill, uuid=machine.uuid)
        client.wait_ended(machine.uuid)
        machine.close()


def test_a_worker_that_writes_without_end_fills_no_log(bed: Bed) -> None:
    with broker(worker="chatty") as chatty:
        client = chatty.connect()
        machine = chatty.machine(client)
        time.sleep(1)
        assert client.ask(wire.Workers).error is None
        assert chatty.log.stat().st_size < 1 << 18
        machine.close()


def test_a_worker_s_socket_takes_no_one_but_root(bed: Bed, machine: Machine) -> None:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    os.seteuid(ALICE)
    try:
        with pytest.raises(PermissionError):
            sock.connect(str(bed.run / "workers" / machine.uuid / "socket"))
    finally:
        os.seteuid(0)
        sock.close()
