# SPDX-License-Identifier: Apache-2.0
"""Questions to polkit (org.freedesktop.PolicyKit1.Authority), and what can go wrong with them.

A question waits as long as a dialogue takes; it is cancelled when the caller leaves the bus or the call is
dropped. Three outcomes are kept apart: polkit says no (NotAuthorized); polkit is not there (Unavailable);
polkit does not know the action, or does not let us ask about others, because our .policy file with its owner
annotation is not installed. polkit answers the last like the first, so the actions are enumerated at
the start and whenever polkit's configuration changes.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections.abc import Callable
from typing import Any, Final

from vmbus.bus import DAEMON, Bus, BusLost, RemoteError, SignalMessage, Variant
from vmbus.service.credentials import Credentials
from vmbus.wire.errors import VmbusError

log = logging.getLogger("vmbus.polkit")

NAME: Final = "org.freedesktop.PolicyKit1"
PATH: Final = "/org/freedesktop/PolicyKit1/Authority"
INTERFACE: Final = "org.freedesktop.PolicyKit1.Authority"
OWNER: Final = "org.freedesktop.policykit.owner"
_ALLOW_INTERACTION: Final = 1
_ABSENT: Final = frozenset(
    f"org.freedesktop.DBus.Error.{name}"
    for name in ("ServiceUnknown", "NameHasNoOwner", "NoReply", "TimedOut", "Disconnected", "AccessDenied")
)


class Polkit:
    """``actions`` are those that the interfaces name, ``user`` the user whom they must be annotated for."""

    def __init__(self, bus: Bus, credentials: Credentials, actions: set[str], user: str) -> None:
        self._bus = bus
        self._credentials = credentials
        self._actions = actions
        self._user = user
        self._numbers = itertools.count(1)
        self._missing: dict[str, str] | None = None
        self._owner = ""  # the unique name of polkitd
        self._tasks: set[asyncio.Task[None]] = set()
        self.on_change: list[Callable[[], None]] = []

    async def begin(self) -> None:
        """Hear of changed rules, and see whether our actions are installed; a log entry says if not."""
        await self._bus.add_match(f"type='signal',sender='{NAME}',path='{PATH}',interface='{INTERFACE}'")
        await self._bus.add_match(f"type='signal',sender='{DAEMON}',member='NameOwnerChanged',arg0='{NAME}'")
        with contextlib.suppress(RemoteError, TimeoutError):
            answer = await self._bus.call(
                DAEMON, "/org/freedesktop/DBus", DAEMON, "GetNameOwner", "s", [NAME]
            )
            self._owner = answer.body[0]
        await self._enumerate()

    def feed(self, signal: SignalMessage) -> None:
        """Take notice of Changed, and of a polkitd that comes or goes; not of what others send under its
        name."""
        replaced = signal.sender == DAEMON and signal.member == "NameOwnerChanged" and signal.body[0] == NAME
        if replaced:
            self._owner = signal.body[2]
        changed = signal.interface == INTERFACE and signal.member == "Changed" and signal.path == PATH
        if replaced or (changed and signal.sender == self._owner):
            self._missing = None
            for hear in self.on_change:
                hear()

    async def installed(self) -> bool:
        """Whether polkit is there and knows all our actions."""
        missing = await self._enumerate()
        return missing is not None and not missing

    async def check(self, sender: str, action: str, details: dict[str, str], *, interactive: bool) -> None:
        """Return if ``sender`` is authorized. Raises NotAuthorized, Unavailable, Disconnected (it has
        left)."""
        missing = await self._enumerate()
        if missing is None:
            raise VmbusError("Unavailable", "polkitd is not there to be asked; start it and try again")
        if action in missing:
            raise VmbusError("Unavailable", missing[action])
        cancellation = f"vmbus-{next(self._numbers)}" if interactive else ""
        question = asyncio.ensure_future(
            self._ask(sender, action, details, cancellation, interactive=interactive)
        )
        departed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        unwatch = self._credentials.watch(sender, departed)
        try:
            waits: set[asyncio.Future[Any]] = {question, departed}
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            unwatch()
            if not question.done():
                question.cancel()
                if cancellation:
                    self._spin_cancel(cancellation)
        if not question.done() or question.cancelled():
            raise VmbusError("Disconnected", "the caller has left the bus")
        if not question.result():
            hint = (
                ""
                if interactive
                else "; a call that allows interactive authorization may be asked for a password"
            )
            raise VmbusError("NotAuthorized", f"polkit does not allow {action}{hint}")

    async def _ask(
        self, sender: str, action: str, details: dict[str, str], cancellation: str, *, interactive: bool
    ) -> bool:
        subject = ["system-bus-name", {"name": Variant("s", sender)}]
        flags = _ALLOW_INTERACTION if interactive else 0
        try:
            answer = await self._bus.call(
                NAME,
                PATH,
                INTERFACE,
                "CheckAuthorization",
                "(sa{sv})sa{ss}us",
                [subject, action, details, flags, cancellation],
                timeout=None if interactive else 25,
            )
        except RemoteError as error:
            if error.name in _ABSENT:
                raise VmbusError(
                    "Unavailable", "polkitd is not there to be asked; start it and try again"
                ) from None
            if not self._credentials.present(sender):
                raise VmbusError("Disconnected", "the caller has left the bus") from None
            log.error("polkit answered %s", error)
            raise VmbusError("Unavailable", f"polkit could not answer ({error.name})") from None
        except TimeoutError:
            raise VmbusError("Unavailable", "polkitd does not answer") from None
        return bool(answer.body[0][0])

    def _spin_cancel(self, cancellation: str) -> None:
        async def cancel() -> None:
            with contextlib.suppress(RemoteError, TimeoutError, BusLost, VmbusError):
                await self._bus.call(NAME, PATH, INTERFACE, "CancelCheckAuthorization", "s", [cancellation])

        task = asyncio.ensure_future(cancel())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _enumerate(self) -> dict[str, str] | None:
        """What is wrong with each of our actions (none: all is well); None: polkit is not there."""
        if self._missing is not None:
            return self._missing
        try:
            answer = await self._bus.call(NAME, PATH, INTERFACE, "EnumerateActions", "s", ["C"])
        except (RemoteError, TimeoutError) as error:
            log.warning("polkit is not there: %s", error)
            return None
        known = {entry[0]: entry[9] for entry in answer.body[0]}
        missing: dict[str, str] = {}
        for action in self._actions:
            if action not in known:
                missing[action] = f"polkit does not know the action {action}; install vmbus's .policy file"
            elif f"unix-user:{self._user}" not in known[action].get(OWNER, "").split():
                missing[action] = (
                    f"polkit's action {action} lacks the annotation {OWNER} = unix-user:{self._user}; "
                    "install vmbus's .policy file as it is"
                )
        for message in missing.values():
            log.error("%s", message)
        self._missing = missing
        return missing
