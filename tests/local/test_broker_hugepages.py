# SPDX-License-Identifier: Apache-2.0
"""Huge memory: reserved for one machine, counted for its owner, given back however it all ends."""

# ruff: noqa: PLC0415 (code of vmbus.broker.dropped cannot be imported by root)
from __future__ import annotations

import fcntl
import itertools
import json
import mmap
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.lab.hugepages import Pool, enlarged
from tests.local.broker_bed import ALICE, BOB, MIB, Bed, Machine, broker, new_uuid, wait_until
from tests.unit.broker_nobody import as_nobody
from vmbus.broker import workers
from vmbus.wire import broker as wire
from vmbus.wire.errors import VmbusError

pytestmark = pytest.mark.requires("root", "kvm", "hugepages")

PAGE = 2 * MIB
PAGES = 16
HUGE: dict[str, Any] = {"memory": 32 * MIB, "memory_kind": "huge", "page_size": PAGE}


@pytest.fixture(scope="module")
def bed() -> Iterator[Bed]:
    with broker() as started:
        yield started


@pytest.fixture
def pool() -> Iterator[Pool]:
    with enlarged(24) as enough:
        yield enough


def end(machine: Machine) -> None:
    machine.client.ask(wire.Kill, uuid=machine.uuid)
    machine.client.wait_ended(machine.uuid)
    machine.close()


def test_it_comes_as_a_sealed_memfd_whose_pages_are_reserved(bed: Bed, pool: Pool) -> None:
    before = pool.figures()
    machine = bed.machine(bed.connect(), **HUGE)
    seen = machine.ask(do="seals", slot="memory")
    assert seen["size"] == 32 * MIB
    assert seen["seals"] == fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
    assert pool["resv"] == before["resv"] + PAGES
    assert pool["free"] == before["free"]
    end(machine)
    assert pool.until(before, 1) == before


def take(pages: int) -> bool:
    """Whether a process can map so many huge pages."""
    fd = os.memfd_create("greedy", os.MFD_HUGETLB | os.MFD_HUGE_2MB)
    os.ftruncate(fd, pages * PAGE)
    try:
        mmap.mmap(fd, pages * PAGE).close()
    except OSError:
        return False
    finally:
        os.close(fd)
    return True


def test_another_user_s_process_cannot_take_what_is_reserved(bed: Bed, pool: Pool) -> None:
    left = pool.figures()["left"]
    machine = bed.machine(bed.connect(), **HUGE)
    assert as_nobody(take, left - PAGES) is True
    assert as_nobody(take, left - PAGES + 1) is False
    end(machine)


def rounds_of_killing(bed: Bed, pool: Pool, rounds: int) -> None:
    """A worker is killed, by its pid or through the broker, and its pages are back within a second."""
    client, before = bed.connect(), pool.figures()
    for number in range(rounds):
        machine = bed.machine(client, **HUGE)
        assert pool["resv"] == before["resv"] + PAGES
        if number % 2:
            os.kill(machine.pid, signal.SIGKILL)
        else:
            client.ask(wire.Kill, uuid=machine.uuid)
        assert pool.until(before, 1) == before, number
        client.wait_ended(machine.uuid)
        machine.close()
    client.close()


def test_a_killed_worker_s_pages_are_back_within_a_second(bed: Bed, pool: Pool) -> None:
    rounds_of_killing(bed, pool, 20)


@pytest.mark.soak
def test_a_killed_worker_s_pages_are_back_within_a_second_200_times(bed: Bed, pool: Pool) -> None:
    rounds_of_killing(bed, pool, 200)


@pytest.mark.parametrize(
    ("memory", "page_size", "error", "argument"),
    [
        (62 * MIB, PAGE, "Unavailable", "memory"),  # 31 pages; 24 were added, fewer than 31 are left
        (33 * MIB, PAGE, "InvalidArgument", "memory"),
        (66 * MIB, PAGE, "QuotaExceeded", "memory"),
        (1 << 30, 1 << 30, "QuotaExceeded", "memory"),
    ],
)
def test_what_cannot_be_had_is_refused_by_name_and_nothing_is_left(
    bed: Bed, pool: Pool, memory: int, page_size: int, error: str, argument: str
) -> None:
    if pool.figures()["left"] > 30:
        pytest.skip("needs a pool that has not been enlarged by an administrator")
    client, before = bed.connect(), pool.figures()
    name = new_uuid()
    client.ask(wire.Own, uuid=name, uid=ALICE)
    reply = client.ask(wire.Spawn, uuid=name, memory=memory, vcpus=1, memory_kind="huge", page_size=page_size)
    assert (reply.error, reply.argument) == (error, argument), reply
    wait_until(lambda: client.ask(wire.Workers).workers == [])
    assert pool.until(before, 1) == before
    client.close()


def test_a_page_size_that_the_cpu_lacks_is_said_by_name() -> None:
    def attempt(pools: Path) -> None:
        from vmbus.broker.dropped import memfd

        memfd.make(1 << 30, 1 << 30, pools)

    with pytest.raises(VmbusError, match="no pages of 1 GiB") as caught:
        as_nobody(attempt, Path("/none-such"))
    assert (caught.value.kind, caught.value.argument) == ("NotSupported", "page-size")


def test_the_quota_is_counted_over_a_restart_of_the_broker(pool: Pool) -> None:
    with broker() as bed:
        client = bed.connect()
        first, second = (bed.machine(client, **{**HUGE, "memory": 16 * MIB}) for _ in range(2))
        assert json.loads((bed.run / "workers" / first.uuid / "record.json").read_bytes())["hugepages"]
        bed.stop(kill=True)
        bed.start()
        client = bed.connect()
        name = new_uuid()
        client.ask(wire.Own, uuid=name, uid=ALICE)
        more = {**HUGE, "memory": 34 * MIB}
        reply = client.ask(wire.Spawn, uuid=name, vcpus=1, **more)
        assert reply.error == "QuotaExceeded"
        assert "67108864 bytes of huge pages in all; 33554432 in use" in reply.message
        assert client.ask(wire.Check, uid=ALICE, memory=65 * MIB, hugepages=65 * MIB).error == "QuotaExceeded"
        assert client.ask(wire.Check, uid=BOB, memory=64 * MIB, hugepages=64 * MIB).error is None
        for machine in (first, second):
            machine.client = client
            end(machine)


@pytest.mark.parametrize("order", list(itertools.permutations(["worker", "broker"])))
def test_killed_in_any_order_nothing_is_left_in_the_pool_s_accounting(pool: Pool, order: list[str]) -> None:
    with broker() as bed:
        before = pool.figures()
        machine = bed.machine(bed.connect(), **HUGE)
        for victim in order:
            if victim == "worker":
                os.kill(machine.pid, signal.SIGKILL)
            else:
                bed.stop(kill=True)
        assert pool.until(before, 1) == before
        bed.start()
        client = bed.connect()
        assert client.ask(wire.Workers).workers == []
        assert not list((bed.run / "workers").iterdir())


def test_old_records_without_huge_pages_are_read() -> None:
    """A broker that is newer than the record of a worker finds it."""
    import msgspec

    assert msgspec.json.decode(b'{"owner": 1000, "memory": 5}', type=workers.Record).hugepages == 0
