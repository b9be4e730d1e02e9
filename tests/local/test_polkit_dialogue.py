# SPDX-License-Identifier: Apache-2.0
"""polkit's dialogue, for real: a registered authentication agent is asked, and grants, refuses or waits.

Nobody types a password: who answers for the user is root, as polkit's own set-uid helper does once PAM is
content (AuthenticationAgentResponse2).
"""

from __future__ import annotations

import asyncio
import json
import os
import pwd
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.lab.system import ALICE, BOB, SLOW
from tests.local.polkit_agent import AUTHORITY, PLACE
from tests.local.service_bed import Bed, scenario
from vmbus.bus import Bus, Variant

RULE = f"""\
polkit.addRule(function(action, subject) {{
    if (subject.user == '{ALICE}' && action.id.indexOf('org.vmbus1.') == 0) return polkit.Result.AUTH_SELF;
}});"""
ALICES = pwd.getpwnam(ALICE).pw_uid


class Program:
    """tests/local/polkit_agent.py, as alice. A context manager."""

    def __init__(self, bed: Bed) -> None:
        pipe = subprocess.PIPE
        path = Path(__file__).with_name("polkit_agent.py")
        environment = {"PYTHONPATH": str(Path(__file__).parents[2])}
        self._process = bed.system.popen(
            ALICE, [sys.executable, path], env=environment, stdin=pipe, stdout=pipe
        )
        self._said = b""

    def __enter__(self) -> Program:
        assert self.hears() == {"ready": True}
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.close()
        self._process.wait(10 * SLOW)
        self._process.stdout.close()

    def order(self, *words: str) -> None:
        """See the program's note."""
        assert self._process.stdin
        self._process.stdin.write(" ".join(words).encode() + b"\n")
        self._process.stdin.flush()

    def hears(self, within: float = 10) -> dict[str, Any]:
        """The next thing that it tells."""
        assert self._process.stdout
        deadline = time.monotonic() + within * SLOW
        while b"\n" not in self._said:
            left = deadline - time.monotonic()
            if left < 0 or not select.select([self._process.stdout], [], [], left)[0]:
                raise TimeoutError("the program says nothing")
            self._said += os.read(self._process.stdout.fileno(), 65536)
        line, _, self._said = self._said.partition(b"\n")
        found: dict[str, Any] = json.loads(line)
        return found


@pytest.fixture(scope="module")
def bed() -> Iterator[Bed]:
    with Bed("dbus_next") as made:
        made.system.rule(RULE)
        yield made


@pytest.fixture
def program(bed: Bed) -> Iterator[Program]:
    with Program(bed) as running:
        yield running


async def machine_of_bob(bed: Bed) -> str:
    async with bed.caller(BOB) as bob:
        machine = await bob.define()
        await bob(machine, "Machine.Start", {}, {})
        return machine


async def state(bed: Bed, machine: str) -> str:
    async with bed.caller(BOB) as bob:
        return await bob.state(machine)


async def answer(bed: Bed, cookie: str) -> None:
    """PAM is content: alice is who she says."""
    bus = await Bus.connect(bed.system.bus_address)
    identity = ["unix-user", {"uid": Variant("u", ALICES)}]
    await bus.call(
        AUTHORITY,
        PLACE,
        f"{AUTHORITY}.Authority",
        "AuthenticationAgentResponse2",
        "us(sa{sv})",
        [ALICES, cookie, identity],
    )
    await bus.close()


@scenario
async def test_a_granted_dialogue_lets_the_call_through(bed: Bed, program: Program) -> None:
    machine = await machine_of_bob(bed)
    program.order("call", machine, "Machine.Pause")
    begun = await asyncio.to_thread(program.hears)
    assert begun["begun"].startswith("org.vmbus1.machine.")
    assert begun["uids"] == [ALICES]
    assert await state(bed, machine) == "running"  # nothing happens before the answer
    await answer(bed, begun["cookie"])
    program.order("end")
    assert await asyncio.to_thread(program.hears) == {"called": ""}
    assert await state(bed, machine) == "paused"


@scenario
async def test_a_closed_dialogue_is_a_refusal(bed: Bed, program: Program) -> None:
    machine = await machine_of_bob(bed)
    program.order("call", machine, "Machine.Pause")
    await asyncio.to_thread(program.hears)
    program.order("end")
    assert await asyncio.to_thread(program.hears) == {"called": "NotAuthorized"}
    assert await state(bed, machine) == "running"


@scenario
async def test_a_caller_that_leaves_takes_its_dialogue_along(bed: Bed, program: Program) -> None:
    machine = await machine_of_bob(bed)
    program.order("call", machine, "Machine.Pause")
    begun = await asyncio.to_thread(program.hears)
    program.order("leave")
    assert await asyncio.to_thread(program.hears) == {"cancelled": begun["cookie"]}
    assert await state(bed, machine) == "running"


@scenario
async def test_a_machine_that_ends_while_the_dialogue_is_open_is_not_acted_on(
    bed: Bed, program: Program
) -> None:
    machine = await machine_of_bob(bed)
    program.order("call", machine, "Machine.Pause")
    begun = await asyncio.to_thread(program.hears)
    async with bed.caller(BOB) as bob:
        await bob(machine, "Machine.Kill")
        await bob(machine, "Machine.Undefine")
    await answer(bed, begun["cookie"])
    program.order("end")
    assert await asyncio.to_thread(program.hears) == {"called": "Changed"}
