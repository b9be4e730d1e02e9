# SPDX-License-Identifier: Apache-2.0
"""The control channel of a real worker: connections, epochs, events, files, and peers that misbehave."""

from __future__ import annotations

import os
import random
import socket
import time
from collections.abc import Iterator

import msgspec
import pytest

from tests.local.worker_process import Service, WorkerProcess
from vmbus.wire import packet
from vmbus.wire.definition import Definition, Kernel
from vmbus.wire.inlet import Delivery, Greeting
from vmbus.wire.worker import Ack, AddFile, Configure, Console, Hello, Pause, Run, Shutdown, Stats, Stop

UUID = "6ba7b810-9dad-11d1-80b4-00c04fd430c8"
DEFINITION = Definition(name="m", memory=16 << 20, kernel=Kernel(source="fd"))


@pytest.fixture
def worker() -> Iterator[WorkerProcess]:
    with WorkerProcess() as worker:
        yield worker


def a_file() -> int:
    return os.open("/dev/null", os.O_RDONLY)


def open_files(worker: WorkerProcess) -> int:
    return len(os.listdir(f"/proc/{worker.pid}/fd"))


def still_serves(worker: WorkerProcess) -> bool:
    return worker.control().welcome.state == "ready"


def test_a_worker_says_imported_and_then_who_it_is(worker: WorkerProcess) -> None:
    assert worker.said == b"imported\n"
    welcome = worker.control(epoch=7).welcome
    assert (welcome.version, welcome.lifeline, welcome.epoch, welcome.state) == (1, 1, 7, "ready")


def test_a_new_control_connection_replaces_the_old(worker: WorkerProcess) -> None:
    old = worker.control()
    new = worker.control()
    assert old.ended()
    assert new.do(Stop).error is None


def test_an_epoch_that_is_not_newer_is_turned_away(worker: WorkerProcess) -> None:
    current = worker.control(epoch=5)
    for epoch in (5, 4, 0, -1):
        assert worker.control(epoch=epoch, hello=False).ended()
    assert current.do(Console, socket.socketpair()[0].detach()).error is None


def test_hello_comes_first(worker: WorkerProcess) -> None:
    service = worker.control(hello=False)
    service.send(Stop(id=1))
    assert service.ended()
    assert still_serves(worker)


def test_a_second_hello_ends_the_connection(worker: WorkerProcess) -> None:
    service = worker.control()
    service.send(Hello(id=9, versions=[1]))
    assert service.ended()


def test_a_service_of_another_version_gets_the_lifeline_only(worker: WorkerProcess) -> None:
    service = worker.control(hello=False)
    welcome = service.ask(Hello(id=0, versions=[7, 8]))
    assert (welcome.version, welcome.lifeline) == (0, 1)
    assert service.do(Configure, uuid=UUID, definition=DEFINITION).error == "Restricted"
    assert service.do(Stats).error == "Restricted"
    before = open_files(worker)
    assert service.do(AddFile, a_file(), slot="kernel").error == "Restricted"
    assert open_files(worker) == before
    assert service.do(Stop).error is None
    assert service.event("ended").reason == "stopped"


def test_requests_out_of_order_are_refused_by_name(worker: WorkerProcess) -> None:
    service = worker.control()
    for request in (Run, Shutdown, Pause, Stats):
        result = service.do(request)
        assert result.error == "InvalidState"
        assert "ready" in result.message


def test_a_missing_slot_is_named_and_can_still_be_filled(worker: WorkerProcess) -> None:
    service = worker.control()
    result = service.do(Configure, uuid=UUID, definition=DEFINITION)
    assert (result.error, result.argument) == ("InvalidArgument", "kernel")
    assert service.do(AddFile, a_file(), slot="kernel").error is None
    assert service.do(AddFile, a_file(), slot="kernel").error == "InUse"


def test_files_by_inlet_are_there_for_a_configure_that_was_sent_later(worker: WorkerProcess) -> None:
    """The service asks as soon as the broker says a file was sent; both channels race at the worker."""
    service = worker.control()
    definition = msgspec.structs.replace(DEFINITION, kernel=Kernel(source="fd", initrd=True))
    os.kill(worker.pid, 19)  # SIGSTOP: everything below is there at once
    worker.deliver("kernel", a_file())
    service.send(Configure(id=5, uuid=UUID, definition=definition))
    os.kill(worker.pid, 18)
    result = service.result(5)
    assert result.argument == "initrd"  # and not "kernel"


def test_a_slot_is_delivered_once_and_refused_files_are_closed(worker: WorkerProcess) -> None:
    worker.control()
    before = open_files(worker)
    worker.deliver("kernel", a_file())
    worker.deliver("kernel", a_file())
    worker.deliver("no such slot!", a_file())
    worker.deliver("empty")
    assert still_serves(worker)
    assert open_files(worker) == before + 1


def test_descriptors_beside_a_request_that_takes_none_end_the_connection(worker: WorkerProcess) -> None:
    service = worker.control()
    before = open_files(worker)
    service.send(Run(id=1), a_file(), a_file())
    assert service.ended()
    assert still_serves(worker)
    assert open_files(worker) == before


def test_a_greeting_with_descriptors_leaves_none_behind(worker: WorkerProcess) -> None:
    worker.control()
    before = open_files(worker)
    sock = worker.connect()
    packet.send(sock, Greeting(role="inlet"), [a_file()])
    packet.send(sock, Delivery(slot="kernel"))
    assert sock.recv(10) == b""
    assert open_files(worker) == before


def test_17_descriptors_are_too_many(worker: WorkerProcess) -> None:
    worker.control()
    before = open_files(worker)
    sock = worker.connect()
    packet.send(sock, Greeting(role="inlet"))
    packet.send(sock, Delivery(slot="kernel"), [0] * 17)
    assert sock.recv(10) == b""
    service = worker.control()
    service.send(AddFile(id=1, slot="kernel"), *[a_file() for _ in range(17)])
    assert service.ended()
    worker.control()
    assert open_files(worker) == before


@pytest.mark.parametrize("seed", range(4))
def test_garbage_loses_its_connection_and_nothing_else(worker: WorkerProcess, seed: int) -> None:
    random_bytes = random.Random(seed)
    valid = msgspec.msgpack.encode(Configure(id=1, uuid=UUID, definition=DEFINITION))
    for number in range(60):
        if number % 2:
            data = random_bytes.randbytes(random_bytes.randrange(1, 300))
        else:
            mutated = bytearray(valid)
            for _ in range(random_bytes.randrange(1, 6)):
                mutated[random_bytes.randrange(len(mutated))] = random_bytes.randrange(256)
            data = bytes(mutated)
        where = random_bytes.choice(["greeting", "inlet", "control"])
        if where == "control":
            worker.control().sock.send(data)
            continue
        sock = worker.connect()
        if where == "inlet":
            packet.send(sock, Greeting(role="inlet"))
        sock.send(data)
        sock.close()
    assert still_serves(worker)


def test_a_datagram_larger_than_the_limit_ends_the_connection(worker: WorkerProcess) -> None:
    service = worker.control()
    service.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    service.sock.send(bytes(packet.LIMIT + 1))
    assert service.ended()
    assert still_serves(worker)


def test_connections_that_say_nothing_are_bounded_and_harm_nobody(worker: WorkerProcess) -> None:
    silent = [worker.connect() for _ in range(64)]
    one_too_many = worker.connect()
    assert one_too_many.recv(10) == b""
    silent[0].close()
    deadline = time.monotonic() + 5
    while True:  # the place of the one that left is free once its end was seen
        try:
            assert still_serves(worker)
            break
        except (ConnectionError, BrokenPipeError):
            assert time.monotonic() < deadline


def test_a_service_that_does_not_read_is_dropped_and_the_next_one_learns_all(worker: WorkerProcess) -> None:
    service = worker.control()
    sent = 0
    try:
        for sent in range(200_000):
            service.send(Run(id=sent))
    except (BlockingIOError, BrokenPipeError, ConnectionResetError):
        pass
    deadline = time.monotonic() + 10
    while "ended" not in worker.log() and time.monotonic() < deadline:
        try:
            service.send(Run(id=0))
        except BlockingIOError:
            time.sleep(0.01)
        except OSError:
            break
    assert sent > 100
    assert still_serves(worker)


class TestEvents:
    """What was not acknowledged is sent again."""

    def test_the_end_is_sent_to_every_new_connection_until_it_is_acknowledged(
        self, worker: WorkerProcess
    ) -> None:
        first = worker.control()
        assert first.do(Stop).error is None
        end = first.event("ended")
        second = worker.control()
        assert (second.welcome.state, second.welcome.reason) == ("ended", "stopped")
        assert second.event("ended") == end
        second.acknowledge()
        assert worker.wait() == 0

    def test_an_acknowledgement_of_what_never_was_ends_the_connection(self, worker: WorkerProcess) -> None:
        service = worker.control()
        service.send(Ack(id=1, seq=1))
        assert service.ended()

    def test_the_answer_that_the_old_connection_waited_for_is_not_given_to_the_new(
        self, worker: WorkerProcess
    ) -> None:
        old = worker.control()
        os.kill(worker.pid, 19)
        old.send(Stop(id=77))
        sock = worker.connect()
        packet.send(sock, Greeting(role="control", epoch=worker.epoch + 1))
        new = Service(sock)
        new.send(Hello(id=0, versions=[1]))
        os.kill(worker.pid, 18)
        new.result(0)
        end = new.event("ended")
        assert end.reason == "stopped"
        with pytest.raises(TimeoutError):
            new.result(77, seconds=0.3)

    def test_an_ended_worker_that_nobody_asks_about_goes_after_its_time(self) -> None:
        hasty = "from vmbus.worker import machine, main; machine.LINGER_SECONDS = 0.5; main.main()"
        with WorkerProcess(program=("-c", hasty)) as worker:
            service = worker.control()
            assert service.do(Stop).error is None
            service.event("ended")
            time.sleep(1)
            assert worker.process.poll() is None  # somebody is there
            service.sock.close()
            assert worker.wait() == 0

    def test_a_worker_that_was_never_asked_waits(self) -> None:
        hasty = "from vmbus.worker import machine, main; machine.LINGER_SECONDS = 0.2; main.main()"
        with WorkerProcess(program=("-c", hasty)) as worker:
            worker.control().sock.close()
            time.sleep(0.6)
            assert still_serves(worker)


def test_a_bug_of_ours_costs_a_request_and_not_the_guest() -> None:
    broken = """
from vmbus.worker import machine, main
def handle(self, request, fds, reply):
    raise KeyError(type(request).__name__)
machine.Machine.handle = handle
main.main()
"""
    with WorkerProcess(program=("-c", broken)) as worker:
        service = worker.control()
        result = service.do(Stats)
        assert (result.error, result.argument) == ("Internal", "")
        assert "Stats: KeyError: 'Stats'" in worker.log()
        assert service.do(Stats).error == "Internal"


def test_a_client_can_watch_the_console_before_there_is_a_machine(worker: WorkerProcess) -> None:
    service = worker.control()
    ours, theirs = socket.socketpair()
    assert service.do(Console, theirs.detach(), write=True).error is None
    theirs = socket.socketpair()[1]
    refused = service.do(Console, theirs.detach(), write=True)
    assert refused.error == "InUse"
    assert service.do(Console).error == "InvalidArgument"
    assert service.do(Stop).error is None
    ours.settimeout(5)
    assert ours.recv(10) == b""
