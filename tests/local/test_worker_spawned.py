# SPDX-License-Identifier: Apache-2.0
"""The real worker, started by the real broker: in an empty root, as nobody, running a guest."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

import vmbus
from tests.local.broker_bed import ALICE, MIB, Bed, Client, Machine
from tests.local.worker_guest import image, read_until
from tests.local.worker_process import Service
from vmbus.wire import broker as broker_wire
from vmbus.wire.definition import Definition, Disk, Kernel, Layer
from vmbus.wire.worker import Configure, Console, Hello, Run, Stop

pytestmark = pytest.mark.requires("root", "kvm")


class RealBed(Bed):
    """A broker whose workers are the product's."""

    def _code(self, worker: str) -> None:
        super()._code(worker)
        source, target = Path(vmbus.__file__).parent, self.place / "code/vmbus"
        shutil.rmtree(target / "worker")
        for part in ("worker", "_native"):
            shutil.copytree(source / part, target / part)


@pytest.fixture(scope="module")
def bed() -> Iterator[Bed]:
    bed = RealBed()
    try:
        shutil.copy(image(), bed.home / "alice/guest")
        disk = bed.home / "alice/disk.raw"
        disk.write_bytes(bytes(MIB))
        disk.chmod(0o600)
        for path in (bed.home / "alice").iterdir():
            os.chown(path, ALICE, ALICE)
        bed.start()
        yield bed
    finally:
        bed.close()


class Spawned:
    """A worker of Alice's with the service's connection to it."""

    def __init__(self, bed: Bed) -> None:
        self.bed = bed
        self.client: Client = bed.connect()
        self.machine: Machine = bed.machine(self.client)
        self.service = Service(self.machine.control)
        self.service.welcome = self.service.ask(Hello(id=0, versions=[1]))

    def configure(self, mode: str) -> None:
        """Files as Alice, machine, console."""
        home = self.bed.home / "alice"
        assert self.machine.open(home / "guest", "kernel").error is None
        assert self.machine.open(home / "disk.raw", "disk/root/0", writable=True).error is None
        definition = Definition(
            name="spawned",
            memory=16 * MIB,
            kernel=Kernel(path=str(home / "guest"), cmdline=mode),
            disks=[Disk(id="root", layers=[Layer(format="raw", path=str(home / "disk.raw"))])],
        )
        self.console, theirs = socket.socketpair()
        assert self.service.do(Console, theirs.detach(), write=True).error is None
        result = self.service.do(Configure, uuid=self.machine.uuid, definition=definition)
        assert result.error is None, result

    def close(self) -> None:
        self.client.ask(broker_wire.Kill, uuid=self.machine.uuid)
        self.client.wait_ended(self.machine.uuid)
        self.machine.close()
        self.client.close()


@pytest.fixture
def spawned(bed: Bed) -> Iterator[Spawned]:
    spawned = Spawned(bed)
    yield spawned
    spawned.close()


def test_a_guest_runs_on_its_owner_s_files_and_the_worker_goes_when_that_is_known(bed: Bed) -> None:
    spawned = Spawned(bed)
    spawned.configure("hello")
    assert spawned.service.do(Run).error is None
    read_until(spawned.console, b"hello: hello\n")
    assert spawned.service.event("ended").reason == "guest-poweroff"
    spawned.service.acknowledge()
    spawned.client.wait_ended(spawned.machine.uuid)
    spawned.machine.close()
    spawned.client.close()


def test_its_root_is_empty_and_every_thread_is_closed_while_a_guest_runs(spawned: Spawned) -> None:
    spawned.configure("idle")
    assert spawned.service.do(Run).error is None
    read_until(spawned.console, b"idle\n")
    process = Path(f"/proc/{spawned.machine.pid}")
    assert os.listdir(process / "root") == []
    for thread in (process / "task").iterdir():
        status = (thread / "status").read_text()
        assert "Seccomp:\t2\n" in status
        assert "NoNewPrivs:\t1\n" in status
        assert "CapEff:\t0000000000000000\n" in status
        assert "CapBnd:\t0000000000000000\n" in status
    held = {os.readlink(fd) for fd in (process / "fd").iterdir()}
    paths = {name for name in held if name.startswith("/") and not name.endswith("(deleted)")}
    # /dev/kvm is closed once there is a VM, the kernel once it is loaded.
    assert paths <= {str(spawned.bed.home / "alice/disk.raw"), str(spawned.bed.home / "alice/guest")}
    assert str(spawned.bed.home / "alice/disk.raw") in paths
    assert spawned.service.do(Stop).error is None
    assert spawned.service.event("ended").reason == "stopped"


def test_its_memory_can_be_read_by_the_service_and_is_small(spawned: Spawned) -> None:
    spawned.configure("idle")
    assert spawned.service.do(Run).error is None
    read_until(spawned.console, b"idle\n")
    rollup = os.pread(spawned.machine.figures[0], 8192, 0).decode()
    private = sum(
        int(line.split()[1])
        for line in rollup.splitlines()
        if line.startswith(("Private_Dirty", "Private_Clean"))
    )
    # Its own pages, with the little that the guest has touched; what all workers share is not in it.
    assert private < 12 * 1024, rollup
