# SPDX-License-Identifier: Apache-2.0
"""docs/dbus-api.md, from the interfaces in dbus/*.xml as vmbusd itself reads them."""

from __future__ import annotations

from collections.abc import Iterator

from vmbus.wire import contract
from vmbus.wire.contract import Argument, Interface, Method, Property, Rule, Signal
from vmbus.wire.errors import KINDS

OUTPUT = "docs/dbus-api.md"

_ORDER = ("Manager", "Machine", "Job", "Host")
_HEAD = """\
<!-- SPDX-License-Identifier: Apache-2.0 -->
<!-- Made from dbus/*.xml by docs/make/dbus_api.py (`make docs`); change the XML, not this file. -->

# The D-Bus API of vmbus

Bus name `org.vmbus1` on the system bus. What is written here stands in the introspection data too, which
vmbusd serves as it is: `busctl introspect org.vmbus1 /org/vmbus1`.

| object | interfaces |
|---|---|
| `/org/vmbus1` | `org.vmbus1.Manager`, `org.freedesktop.DBus.ObjectManager` |
| `/org/vmbus1/machine/UUID` (dashes as underscores) | `org.vmbus1.Machine` |
| `/org/vmbus1/job/N` | `org.vmbus1.Job` |
| `/org/vmbus1/host` | `org.vmbus1.Host` |

Every object has `org.freedesktop.DBus.Properties`, `.Introspectable` and `.Peer` too.

## Who may do what

Each method says which polkit action is asked: one when the object is the caller's own, one when it is
somebody else's, and further ones when the arguments bring something that belongs to the host. "No question"
means that polkit is not asked, and why. polkit may open a dialogue only if the message carries
`ALLOW_INTERACTIVE_AUTHORIZATION`.

A *public* property can be read by anyone, a *private* one by the object's owner and by who has
`org.vmbus1.machine.read-any`; `GetAll` and `GetManagedObjects` leave out what the caller may not read.
*Public* signals are broadcast. *Private* ones (and changes of private properties) go by unicast to the
connections that called `Manager.Subscribe` and may read the object.
"""


def text() -> str:
    """The whole document."""
    interfaces = contract.load()
    known = [f"org.vmbus1.{name}" for name in _ORDER]
    names = known + sorted(set(interfaces) - set(known))
    lines = [_HEAD]
    for name in names:
        lines.extend(_interface(interfaces[name]))
    lines.extend(_errors())
    return "\n".join(lines) + "\n"


def _interface(interface: Interface) -> Iterator[str]:
    yield f"## {interface.name}\n"
    yield f"{interface.doc}\n"
    for method in interface.methods.values():
        yield from _method(method)
    for signal in interface.signals.values():
        yield from _signal(signal)
    if interface.properties:
        yield "### Properties\n"
        yield "| property | type | read by | announced | |"
        yield "|---|---|---|---|---|"
        yield from (_property(one) for one in interface.properties.values())
        yield ""


def _method(method: Method) -> Iterator[str]:
    ins = ", ".join(f"{arg.name} `{arg.signature}`" for arg in method.ins)
    outs = ", ".join(f"{arg.name} `{arg.signature}`" for arg in method.outs)
    yield f"### {method.name}({ins}){f' → {outs}' if outs else ''}\n"
    yield f"{method.doc}\n"
    yield from _arguments(method.ins + method.outs)
    yield f"- Own: {_rule(method.own)}"
    if method.other is not None:
        yield f"- Somebody else's: {_rule(method.other)}"
    for what, action in method.arguments.items():
        yield f"- With {what}: also `{action}`"
    yield ""


def _signal(signal: Signal) -> Iterator[str]:
    args = ", ".join(f"{arg.name} `{arg.signature}`" for arg in signal.args)
    yield f"### signal {signal.name}({args})\n"
    yield f"{signal.doc}\n"
    yield from _arguments(signal.args)
    yield f"- {'Public: broadcast.' if signal.public else 'Private: to subscribers who may read the object.'}"
    yield ""


def _arguments(arguments: tuple[Argument, ...]) -> Iterator[str]:
    for argument in arguments:
        yield f"- `{argument.name}`: {argument.doc}"


def _property(prop: Property) -> str:
    reader = "anyone" if prop.public else "owner"
    announced = "never changes" if prop.constant else "no" if prop.silent else "PropertiesChanged"
    doc = prop.doc.replace("|", "\\|")
    return f"| `{prop.name}` | `{prop.signature}` | {reader} | {announced} | {doc} |"


def _rule(rule: Rule) -> str:
    return f"no question; {rule.reason}" if rule.action is None else f"`{rule.action}`"


def _errors() -> Iterator[str]:
    yield "## Errors\n"
    yield "The message begins with the argument that it is about, says what was wrong and what would work.\n"
    for kind in sorted(KINDS):
        yield f"- `{contract.error_name(kind)}`"
