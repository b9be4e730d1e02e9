# SPDX-License-Identifier: Apache-2.0
"""Time the starts of instant clones and of restores of one machine, in turns; run as an ordinary user by
bench/clone.py.

Arguments: kernel, bytes of memory, MiB that the guest fills, rounds, directory, seconds to rest. Prints a
JSON object: for clone and restore a list of [seconds to the first guest output, seconds to the reply], both
from just before the call is sent. The output is known by the signal ConsoleActivity, as in
bench/start_client.py.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from typing import Any

from bench.save_client import filled
from vmbus.bus import Client, Variant

ROOT = "/org/vmbus1"


async def done(client: Client, job: str) -> None:
    """Wait for a job."""
    while (state := await client.get(job, "Job", "State")) == "running":
        await asyncio.sleep(0.005)
    if state != "done":
        raise RuntimeError(await client.get(job, "Job", "Message"))


async def main() -> None:
    """See the module's note."""
    kernel, memory, mib, rounds, directory, rest = sys.argv[1:]
    client = await Client.connect()
    boot = {"path": Variant("s", kernel), "cmdline": Variant("s", f"fill unlike={mib} flood")}
    definition = {
        "name": Variant("s", "cloned"),
        "memory": Variant("t", int(memory)),
        "kernel": Variant("a{sv}", boot),
    }
    path = await client.call(ROOT, "Manager.DefineMachine", definition)
    await client.call(path, "Machine.Start", {}, {})
    await filled(client, path)
    place = os.path.join(directory, "bench.template")
    file = os.open(place, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    await done(client, await client.call(path, "Machine.Save", file, {}))
    await done(client, await client.call(ROOT, "Manager.ImportTemplate", "bench", file))
    await client.call(ROOT, "Manager.Subscribe")
    spoke = asyncio.Event()
    when = 0.0

    def told(_interface: str, member: str, _body: list[Any]) -> None:
        nonlocal when
        if member == "ConsoleActivity" and not spoke.is_set():
            when = time.perf_counter()
            spoke.set()

    await client.watch(path, told)
    calls: dict[str, tuple[str, list[Any]]] = {
        "clone": ("Machine.Clone", ["bench", {}, {}]),
        "restore": ("Machine.Restore", [file, {}, {}]),
    }
    samples: dict[str, list[list[float]]] = {name: [] for name in calls}
    for _ in range(int(rounds)):
        for name, (method, arguments) in calls.items():
            await asyncio.sleep(float(rest))
            spoke.clear()
            begin = time.perf_counter()
            await client.call(path, method, *arguments)
            replied = time.perf_counter()
            await asyncio.wait_for(spoke.wait(), 60)
            samples[name].append([when - begin, replied - begin])
            await client.call(path, "Machine.Kill")
    await client.call(ROOT, "Manager.DeleteTemplate", "bench")
    await client.call(path, "Machine.Undefine")
    os.close(file)
    os.unlink(place)
    print(json.dumps(samples))
    await client.close()


if __name__ == "__main__":
    asyncio.run(main())
