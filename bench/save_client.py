# SPDX-License-Identifier: Apache-2.0
"""Time Machine.Save of one machine several times; run as an ordinary user by bench/save.py.

Arguments: kernel, bytes of memory, MiB that the guest fills, rounds, directory. Prints a JSON list of
[seconds from the call to the job's end, bytes of the file on the disk].
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time

from vmbus.bus import Client, Variant

ROOT = "/org/vmbus1"


async def filled(client: Client, path: str) -> None:
    """Wait until the guest has said so."""
    console = await client.call(path, "Machine.OpenConsole", {})
    said = b""
    while b"filled" not in said:
        said += await asyncio.to_thread(os.read, console, 65536)
    os.close(console)


async def save(client: Client, path: str, place: str) -> tuple[float, int]:
    """Once; the machine goes on."""
    file = os.open(place, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    begin = time.perf_counter()
    job = await client.call(path, "Machine.Save", file, {"keep": Variant("b", True)})
    while (state := await client.get(job, "Job", "State")) == "running":
        await asyncio.sleep(0.002)
    took = time.perf_counter() - begin
    if state != "done":
        raise RuntimeError(await client.get(job, "Job", "Message"))
    written = os.fstat(file).st_blocks * 512
    os.close(file)
    os.unlink(place)
    return took, written


async def main() -> None:
    """See the module's note."""
    kernel, memory, mib, rounds, directory = sys.argv[1:]
    client = await Client.connect()
    boot = {"path": Variant("s", kernel), "cmdline": Variant("s", f"fill unlike={mib}")}
    definition = {
        "name": Variant("s", "saved"),
        "memory": Variant("t", int(memory)),
        "kernel": Variant("a{sv}", boot),
    }
    path = await client.call(ROOT, "Manager.DefineMachine", definition)
    await client.call(path, "Machine.Start", {}, {})
    await filled(client, path)
    place = os.path.join(directory, "bench.saved")
    print(json.dumps([await save(client, path, place) for _ in range(int(rounds))]))
    await client.call(path, "Machine.Kill")
    await client.close()


if __name__ == "__main__":
    asyncio.run(main())
