# SPDX-License-Identifier: Apache-2.0
"""The objects on the bus: what is where, who may see which property, and who hears of what.

An object has an owner (or none: everything of it is public). Of its properties and signals, the public ones
are for everybody and broadcast; the private ones are for the owner and for who has
org.vmbus1.machine.read-any, and go by unicast to those of their connections that subscribed (DESIGN rule
5). PropertiesChanged and InterfacesAdded obey the same rule: the broadcast carries the public properties
only, and a second one, by unicast, all.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterable, Mapping
from typing import Any, Final, Protocol

from vmbus.bus import Bus, BusLost
from vmbus.service.credentials import Credentials
from vmbus.service.polkit import Polkit
from vmbus.wire.contract import Interface
from vmbus.wire.errors import VmbusError

log = logging.getLogger("vmbus.exports")

ROOT: Final = "/org/vmbus1"
READ_ANY: Final = "org.vmbus1.machine.read-any"
PROPERTIES: Final = "org.freedesktop.DBus.Properties"
OBJECT_MANAGER: Final = "org.freedesktop.DBus.ObjectManager"


class Exported(Protocol):
    """An object on the bus; it has one interface of ours."""

    path: str
    interface: str
    owner: int | None

    def token(self) -> object:
        """Differs when what a caller was authorized for has changed meanwhile."""

    def property(self, name: str) -> Any:
        """The value of a property as a Variant."""


class Exports:
    """The tree below /org/vmbus1."""

    def __init__(self, bus: Bus, interfaces: Mapping[str, Interface], subscribers: Subscribers) -> None:
        self._bus = bus
        self._interfaces = interfaces
        self._subscribers = subscribers
        self._objects: dict[str, Exported] = {}

    def get(self, path: str) -> Exported | None:
        """The object at ``path``."""
        return self._objects.get(path)

    def all(self) -> Iterable[Exported]:
        """Every object."""
        return self._objects.values()

    def children(self, path: str) -> set[str]:
        """The names right below ``path``."""
        prefix = "/" if path == "/" else f"{path}/"
        return {
            other[len(prefix) :].split("/")[0]
            for other in self._objects
            if other.startswith(prefix) and other != path
        }

    def properties(self, item: Exported, *, private: bool) -> dict[str, Any]:
        """Name → Variant."""
        described = self._interfaces[item.interface].properties
        return {name: item.property(name) for name, p in described.items() if private or p.public}

    def add(self, item: Exported) -> None:
        """Show an object and say so."""
        self._objects[item.path] = item
        self._announce(item, "InterfacesAdded", "oa{sa{sv}}")

    def remove(self, path: str) -> None:
        """Take an object away and say so."""
        item = self._objects.pop(path, None)
        if item is not None:
            self._send(ROOT, OBJECT_MANAGER, "InterfacesRemoved", "oas", [path, [item.interface]])

    def _announce(self, item: Exported, member: str, signature: str) -> None:
        public = {item.interface: self.properties(item, private=False)}
        self._send(ROOT, OBJECT_MANAGER, member, signature, [item.path, public])
        if item.owner is not None:
            names = self._subscribers.of(item.owner)
            if names:
                everything = {item.interface: self.properties(item, private=True)}
                for name in names:
                    self._send(ROOT, OBJECT_MANAGER, member, signature, [item.path, everything], name)

    def changed(self, item: Exported, names: Iterable[str]) -> None:
        """Say that properties have new values."""
        described = self._interfaces[item.interface].properties
        public = {name: item.property(name) for name in names if described[name].public}
        private = {name: item.property(name) for name in names if not described[name].public}
        if public:
            self._send(item.path, PROPERTIES, "PropertiesChanged", "sa{sv}as", [item.interface, public, []])
        if private and item.owner is not None:
            body = [item.interface, private, []]
            for name in self._subscribers.of(item.owner):
                self._send(item.path, PROPERTIES, "PropertiesChanged", "sa{sv}as", body, name)

    def emit(self, item: Exported, member: str, *args: Any) -> None:
        """A signal of the object's own interface."""
        signal = self._interfaces[item.interface].signals[member]
        if signal.public:
            self._send(item.path, item.interface, member, signal.signature, list(args))
        elif item.owner is not None:
            for name in self._subscribers.of(item.owner):
                self._send(item.path, item.interface, member, signal.signature, list(args), name)

    def _send(
        self, path: str, interface: str, member: str, signature: str, body: list[Any], to: str | None = None
    ) -> None:
        with contextlib.suppress(BusLost):
            self._bus.signal(path, interface, member, signature, body, destination=to)


class Subscribers:
    """Connections that called Manager.Subscribe, by uid; and those who may see everybody's."""

    def __init__(self, credentials: Credentials, polkit: Polkit) -> None:
        self._credentials = credentials
        self._polkit = polkit
        self._uids: dict[str, int] = {}
        self._by_uid: dict[int, set[str]] = {}
        self._all: set[str] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        credentials.on_left.append(self.remove)
        polkit.on_change.append(self._ask_again)

    async def add(self, name: str, uid: int) -> None:
        """Subscribe a connection."""
        self._uids[name] = uid
        self._by_uid.setdefault(uid, set()).add(name)
        await self._ask(name)

    def remove(self, name: str) -> None:
        """Unsubscribe; nothing happens if it was not subscribed."""
        uid = self._uids.pop(name, None)
        self._all.discard(name)
        if uid is not None:
            names = self._by_uid[uid]
            names.discard(name)
            if not names:
                del self._by_uid[uid]

    def of(self, owner: int) -> set[str]:
        """Whom private things of ``owner`` are sent to."""
        names = self._by_uid.get(owner, set())
        return names | self._all if self._all else names

    async def _ask(self, name: str) -> None:
        try:
            await self._polkit.check(name, READ_ANY, {}, interactive=False)
        except VmbusError:
            self._all.discard(name)
            return
        if name in self._uids:
            self._all.add(name)

    def _ask_again(self) -> None:
        for name in list(self._uids):
            self._all.discard(name)
            task = asyncio.ensure_future(self._ask(name))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
