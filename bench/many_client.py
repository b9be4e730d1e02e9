# SPDX-License-Identifier: Apache-2.0
"""Define many machines as one user, and start them if asked: ``define|start COUNT KERNEL``."""

from __future__ import annotations

import asyncio
import sys

from vmbus.bus import Client, Variant


async def main() -> None:
    """See the module's note."""
    verb, count, kernel = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    client = await Client.connect()
    already = len(await client.call("/org/vmbus1", "Manager.ListMachines"))
    for number in range(already, count):
        definition = {
            "name": Variant("s", f"many{number}"),
            "memory": Variant("t", 64 << 20),
            "kernel": Variant("a{sv}", {"path": Variant("s", kernel), "cmdline": Variant("s", "idle")}),
        }
        path = await client.call("/org/vmbus1", "Manager.DefineMachine", definition)
        if verb == "start":
            await client.call(path, "Machine.Start", {}, {})
    await client.close()


asyncio.run(main())
