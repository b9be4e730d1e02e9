# SPDX-License-Identifier: Apache-2.0
"""Random messages to vmbusd: whatever the bus daemon lets through, it answers, leaks nothing and goes on."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Iterator
from typing import Any

import pytest

from tests.local.service_bed import ALICE, ROOT, Bed, Caller, scenario
from vmbus.bus import _CALL, _SIGNAL, Variant, _lib, _Message
from vmbus.wire import contract

BASIC = "ybnqiuxtdsog"
EDGES = {
    "y": 255,
    "n": -(1 << 15),
    "q": 65535,
    "i": -(1 << 31),
    "u": (1 << 32) - 1,
    "x": -(1 << 63),
    "t": (1 << 64) - 1,
}
WORDS = [
    "name",
    "memory",
    "kernel",
    "path",
    "disks",
    "layers",
    "vcpus",
    "id",
    "format",
    "qcow2",
    "raw",
    "fd",
    "source",
]
STANDARD = ["Introspectable", "Peer", "Properties", "ObjectManager"]
MEMBERS = ["Introspect", "Ping", "GetMachineId", "Get", "GetAll", "Set", "GetManagedObjects", "X"]


@pytest.fixture(scope="module", params=["dbus_next", "dbus_fast"])
def bed(request: pytest.FixtureRequest) -> Iterator[Bed]:
    with Bed(request.param) as made:
        yield made


class Source:
    """Random signatures, values and messages."""

    def __init__(self, seed: int, machine: str) -> None:
        self.random = random.Random(seed)
        self.machine = machine
        self.interfaces = contract.load()

    def signature(self, depth: int = 0) -> str:
        kind = self.random.random()
        if depth > 3 or kind < 0.5:
            return self.random.choice(BASIC + "hv")
        if kind < 0.7:
            return "a" + self.signature(depth + 1)
        if kind < 0.85:
            return f"a{{{self.random.choice('su')}{self.signature(depth + 1)}}}"
        return "(" + "".join(self.signature(depth + 1) for _ in range(self.random.randint(1, 3))) + ")"

    def value(self, tree: Any, depth: int = 0) -> Any:
        token = tree.token
        many = self.random.randint(0, 3)
        if token == "a":
            child = tree.children[0]
            if child.token == "{":
                return {
                    self.value(child.children[0]): self.value(child.children[1], depth) for _ in range(many)
                }
            if child.token == "y":
                return self.random.randbytes(many)
            return [self.value(child, depth) for _ in range(many)]
        if token == "(":
            return [self.value(child, depth) for child in tree.children]
        if token == "v":
            signature = "s" if depth > 3 else self.signature(2)
            return Variant(signature, self.value(_tree(signature)[0], depth + 1))
        return self.basic(token)

    def basic(self, token: str) -> Any:
        if token == "s":
            return self.random.choice([*WORDS, "", "ü\U0001f4a9", "x" * 5000, "org.vmbus1.Machine", "State"])
        if token == "o":
            return self.random.choice(["/", ROOT, self.machine])
        if token == "g":
            return self.random.choice(["", "a{sv}", "(ii)"])
        if token == "b":
            return self.random.random() < 0.5
        if token == "d":
            return self.random.choice([0.0, float("inf"), float("nan"), -1e300])
        if token == "h":
            return self.random.choice([0, 1, 15, 16, (1 << 32) - 1])
        return self.random.choice([0, 1, EDGES[token]])

    def message(self, fds: list[int]) -> tuple[Any, int]:
        """A message and the flags that it shall have."""
        name = self.random.choice(list(self.interfaces))
        interface = self.interfaces[name]
        path = self.random.choice([ROOT, self.machine, f"{ROOT}/host", f"{ROOT}/job/1", "/", "/x"])
        if self.random.random() < 0.3:
            name, member = f"org.freedesktop.DBus.{self.random.choice(STANDARD)}", self.random.choice(MEMBERS)
            signature = self.random.choice(["", "s", "ss", "ssv", self.signature()])
        else:
            member = self.random.choice([*interface.methods, "X"])
            described = interface.methods.get(member)
            right = described is not None and self.random.random() < 0.7
            signature = described.in_signature if described is not None and right else self.signature()
        body = [self.value(tree) for tree in _tree(signature)]
        if self.random.random() < 0.2 and signature == "a{sv}":
            body = [{word: Variant("s", "x") for word in WORDS}]
        kind = _CALL if self.random.random() < 0.9 else _SIGNAL
        message = _Message(
            message_type=kind,
            destination="org.vmbus1",
            path=path,
            interface=None if kind == _CALL and self.random.random() < 0.1 else name,
            member=member,
            signature=signature,
            body=body,
            unix_fds=fds * self.random.choice([0, 0, 0, 1, 16]),
        )
        return message, self.random.choice([0, 1, 2, 4, 5, 0x80, 0xFF])


def _tree(signature: str) -> Any:
    return _lib.signature.SignatureTree(signature).types


def send(caller: Caller, message: Any, flags: int) -> None:
    """Send with any flags, known or not."""
    message.flags = _lib.MessageFlag(flags)
    caller.client.bus._send(message)


async def rounds(bed: Bed, seed: int, seconds: float) -> int:
    """Send random messages for a while; how many."""
    loop = asyncio.get_running_loop()
    async with bed.caller(ALICE) as alice:
        machine = await alice.define(name=f"fuzz-{seed}")
        before = bed.fds()
        source, sent = Source(seed, machine), 0
        end = loop.time() + seconds
        with open(bed.file(), "r+b") as file:
            while loop.time() < end:
                message, flags = source.message([file.fileno()])
                send(alice, message, flags)
                sent += 1
                if sent % 20 == 0:
                    await alice(ROOT, "Manager.ListMachines", timeout=20)
        for path in await alice(ROOT, "Manager.ListMachines"):
            state = await alice.state(path)
            if state not in ("stopped", "crashed"):
                await alice(path, "Machine.Kill")
        for _ in range(100):
            if bed.fds() <= before:
                break
            await asyncio.sleep(0.05)
        assert bed.fds() <= before, "descriptors leaked"
    return sent


@scenario
async def test_unknown_flags_do_not_end_the_connection(bed: Bed) -> None:
    async with bed.caller(ALICE) as alice:
        for flags in (0x08, 0x80, 0xFE, 0xFF):
            message = _Message(
                destination="org.vmbus1", path=ROOT, interface="org.vmbus1.Manager", member="ListMachines"
            )
            send(alice, message, flags)
        await alice(ROOT, "Manager.ListMachines", timeout=5)


@scenario
async def test_a_short_round(bed: Bed) -> None:
    pid = bed.service_pid
    assert await rounds(bed, 1, 4) > 100
    assert bed.service_pid == pid
    assert "Traceback" not in bed.system.logs()["service"]


@pytest.mark.fuzz
@pytest.mark.timeout(0)
def test_long_rounds(bed: Bed) -> None:
    seconds = float(os.environ.get("FUZZ_SECONDS", "60"))
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    asyncio.run(rounds(bed, seed, seconds))
    assert "Traceback" not in bed.system.logs()["service"]
