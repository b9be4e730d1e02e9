# SPDX-License-Identifier: Apache-2.0
"""Machines that move, as the service has it: jobs, states, sockets, and a vmbusd that dies in the middle. The
workers are the test's."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
import uuid as uuids
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from tests.local.service_bed import BOB, ROOT, Bed, Caller, ended, form, scenario, uuid_of
from tests.local.service_fakes import FakeWorker
from vmbus.bus import Variant
from vmbus.wire import broker
from vmbus.wire import worker as wire
from vmbus.wire.errors import VmbusError

MODEL = "x86-64-v2-amd-1"


@pytest.fixture(scope="module")
def shared() -> Iterator[Bed]:
    with Bed() as made:
        yield made


@pytest.fixture
def bed(shared: Bed) -> Bed:
    shared.broker.reset()
    return shared


async def come(what: Callable[[], Any]) -> Any:
    """Wait until ``what`` is so."""
    while not (found := what()):
        await asyncio.sleep(0.01)
    return found


@asynccontextmanager
async def sending(caller: Caller, bed: Bed, **options: Any) -> AsyncIterator[tuple[str, str, FakeWorker]]:
    """A running machine that is being sent, its job, its worker; at last the other end is at its end."""
    machine = await caller.define(cpu_model=MODEL)
    await caller(machine, "Machine.Start", {}, {})
    worker = bed.broker.workers[uuid_of(machine)]
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            job = await caller(machine, "Machine.Migrate", theirs.fileno(), options)
        await come(lambda: worker.moving)
        yield machine, job, worker
        ours.setblocking(False)
        if worker.socket is not None:
            worker.socket.close()
            worker.socket = None
        while await _nothing_yet(ours):
            await asyncio.sleep(0.01)


async def _nothing_yet(sock: socket.socket) -> bool:
    """Whether somebody holds the other end still."""
    with contextlib.suppress(BlockingIOError):
        assert sock.recv(1) == b""
        return False
    return True


@asynccontextmanager
async def receiving(caller: Caller, bed: Bed, **options: Any) -> AsyncIterator[tuple[str, str, FakeWorker]]:
    """A machine that is being received."""
    machine = await caller.define(cpu_model=MODEL)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        job = await caller(machine, "Machine.Receive", theirs.fileno(), options, {})
        worker = await come(lambda: bed.broker.workers.get(uuid_of(machine)))
        await come(lambda: worker.moving)
        yield machine, job, worker


@scenario
async def test_a_machine_that_was_sent_has_ended_and_its_job_says_what_it_cost(bed: Bed) -> None:
    async with bed.caller() as alice:
        before = bed.fds()
        options = {"downtime": Variant("u", 30), "bandwidth": Variant("t", 1 << 30)}
        async with sending(alice, bed, **options) as (machine, job, worker):
            assert worker.asked_last == wire.Send(id=worker.moving, downtime=30, bandwidth=1 << 30)
            while not (result := await alice.client.get(job, "Job", "Result")):
                await asyncio.sleep(0.01)
            assert result == {"total": 16 << 20, "sent": 1000, "remaining": 500}
            assert list(await alice.client.get(job, "Job", "Progress")) == [1000, 1500]
            assert await alice.state(machine) == "running"
            worker.moved(downtime_ms=12.5, sent=20 << 20, rounds=3, throughput=1 << 20, odd="x" * 100)
            found = await ended(alice, job)
            assert (found["State"], found["Kind"]) == ("done", "migrate")
            result = found["Result"]
            assert (result["downtime"], result["sent"], result["rounds"]) == (12.5, 20 << 20, 3)
            assert "odd" not in result
            properties = await alice.client.get_all(machine, "Machine")
            assert (properties["State"], properties["StateReason"]) == ("stopped", "migrated")
        await come(lambda: bed.fds() == before)


@scenario
async def test_whatever_fails_leaves_the_sender_as_it_was(bed: Bed) -> None:
    async with bed.caller() as alice:
        async with sending(alice, bed) as (machine, job, worker):
            worker.not_moved("NotSupported", "the destination refuses: no flag", "cpu-model")
            found = await ended(alice, job)
            assert (found["State"], found["Error"]) == ("failed", "org.vmbus1.Error.NotSupported")
            assert await alice.state(machine) == "running"
        # It can be sent again, and that be cancelled.
        ours, theirs = socket.socketpair()
        with ours, theirs:
            job = await alice(machine, "Machine.Migrate", theirs.fileno(), {})
            await come(lambda: worker.moving)
            with pytest.raises(VmbusError) as caught:
                await alice(machine, "Machine.Migrate", theirs.fileno(), {})
            assert caught.value.kind == "InvalidState"
            await alice(job, "Job.Cancel")
            assert worker.asked.count("cancel-save") == 1
            assert await alice.state(machine) == "running"


@scenario
async def test_a_cancellation_that_comes_too_late_is_none(bed: Bed) -> None:
    async with bed.caller() as alice, sending(alice, bed) as (machine, job, worker):
        worker.too_late = True
        cancelling = asyncio.ensure_future(alice(job, "Job.Cancel"))
        await come(lambda: "cancel-save" in worker.asked)
        worker.moved()
        await cancelling
        assert (await ended(alice, job))["State"] == "done"
        assert await alice.client.get(machine, "Machine", "StateReason") == "migrated"


@scenario
async def test_one_of_which_nobody_knows_where_it_runs_stands_and_says_so(bed: Bed) -> None:
    async with bed.caller() as alice, sending(alice, bed) as (machine, job, worker):
        worker.enter("paused")
        worker.not_moved("Disconnected", "it may run there or not", "unsure")
        assert (await ended(alice, job))["Error"] == "org.vmbus1.Error.Disconnected"
        properties = await alice.client.get_all(machine, "Machine")
        assert (properties["State"], properties["StateReason"]) == ("paused", "migration-unsure")
        assert "may run there" in properties["StateDetail"]
        await alice(machine, "Machine.Resume")
        assert await alice.client.get(machine, "Machine", "StateReason") == ""


@scenario
async def test_both_jobs_end_with_their_caller(bed: Bed) -> None:
    async with bed.caller() as alice:
        async with (
            bed.caller() as leaving,
            sending(leaving, bed) as (sent, _, sender),
            receiving(leaving, bed) as (received, _, _receiver),
        ):
            await leaving.client.close()
            await come(lambda: "cancel-save" in sender.asked)
            await alice.until(sent, "running")
            await alice.until(received, "stopped")
        assert await alice.client.get(received, "Machine", "StateReason") == "start-failed"


@scenario
async def test_stop_and_kill_end_a_sender_that_is_under_way(bed: Bed) -> None:
    async with bed.caller() as alice:
        async with sending(alice, bed) as (machine, job, worker):
            await ended(alice, await alice(machine, "Machine.Stop", 0))
            assert "cancel-save" in worker.asked
            assert (await ended(alice, job))["State"] == "cancelled"
            assert await alice.client.get(machine, "Machine", "StateReason") == "stopped"
        async with sending(alice, bed) as (machine, job, worker):
            await alice(machine, "Machine.Kill")
            assert await alice.client.get(machine, "Machine", "StateReason") == "killed"


@pytest.mark.parametrize("state", ["running", "paused"])
def test_a_machine_that_arrives_is_in_the_state_in_which_it_came(bed: Bed, state: Any) -> None:
    @scenario
    async def test() -> None:
        async with bed.caller() as alice, receiving(alice, bed) as (machine, job, worker):
            assert await alice.state(machine) == "starting"
            assert await alice.client.get(machine, "Machine", "StateReason") == "receive"
            asked = [name for name in worker.asked if name in ("configure", "receive", "run", "resume")]
            assert asked == ["configure", "receive"]
            worker.moved(state)
            assert (await ended(alice, job))["State"] == "done"
            assert await alice.state(machine) == state
            assert "run" not in worker.asked
            assert "resume" not in worker.asked
            if state == "paused":
                await alice(machine, "Machine.Resume")
                assert worker.asked[-2:].count("resume") == 1
            await alice(machine, "Machine.Kill")

    test()


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("state", ["running", "paused"])
def test_one_whose_worker_is_not_heard_as_it_arrives_stays(bed: Bed, state: Any, when: str) -> None:
    """It arrives before the connection breaks, and the word of it is lost; or before it is made again."""

    @scenario
    async def test() -> None:
        async with bed.caller() as alice, receiving(alice, bed) as (machine, job, worker):
            if when == "before":
                worker.state, worker.moving = state, 0
                worker.hang_up()
            else:
                worker.hang_up()
                await come(lambda: worker.asked.count("hello") > 1)
                worker.enter(state)
                worker.moving = 0
            assert (await ended(alice, job))["State"] == "done"
            assert await alice.state(machine) == state
            assert not any(isinstance(one, broker.Kill) for one in bed.broker.asked)
            await alice(machine, "Machine.Pause" if state == "running" else "Machine.Resume")
            await alice(machine, "Machine.Kill")

    test()


@pytest.mark.parametrize("how", ["ended", "never heard of it", "cancelled", "killed", "gone"])
def test_one_whose_worker_is_not_heard_and_that_does_not_arrive_leaves_nothing(bed: Bed, how: str) -> None:
    @scenario
    async def test() -> None:
        async with bed.caller() as alice, receiving(alice, bed) as (machine, job, worker):
            if how == "never heard of it":
                worker.moving = 0
            worker.hang_up()
            if how == "ended":
                worker.end("error", "it broke off")
            elif how == "cancelled":
                with contextlib.suppress(VmbusError):  # on a busy host it came when all was over
                    await alice(job, "Job.Cancel")
            elif how == "killed":
                await alice(machine, "Machine.Kill")
            elif how == "gone":
                bed.broker.ended(uuid_of(machine))
            wanted = {"cancelled", "failed"} if how in ("cancelled", "killed") else {"failed"}
            assert (await ended(alice, job))["State"] in wanted
            await alice.until(machine, "stopped")
            assert uuid_of(machine) not in bed.broker.workers
            await alice(machine, "Machine.Undefine")

    test()


@scenario
async def test_one_that_fails_is_undone_whole_though_it_is_cancelled_meanwhile(bed: Bed) -> None:
    async with bed.caller() as alice, receiving(alice, bed) as (machine, job, worker):
        uuid = uuid_of(machine)
        bed.broker.lingering.add(uuid)
        worker.not_moved("ImageInvalid", "a record is damaged")
        await come(lambda: any(isinstance(one, broker.Kill) for one in bed.broker.asked))
        cancelling = asyncio.ensure_future(alice(job, "Job.Cancel"))
        early, _ = await asyncio.wait({cancelling}, timeout=0.3)
        assert not early
        assert await alice.state(machine) == "stopping"
        bed.broker.lingering.clear()
        bed.broker.ended(uuid)
        with contextlib.suppress(VmbusError):  # on a busy host it came when all was over
            await cancelling
        assert await alice.state(machine) == "stopped"
        await alice(machine, "Machine.Undefine")


@scenario
async def test_one_that_does_not_arrive_leaves_nothing(bed: Bed) -> None:
    async with bed.caller() as alice:
        before = bed.fds()
        async with receiving(alice, bed) as (machine, job, worker):
            worker.not_moved("ImageInvalid", "a record is damaged")
            found = await ended(alice, job)
            assert found["Error"] == "org.vmbus1.Error.ImageInvalid"
            properties = await alice.client.get_all(machine, "Machine")
            assert (properties["State"], properties["StateReason"]) == ("stopped", "start-failed")
            assert uuid_of(machine) not in bed.broker.workers
        async with receiving(alice, bed) as (machine, job, worker):
            await alice(job, "Job.Cancel")
            assert await alice.state(machine) == "stopped"
            assert uuid_of(machine) not in bed.broker.workers
        async with receiving(alice, bed) as (machine, job, worker):
            await alice(machine, "Machine.Kill")
            assert (await ended(alice, job))["State"] == "cancelled"
        await come(lambda: bed.fds() == before)


@pytest.mark.parametrize("moment", ["running", "paused", "later", "never"])
def test_a_new_vmbusd_sees_what_comes_of_a_machine_that_was_on_its_way(bed: Bed, moment: Any) -> None:
    """The vmbusd that began with it is killed; it arrives meanwhile, afterwards or not."""

    @scenario
    async def test() -> None:
        async with bed.caller() as alice, receiving(alice, bed) as (machine, _, worker):
            bed.system.service.kill()
            if moment in ("running", "paused"):
                worker.enter(moment)
            worker.moving = 0
            bed.system.service.start()
        async with bed.caller() as alice:
            if moment in ("later", "never"):
                await alice.until(machine, "starting")
                assert uuid_of(machine) in bed.broker.workers
                worker.enter("running") if moment == "later" else worker.end("error", "it broke off")
            await alice.until(machine, {"later": "running", "never": "stopped"}.get(moment, moment))
            if moment == "never":
                assert "it broke off" in await alice.client.get(machine, "Machine", "StateDetail")
            else:
                await alice(machine, "Machine.Pause" if moment != "paused" else "Machine.Resume")
                await alice(machine, "Machine.Kill")

    test()


@scenario
async def test_a_new_vmbusd_sees_that_a_machine_has_left(bed: Bed) -> None:
    async with bed.caller() as alice, sending(alice, bed) as (machine, _, worker):
        bed.system.service.kill()
        worker.end("migrated")
        bed.system.service.start()
    async with bed.caller() as alice:
        await alice.until(machine, "stopped")
        assert await alice.client.get(machine, "Machine", "StateReason") == "migrated"


@scenario
async def test_what_is_no_machine_that_moves_or_no_connection_is_refused_by_name(bed: Bed) -> None:
    async with bed.caller() as alice, bed.caller(BOB) as bob:
        host = await alice.define()
        machine = await alice.define(cpu_model=MODEL)
        before = bed.fds()

        async def refused(caller: Caller, on: str, method: str, end: int, *more: Any) -> tuple[str, str]:
            options = more or ({},)
            rest: tuple[Any, ...] = ({},) if method == "Receive" else ()
            with pytest.raises(VmbusError) as caught:
                await caller(on, f"Machine.{method}", end, *options, *rest)
            return caught.value.kind, str(caught.value)

        with contextlib.ExitStack() as stack:
            _, theirs = map(stack.enter_context, socket.socketpair())
            good = theirs.fileno()
            assert (await refused(alice, machine, "Migrate", good))[0] == "InvalidState"
            assert (await refused(bob, machine, "Migrate", good))[0] == "NotAuthorized"
            assert (await refused(bob, machine, "Receive", good))[0] == "NotAuthorized"
            kind, text = await refused(alice, host, "Receive", good)
            assert (kind, text.partition(":")[0]) == ("NotSupported", "cpu-model")
            for option, value in (
                ("downtime", Variant("u", 0)),
                ("downtime", Variant("u", 60_001)),
                ("bandwidth", Variant("x", -1)),
                ("bandwidth", Variant("b", True)),
                ("colour", Variant("t", 1)),
            ):
                found = await refused(alice, machine, "Migrate", good, {option: value})
                assert (found[0], found[1].partition(":")[0]) == ("InvalidArgument", option)
            datagrams = stack.enter_context(socket.socketpair(type=socket.SOCK_DGRAM)[0])
            alone = stack.enter_context(socket.socket(socket.AF_UNIX))
            listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            file = stack.enter_context(open("/etc/hostname", "rb"))
            read, write = os.pipe()
            stack.callback(os.close, read)
            stack.callback(os.close, write)
            for end, why in (
                (datagrams.fileno(), "no stream socket"),
                (alone.fileno(), "not connected"),
                (listener.fileno(), "listens"),
                (file.fileno(), "it is a file"),
                (read, "neither a regular file"),
            ):
                kind, text = await refused(alice, machine, "Receive", end)
                assert kind == "InvalidArgument"
                assert why in text
            # And a socket is no file.
            for method, arguments in (
                ("Save", (good, {})),
                ("AddFile", ("kernel", good)),
                ("Start", ({}, {"kernel": good})),
            ):
                with pytest.raises(VmbusError) as caught:
                    await alice(machine, f"Machine.{method}", *arguments)
                assert caught.value.kind == "InvalidArgument"
        await come(lambda: bed.fds() == before)
        assert await alice.state(machine) == "stopped"


@scenario
async def test_a_socket_whose_last_close_hangs_makes_nobody_wait(bed: Bed) -> None:
    """A TCP socket with unsent data lingers; vmbusd is the last to have it."""
    async with bed.caller() as alice:
        machine = await alice.define(cpu_model=MODEL)
        bed.broker.make_worker = lambda worker: worker.silent.add("configure")
        with socket.create_server(("127.0.0.1", 0)) as listener:
            theirs = socket.create_connection(listener.getsockname())
            ours, _ = listener.accept()
        with ours:
            with theirs:
                theirs.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 3600))
                theirs.setblocking(False)
                with contextlib.suppress(BlockingIOError):
                    while True:
                        theirs.send(bytes(1 << 16))
                job = await alice(machine, "Machine.Receive", theirs.fileno(), {}, {})
            worker = await come(lambda: bed.broker.workers.get(uuid_of(machine)))
            await come(lambda: "configure" in worker.asked)
            await alice(machine, "Machine.Kill")
            assert (await ended(alice, job))["State"] == "cancelled"
            await come(lambda: _threads(bed) > 1)  # else nothing hangs, and this is no test
            assert machine in await alice(ROOT, "Manager.ListMachines", timeout=5)
            await asyncio.to_thread(_read_all, ours, lambda: _threads(bed) == 1)


def _threads(bed: Bed) -> int:
    return len(os.listdir(f"/proc/{bed.service_pid}/task"))


def _read_all(sock: socket.socket, until: Callable[[], bool]) -> None:
    sock.settimeout(0.05)
    while not until():
        with contextlib.suppress(TimeoutError):
            sock.recv(1 << 20)


@scenario
async def test_a_machine_is_defined_with_the_uuid_that_it_has_elsewhere_if_nobody_has_it(bed: Bed) -> None:
    async with bed.caller() as alice, bed.caller(BOB) as bob:
        uuid = str(uuids.uuid4())
        machine = await alice(ROOT, "Manager.DefineMachineAs", form(), uuid)
        assert uuid_of(machine) == uuid
        for caller in (alice, bob):
            with pytest.raises(VmbusError) as caught:
                await caller(ROOT, "Manager.DefineMachineAs", form(), uuid)
            assert caught.value.kind == "AlreadyExists"
        for wrong in ("", uuid.upper(), uuid + "0", "../../etc", "g" * 36):
            with pytest.raises(VmbusError) as caught:
                await alice(ROOT, "Manager.DefineMachineAs", form(), wrong)
            assert (caught.value.kind, str(caught.value).partition(":")[0]) == ("InvalidArgument", "uuid")
        # Gone, it can come back, at once and for several that ask for it at once.
        await alice(machine, "Machine.Undefine")
        asked = [alice(ROOT, "Manager.DefineMachineAs", form(), uuid) for _ in range(4)]
        answers = await asyncio.gather(*asked, return_exceptions=True)
        assert [answer for answer in answers if isinstance(answer, str)] == [machine]
        assert uuid in bed.broker.owners
