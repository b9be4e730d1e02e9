# SPDX-License-Identifier: Apache-2.0
"""Parts of the service alone: stored files, claims, the registry, jobs, passed files, the channel."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest

from tests.local.service_bed import scenario
from vmbus.bus import DAEMON, Bus, SignalMessage
from vmbus.service import durable, host
from vmbus.service import polkit as polkit_module
from vmbus.service.channel import QUEUE, Channel
from vmbus.service.claims import Claims
from vmbus.service.credentials import Credentials
from vmbus.service.dispatcher import snake_case
from vmbus.service.files import harmless
from vmbus.service.jobs import KEPT, Jobs
from vmbus.service.machine import Last, Stored, boot_id
from vmbus.service.polkit import Polkit
from vmbus.service.registry import Registry
from vmbus.wire import broker, packet
from vmbus.wire.definition import Definition, Kernel, check_machine_type
from vmbus.wire.errors import VmbusError

UUIDS = [f"00000000-0000-4000-8000-00000000000{n}" for n in range(4)]


def definition(name: str = "one") -> Definition:
    return Definition(name=name, memory=16 << 20, kernel=Kernel(path="/k"))


def identity(ino: int, *, mode: int = stat.S_IFREG, rdev: int = 0, dev: int = 1) -> broker.Identity:
    return broker.Identity(dev, ino, rdev, mode, 512)


# -- stored files


def test_a_stored_file_is_private_and_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "one.json"
    durable.write(path, {"a": 1})
    durable.write(path, {"a": 2})
    assert durable.read(path, dict[str, int]) == {"a": 2}
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [file.name for file in tmp_path.iterdir()] == ["one.json"]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "one.json"
    durable.write(path, {"a": 1})

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        durable.write(path, {"a": 2})
    assert durable.read(path, dict[str, int]) == {"a": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["one.json"]


# -- claims


@pytest.fixture
def claims(tmp_path: Path) -> Claims:
    for uuid in UUIDS:
        (tmp_path / uuid).mkdir()
    return Claims(tmp_path)


@pytest.mark.parametrize(
    ("first", "second", "allowed"),
    [(False, False, True), (True, False, False), (False, True, False), (True, True, False)],
)
def test_one_writer_or_many_readers(claims: Claims, first: bool, second: bool, allowed: bool) -> None:
    claims.add(UUIDS[0], "disk/a/0", identity(7), writable=first)
    if allowed:
        claims.add(UUIDS[1], "disk/a/0", identity(7), writable=second)
        return
    with pytest.raises(VmbusError) as caught:
        claims.add(UUIDS[1], "disk/b/0", identity(7), writable=second)
    assert (caught.value.kind, caught.value.argument) == ("InUse", "disk/b/0")
    assert UUIDS[0] not in str(caught.value)
    claims.drop(UUIDS[0])
    claims.add(UUIDS[1], "disk/b/0", identity(7), writable=second)


def test_block_devices_are_one_by_their_number_whatever_the_node(claims: Claims) -> None:
    claims.add(UUIDS[0], "disk/a/0", identity(7, mode=stat.S_IFBLK, rdev=0x801), writable=True)
    claims.add(UUIDS[1], "disk/a/0", identity(7, mode=stat.S_IFBLK, rdev=0x802), writable=True)
    with pytest.raises(VmbusError):
        claims.add(UUIDS[2], "disk/a/0", identity(9, mode=stat.S_IFBLK, rdev=0x801, dev=5), writable=True)


def test_claims_are_loaded_again(claims: Claims, tmp_path: Path) -> None:
    claims.add(UUIDS[0], "disk/a/0", identity(7), writable=True)
    again = Claims(tmp_path)
    again.add(UUIDS[1], "disk/a/0", identity(8), writable=True)
    again.load(UUIDS[0])
    with pytest.raises(VmbusError):
        again.add(UUIDS[2], "disk/a/0", identity(7), writable=True)
    assert again.count() == 2


# -- the registry


def registry(tmp_path: Path) -> Registry:
    for name in ("state", "run"):
        (tmp_path / name).mkdir(exist_ok=True)
    return Registry(tmp_path / "state", tmp_path / "run")


@scenario
async def test_machines_are_found_again_in_their_order(tmp_path: Path) -> None:
    first = registry(tmp_path)
    for number in (2, 0, 1):
        first.create(UUIDS[number], 1000, definition(f"m{number}"), {}, persistent=True)
    first.create(UUIDS[3], 1000, definition("transient"), {}, persistent=False)
    second = registry(tmp_path)
    second.load()
    assert [machine.definition.name for machine in second.all()] == ["m2", "m0", "m1"]
    assert second.find(1000, "m0").uuid == UUIDS[0]
    with pytest.raises(VmbusError) as caught:
        second.find(1001, "m0")
    assert caught.value.kind == "NotFound"
    assert second.find(1001, UUIDS[0]).uuid == UUIDS[0]


@scenario
async def test_a_machine_that_ran_and_has_no_worker_crashed(tmp_path: Path) -> None:
    for uuid, boot, reason in ((UUIDS[0], boot_id(), "worker-lost"), (UUIDS[1], "other", "host-restarted")):
        made = registry(tmp_path)
        last = Last("running", "", "", 5, boot)
        durable.write(tmp_path / "state" / f"{uuid}.json", Stored(uuid, 1000, definition(uuid[-1]), last))
        made.load()
        machine = made.get(uuid)
        assert machine is not None
        assert (machine.state, machine.reason) == ("crashed", reason)


@scenario
async def test_a_definition_names_its_machine_type_wherever_it_is_stored(tmp_path: Path) -> None:
    made = registry(tmp_path)
    machine = made.create(UUIDS[0], 1000, definition(), {}, persistent=True)
    stored = json.loads((tmp_path / "state" / f"{UUIDS[0]}.json").read_text())
    assert stored["definition"]["machine_type"] == machine.definition.machine_type == "vmbus-2"
    again = registry(tmp_path)
    again.load()
    assert again.find(1000, UUIDS[0]).definition.machine_type == "vmbus-2"


@scenario
async def test_a_machine_of_before_there_were_types_is_shown_and_not_started(tmp_path: Path) -> None:
    file = tmp_path / "state" / f"{UUIDS[0]}.json"
    made = registry(tmp_path)
    made.create(UUIDS[0], 1000, definition(), {}, persistent=True)
    stored = json.loads(file.read_text())
    del stored["definition"]["machine_type"], stored["format"]
    file.write_text(json.dumps(stored))
    for _ in range(2):  # it says so itself once it was written again
        again = registry(tmp_path)
        again.load()
        machine = again.find(1000, UUIDS[0])
        assert machine.definition.machine_type == "vmbus-0"
        with pytest.raises(VmbusError, match="define the machine anew, as vmbus-2") as caught:
            check_machine_type(machine.definition)
        assert (caught.value.kind, caught.value.argument) == ("NotSupported", "machine-type")
        again.store(machine)


@scenario
async def test_a_stored_file_under_another_s_name_is_passed_over(tmp_path: Path) -> None:
    made = registry(tmp_path)
    stored = Stored(UUIDS[0], 1000, definition(), Last("stopped", "defined"))
    durable.write(tmp_path / "state" / f"{UUIDS[1]}.json", stored)
    made.load()
    assert made.all() == []


# -- jobs


@scenario
async def test_a_job_that_is_cancelled_before_its_first_step_is_undone_too() -> None:
    undone = []

    async def work() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            undone.append(True)

    job = Jobs().start("start", 1000, UUIDS[0], work())
    await job.cancel()
    assert job.state == "cancelled"
    assert undone
    with pytest.raises(VmbusError) as caught:
        await job.wait()
    assert caught.value.kind == "Cancelled"


@scenario
async def test_a_bug_in_a_job_is_internal_and_tells_nothing() -> None:
    async def work() -> None:
        raise ZeroDivisionError("secret")

    job = Jobs().start("start", 1000, UUIDS[0], work())
    with pytest.raises(VmbusError) as caught:
        await job.wait()
    assert caught.value.kind == "Internal"
    assert "secret" not in str(caught.value)


@scenario
async def test_an_owner_s_finished_jobs_are_bounded() -> None:
    async def work() -> None: ...

    jobs, removed = Jobs(), []
    jobs.on_removed = lambda job: removed.append(job.number)
    for _ in range(KEPT + 3):
        await jobs.start("stop", 1000, UUIDS[0], work()).wait()
    assert removed == [1, 2, 3]


# -- passed files


def test_what_is_known_to_be_harmless(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    memory = os.memfd_create("guest")
    regular = os.open(tmp_path / "file", os.O_RDWR)
    assert harmless(memory) == ""
    assert harmless(regular) == ""
    for fd in (memory, regular):
        os.close(fd)


@pytest.mark.parametrize("path", ["/dev/null", "/tmp", "/proc/self/ns/net"])
def test_what_is_not(path: str) -> None:
    fd = os.open(path, os.O_RDONLY)
    assert harmless(fd) != ""
    os.close(fd)


LAYOUT = """
import os, socket, time
from vmbus.service import descriptors as d

d.begin()
first = d.limit()
assert first % 64 == 0
kept = []
for _ in range(300):  # more than the layout had room for: it grows
    kept.append(d.keep(os.memfd_create("own")))
    assert kept[-1] < d.limit()
assert d.limit() > first
reader, writer = os.pipe()
assert reader >= d.limit()
ended = []
assert d.expel([reader, writer], lambda: ended.append(True))
for fd in (reader, writer):
    try:
        os.fstat(fd)
        raise SystemExit("still there")
    except OSError:
        pass
assert all(os.fstat(fd).st_nlink == 0 for fd in kept)
for fd in kept[:100]:
    d.close(fd)
assert os.open("/dev/null", os.O_RDONLY) >= d.limit()  # no hole is left
for _ in range(100):
    if ended:
        break
    time.sleep(0.02)
assert ended
print("done")
"""


def test_the_layout_grows_and_what_is_expelled_is_gone_and_nothing_else() -> None:
    done = subprocess.run(
        [sys.executable, "-c", LAYOUT], capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.stdout, done.returncode) == ("done\n", 0), done.stderr


# -- the channel


Made = tuple[Channel[broker.Reply, broker.Ended], socket.socket, list[Any]]


def channel() -> Made:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    told: list[Any] = []
    made: Channel[broker.Reply, broker.Ended] = Channel(
        ours,
        msgspec.msgpack.Decoder(broker.Answer),
        broker.Reply,
        peer="the test",
        on_event=told.append,
        on_closed=lambda: told.append("closed"),
        max_fds=4,
    )
    return made, theirs, told


async def ask(made: Channel[broker.Reply, broker.Ended], **options: Any) -> broker.Reply:
    number = made.number()
    reply, _ = await made.request(broker.Workers(id=number), number, **options)
    return reply


@scenario
async def test_answers_may_come_in_any_order_and_events_between() -> None:
    made, theirs, told = channel()
    questions = [asyncio.ensure_future(ask(made)) for _ in range(3)]
    await asyncio.sleep(0)
    ids = [msgspec.msgpack.decode(theirs.recv(1000), type=broker.Request).id for _ in questions]
    packet.send(theirs, broker.Ended(uuid=UUIDS[0]))
    for number in reversed(ids):
        packet.send(theirs, broker.Reply(id=number, instance=str(number)))
    assert [reply.instance for reply in await asyncio.gather(*questions)] == [str(number) for number in ids]
    assert told == [broker.Ended(uuid=UUIDS[0])]
    made.close()


@pytest.mark.parametrize(
    "say",
    [
        lambda sock: sock.send(b"garbage"),
        lambda sock: packet.send(sock, broker.Reply(id=999)),
        lambda sock: sock.shutdown(socket.SHUT_RDWR),
    ],
)
@scenario
async def test_a_peer_that_breaks_the_protocol_is_left_and_questions_fail(
    say: Callable[[socket.socket], Any],
) -> None:
    made, theirs, told = channel()
    question = asyncio.ensure_future(ask(made))
    await asyncio.sleep(0)
    say(theirs)
    with pytest.raises(VmbusError) as caught:
        await question
    assert caught.value.kind == "Disconnected"
    assert told == ["closed"]
    with pytest.raises(VmbusError):
        await ask(made)


@scenario
async def test_an_answer_after_its_deadline_is_dropped_with_its_files() -> None:
    made, theirs, told = channel()
    with pytest.raises(VmbusError) as caught:
        await ask(made, timeout=0.05)
    assert caught.value.kind == "Timeout"
    number = msgspec.msgpack.decode(theirs.recv(1000), type=broker.Request).id
    before = len(os.listdir("/proc/self/fd"))
    packet.send(theirs, broker.Reply(id=number), [theirs.fileno()])
    await asyncio.sleep(0.05)
    assert len(os.listdir("/proc/self/fd")) == before
    assert told == []
    made.close()


@scenario
async def test_a_peer_that_does_not_read_is_left() -> None:
    made, _theirs, told = channel()
    with pytest.raises(VmbusError) as caught:
        for _ in range(100_000):
            made.send(broker.Check(id=1, uid=1, paths=["/" + "x" * 1000] * 50))
    assert caught.value.kind == "Disconnected"
    assert told == ["closed"]
    assert QUEUE < 100_000


# -- polkit


def test_only_polkitd_and_the_bus_say_that_rules_have_changed() -> None:
    polkit = Polkit(cast(Bus, None), cast(Credentials, None), set(), "vmbus")
    heard = []
    polkit.on_change.append(lambda: heard.append(True))

    def say(sender: str, interface: str, member: str, *body: str) -> int:
        path = polkit_module.PATH if interface == polkit_module.INTERFACE else "/org/freedesktop/DBus"
        polkit.feed(SignalMessage(sender, path, interface, member, list(body)))
        return len(heard)

    name = polkit_module.NAME
    assert say(":1.9", DAEMON, "NameOwnerChanged", name, "", ":1.9") == 0
    assert say(":1.9", polkit_module.INTERFACE, "Changed") == 0
    assert say(DAEMON, DAEMON, "NameOwnerChanged", name, "", ":1.3") == 1
    assert say(":1.3", polkit_module.INTERFACE, "Changed") == 2
    assert say(":1.9", polkit_module.INTERFACE, "Changed") == 2


# -- names


def test_members_have_their_handlers_in_snake_case() -> None:
    assert [snake_case(name) for name in ("Start", "OpenConsole", "GetStats")] == [
        "start",
        "open_console",
        "get_stats",
    ]


def test_what_the_host_can_do_has_every_key_of_the_documentation() -> None:
    from vmbus.wire import contract  # noqa: PLC0415

    documented = contract.load()["org.vmbus1.Host"].methods["GetCapabilities"].outs[0].doc
    for key in host.capabilities(broker=True, polkit=True, notes=[]):
        assert key in documented
