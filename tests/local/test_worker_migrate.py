# SPDX-License-Identifier: Apache-2.0
"""Machines that go from one closed worker to another while they run."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from tests.local.worker_guest import Guest
from vmbus.wire.definition import Layer
from vmbus.wire.worker import CancelSave, Receive, Result, Resume, Run, Send, Stats

pytestmark = pytest.mark.requires("kvm")

SEND, RECEIVE = 7001, 7002
MEMORY = 32 << 20


def begin(source: Guest, destination: Guest, *, downtime: int = 300, paused: bool = False) -> None:
    """Tell both."""
    here, there = socket.socketpair()
    destination.service.send(Receive(id=RECEIVE, paused=paused), there.detach())
    source.service.send(Send(id=SEND, downtime=downtime), here.detach())


def ends(source: Guest, destination: Guest) -> tuple[Result, Result]:
    """What became of it on both sides."""
    return source.service.result(SEND, 60), destination.service.result(RECEIVE, 60)


def test_a_guest_goes_on_in_another_worker_with_its_memory_and_its_disk(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(1 << 20))
    disks = {"root": ([Layer("raw")], [disk])}
    mode = "disk-loop sector=0 count=64 beat=20"
    with Guest(mode, disks=disks) as source, Guest(mode, disks=disks, restore=-1) as destination:
        source.start()
        source.said(b"loop: beat")
        assert destination.configured.error is None, destination.configured
        assert destination.service.do(Run).error == "InvalidState"
        begin(source, destination)
        sent, received = ends(source, destination)
        assert sent.error is None, sent
        assert received.error is None, received
        assert sent.stats["sent"] == received.stats["received"] > 0
        assert sent.stats["rounds"] >= 1
        assert source.service.event("ended").reason == "migrated"
        assert destination.service.event("state", state="running")
        destination.said(b"loop: beat")


def test_what_cannot_go_leaves_both_with_a_reason() -> None:
    with Guest("flood") as source, Guest("flood", memory=32 << 20, restore=-1) as destination:
        source.start()
        source.said(b"line 5\n")
        assert source.service.do(Send).argument == "socket"
        null = os.open("/dev/null", os.O_RDWR)
        assert source.service.do(Send, null).argument == "socket"
        begin(source, destination)
        sent, received = ends(source, destination)
        assert (sent.error, sent.argument) == ("InvalidArgument", "memory")
        assert (received.error, received.argument) == ("InvalidArgument", "memory")
        assert destination.service.event("ended").reason == "error"
        source.said(b"line")


def test_one_that_is_stopped_on_its_way_goes_on_where_it_is() -> None:
    mode = "dirty mib=4"
    with Guest(mode, memory=MEMORY) as source, Guest(mode, memory=MEMORY, restore=-1) as destination:
        source.start()
        source.said(b"pass 2\n")
        here, there = socket.socketpair()
        source.service.send(Send(id=SEND), here.detach())
        assert there.recv(8) == b"VMBUSMIG"
        assert source.service.do(Stats).stats["migration"]["total"] == MEMORY
        assert source.service.do(CancelSave).error is None
        assert source.service.result(SEND).error == "Cancelled"
        assert "migration" not in source.service.do(Stats).stats
        source.said(b"pass")
        there.close()
        # And it goes afterwards, to where it is told not to go on yet.
        begin(source, destination, paused=True)
        sent, received = ends(source, destination)
        assert (sent.error, received.error) == (None, None)
        assert destination.service.event("state", state="paused")
        assert destination.service.do(Resume).error is None
        destination.said(b"pass")


def test_workers_whose_services_are_gone_finish_it_by_themselves() -> None:
    mode = "dirty mib=4"
    with Guest(mode, memory=MEMORY) as source, Guest(mode, memory=MEMORY, restore=-1) as destination:
        source.start()
        source.said(b"pass 2\n")
        here, there = socket.socketpair()
        source.service.send(Send(id=SEND), here.detach())
        # It is under way, and then nobody is there who would hear of it.
        assert "migration" in source.service.do(Stats).stats
        source.service.sock.close()
        destination.service.send(Receive(id=RECEIVE), there.detach())
        destination.service.sock.close()
        later = destination.worker.control(epoch=2)
        assert later.event("state", state="running", seconds=60)
        destination.said(b"pass")
        assert source.worker.control(epoch=2).event("ended", seconds=60).reason == "migrated"


def test_one_that_has_not_begun_is_not_sent_and_one_that_runs_receives_none() -> None:
    with Guest("flood") as guest:
        assert guest.service.do(Send, *socket_end()).error == "InvalidState"
        guest.start()
        assert guest.service.do(Receive, *socket_end()).error == "InvalidState"
        guest.said(b"line 5\n")


def socket_end() -> list[int]:
    """One end of a socketpair whose other end is closed."""
    here, there = socket.socketpair()
    there.close()
    return [here.detach()]
