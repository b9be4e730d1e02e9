# SPDX-License-Identifier: Apache-2.0
"""vmbusctl's connection: vmbus.bus.Client with errors for people, and an eye on whether vmbusd is there."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine, Mapping
from typing import Any, Final, TypeVar

from vmbus.bus import DAEMON, BusLost, Client, RemoteError, SignalMessage, Variant, variants
from vmbus.cli.remote import Handler
from vmbus.wire import dbus_form
from vmbus.wire.definition import Definition, Disk, Medium, Nic
from vmbus.wire.errors import VmbusError

_DAEMON_PATH: Final = "/org/freedesktop/DBus"
_TIMEOUT: Final = 300.0
"""Seconds: a person may be typing a password meanwhile."""
_STANDARD: Final = {
    "ServiceUnknown": ("Unavailable", "vmbusd is not running and cannot be started by the bus"),
    "NameHasNoOwner": ("Unavailable", "vmbusd is not running"),
    "NoReply": ("Disconnected", "vmbusd left the bus without an answer"),
    "UnknownObject": ("NotFound", "it is not there any more"),
    "AccessDenied": ("AccessDenied", "the bus's own policy (system.d) does not let you call vmbusd"),
    "LimitsExceeded": ("Unavailable", "the bus has reached a limit"),
}

T = TypeVar("T")


@contextlib.asynccontextmanager
async def connect(
    *, address: str | None, name: str, interactive: bool, autostart: bool
) -> AsyncIterator[ClientConnection]:
    """Connect to the vmbusd that is ``name`` on the bus at ``address`` (None: the system bus).

    ``interactive``: polkit may ask somebody for a password. ``autostart``: the bus may start vmbusd.
    Raises VmbusError Unavailable.
    """
    try:
        client = await Client.connect(address, name)
    except BusLost as error:
        raise VmbusError("Unavailable", f"{error}; is dbus-daemon running?") from None
    try:
        connection = ClientConnection(client, name, interactive=interactive)
        if not autostart and not await connection.present():
            raise VmbusError("Unavailable", f"vmbusd ({name}) is not running")
        yield connection
    finally:
        await client.close()


class ClientConnection:
    """``vmbus.cli.remote.Connection`` over vmbus.bus.Client."""

    def __init__(self, client: Client, name: str, *, interactive: bool) -> None:
        self._client = client
        self._name = name
        self._interactive = interactive
        self._left: asyncio.Event | None = None

    async def call(self, path: str, method: str, *args: Any) -> Any:
        """Call "Machine.Start"; None, one value or a list of values."""
        return await self._named(
            self._client.call(path, method, *args, timeout=_TIMEOUT, interactive=self._interactive)
        )

    async def get_all(self, path: str, interface: str) -> dict[str, Any]:
        """The properties that the caller may see."""
        return await self._named(self._client.get_all(path, interface))

    async def managed_objects(self) -> dict[str, dict[str, dict[str, Any]]]:
        """All objects: path, interface, property, value."""
        return await self._named(self._client.managed_objects())

    async def watch(self, path: str, handler: Handler) -> None:
        """Tell ``handler`` of each signal of the object at ``path``."""
        await self._named(self._client.watch(path, handler))

    async def present(self) -> bool:
        """Whether somebody owns vmbusd's name."""
        answer = await self._named(
            self._client.bus.call(DAEMON, _DAEMON_PATH, DAEMON, "NameHasOwner", "s", [self._name])
        )
        return bool(answer.body[0])

    async def gone(self) -> None:
        """Return when vmbusd has left the bus, or the bus is gone."""
        if self._left is None:
            self._left = await self._watch_name()
            if not await self.present():
                self._left.set()
        left, lost = (
            asyncio.ensure_future(self._left.wait()),
            asyncio.ensure_future(self._client.bus.wait_lost()),
        )
        try:
            await asyncio.wait({left, lost}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            left.cancel()
            lost.cancel()

    def form(self, described: Definition | Disk | Medium | Nic) -> dict[str, Any]:
        """A definition, or one device of it, as an ``a{sv}``."""
        return variants(dbus_form.build(described))

    def values(self, values: Mapping[str, int | str]) -> dict[str, Any]:
        """Numbers and words as an ``a{sv}``."""
        return {key: Variant("s" if isinstance(value, str) else "x", value) for key, value in values.items()}

    def lists(self, lists: Mapping[str, list[str]]) -> dict[str, Any]:
        """Lists of words as an ``a{sv}``; not those that are empty, which an older vmbusd may not know."""
        return {key: Variant("as", words) for key, words in lists.items() if words}

    def flags(self, **flags: bool) -> dict[str, Any]:
        """Boolean options as an ``a{sv}``."""
        return {key: Variant("b", value) for key, value in flags.items()}

    async def _watch_name(self) -> asyncio.Event:
        left = asyncio.Event()
        before = self._client.bus.on_signal

        def on_signal(signal: SignalMessage) -> None:
            before(signal)
            if signal.member == "NameOwnerChanged" and signal.sender == DAEMON:
                name, _, owner = signal.body
                if name == self._name and not owner:
                    left.set()

        self._client.bus.on_signal = on_signal
        rule = f"type='signal',sender='{DAEMON}',member='NameOwnerChanged',arg0='{self._name}'"
        await self._named(self._client.bus.add_match(rule))
        return left

    async def _named(self, what: Coroutine[Any, Any, T]) -> T:
        """The result, every failure as a VmbusError."""
        try:
            return await what
        except RemoteError as error:
            kind, words = _STANDARD.get(error.name.rpartition(".")[2], ("Internal", str(error)))
            raise VmbusError(kind, f"{words} ({error.message})" if kind != "Internal" else words) from None
        except BusLost as error:
            raise VmbusError("Disconnected", str(error)) from None
        except TimeoutError:
            raise VmbusError("Timeout", f"vmbusd has not answered within {_TIMEOUT:g} seconds") from None
