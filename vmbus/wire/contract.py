# SPDX-License-Identifier: Apache-2.0
"""The D-Bus interfaces as typed values, read from dbus/*.xml (which explains its annotations).

Reading is strict: a method without its access rule, a property or a signal without its audience, or an
action that is no action is a ``ContractError``, and vmbusd does not start.
"""

from __future__ import annotations

import re
import sys
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path
from typing import Final

DOC: Final = "org.gtk.GDBus.DocString"
ACCESS: Final = "org.vmbus1.Access."
EMITS: Final = "org.freedesktop.DBus.Property.EmitsChangedSignal"
SOCKET: Final = "org.vmbus1.Socket"
OWNED: Final = frozenset({"org.vmbus1.Machine", "org.vmbus1.Job"})
"""Interfaces of objects that have an owner: their methods need an Other rule."""
_ACTION: Final = re.compile(r"org\.vmbus1(\.[a-z][a-z0-9-]*){2,}")


class ContractError(Exception):
    """The XML lacks a rule or is not what it must be; the message says which member."""


@dataclass(frozen=True, slots=True)
class Rule:
    """A polkit action, or None and the reason why none is asked."""

    action: str | None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Argument:
    """An argument of a method or a signal. ``socket``: an ``h`` is a connected stream socket, not a file."""

    name: str
    signature: str
    doc: str
    socket: bool = False


@dataclass(frozen=True, slots=True)
class Method:
    """A method and who may call it. ``arguments`` maps what an argument brings to a further action."""

    name: str
    doc: str
    ins: tuple[Argument, ...]
    outs: tuple[Argument, ...]
    own: Rule
    other: Rule | None
    arguments: dict[str, str]

    @property
    def in_signature(self) -> str:
        """The signature of a call's body."""
        return "".join(arg.signature for arg in self.ins)

    @property
    def out_signature(self) -> str:
        """The signature of a reply's body."""
        return "".join(arg.signature for arg in self.outs)


@dataclass(frozen=True, slots=True)
class Property:
    """A property; all are read-only. ``constant``: it never changes; ``silent``: its changes are not told."""

    name: str
    doc: str
    signature: str
    public: bool
    constant: bool
    silent: bool = False


@dataclass(frozen=True, slots=True)
class Signal:
    """A signal, broadcast if public."""

    name: str
    doc: str
    args: tuple[Argument, ...]
    public: bool

    @property
    def signature(self) -> str:
        """The signature of the body."""
        return "".join(arg.signature for arg in self.args)


@dataclass(frozen=True, slots=True)
class Interface:
    """One interface; ``xml`` is its element as it stands in the file."""

    name: str
    doc: str
    methods: dict[str, Method]
    properties: dict[str, Property]
    signals: dict[str, Signal]
    xml: str

    def actions(self) -> set[str]:
        """All the polkit actions that its methods may ask."""
        found: set[str] = set()
        for method in self.methods.values():
            rules = (method.own, method.other)
            found |= {rule.action for rule in rules if rule is not None and rule.action is not None}
            found |= set(method.arguments.values())
        return found


def error_name(kind: str) -> str:
    """The D-Bus name of an error of wire.errors, ``org.vmbus1.Error.<Kind>``."""
    return f"org.vmbus1.Error.{kind}"


def directory() -> Path:
    """Where the XML lies: beside the package in a source tree, else where it was installed."""
    places = [
        Path(__file__).resolve().parents[2] / "dbus",
        Path(sys.prefix) / "share" / "dbus-1" / "interfaces",
        Path("/usr/share/dbus-1/interfaces"),
    ]
    for place in places:
        if (place / "org.vmbus1.Manager.xml").is_file():
            return place
    raise ContractError(f"org.vmbus1.Manager.xml is in none of {', '.join(map(str, places))}")


def load(place: Path | None = None) -> dict[str, Interface]:
    """All interfaces by name. Raises ContractError."""
    found: dict[str, Interface] = {}
    for file in sorted((place or directory()).glob("org.vmbus1.*.xml")):
        for element in ET.parse(file).getroot().findall("interface"):
            interface = _interface(element)
            if interface.name in found:
                raise ContractError(f"{interface.name} is there twice")
            found[interface.name] = interface
    if not found:
        raise ContractError(f"no interface found in {place}")
    return found


def _interface(element: ET.Element) -> Interface:
    name = element.attrib["name"]
    return Interface(
        name,
        _doc(element, name),
        {m.attrib["name"]: _method(m, name) for m in element.findall("method")},
        {p.attrib["name"]: _property(p, name) for p in element.findall("property")},
        {s.attrib["name"]: _signal(s, name) for s in element.findall("signal")},
        ET.tostring(element, encoding="unicode").strip(),
    )


def _annotations(element: ET.Element) -> dict[str, str]:
    return {a.attrib["name"]: " ".join(a.attrib["value"].split()) for a in element.findall("annotation")}


def _doc(element: ET.Element, where: str) -> str:
    doc = _annotations(element).get(DOC)
    if not doc:
        raise ContractError(f"{where} is not documented")
    return doc


def _args(element: ET.Element, where: str, direction: str | None) -> tuple[Argument, ...]:
    return tuple(
        Argument(
            a.attrib["name"],
            a.attrib["type"],
            _doc(a, f"{where}: {a.attrib['name']}"),
            _annotations(a).get(SOCKET) == "connected",
        )
        for a in element.findall("arg")
        if direction is None or a.attrib["direction"] == direction
    )


def _action(value: str, where: str) -> str:
    if not _ACTION.fullmatch(value):
        raise ContractError(f"{where}: {value!r} is not an action of org.vmbus1")
    return value


def _rule(value: str | None, where: str) -> Rule:
    if value is None:
        raise ContractError(f"{where} is missing")
    if value.startswith("none:"):
        reason = value.removeprefix("none:").strip()
        if not reason:
            raise ContractError(f"{where} is none without a reason")
        return Rule(None, reason)
    return Rule(_action(value, where))


def _method(element: ET.Element, interface: str) -> Method:
    where = f"{interface}.{element.attrib['name']}"
    notes = _annotations(element)
    prefix = f"{ACCESS}Argument."
    return Method(
        element.attrib["name"],
        _doc(element, where),
        _args(element, where, "in"),
        _args(element, where, "out"),
        _rule(notes.get(f"{ACCESS}Own"), f"{where}: {ACCESS}Own"),
        _rule(notes.get(f"{ACCESS}Other"), f"{where}: {ACCESS}Other") if interface in OWNED else None,
        {k.removeprefix(prefix): _action(v, where) for k, v in notes.items() if k.startswith(prefix)},
    )


def _audience(notes: dict[str, str], kind: str, where: str) -> bool:
    value = notes.get(ACCESS + kind)
    if value not in ("public", "private"):
        raise ContractError(f"{where}: {ACCESS}{kind} must be public or private")
    return value == "public"


def _property(element: ET.Element, interface: str) -> Property:
    where = f"{interface}.{element.attrib['name']}"
    if element.attrib["access"] != "read":
        raise ContractError(f"{where}: properties are read-only; a change is a method, with a rule")
    notes = _annotations(element)
    constant = notes.get(EMITS) == "const"
    public = _audience(notes, "Read", where)
    silent = notes.get(EMITS) == "false"
    name = element.attrib["name"]
    return Property(name, _doc(element, where), element.attrib["type"], public, constant, silent)


def _signal(element: ET.Element, interface: str) -> Signal:
    where = f"{interface}.{element.attrib['name']}"
    public = _audience(_annotations(element), "Receive", where)
    return Signal(element.attrib["name"], _doc(element, where), _args(element, where, None), public)
