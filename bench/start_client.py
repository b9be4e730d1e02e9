# SPDX-License-Identifier: Apache-2.0
"""Start a machine again and again over D-Bus and time it; run as an ordinary user by bench/start.py.

Arguments: kernel, rounds, seconds to rest between rounds. Prints one JSON list of [seconds to the first guest
output, seconds to the reply of Start], both from just before the call is sent.

The first output is known by the signal ConsoleActivity, so it includes the guest's way to its console, the
worker's event, the service and the bus: it is later than the first instruction by all that.
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
    kernel, rounds, rest = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
    client = await Client.connect()
    definition = {
        "name": Variant("s", "timed"),
        "memory": Variant("t", 64 << 20),
        "kernel": Variant("a{sv}", {"path": Variant("s", kernel), "cmdline": Variant("s", "idle")}),
    }
    known = await client.call(ROOT, "Manager.ListMachines")
    path = known[0] if known else await client.call(ROOT, "Manager.DefineMachine", definition)
    await client.call(ROOT, "Manager.Subscribe")
    spoke = asyncio.Event()
    when = 0.0

    def told(_interface: str, member: str, _body: list[Any]) -> None:
        nonlocal when
        if member == "ConsoleActivity" and not spoke.is_set():
            when = time.perf_counter()
            spoke.set()

    await client.watch(path, told)
    samples = []
    for _ in range(rounds):
        spoke.clear()
        begin = time.perf_counter()
        await client.call(path, "Machine.Start", {}, {})
        replied = time.perf_counter()
        await asyncio.wait_for(spoke.wait(), 20)
        samples.append([when - begin, replied - begin])
        await client.call(path, "Machine.Kill")
        await asyncio.sleep(rest)
    print(json.dumps(samples))
    await client.close()


asyncio.run(main())
