# SPDX-License-Identifier: Apache-2.0
"""Attach an interface to a running machine and detach it, again and again; run as an ordinary user by
bench/attach.py: ``KERNEL BRIDGE ROUNDS``.

Prints a JSON list of [seconds until the guest says that it has found it, seconds to the reply], both from
just before the call of AttachNic is sent.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time

from vmbus.bus import Client, Variant

ROOT = "/org/vmbus1"


async def main() -> None:
    """See the module's note."""
    kernel, bridge, rounds = sys.argv[1], sys.argv[2], int(sys.argv[3])
    client = await Client.connect()
    boot = {"path": Variant("s", kernel), "cmdline": Variant("s", "plug count=9999")}
    definition = {
        "name": Variant("s", "plug"),
        "memory": Variant("t", 16 << 20),
        "kernel": Variant("a{sv}", boot),
    }
    path = await client.call(ROOT, "Manager.DefineMachine", definition)
    await client.call(path, "Machine.Start", {}, {})
    console = await client.call(path, "Machine.OpenConsole", {})
    os.set_blocking(console, False)
    heard = ""
    more = asyncio.Event()

    def readable() -> None:
        nonlocal heard
        heard += os.read(console, 65536).decode(errors="replace")
        more.set()

    asyncio.get_running_loop().add_reader(console, readable)

    async def said(what: str) -> float:
        """When the guest had said it."""
        while what not in heard:
            more.clear()
            await asyncio.wait_for(more.wait(), 30)
        return time.perf_counter()

    await said("plug: ready")
    wanted = {"id": "further", "bridge": bridge, "mac": "52:54:00:00:00:01"}
    samples = []
    for _ in range(rounds):
        heard = ""
        begin = time.perf_counter()
        found = asyncio.ensure_future(said("plug: slot 1 has 1041"))
        nic = {name: Variant("s", value) for name, value in wanted.items()}
        await client.call(path, "Machine.AttachNic", nic)
        replied = time.perf_counter()
        samples.append([await found - begin, replied - begin])
        await client.call(path, "Machine.DetachNic", "further", 20_000_000)
        await said("plug: slot 1 is empty")
        while (await client.get(path, "Machine", "Definition")).get("nics"):
            await asyncio.sleep(0.01)
    await client.call(path, "Machine.Kill")
    await client.call(path, "Machine.Undefine")
    print(json.dumps(samples))
    await client.close()


asyncio.run(main())
