# SPDX-License-Identifier: Apache-2.0
"""The broker's socket, from the side of a service that was taken over."""

from __future__ import annotations

import os
import random
import socket
import stat
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from tests.local.broker_bed import ALICE, BOB, MIB, SERVICE, Bed, broker, new_uuid, send_with_fds, wait_until
from vmbus.wire import broker as wire
from vmbus.wire.packet import LIMIT

pytestmark = pytest.mark.requires("root")


@pytest.fixture(scope="module")
def bed() -> Iterator[Bed]:
    with broker() as started:
        yield started


def ended(sock: socket.socket, seconds: float = 5) -> bool:
    """Whether the broker closed this connection."""
    sock.settimeout(seconds)
    try:
        while sock.recv(1 << 17):
            pass
    except TimeoutError:
        return False
    except OSError:
        pass
    return True


def test_only_the_service_s_user_is_served(bed: Bed) -> None:
    place = bed.run / "broker"
    assert stat.S_IMODE(place.stat().st_mode) == 0o750
    assert stat.S_IMODE((place / "socket").stat().st_mode) == 0o660
    assert (place.stat().st_uid, place.stat().st_gid) == (0, SERVICE)
    for uid in (ALICE, 0):
        client = bed.connect(uid, hello=False)
        assert ended(client.sock), uid
        client.close()


def test_hello_comes_first(bed: Bed) -> None:
    client = bed.connect(hello=False)
    client.post(wire.Workers)
    assert ended(client.sock)


def test_hello_says_what_is_missing_here(bed: Bed) -> None:
    client = bed.connect(hello=False)
    reply = client.ask(wire.Hello, versions=[1, 2, 99])
    assert (reply.version, reply.instance) == (1, bed.instance)
    assert any("rlimits only" in note for note in reply.notes)
    client.close()


def test_a_version_that_it_does_not_speak_is_said(bed: Bed) -> None:
    client = bed.connect(hello=False)
    reply = client.ask(wire.Hello, versions=[7])
    assert (reply.error, reply.argument) == ("NotSupported", "versions")
    client.post(wire.Workers)
    assert ended(client.sock)  # no version was agreed on


def test_a_new_connection_replaces_the_old_one(bed: Bed) -> None:
    first = bed.connect()
    second = bed.connect()
    assert ended(first.sock)
    assert second.ask(wire.Workers).error is None
    second.close()


BAD = {
    "empty map": msgspec.msgpack.encode({}),
    "no such operation": msgspec.msgpack.encode({"op": "reboot", "id": 1}),
    "no id": msgspec.msgpack.encode({"op": "workers"}),
    "an id that is a string": msgspec.msgpack.encode({"op": "workers", "id": "1"}),
    "a uuid with a slash": msgspec.msgpack.encode({"op": "kill", "id": 1, "uuid": "../../../etc/passwd"}),
    "a slot with dots": msgspec.msgpack.encode(
        {"op": "open", "id": 1, "uuid": new_uuid(), "slot": "..", "path": "/x"}
    ),
    "a relative path": msgspec.msgpack.encode(
        {"op": "open", "id": 1, "uuid": new_uuid(), "slot": "kernel", "path": "etc/passwd"}
    ),
    "a path of 5000 bytes": msgspec.msgpack.encode(
        {"op": "open", "id": 1, "uuid": new_uuid(), "slot": "kernel", "path": "/" + "x" * 5000}
    ),
    **{
        f"a machine with {memory} bytes and {vcpus} vCPUs": msgspec.msgpack.encode(
            {"op": "spawn", "id": 1, "uuid": new_uuid(), "memory": memory, "vcpus": vcpus}
        )
        for memory, vcpus in ((0, 1), (-(1 << 20), 1), (1 << 50, 1), (1 << 20, 0), (1 << 20, 1000))
    },
    **{
        f"a tap with {queues} queues": msgspec.msgpack.encode(
            {
                "op": "tap",
                "id": 1,
                "uuid": new_uuid(),
                "slot": "n",
                "mac": "52:54:00:00:00:01",
                "queues": queues,
            }
        )
        for queues in (-1, 17)
    },
    "a negative amount": msgspec.msgpack.encode({"op": "check", "id": 1, "uid": 1, "locked": -1}),
    "a list": msgspec.msgpack.encode([1, 2, 3]),
    "not msgpack": b"\xc1\xff\x00",
    "two messages in one": msgspec.msgpack.encode({"op": "workers", "id": 1}) * 2,
    "a datagram that is too large": b"x" * (LIMIT + 1),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_not_acceptable_ends_the_connection(bed: Bed, name: str) -> None:
    client = bed.connect()
    client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    client.sock.send(BAD[name])
    assert ended(client.sock)
    again = bed.connect()
    assert again.ask(wire.Workers).error is None
    again.close()


def test_random_bytes_end_the_connection_and_nothing_else(bed: Bed) -> None:
    chance = random.Random(7)
    valid = msgspec.msgpack.encode(wire.Own(id=1, uuid=new_uuid(), uid=ALICE))
    for _ in range(200):
        client = bed.connect()
        data = bytearray(valid)
        for _ in range(chance.randrange(1, 6)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        client.sock.send(data)
        client.close()
    again = bed.connect()
    assert again.ask(wire.Workers).error is None
    assert bed.said("bug:") == 0
    again.close()


def test_attached_descriptors_do_not_arrive(bed: Bed) -> None:
    client = bed.connect()
    assert bed.process is not None
    fds = Path(f"/proc/{bed.process.pid}/fd")
    before = len(list(fds.iterdir()))
    read, write = os.pipe()
    try:
        for number in range(50):
            send_with_fds(client, wire.Workers(id=1000 + number), [write] * 16)
            client.reply(1000 + number)
    except (PermissionError, OSError) as error:
        assert error.errno == 1  # Linux 6.16 and newer: they cannot even be sent
    os.close(write)
    assert len(list(fds.iterdir())) == before
    os.set_blocking(read, False)
    assert os.read(read, 1) == b""  # nobody holds the other end
    os.close(read)
    client.close()


def test_a_flood_of_requests_is_answered_or_ends_the_flooder(bed: Bed) -> None:
    client = bed.connect()
    message = msgspec.msgpack.encode(wire.Check(id=1, uid=ALICE, paths=[f"{bed.home}/alice/x"] * 10))
    client.sock.settimeout(1)
    sent = 0
    try:
        for _ in range(20_000):  # and never read a reply
            client.sock.send(message)
            sent += 1
    except OSError:
        pass
    assert sent > 100
    again = bed.connect()
    began = time.monotonic()
    assert again.ask(wire.Workers).error is None
    assert time.monotonic() - began < 5
    wait_until(lambda: bed.said("does not read its replies") + bed.said("replaced by a new connection") > 0)
    again.close()


def test_a_thousand_replies_wait_for_a_service_that_is_busy(bed: Bed) -> None:
    client = bed.connect()
    numbers = [client.post(wire.Workers) for _ in range(1000)]
    assert [client.reply(number)[0].error for number in numbers] == [None] * 1000
    client.close()


def test_many_users_cannot_fill_it_with_children(bed: Bed) -> None:
    client = bed.connect()
    numbers = [client.post(wire.Own, uuid=new_uuid(), uid=70_000 + n) for n in range(150)]
    for number in numbers:
        assert client.reply(number)[0].error == "NotFound"
    assert bed.process is not None
    wait_until(
        lambda: Path(f"/proc/{bed.process.pid}/task/{bed.process.pid}/children").read_text() == ""  # type: ignore[union-attr]
    )
    client.close()


@pytest.mark.parametrize("uid", [0, 1, 999, 61500, 65534, 65535, -1, 0xFFFFFFFF, 1 << 40])
def test_root_and_system_users_never_own(bed: Bed, uid: int) -> None:
    client = bed.connect()
    reply = client.ask(wire.Own, uuid=new_uuid(), uid=uid)
    assert (reply.error, reply.argument) == ("AccessDenied", "uid")
    assert client.ask(wire.Own, uuid=new_uuid(), uid=bed.uid_first + 1).error == "AccessDenied"
    client.close()


def test_an_owner_never_changes(bed: Bed) -> None:
    client = bed.connect()
    name = new_uuid()
    assert client.ask(wire.Own, uuid=name, uid=ALICE).error is None
    assert client.ask(wire.Own, uuid=name, uid=ALICE).error is None
    reply = client.ask(wire.Own, uuid=name, uid=BOB)
    assert (reply.error, reply.argument) == ("AccessDenied", "uid")
    record = bed.state / "owners" / name
    assert stat.S_IMODE(record.stat().st_mode) == 0o600
    assert stat.S_IMODE(record.parent.stat().st_mode) == 0o700
    assert msgspec.json.decode(record.read_bytes()) == {"uid": ALICE, "user": "alice"}
    client.close()


def test_a_uid_that_is_somebody_else_now_gets_nothing(bed: Bed) -> None:
    client = bed.connect()
    name = new_uuid()
    client.ask(wire.Own, uuid=name, uid=ALICE)
    record = bed.state / "owners" / name
    record.write_bytes(msgspec.json.encode({"uid": ALICE, "user": "alice-of-before"}))
    reply = client.ask(wire.Spawn, uuid=name, memory=MIB, vcpus=1)
    assert (reply.error, reply.argument) == ("AccessDenied", "uid")
    client.close()


def test_check_says_what_the_policy_would_refuse(bed: Bed) -> None:
    client = bed.connect()

    def asked(uid: int, **what: object) -> str | None:
        return client.ask(wire.Check, uid=uid, **what).error

    assert asked(ALICE, memory=2 << 30) is None  # of group pool
    assert asked(BOB, memory=2 << 30) == "QuotaExceeded"
    assert asked(BOB, vcpus=9) == "QuotaExceeded"
    assert asked(ALICE, grants=["bridges.vmbt0"]) is None
    assert asked(BOB, grants=["bridges.vmbt0"]) == "AccessDenied"
    assert asked(ALICE, grants=["bridges.docker0"]) == "AccessDenied"
    assert asked(ALICE, paths=[f"{bed.home}/alice/x", f"{bed.place}/pool/y"]) is None
    assert asked(BOB, paths=[f"{bed.place}/pool/y"]) == "AccessDenied"
    assert asked(4_000_000) == "NotFound"
    client.close()


def test_every_request_is_in_the_audit_log(bed: Bed) -> None:
    client = bed.connect()
    name = new_uuid()
    client.ask(wire.Own, uuid=name, uid=ALICE)
    client.ask(wire.Open, uuid=name, slot="kernel", path="/etc/shadow\n2026 forged: done")
    lines = [line for line in bed.log.read_text().splitlines() if name in line]
    assert len(lines) == 2
    assert f"service[{os.getpid()}] for nobody: own" in lines[0]
    assert f"service[{os.getpid()}] for alice: open" in lines[1]
    assert "uid=61010: done" in lines[0]
    assert "/etc/shadow" in lines[1]
    assert "InvalidState" in lines[1]
    assert not any(line.startswith("2026 forged") for line in bed.log.read_text().splitlines())
    client.close()


def test_a_peer_that_hangs_up_at_once_is_nothing_special(bed: Bed) -> None:
    for _ in range(50):
        client = bed.connect(hello=False)
        client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.post(wire.Hello, versions=[1])
        client.close()
    client = bed.connect()
    assert client.ask(wire.Workers).error is None
    assert bed.said("bug:") == 0
    client.close()
