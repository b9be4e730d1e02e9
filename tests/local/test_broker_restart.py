# SPDX-License-Identifier: Apache-2.0
"""Workers outlive the broker; a restarted broker finds its own and sweeps what nobody owns."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

import msgspec
import pytest

from tests.local.broker_bed import ALICE, MIB, Bed, Machine, broker, new_uuid, wait_until
from tests.local.broker_fuse import READ, Fuse
from vmbus.wire import broker as wire

pytestmark = pytest.mark.requires("root", "kvm")


@pytest.mark.parametrize("kill", [False, True])
def test_a_restarted_broker_finds_its_worker(kill: bool) -> None:
    with broker() as bed:
        client = bed.connect()
        machine = bed.machine(client)
        machine.ask(do="look")
        before = client.ask(wire.Workers).workers
        bed.stop(kill=kill)
        assert machine.ask(do="look")["epoch"] == 1  # the connection of before goes on
        bed.start()
        again = bed.connect()
        assert again.ask(wire.Workers).workers == before
        assert machine.ask(do="look")["epoch"] == 1
        reply, fds = again.reply(again.post(wire.Connect, uuid=machine.uuid))
        assert reply.error is None
        anew = Machine(again, machine.uuid, fds)
        assert anew.ask(do="look")["epoch"] == 2
        assert anew.open(bed.file("later")).error is None
        assert again.ask(wire.Spawn, uuid=machine.uuid, memory=MIB, vcpus=1).error == "InvalidState"
        again.ask(wire.Kill, uuid=machine.uuid)
        again.wait_ended(machine.uuid)
        assert list((bed.run / "workers").iterdir()) == []
        machine.close()
        anew.close()


def test_the_quota_counts_what_was_adopted() -> None:
    with broker() as bed:
        client = bed.connect()
        machine = bed.machine(client, memory=1536 * MIB)
        bed.stop(kill=True)
        bed.start()
        client = bed.connect()
        name = new_uuid()
        client.ask(wire.Own, uuid=name, uid=ALICE)
        assert client.ask(wire.Spawn, uuid=name, memory=1024 * MIB, vcpus=1).error == "QuotaExceeded"
        machine.close()


def test_a_worker_that_ended_meanwhile_is_swept() -> None:
    with broker() as bed:
        client = bed.connect()
        machine = bed.machine(client)
        machine.ask(do="look")
        bed.stop(kill=True)
        os.kill(machine.pid, signal.SIGKILL)
        wait_until(lambda: machine.pid not in bed.worker_pids())
        bed.start()
        assert bed.connect().ask(wire.Workers).workers == []
        assert list((bed.run / "workers").iterdir()) == []
        machine.close()


@pytest.mark.parametrize("change", [{"start_time": 1}, {"boot_id": "another"}, {"worker_uid": 1}, {"pid": 1}])
def test_a_process_that_is_not_the_recorded_one_is_left_alone(change: dict[str, object]) -> None:
    with broker() as bed:
        client = bed.connect()
        machine = bed.machine(client)
        machine.ask(do="look")
        bed.stop(kill=True)
        path = bed.run / "workers" / machine.uuid / "record.json"
        path.write_bytes(msgspec.json.encode(msgspec.json.decode(path.read_bytes()) | change))
        bed.start()
        assert bed.connect().ask(wire.Workers).workers == []
        assert machine.pid in bed.worker_pids()
        machine.close()


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b'{"pid": "x"}', b"\xff" * 100])
def test_a_record_that_cannot_be_read_is_swept(text: bytes) -> None:
    with broker() as bed:
        bed.stop()
        directory = bed.run / "workers" / new_uuid()
        directory.mkdir(mode=0o700)
        (directory / "record.json").write_bytes(text)
        bed.start()
        assert list((bed.run / "workers").iterdir()) == []


def test_a_broker_that_dies_during_a_start_leaves_no_worker() -> None:
    with broker(worker="late") as bed:
        client = bed.connect()
        name = new_uuid()
        client.ask(wire.Own, uuid=name, uid=ALICE)
        for delay in (0.0, 0.003, 0.006, 0.01, 0.02):
            client.post(wire.Spawn, uuid=name, memory=MIB, vcpus=1)
            time.sleep(delay)
            bed.stop(kill=True)
            pids = bed.worker_pids()
            bed.start()
            client = bed.connect()
            for info in client.ask(wire.Workers).workers:
                pids.remove(info.pid)  # it was recorded, and adopted
                client.ask(wire.Kill, uuid=info.uuid)
                client.wait_ended(info.uuid)
            for pid in pids:  # not recorded: its stager went with the broker, so it holds no more than a uid
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            wait_until(lambda: bed.worker_pids() == [])
        assert list((bed.run / "workers").iterdir()) == []


def test_a_real_worker_that_lost_its_broker_before_it_was_recorded_ends_by_itself() -> None:
    with broker() as bed:
        client = bed.connect()
        for delay in (0.0, 0.002, 0.004, 0.006, 0.008, 0.01, 0.012, 0.015):
            name = new_uuid()
            client.ask(wire.Own, uuid=name, uid=ALICE)
            client.post(wire.Spawn, uuid=name, memory=MIB, vcpus=1)
            time.sleep(delay)
            bed.stop(kill=True)
            bed.start()
            client = bed.connect()
            adopted = {info.pid for info in client.ask(wire.Workers).workers}
            wait_until(lambda adopted=adopted: set(bed.worker_pids()) <= adopted, 15)  # type: ignore[misc]
            for info in client.ask(wire.Workers).workers:
                client.ask(wire.Kill, uuid=info.uuid)
                client.wait_ended(info.uuid)


def test_two_instances_do_not_touch_each_other() -> None:
    with broker() as one, broker() as two:
        first, second = one.connect(), two.connect()
        mine, theirs = one.machine(first), two.machine(second)
        assert mine.ask(do="look")["uids"] != theirs.ask(do="look")["uids"]
        one.stop(kill=True)
        one.start()
        assert theirs.ask(do="look")["epoch"] == 1
        assert second.ask(wire.Workers).workers[0].uuid == theirs.uuid
        assert one.connect().ask(wire.Workers).workers[0].uuid == mine.uuid
        mine.close()
        theirs.close()


def test_two_instances_with_one_range_of_uids_are_refused() -> None:
    with broker() as one:
        two = Bed()
        try:
            text = two.config.read_text()
            overlap = one.uid_first + 63
            two.config.write_text(text.replace(f"uid_first = {two.uid_first}", f"uid_first = {overlap}"))
            with pytest.raises(AssertionError, match="held by another instance"):
                two.start()
        finally:
            two.close()


def test_a_spare_worker_is_used_once_and_replaced() -> None:
    with broker(spares=2) as bed:

        def spares() -> set[int]:
            found = set()
            for path in (bed.run / "workers").glob("spare-*/record.json"):
                with contextlib.suppress(FileNotFoundError):
                    found.add(msgspec.json.decode(path.read_bytes())["pid"])
            return found

        wait_until(lambda: len(spares()) == 2)
        ready = spares()
        client = bed.connect()
        assert client.ask(wire.Workers).workers == []
        machine = bed.machine(client)
        assert machine.pid in ready
        assert machine.ask(do="look")["epoch"] == 1
        assert machine.open(bed.file("disk")).error is None
        wait_until(lambda: len(spares()) == 2)
        assert machine.pid not in spares()
        client.ask(wire.Kill, uuid=machine.uuid)
        client.wait_ended(machine.uuid)
        machine.close()
        bed.stop()
        bed.spares = 0
        bed.start()  # the spares of before are of no known age
        wait_until(lambda: bed.worker_pids() == [])
        wait_until(lambda: list((bed.run / "workers").iterdir()) == [])


@pytest.mark.long
@pytest.mark.requires("fuse")
def test_a_worker_that_hangs_in_the_kernel_is_stuck_and_keeps_its_uid() -> None:
    bed = Bed()
    bed.config.write_text(bed.config.read_text().replace("[open]", "[open]\nfuse = true"))
    place = bed.home / "alice/fuse"
    place.mkdir()
    fuse = Fuse(place, silent=False, owner=ALICE, silent_on=READ)
    try:
        bed.start()
        client = bed.connect()
        machine = bed.machine(client)
        assert machine.open(place / "disk").error is None
        wait_until(lambda: bool(fuse.asked()))
        machine.control.send(msgspec.msgpack.encode({"do": "files"}))  # reads, and never comes back
        wait_until(lambda: READ in fuse.asked())
        assert client.ask(wire.Kill, uuid=machine.uuid).error is None
        client.wait_ended(machine.uuid, stuck=True)
        assert client.ask(wire.Workers).workers[0].uuid == machine.uuid
        assert client.ask(wire.Disown, uuid=machine.uuid).error == "InvalidState"
        other = bed.machine(client)  # nobody else waits
        assert other.ask(do="look")["uids"] != [0, 0, 0]
        fuse.close()
        client.wait_ended(machine.uuid)
        machine.close()
        other.close()
    finally:
        print(bed.log.read_text())
        fuse.close()
        argv = ["umount", "-l", str(place)]
        os.spawnvp(os.P_WAIT, argv[0], argv)
        bed.close()


def test_sigterm_ends_the_broker_and_no_worker() -> None:
    with broker() as bed:
        machine = bed.machine(bed.connect())
        bed.stop()
        assert Path(f"/proc/{machine.pid}").exists()
        assert machine.ask(do="look")["root"] == []
        machine.close()


@pytest.mark.parametrize(("uid", "mode"), [(ALICE, 0o644), (0, 0o664), (0, 0o646)])
def test_a_policy_that_others_can_write_is_refused(uid: int, mode: int) -> None:
    bed = Bed()
    try:
        os.chown(bed.config, uid, 0)
        bed.config.chmod(mode)
        with pytest.raises(AssertionError, match="can be written by others than root"):
            bed.start()
        assert not (bed.run / "broker/socket").exists()
    finally:
        bed.close()


def test_sighup_reads_the_policy_again() -> None:
    with broker() as bed:
        client = bed.connect()
        assert client.ask(wire.Check, uid=ALICE, vcpus=9).error == "QuotaExceeded"
        good = bed.config.read_text()
        bed.config.write_text(good.replace("vcpus = 8", "vcpus = 16"))
        assert bed.process is not None
        bed.process.send_signal(signal.SIGHUP)
        wait_until(lambda: client.ask(wire.Check, uid=ALICE, vcpus=9).error is None)
        bed.config.write_text("[open]\nfues = true\n")
        bed.process.send_signal(signal.SIGHUP)
        wait_until(lambda: bed.said("policy not reloaded") == 1)
        assert bed.said("fues") == 1
        assert client.ask(wire.Check, uid=ALICE, vcpus=9).error is None
