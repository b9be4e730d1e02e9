# SPDX-License-Identifier: Apache-2.0
"""A user's program that calls vmbusd and has an authentication agent of its own, as pkttyagent is one.

Orders come on stdin, one a line, and what happens is told on stdout as JSON:

    call PATH METHOD     calls it, interactive authorization allowed    → {"called": error kind, "" for none}
    end                  the dialogue ends (after somebody with the right to has answered it, or not)
    leave                the connection that called leaves the bus; the agent's stays

polkitd begins and cancels dialogues: {"begun": action, "cookie": …, "uids": […]} and {"cancelled": cookie}.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

from vmbus.bus import Bus, Call, Client, RemoteError, Variant
from vmbus.wire.errors import VmbusError

AUTHORITY = "org.freedesktop.PolicyKit1"
PLACE = "/org/freedesktop/PolicyKit1/Authority"


def tell(**what: Any) -> None:
    """One event for the test."""
    print(json.dumps(what), flush=True)


class Agent:
    """The agent's side of org.freedesktop.PolicyKit1.AuthenticationAgent."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._dialogue: Call | None = None
        bus.on_call = self._on_call

    async def register(self) -> None:
        """For this process: it is asked about calls of any of its connections."""
        started = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        process = {"pid": Variant("u", os.getpid()), "start-time": Variant("t", started)}
        subject = ["unix-process", {**process, "uid": Variant("i", os.getuid())}]
        body = [subject, "C", "/agent"]
        await self._bus.call(
            AUTHORITY,
            PLACE,
            f"{AUTHORITY}.Authority",
            "RegisterAuthenticationAgent",
            "(sa{sv})ss",
            body,
        )

    def end(self) -> None:
        """The user has finished with the dialogue, or has closed it."""
        if self._dialogue:
            self._bus.reply(self._dialogue)
            self._dialogue = None

    def _on_call(self, call: Call) -> None:
        if call.member == "BeginAuthentication":
            action, _, _, _, cookie, identities = call.body
            self._dialogue = call
            tell(begun=action, cookie=cookie, uids=[details["uid"].value for _, details in identities])
        elif call.member == "CancelAuthentication":
            self._bus.reply(call)
            self.end()
            tell(cancelled=call.body[0])


async def orders(reader: asyncio.StreamReader, agent: Agent) -> None:
    """Carry out what the test says."""
    client = await Client.connect()

    async def call(path: str, method: str) -> None:
        try:
            await client.call(path, method, timeout=60)
            tell(called="")
        except VmbusError as error:
            tell(called=error.kind)
        except RemoteError as error:
            tell(called=error.name)

    calls = set()
    while line := (await reader.readline()).decode().split():
        if line[0] == "call":
            calls.add(asyncio.ensure_future(call(line[1], line[2])))
        elif line[0] == "end":
            agent.end()
        elif line[0] == "leave":
            await client.close()


async def main() -> None:
    """See the module's note."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    agent = Agent(await Bus.connect())
    await agent.register()
    tell(ready=True)
    await orders(reader, agent)


if __name__ == "__main__":
    asyncio.run(main())
