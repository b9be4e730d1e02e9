# SPDX-License-Identifier: Apache-2.0
"""The D-Bus library, and all of vmbus that touches it: a connection, its messages, a small client.

dbus-fast is used when it is installed, else dbus-next; ``VMBUS_DBUS_LIBRARY`` (dbus_fast, dbus_next)
chooses one by name. Only their low-level messages are used; the libraries' own object
servers show a handler neither the sender nor the flags, leak the fds of refused calls and answer with
tracebacks. What this adds to the libraries:

* **Sends that wait.** Both treat a full socket as the end of the connection; ``_PatientSocket`` says
  "nothing sent" instead, and keeps the fds for the next try.
* **fds belong to somebody.** Every fd of an incoming message is in its ``Call`` or its ``Answer``, whose
  receiver settles it, or goes to ``discard``; nothing stays behind in the library. They are looked at as soon
  as the message is there: dbus-fast lets one without fds share its empty list with the next.

Values: what comes in is plain (variants unwrapped); for a variant that goes out, give ``Variant``.
A D-Bus ``h`` is the index of an fd, in and out.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import importlib
import logging
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from vmbus.wire.dbus_form import Form
from vmbus.wire.errors import KINDS, VmbusError

log = logging.getLogger("vmbus.bus")

MAX_FDS: Final = 16
"""The system bus disconnects the sender of more in one message."""
DAEMON: Final = "org.freedesktop.DBus"
ERROR_PREFIX: Final = "org.vmbus1.Error."
INTERACTIVE: Final = 4
"""ALLOW_INTERACTIVE_AUTHORIZATION (D-Bus specification, message protocol)."""
NO_REPLY: Final = 1


def _library() -> tuple[str, Any, Any]:
    wanted = os.environ.get("VMBUS_DBUS_LIBRARY")
    names = (wanted,) if wanted else ("dbus_fast", "dbus_next")
    for name in names:
        with contextlib.suppress(ModuleNotFoundError):
            return name, importlib.import_module(name), importlib.import_module(f"{name}.aio")
    raise ImportError(f"no D-Bus library: {wanted or 'neither dbus_fast nor dbus_next'} is installed")


LIBRARY, _lib, _aio = _library()
Variant: Final[Any] = _lib.Variant
_Message: Final[Any] = _lib.Message
_CALL, _RETURN = _lib.MessageType.METHOD_CALL, _lib.MessageType.METHOD_RETURN
_ERROR, _SIGNAL = _lib.MessageType.ERROR, _lib.MessageType.SIGNAL


class RemoteError(Exception):
    """An error reply that is not one of vmbus."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(f"{name}: {message}" if message else name)
        self.name = name
        self.message = message


class BusLost(Exception):
    """The connection to the bus is gone."""


@dataclass(slots=True)
class Call:
    """An incoming method call. ``fds`` are the receiver's to settle."""

    sender: str
    path: str
    interface: str | None
    member: str
    signature: str
    body: list[Any]
    flags: int
    serial: int
    fds: list[int]

    @property
    def interactive(self) -> bool:
        """Whether the caller allows a dialogue with its user."""
        return bool(self.flags & INTERACTIVE)


@dataclass(frozen=True, slots=True)
class SignalMessage:
    """An incoming signal, without fds: nothing of ours sends any."""

    sender: str
    path: str
    interface: str
    member: str
    body: list[Any]


@dataclass(frozen=True, slots=True)
class Answer:
    """A reply to our own call. ``fds`` are the caller's."""

    body: list[Any]
    fds: list[int]


class Prepared:
    """The body of a reply that is sent often, an array: marshalled once. Without fds."""

    def __init__(self, signature: str, array: Sequence[Any]) -> None:
        self.signature = signature
        message = _Message(
            message_type=_RETURN, reply_serial=1, signature=signature, body=[list(array)], serial=1
        )
        self.data = _split(message._marshall(False))[1]


class _PreparedReply(_Message):  # type: ignore[misc]
    """A reply whose header the library makes, for an empty array, and whose body is there already."""

    prepared: Prepared

    def _marshall(self, negotiate_unix_fd: bool = False) -> bytearray:
        header, _ = _split(_Message._marshall(self, negotiate_unix_fd))
        header[4:8] = len(self.prepared.data).to_bytes(4, "little")
        return header + self.prepared.data


def _split(message: bytearray) -> tuple[bytearray, bytearray]:
    """Header and body; the body's length stands in bytes 4 to 7 (D-Bus specification, message format)."""
    end = len(message) - int.from_bytes(message[4:8], "little")
    return message[:end], message[end:]


class _PatientSocket:
    """The connection's socket as the library's writer sees it: a full one takes 0 bytes.

    The writer forgets a message's fds once sendmsg returned, so those that were not sent are kept here
    and go with the next bytes, which are the first of the same message.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._waiting: array.array[int] | None = None

    def send(self, data: memoryview) -> int:
        try:
            if self._waiting is None:
                return self._sock.send(data)
            ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, self._waiting)]
            sent = self._sock.sendmsg([data], ancillary)
        except BlockingIOError:
            return 0
        self._waiting = None
        return sent

    def sendmsg(self, buffers: Sequence[memoryview], ancillary: Sequence[tuple[int, int, Any]]) -> int:
        self._waiting = ancillary[0][2]
        return self.send(buffers[0])


class Bus:
    """A connection to a message bus.

    ``on_call`` is given every method call, and must see to it that a reply is sent and that the call's fds
    are settled; it must not raise. ``on_signal`` is given every signal that a match rule asked for or that
    somebody sent to us alone. ``discard`` closes fds that nobody wants; anyone may have sent them.
    """

    def __init__(self, library_bus: Any) -> None:
        self._bus = library_bus
        self._pending: dict[int, asyncio.Future[Any]] = {}
        self.on_call: Callable[[Call], None] | None = None
        self.on_signal: Callable[[SignalMessage], None] = lambda signal: None
        self.discard: Callable[[str, list[int]], None] = lambda sender, fds: _close(fds)
        self.close_sent: Callable[[Sequence[int]], None] = _close
        library_bus.add_message_handler(self._on_message)
        library_bus._writer.sock = _PatientSocket(library_bus._sock)
        self._lost: asyncio.Task[None] = asyncio.ensure_future(self._watch())

    @classmethod
    async def connect(cls, address: str | None = None) -> Bus:
        """Connect to ``address``, or to the system bus. Raises BusLost when that fails."""
        kind = {"bus_address": address} if address else {"bus_type": _lib.BusType.SYSTEM}
        try:
            bus = _aio.MessageBus(negotiate_unix_fd=True, **kind)
            return cls(await bus.connect())
        except (OSError, EOFError, _lib.AuthError, _lib.InvalidAddressError) as error:
            raise BusLost(f"cannot connect to {address or 'the system bus'}: {error}") from None

    @property
    def unique_name(self) -> str:
        """Our own unique name."""
        name: str = self._bus.unique_name
        return name

    async def wait_lost(self) -> None:
        """Return when the connection has ended."""
        await asyncio.shield(self._lost)

    async def _watch(self) -> None:
        with contextlib.suppress(Exception):
            await self._bus.wait_for_disconnect()
        for future in self._pending.values():
            if not future.done():
                future.set_exception(BusLost("the connection to the bus has ended"))
        self._pending.clear()

    async def close(self) -> None:
        """End the connection, after what is queued has been sent."""
        with contextlib.suppress(BusLost, RemoteError, TimeoutError):
            await self.call(DAEMON, "/org/freedesktop/DBus", DAEMON, "GetId", timeout=1)
        self._bus.disconnect()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.wait_lost(), 1)

    # -- out

    async def call(
        self,
        destination: str,
        path: str,
        interface: str,
        member: str,
        signature: str = "",
        body: Sequence[Any] = (),
        *,
        fds: Sequence[int] = (),
        timeout: float | None = 25,
        interactive: bool = False,
    ) -> Answer:
        """Call a method; ``fds`` stay the caller's. ``timeout`` in seconds, None: as long as it takes.

        Raises VmbusError for an error of vmbus, RemoteError for another, TimeoutError, BusLost.
        """
        if len(fds) > MAX_FDS:
            raise VmbusError(
                "InvalidArgument", f"{len(fds)} files in one call; at most {MAX_FDS} can be sent"
            )
        message = _Message(
            destination=destination,
            path=path,
            interface=interface,
            member=member,
            signature=signature,
            body=list(body),
            unix_fds=list(fds),
            flags=_lib.MessageFlag(INTERACTIVE if interactive else 0),
            serial=self._bus.next_serial(),
        )
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._pending[message.serial] = future
        try:
            self._send(message)
            reply, fds_in = await asyncio.wait_for(future, timeout)
        finally:
            self._pending.pop(message.serial, None)
        if reply.message_type == _ERROR:
            _close(fds_in)
            raise remote_error(reply.error_name, reply.body[0] if reply.signature[:1] == "s" else "")
        return Answer(plain(reply.body), fds_in)

    def reply(
        self, call: Call, signature: str = "", body: Sequence[Any] = (), fds: Sequence[int] = ()
    ) -> None:
        """Answer ``call``; the fds are closed once they are sent."""
        if call.flags & NO_REPLY:
            self.close_sent(fds)
            return
        message = _Message(
            message_type=_RETURN,
            reply_serial=call.serial,
            destination=call.sender,
            signature=signature,
            body=list(body),
            unix_fds=list(fds),
        )
        try:
            sent = self._send(message)
        except BaseException:
            self.close_sent(fds)
            raise
        if fds:
            sent.add_done_callback(lambda done: self.close_sent(fds))

    def reply_prepared(self, call: Call, prepared: Prepared) -> None:
        """Answer ``call`` with a body that was marshalled before."""
        if call.flags & NO_REPLY:
            return
        message = _PreparedReply(
            message_type=_RETURN,
            reply_serial=call.serial,
            destination=call.sender,
            signature=prepared.signature,
            body=[[]],
        )
        message.prepared = prepared
        self._send(message)

    def error(self, call: Call, name: str, text: str) -> None:
        """Answer ``call`` with an error."""
        if call.flags & NO_REPLY:
            return
        # a D-Bus string holds neither NUL nor lone surrogates
        text = text.encode("utf-8", "replace").decode().replace("\0", "?")
        message = _Message(
            message_type=_ERROR,
            reply_serial=call.serial,
            destination=call.sender,
            error_name=name,
            signature="s",
            body=[text],
        )
        self._send(message)

    def signal(
        self,
        path: str,
        interface: str,
        member: str,
        signature: str = "",
        body: Sequence[Any] = (),
        *,
        destination: str | None = None,
    ) -> None:
        """Send a signal: to everybody, or to ``destination`` alone."""
        message = _Message(
            message_type=_SIGNAL,
            path=path,
            interface=interface,
            member=member,
            signature=signature,
            body=list(body),
            destination=destination,
        )
        self._send(message)

    def _send(self, message: Any) -> asyncio.Future[Any]:
        if self._lost.done():
            raise BusLost("the connection to the bus has ended")
        sent: asyncio.Future[Any] = self._bus.send(message)
        sent.add_done_callback(_heard)
        return sent

    async def add_match(self, rule: str) -> None:
        """Ask the bus for the signals that match ``rule``."""
        await self.call(DAEMON, "/org/freedesktop/DBus", DAEMON, "AddMatch", "s", [rule])

    async def request_name(self, name: str) -> None:
        """Own ``name``, without a queue. Raises VmbusError AlreadyExists, RemoteError."""
        do_not_queue = 4
        path = "/org/freedesktop/DBus"
        answer = await self.call(DAEMON, path, DAEMON, "RequestName", "su", [name, do_not_queue])
        if answer.body[0] not in (1, 4):
            raise VmbusError(
                "AlreadyExists", f"the name {name} is taken on this bus; is vmbusd running already?"
            )

    # -- in

    def _on_message(self, message: Any) -> bool:
        """True: the library has nothing more to do with it (its replies to Hello excepted)."""
        kind = message.message_type
        fds = list(message.unix_fds or ())
        if kind == _CALL:
            if self.on_call is None:
                self.discard(message.sender, fds)
                return False
            self.on_call(
                Call(
                    message.sender,
                    message.path,
                    message.interface,
                    message.member,
                    message.signature,
                    message.body,
                    message.flags.value,
                    message.serial,
                    fds,
                )
            )
            return True
        if fds and (kind == _SIGNAL or message.reply_serial not in self._pending):
            self.discard(message.sender, fds)
        if kind == _SIGNAL:
            self.on_signal(
                SignalMessage(
                    message.sender, message.path, message.interface, message.member, plain(message.body)
                )
            )
            return False
        future = self._pending.get(message.reply_serial)
        if future is not None and not future.done():
            future.set_result((message, fds))
            return True
        return False


def _heard(done: asyncio.Future[Any]) -> None:
    if not done.cancelled():
        done.exception()


def _close(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)


def remote_error(name: str, text: str) -> VmbusError | RemoteError:
    """The exception for an error reply; vmbus's own get their kind and argument back."""
    kind = name.removeprefix(ERROR_PREFIX)
    if kind == name or kind not in KINDS:
        return RemoteError(name, text)
    return VmbusError(kind, text)


def plain(value: Any) -> Any:
    """The value without the wrapping of its variants."""
    if isinstance(value, Variant):
        return plain(value.value)
    if isinstance(value, list):
        return [plain(item) for item in value]
    if isinstance(value, tuple):
        return tuple(plain(item) for item in value)
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return value


def variants(form: Form) -> dict[str, Any]:
    """An ``a{sv}`` from (signature, value) pairs, nested ones too."""
    return {key: variant(signature, value) for key, (signature, value) in form.items()}


def variant(signature: str, value: Any) -> Any:
    """One variant; values of ``a{sv}`` and ``aa{sv}`` are Forms."""
    if signature == "a{sv}":
        return Variant(signature, variants(value))
    if signature == "aa{sv}":
        return Variant(signature, [variants(item) for item in value])
    return Variant(signature, value)


class Client:
    """A caller's face of vmbusd: ``await client.call(path, "Machine.Start", {}, {})``.

    The signatures come from the interfaces' XML. ``h`` arguments are fds (not indices), also in an
    ``a{sh}``; fds that come back take the place of their index and are the caller's.
    """

    def __init__(self, bus: Bus, interfaces: Mapping[str, Any], name: str) -> None:
        self.bus = bus
        self._interfaces = interfaces
        self._name = name

    @classmethod
    async def connect(cls, address: str | None = None, name: str = "org.vmbus1") -> Client:
        """Connect to vmbusd as ``name`` on the bus at ``address`` (None: the system bus). Raises BusLost."""
        from vmbus.wire import contract  # noqa: PLC0415 (vmbusd has read it already)

        return cls(await Bus.connect(address), contract.load(), name)

    async def call(
        self, path: str, method: str, *args: Any, timeout: float | None = 25, interactive: bool = True
    ) -> Any:
        """Call ``"Interface.Method"``; None, one value or a list of values. Raises as Bus.call, and
        VmbusError InvalidArgument for more than 16 fds, before anything is sent."""
        short, _, member = method.partition(".")
        interface = self._interfaces[f"org.vmbus1.{short}"]
        described = interface.methods[member]
        fds: list[int] = []
        body = [_index(arg.signature, value, fds) for arg, value in zip(described.ins, args, strict=True)]
        answer = await self.bus.call(
            self._name,
            path,
            interface.name,
            member,
            described.in_signature,
            body,
            fds=fds,
            timeout=timeout,
            interactive=interactive,
        )
        out = [
            answer.fds[value] if arg.signature == "h" else value
            for arg, value in zip(described.outs, answer.body, strict=True)
        ]
        return None if not out else out[0] if len(out) == 1 else out

    async def get_all(self, path: str, interface: str) -> dict[str, Any]:
        """The properties of ``"Machine"`` (or another) that the caller may see."""
        found: dict[str, Any] = await self._standard(
            path, "Properties", "GetAll", "s", [f"org.vmbus1.{interface}"]
        )
        return found

    async def get(self, path: str, interface: str, name: str) -> Any:
        """One property. Raises VmbusError NotAuthorized for a private one of somebody else."""
        body = [f"org.vmbus1.{interface}", name]
        return await self._standard(path, "Properties", "Get", "ss", body)

    async def managed_objects(self) -> dict[str, dict[str, dict[str, Any]]]:
        """All objects and the properties that the caller may see: path → interface → property → value."""
        found: dict[str, dict[str, dict[str, Any]]] = await self._standard(
            "/org/vmbus1", "ObjectManager", "GetManagedObjects", "", []
        )
        return found

    async def _standard(self, path: str, interface: str, member: str, signature: str, body: list[Any]) -> Any:
        answer = await self.bus.call(
            self._name, path, f"org.freedesktop.DBus.{interface}", member, signature, body, interactive=True
        )
        return answer.body[0]

    async def watch(self, path: str, handler: Callable[[str, str, list[Any]], None]) -> None:
        """Call ``handler(interface, member, body)`` for each signal of the object at ``path``."""
        owner = await self.bus.call(
            DAEMON, "/org/freedesktop/DBus", DAEMON, "GetNameOwner", "s", [self._name]
        )
        service = owner.body[0]
        before = self.bus.on_signal

        def on_signal(signal: SignalMessage) -> None:
            before(signal)
            if signal.sender == service and signal.path == path:
                handler(signal.interface, signal.member, signal.body)

        self.bus.on_signal = on_signal
        await self.bus.add_match(f"type='signal',sender='{self._name}',path='{path}'")

    async def close(self) -> None:
        """End the connection."""
        await self.bus.close()


def _index(signature: str, value: Any, fds: list[int]) -> Any:
    if signature == "h":
        fds.append(value)
        return len(fds) - 1
    if signature == "a{sh}":
        return {key: _index("h", fd, fds) for key, fd in value.items()}
    return value
