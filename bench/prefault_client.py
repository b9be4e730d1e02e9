# SPDX-License-Identifier: Apache-2.0
"""Time one Machine.Prefault of a machine of huge pages; run as an ordinary user by bench/prefault.py.

Arguments: kernel, bytes. Prints a JSON list of one number: seconds from the call to the job's Finished.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any

from vmbus.bus import Client, Variant

ROOT = "/org/vmbus1"


async def main() -> None:
    """See the module's note."""
    kernel, size = sys.argv[1], int(sys.argv[2])
    client = await Client.connect()
    definition = {
        "name": Variant("s", "touched"),
        "memory": Variant("t", size),
        "memory-kind": Variant("s", "huge"),
        "kernel": Variant("a{sv}", {"path": Variant("s", kernel), "cmdline": Variant("s", "idle")}),
    }
    known = await client.call(ROOT, "Manager.ListMachines")
    path = known[0] if known else await client.call(ROOT, "Manager.DefineMachine", definition)
    await client.call(ROOT, "Manager.Subscribe")
    await client.call(path, "Machine.Start", {"paused": Variant("b", True)}, {})
    ended = asyncio.Event()
    states: list[str] = []

    def told(_interface: str, member: str, body: list[Any]) -> None:
        if member == "Finished":
            states.append(body[0])
            ended.set()

    begin = time.perf_counter()
    job = await client.call(path, "Machine.Prefault")
    await client.watch(job, told)
    if await client.get(job, "Job", "State") == "running":
        await asyncio.wait_for(ended.wait(), 300)
    took = time.perf_counter() - begin
    state = await client.get(job, "Job", "State")
    if state != "done":
        raise RuntimeError(f"the job is {state}")
    await client.call(path, "Machine.Kill")
    print(json.dumps([took]))
    await client.close()


asyncio.run(main())
