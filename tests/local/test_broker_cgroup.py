# SPDX-License-Identifier: Apache-2.0
"""Each worker in a cgroup of its own, where the host delegates one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.local.broker_bed import MIB, broker, wait_until
from vmbus.wire import broker as wire

pytestmark = pytest.mark.requires("root", "kvm", "cgroup-v2-controllers")


@pytest.fixture
def base() -> Iterator[Path]:
    path = Path(f"/sys/fs/cgroup/vmbus-test-{os.getpid()}")
    path.mkdir()
    yield path
    for group in path.glob(
        "worker-*/"
    ):  # of workers that outlived the test's broker, and were killed after it
        group.rmdir()
    path.rmdir()


def machine_cgroup(pid: int) -> Path:
    line = next(
        line for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines() if line.startswith("0::")
    )
    return Path("/sys/fs/cgroup") / line[3:].lstrip("/")


def test_a_worker_is_bounded_by_its_own_cgroup(base: Path) -> None:
    with broker(cgroup=base) as bed:
        client = bed.connect()
        machine = bed.machine(client, memory=256 * MIB, vcpus=2)
        group = machine_cgroup(machine.pid)
        assert group.parent == base
        assert int((group / "memory.max").read_text()) == (256 + 128) * MIB
        assert int((group / "pids.max").read_text()) == 512
        assert int((group / "cpu.weight").read_text()) == 200
        machine.ask(do="look")
        assert (
            Path(f"/proc/{machine.pid}/limits").read_text().count("Max address space         unlimited") == 1
        )
        client.ask(wire.Kill, uuid=machine.uuid)
        client.wait_ended(machine.uuid)
        assert not group.exists()
        machine.close()


def test_a_spare_worker_gets_the_limits_of_its_machine(base: Path) -> None:
    with broker(cgroup=base, spares=1) as bed:
        wait_until(lambda: len(list((bed.run / "workers").glob("spare-*/record.json"))) == 1)
        client = bed.connect()
        machine = bed.machine(client, memory=64 * MIB)
        assert int((machine_cgroup(machine.pid) / "memory.max").read_text()) == (64 + 128) * MIB
        machine.close()


def test_a_broker_with_a_cgroup_has_nothing_to_note(base: Path) -> None:
    with broker(cgroup=base) as bed:
        client = bed.connect(hello=False)
        assert client.ask(wire.Hello, versions=[1]).notes == []
        client.close()


def test_after_a_restart_the_cgroup_of_a_dead_worker_is_removed(base: Path) -> None:
    with broker(cgroup=base) as bed:
        machine = bed.machine(bed.connect())
        machine.ask(do="look")
        bed.stop(kill=True)
        os.kill(machine.pid, 9)
        wait_until(lambda: machine.pid not in bed.worker_pids())
        assert list(base.glob("worker-*"))
        (base / f"worker-{bed.uid_first + 9}").mkdir()  # of a start that was cut short
        other = base / f"worker-{bed.uid_first - 1}"  # another instance's
        other.mkdir()
        bed.start()
        wait_until(lambda: list(base.glob("worker-*")) == [other])
        machine.close()
