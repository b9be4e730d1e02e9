# SPDX-License-Identifier: Apache-2.0
"""The interfaces of the D-Bus specification that every object has: Introspectable, Peer, Properties,
ObjectManager.

What is shown depends on who asks: GetAll and GetManagedObjects leave private properties out for those who
may not see them, without a dialogue; Get of one asks, and refuses by name.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol

from vmbus.bus import Call
from vmbus.service.exports import OBJECT_MANAGER, PROPERTIES, ROOT, Exported, Exports
from vmbus.wire.contract import Interface
from vmbus.wire.errors import VmbusError

INTROSPECTABLE: Final = "org.freedesktop.DBus.Introspectable"
PEER: Final = "org.freedesktop.DBus.Peer"

HEAD: Final = """<!DOCTYPE node PUBLIC "-//freedesktop//DTD D-BUS Object Introspection 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/introspect.dtd">
"""
EVERYWHERE: Final = """\
  <interface name="org.freedesktop.DBus.Introspectable">
    <method name="Introspect"><arg name="xml" type="s" direction="out"/></method>
  </interface>
  <interface name="org.freedesktop.DBus.Peer">
    <method name="Ping"/>
    <method name="GetMachineId"><arg name="machine_uuid" type="s" direction="out"/></method>
  </interface>
"""
WITH_PROPERTIES: Final = """\
  <interface name="org.freedesktop.DBus.Properties">
    <method name="Get">
      <arg name="interface" type="s" direction="in"/>
      <arg name="name" type="s" direction="in"/>
      <arg name="value" type="v" direction="out"/>
    </method>
    <method name="GetAll">
      <arg name="interface" type="s" direction="in"/>
      <arg name="properties" type="a{sv}" direction="out"/>
    </method>
    <method name="Set">
      <arg name="interface" type="s" direction="in"/>
      <arg name="name" type="s" direction="in"/>
      <arg name="value" type="v" direction="in"/>
    </method>
    <signal name="PropertiesChanged">
      <arg name="interface" type="s"/>
      <arg name="changed" type="a{sv}"/>
      <arg name="invalidated" type="as"/>
    </signal>
  </interface>
"""
MANAGER: Final = """\
  <interface name="org.freedesktop.DBus.ObjectManager">
    <method name="GetManagedObjects"><arg name="objects" type="a{oa{sa{sv}}}" direction="out"/></method>
    <signal name="InterfacesAdded">
      <arg name="object" type="o"/>
      <arg name="interfaces" type="a{sa{sv}}"/>
    </signal>
    <signal name="InterfacesRemoved">
      <arg name="object" type="o"/>
      <arg name="interfaces" type="as"/>
    </signal>
  </interface>
"""

_SIGNATURES: Final = {
    (INTROSPECTABLE, "Introspect"): "",
    (PEER, "Ping"): "",
    (PEER, "GetMachineId"): "",
    (PROPERTIES, "Get"): "ss",
    (PROPERTIES, "GetAll"): "s",
    (PROPERTIES, "Set"): "ssv",
    (OBJECT_MANAGER, "GetManagedObjects"): "",
}
_INTERFACE_OF: Final = {member: interface for interface, member in _SIGNATURES}

ANYBODY: Final = -1
"""As an owner: whoever it is."""

Answer = tuple[str, list[Any]]


class StandardError(Exception):
    """An error with one of the names that the D-Bus specification gives."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(message)
        self.name = f"org.freedesktop.DBus.Error.{name}"


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls."""

    name: str
    uid: int
    interactive: bool


class MayRead(Protocol):
    """Whether the caller may see private properties of ``owner``'s objects."""

    def __call__(self, caller: Caller, owner: int | None, *, interactive: bool) -> Awaitable[bool]: ...


class Standard:
    """Answers calls to the standard interfaces."""

    def __init__(self, exports: Exports, interfaces: Mapping[str, Interface], may_read: MayRead) -> None:
        self._exports = exports
        self._interfaces = interfaces
        self._may_read = may_read
        self._handlers: dict[str, Callable[[Caller, Call], Awaitable[Answer]]] = {
            "Introspect": self._introspect,
            "Ping": self._ping,
            "GetMachineId": self._machine_id,
            "Get": self._get,
            "GetAll": self._get_all,
            "Set": self._set,
            "GetManagedObjects": self._managed_objects,
        }

    async def handle(self, caller: Caller, call: Call) -> Answer | None:
        """Signature and body of the reply; None if the call is not to one of these interfaces."""
        interface = call.interface or _INTERFACE_OF.get(call.member)
        if interface not in (INTROSPECTABLE, PEER, PROPERTIES, OBJECT_MANAGER):
            return None
        signature = _SIGNATURES.get((interface, call.member))
        if signature is None:
            raise StandardError("UnknownMethod", f"{interface} has no method {call.member}")
        if call.signature != signature:
            raise VmbusError("InvalidArgument", f"{call.member} takes ({signature}), not ({call.signature})")
        return await self._handlers[call.member](caller, call)

    async def _introspect(self, caller: Caller, call: Call) -> Answer:
        item = self._exports.get(call.path)
        children = self._exports.children(call.path)
        if item is None and not children:
            raise StandardError("UnknownObject", f"there is no object at {call.path}")
        parts = [HEAD, "<node>\n", EVERYWHERE]
        if item is not None:
            parts += [WITH_PROPERTIES, "  ", self._interfaces[item.interface].xml, "\n"]
        if call.path == ROOT:
            parts.append(MANAGER)
        parts += [f'  <node name="{name}"/>\n' for name in sorted(children)]
        return "s", ["".join([*parts, "</node>\n"])]

    async def _ping(self, caller: Caller, call: Call) -> Answer:
        return "", []

    async def _machine_id(self, caller: Caller, call: Call) -> Answer:
        for path in ("/etc/machine-id", "/var/lib/dbus/machine-id"):
            try:
                with open(path) as file:
                    return "s", [file.read().strip()]
            except OSError:
                continue
        raise StandardError("FileNotFound", "this host has no machine id")

    def _item(self, call: Call) -> Exported:
        item = self._exports.get(call.path)
        if item is None:
            raise StandardError("UnknownObject", f"there is no object at {call.path}")
        if call.body[0] not in ("", item.interface):
            raise StandardError("UnknownInterface", f"{call.path} has no interface {call.body[0]}")
        return item

    async def _get(self, caller: Caller, call: Call) -> Answer:
        item = self._item(call)
        described = self._interfaces[item.interface].properties.get(call.body[1])
        if described is None:
            raise StandardError("UnknownProperty", f"{item.interface} has no property {call.body[1]}")
        if not described.public and not await self._may_read(
            caller, item.owner, interactive=caller.interactive
        ):
            raise VmbusError(
                "NotAuthorized", f"{described.name} is for the owner, and for org.vmbus1.machine.read-any"
            )
        return "v", [item.property(described.name)]

    async def _get_all(self, caller: Caller, call: Call) -> Answer:
        item = self._item(call)
        private = await self._may_read(caller, item.owner, interactive=False)
        return "a{sv}", [self._exports.properties(item, private=private)]

    async def _set(self, caller: Caller, call: Call) -> Answer:
        self._item(call)
        raise StandardError("PropertyReadOnly", "no property can be set; a change is a method")

    async def _managed_objects(self, caller: Caller, call: Call) -> Answer:
        if call.path != ROOT:
            raise StandardError("UnknownInterface", f"the ObjectManager is at {ROOT}")
        # One question for all owners, without naming one: a list must not ask as often as there are users.
        everything = any(item.owner not in (None, caller.uid) for item in self._exports.all())
        everything = everything and await self._may_read(caller, ANYBODY, interactive=False)
        found = {
            item.path: {
                item.interface: self._exports.properties(
                    item, private=everything or item.owner in (None, caller.uid)
                )
            }
            for item in self._exports.all()
            if item.path != ROOT
        }
        return "a{oa{sa{sv}}}", [found]
