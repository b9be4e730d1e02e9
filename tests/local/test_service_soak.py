# SPDX-License-Identifier: Apache-2.0
"""Random operations on writing guests while vmbusd and broker are killed: nothing is left."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Iterator
from typing import Any

import pytest

from tests.lab.system import System
from tests.local.service_bed import ROOT, Caller
from tests.local.test_service_real import Stage
from vmbus.bus import RemoteError
from vmbus.wire.errors import VmbusError

MACHINES = 6
OPERATIONS = ["Start", "Kill", "Pause", "Resume", "Reset", "Stop", "Shutdown", "GetStats", "OpenConsole"]

pytestmark = [pytest.mark.requires("root", "kvm"), pytest.mark.soak, pytest.mark.timeout(0)]


@pytest.fixture
def stage() -> Iterator[Stage]:
    with System() as system:
        yield Stage(system)


async def operate(caller: Caller, machine: str, source: random.Random) -> None:
    """A few operations; refusals are as good as successes, and the daemons may be away."""
    for _ in range(6):
        operation = source.choice(OPERATIONS)
        arguments: dict[str, list[Any]] = {
            "Start": [{}, {}],
            "Stop": [source.choice([0, 300_000])],
            "OpenConsole": [{}],
        }
        try:
            result = await caller(machine, f"Machine.{operation}", *arguments.get(operation, []), timeout=60)
        except (VmbusError, RemoteError):
            result = None
        if operation == "OpenConsole" and result is not None:
            os.close(result)
        await asyncio.sleep(source.random() * 0.2)


async def disturb(stage: Stage, source: random.Random) -> None:
    """Kill a daemon, or none, and start it again."""
    await asyncio.sleep(source.random() * 2)
    victim = source.choice(["service", "broker", None, None])
    if victim is not None:
        daemon = getattr(stage.system, victim)
        daemon.kill()
        await asyncio.to_thread(daemon.start)


async def story(stage: Stage, source: random.Random, seconds: float) -> None:
    machines = []
    async with stage.caller() as alice:
        for _ in range(MACHINES):
            disks = [{"id": "d", "layers": [{"format": "raw", "path": stage.disk()}]}]
            machines.append(await alice(ROOT, "Manager.DefineMachine", stage.guest("disk-loop", disks=disks)))
    end = asyncio.get_running_loop().time() + seconds
    while asyncio.get_running_loop().time() < end:
        async with stage.caller() as alice:
            await asyncio.gather(
                disturb(stage, source), *(operate(alice, machine, source) for machine in machines)
            )
    async with stage.caller() as alice:
        for machine in machines:
            await alice.until(machine, "running", "paused", "stopped", "crashed", within=30)
            if await alice.state(machine) in ("running", "paused"):
                await alice(machine, "Machine.Kill", timeout=60)
            assert await alice.client.get(machine, "Machine", "StatusFlags") == []
            await alice(machine, "Machine.Undefine")


def test_nothing_is_left_of_random_operations_and_killed_daemons(stage: Stage) -> None:
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    before = stage.system.counts()
    asyncio.run(story(stage, random.Random(seed), float(os.environ.get("SOAK_SECONDS", "120"))))
    assert stage.system.settle(before) == before
    assert "Traceback" not in stage.system.logs()["service"]
