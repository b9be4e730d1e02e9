# SPDX-License-Identifier: Apache-2.0
"""A machine that was killed can be started again at once: nothing of the last run reaches into the next."""

from __future__ import annotations

import os
import pwd
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.system import ALICE, NESTED, System
from tests.local.worker_guest import image

pytestmark = pytest.mark.requires("root", "kvm")

ROUNDS = 5 if NESTED else 40
# The signal of the worker's hang-up and the broker's word of its end race with the next start.
CLIENT = """
import asyncio, sys
from vmbus.bus import Client, Variant

async def main():
    client = await Client.connect()
    kernel = {"path": Variant("s", sys.argv[1]), "cmdline": Variant("s", "idle")}
    form = {"name": Variant("s", "again"), "memory": Variant("t", 16 << 20)}
    form["kernel"] = Variant("a{sv}", kernel)
    path = await client.call("/org/vmbus1", "Manager.DefineMachine", form)
    for _ in range(int(sys.argv[2])):
        await client.call(path, "Machine.Start", {}, {})
        await asyncio.sleep(float(sys.argv[3]))
        await client.call(path, "Machine.Kill")
    await client.call(path, "Machine.Undefine")

asyncio.run(main())
"""


@pytest.fixture(scope="module")
def system() -> Iterator[System]:
    with System() as made:
        account = pwd.getpwnam(ALICE)
        place = made.files(ALICE) / "kernel"
        shutil.copyfile(image(), place)
        os.chown(place, account.pw_uid, account.pw_gid)
        yield made


@pytest.mark.parametrize(
    "rest",
    [pytest.param(0, id="at once"), pytest.param(0.05, id="after a moment", marks=pytest.mark.long)],
)
def test_start_and_kill_in_quick_succession(rest: float, system: System) -> None:
    words = [str(system.files(ALICE) / "kernel"), str(ROUNDS), str(rest)]
    environment = {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = system.run_as(ALICE, [sys.executable, "-c", CLIENT, *words], env=environment, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert system.workers() == {}
