# SPDX-License-Identifier: Apache-2.0
"""Who is behind a unique name, and when it leaves the bus.

The bus daemon says the uid (from the socket's credentials); it never changes during a connection, and a
unique name is never given twice, so it is asked once and forgotten when the name goes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from vmbus.bus import DAEMON, Bus, RemoteError, SignalMessage
from vmbus.wire.errors import VmbusError

RULE: Final = f"type='signal',sender='{DAEMON}',interface='{DAEMON}',member='NameOwnerChanged',arg2=''"


class Credentials:
    """``feed`` is given every signal; ``known`` needs no question to the daemon."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._uids: dict[str, int] = {}
        self._departures: dict[str, list[Callable[[], None]]] = {}
        self.on_left: list[Callable[[str], None]] = []

    async def begin(self) -> None:
        """Hear of connections that end."""
        await self._bus.add_match(RULE)

    def feed(self, signal: SignalMessage) -> None:
        """Take notice of a NameOwnerChanged."""
        if signal.sender != DAEMON or signal.member != "NameOwnerChanged" or signal.body[2]:
            return
        name = signal.body[0]
        if not name.startswith(":"):
            return
        self._uids.pop(name, None)
        for callback in self._departures.pop(name, ()):
            callback()
        for hear in self.on_left:
            hear(name)

    def known(self, name: str) -> int | None:
        """The uid, if it was asked before."""
        return self._uids.get(name)

    async def uid(self, name: str) -> int:
        """The uid. Raises Disconnected when the connection has gone."""
        known = self._uids.get(name)
        if known is not None:
            return known
        try:
            answer = await self._bus.call(
                DAEMON, "/org/freedesktop/DBus", DAEMON, "GetConnectionUnixUser", "s", [name]
            )
        except (RemoteError, TimeoutError):
            raise VmbusError("Disconnected", "the caller has left the bus") from None
        uid: int = answer.body[0]
        self._uids[name] = uid
        return uid

    def watch(self, name: str, future: asyncio.Future[None]) -> Callable[[], None]:
        """Resolve ``future`` when ``name`` leaves; returns what undoes the watch."""

        def left() -> None:
            if not future.done():
                future.set_result(None)

        watchers = self._departures.setdefault(name, [])
        watchers.append(left)

        def undo() -> None:
            watchers.remove(left)
            if not watchers and self._departures.get(name) is watchers:
                del self._departures[name]

        return undo

    def present(self, name: str) -> bool:
        """Whether a name whose uid was asked is still there."""
        return name in self._uids
