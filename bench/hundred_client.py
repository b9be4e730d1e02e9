# SPDX-License-Identifier: Apache-2.0
"""Define and start many machines as one user: ``COUNT KERNEL``; run by bench/hundred.py.

Prints one JSON object: seconds of each definition and of each start, one after the other; then, all of them
killed, seconds until all have been started at once.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Awaitable

from vmbus.bus import Client, Variant

ROOT = "/org/vmbus1"


async def timed(work: Awaitable[object]) -> float:
    """Seconds that it took."""
    begin = time.perf_counter()
    await work
    return time.perf_counter() - begin


async def main() -> None:
    """See the module's note."""
    count, kernel = int(sys.argv[1]), sys.argv[2]
    client = await Client.connect()
    defined = []
    for number in range(count):
        definition = {
            "name": Variant("s", f"machine{number}"),
            "memory": Variant("t", 16 << 20),
            "kernel": Variant("a{sv}", {"path": Variant("s", kernel), "cmdline": Variant("s", "idle")}),
        }
        defined.append(await timed(client.call(ROOT, "Manager.DefineMachine", definition)))
    paths = await client.call(ROOT, "Manager.ListMachines")
    starts = [await timed(client.call(path, "Machine.Start", {}, {})) for path in paths]
    print(json.dumps({"definitions": defined, "starts": starts}), flush=True)
    await asyncio.to_thread(sys.stdin.readline)  # until the memory has been looked at
    await asyncio.gather(*(client.call(path, "Machine.Kill") for path in paths))
    at_once = await timed(asyncio.gather(*(client.call(path, "Machine.Start", {}, {}) for path in paths)))
    print(json.dumps(at_once), flush=True)
    await asyncio.gather(*(client.call(path, "Machine.Kill") for path in paths))
    await client.close()


asyncio.run(main())
