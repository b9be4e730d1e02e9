# SPDX-License-Identifier: Apache-2.0
"""Machines' memory on a whole system, with bare-metal guests that give it back."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from tests.lab.system import System
from tests.local.service_bed import ROOT, scenario
from tests.local.test_service_real import Stage, console_says

pytestmark = pytest.mark.requires("root", "kvm")

MIB = 1 << 20
MEMORY = 64 * MIB


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    with System() as system:
        yield Stage(system)


@scenario
async def test_what_a_guest_gives_back_the_host_has(stage: Stage) -> None:
    async with stage.caller() as alice:
        for kind in ("mergeable", "shareable"):
            definition = stage.guest("balloon touch=16", memory=MEMORY, memory_kind=kind)
            machine = await alice(ROOT, "Manager.DefineMachine", definition)
            await alice(machine, "Machine.Start", {}, {})
            console = await alice(machine, "Machine.OpenConsole", {})
            await console_says(console, "touched 4096 pages")
            before = await alice(machine, "Machine.GetMemory")
            assert 16 * MIB <= before["resident"] < 20 * MIB, before
            assert MIB < before["overhead"] < 64 * MIB, before
            assert before["ballooned"] == before["saved"] == before["merged"] == 0, before
            await alice(machine, "Machine.SetMemoryTarget", MEMORY - 12 * MIB)
            await console_says(console, "3072 pages")
            for _ in range(100):
                after = await alice(machine, "Machine.GetMemory")
                if after["ballooned"] == 12 * MIB:
                    break
                await asyncio.sleep(0.05)
            assert after["ballooned"] == 12 * MIB, after
            assert before["resident"] - after["resident"] >= 12 * MIB, (before, after)
            assert await alice.client.get(machine, "Machine", "MemoryActual") == MEMORY - 12 * MIB
            await alice(machine, "Machine.Kill")
            await alice(machine, "Machine.Undefine")
