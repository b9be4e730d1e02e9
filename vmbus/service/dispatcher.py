# SPDX-License-Identifier: Apache-2.0
"""From a method call to a reply: the one place through which every call goes.

In this order: the files that came are admitted (``files``); the object, the method and the signature are
looked up in what dbus/*.xml says; the bus daemon says who calls; the method's rule decides, which may take
a question to polkit; after that wait everything is looked at again, and what is not as it was is
``Changed``; then the handler, a function of vmbus/api, is called with a ``Caller`` and plain values.
Handlers raise; here errors become replies, tracebacks go to the log, and files that the handler did not
claim are closed.

A method that needs no question and whose handler is a plain function is answered without a task.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from vmbus.bus import Bus, BusLost, Call, Prepared, plain
from vmbus.service.credentials import Credentials
from vmbus.service.exports import READ_ANY, Exported, Exports
from vmbus.service.files import Files, Passed, PassedFile, PassedSocket
from vmbus.service.polkit import Polkit
from vmbus.service.standard import ANYBODY, Caller, Standard, StandardError
from vmbus.wire.contract import ContractError, Interface, Method, Rule, error_name
from vmbus.wire.errors import VmbusError

log = logging.getLogger("vmbus.dispatcher")

IN_FLIGHT: Final = 128
"""Calls of one connection that may wait at a time."""


@dataclass(slots=True)
class Reply:
    """What a handler gives back when there are fds among it; they are taken over."""

    values: list[Any]
    fds: list[int] = field(default_factory=list)


Handler = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class _Route:
    method: Method
    handler: Handler
    brings: Callable[..., set[str]] | None
    immediate: bool  # no question is ever asked of an owner, and the handler does not wait


class Dispatcher:
    """``handlers`` maps an interface to the object that carries its methods out, in snake case:
    ``start(caller, item, options, files)``; and to ``brings(method, args)`` where arguments have rules."""

    def __init__(
        self,
        bus: Bus,
        interfaces: Mapping[str, Interface],
        handlers: Mapping[str, object],
        exports: Exports,
        credentials: Credentials,
        polkit: Polkit,
        files: Files,
    ) -> None:
        self._bus = bus
        self._interfaces = interfaces
        self._exports = exports
        self._credentials = credentials
        self._polkit = polkit
        self._files = files
        self._routes = {name: _routes(interfaces[name], api) for name, api in handlers.items()}
        if missing := interfaces.keys() - handlers.keys():
            raise ContractError(f"nothing carries out {', '.join(sorted(missing))}")
        self._in_flight: Counter[str] = Counter()
        self._tasks: set[asyncio.Task[None]] = set()
        self._standard = Standard(exports, interfaces, self.may_read)

    def on_call(self, call: Call) -> None:
        """Take a call. Never raises."""
        files: list[Passed] = []
        try:
            if call.fds:
                files = self._files.admit(call.fds, self._who(call.sender))
            elif self._immediately(call):
                return
            if self._in_flight[call.sender] >= IN_FLIGHT:
                text = f"{IN_FLIGHT} calls of this connection are waiting already"
                raise StandardError("LimitsExceeded", text)
        except BaseException as error:
            self._refuse(call, error)
            _settle(files)
            return
        self._in_flight[call.sender] += 1
        task = asyncio.ensure_future(self._handle(call, files))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def discard(self, sender: str, fds: list[int]) -> None:
        """Get rid of files that came with something that is no call."""
        self._files.discard(fds, self._who(sender))

    def _who(self, sender: str) -> str:
        uid = self._credentials.known(sender)
        return sender if uid is None else f"uid {uid}"

    def _immediately(self, call: Call) -> bool:
        """Answer a call that needs neither a question nor a wait; False: it may."""
        uid = self._credentials.known(call.sender)
        item = self._exports.get(call.path)
        if uid is None or item is None or call.interface != item.interface:
            return False
        route = self._routes[item.interface].get(call.member)
        if route is None or not route.immediate or call.signature != route.method.in_signature:
            return False
        if item.owner is not None and item.owner != uid:
            return False
        caller = Caller(call.sender, uid, call.interactive)
        result = route.handler(caller, item, *map(plain, call.body))
        self._answer(call, route.method, result)
        return True

    async def _handle(self, call: Call, files: list[Passed]) -> None:
        try:
            uid = await self._credentials.uid(call.sender)
            self._files.charge(files, f"uid {uid}")
            caller = Caller(call.sender, uid, call.interactive)
            result = await self._standard.handle(caller, call)
            if result is not None:
                self._bus.reply(call, *result)
                return
            item, route = self._find(call)
            args = _arguments(call, route.method, files)
            await self._authorize(caller, item, route, args)
            result = route.handler(caller, item, *args)
            if inspect.isawaitable(result):
                result = await result
            self._answer(call, route.method, result)
        except BaseException as error:
            self._refuse(call, error)
            if isinstance(error, asyncio.CancelledError):
                raise
        finally:
            self._in_flight[call.sender] -= 1
            if not self._in_flight[call.sender]:
                del self._in_flight[call.sender]
            _settle(files)

    # -- finding

    def _find(self, call: Call) -> tuple[Exported, _Route]:
        item = self._exports.get(call.path)
        if item is None:
            raise StandardError("UnknownObject", f"there is no object at {call.path}")
        if call.interface not in (None, item.interface):
            raise StandardError("UnknownInterface", f"{call.path} has no interface {call.interface}")
        route = self._routes[item.interface].get(call.member)
        if route is None:
            raise StandardError("UnknownMethod", f"{item.interface} has no method {call.member}")
        if call.signature != route.method.in_signature:
            wanted = ", ".join(f"{arg.name} {arg.signature}" for arg in route.method.ins) or "nothing"
            raise VmbusError(
                "InvalidArgument",
                f"{call.member} takes ({route.method.in_signature}): {wanted}; not ({call.signature})",
            )
        return item, route

    # -- the gate

    async def _authorize(self, caller: Caller, item: Exported, route: _Route, args: list[Any]) -> None:
        method = route.method
        others = item.owner is not None and item.owner != caller.uid
        rule = method.other if others else method.own
        assert rule is not None  # the contract has seen to it
        token = item.token()
        asked = False
        for action in _actions(rule, route, args):
            details = {} if item.owner is None else {"owner": str(item.owner), "object": item.path}
            await self._polkit.check(caller.name, action, details, interactive=caller.interactive)
            asked = True
        if not asked:
            return
        if not self._credentials.present(caller.name):
            raise VmbusError("Disconnected", "the caller has left the bus")
        if self._exports.get(item.path) is not item or item.token() != token:
            raise VmbusError("Changed", "it changed while authorization was asked for; look and call again")

    async def may_read(self, caller: Caller, owner: int | None, *, interactive: bool) -> bool:
        """Whether private properties of ``owner``'s objects are for the caller."""
        if owner is None or caller.uid in (owner, 0):
            return True
        try:
            details = {} if owner == ANYBODY else {"owner": str(owner)}
            await self._polkit.check(caller.name, READ_ANY, details, interactive=interactive)
        except VmbusError as error:
            if error.kind == "NotAuthorized":
                return False
            if interactive:
                raise
            return False
        return True

    # -- the reply

    def _answer(self, call: Call, method: Method, result: Any) -> None:
        if isinstance(result, Prepared):
            self._bus.reply_prepared(call, result)
        elif isinstance(result, Reply):
            self._bus.reply(call, method.out_signature, result.values, result.fds)
        elif method.outs:
            self._bus.reply(call, method.out_signature, [result])
        else:
            self._bus.reply(call)

    def _refuse(self, call: Call, error: BaseException) -> None:
        try:
            if isinstance(error, VmbusError):
                self._bus.error(call, error_name(error.kind), str(error))
            elif isinstance(error, StandardError):
                self._bus.error(call, error.name, str(error))
            elif isinstance(error, asyncio.CancelledError):
                self._bus.error(call, "org.vmbus1.Error.Disconnected", "vmbusd is being stopped")
            elif not isinstance(error, BusLost):
                log.error("%s.%s failed", call.interface, call.member, exc_info=error)
                self._bus.error(
                    call, "org.vmbus1.Error.Internal", "an error of vmbus; its log has the details"
                )
        except BusLost:
            pass


def _actions(rule: Rule, route: _Route, args: list[Any]) -> list[str]:
    actions = [] if rule.action is None else [rule.action]
    if route.brings is not None and route.method.arguments:
        brought = route.brings(route.method.name, args)
        actions += [route.method.arguments[name] for name in sorted(brought)]
    return actions


def _routes(interface: Interface, api: object) -> dict[str, _Route]:
    routes: dict[str, _Route] = {}
    for name, method in interface.methods.items():
        handler = getattr(api, snake_case(name), None)
        if handler is None:
            raise ContractError(f"{interface.name}.{name} is carried out by nothing")
        brings = getattr(api, "brings", None)
        if method.arguments and brings is None:
            raise ContractError(f"{interface.name}.{name}: nothing says what its arguments bring")
        free = method.own.action is None and not method.arguments
        routes[name] = _Route(method, handler, brings, free and not inspect.iscoroutinefunction(handler))
    return routes


def snake_case(name: str) -> str:
    """``OpenConsole`` → ``open_console``."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


def _arguments(call: Call, method: Method, files: list[Passed]) -> list[Any]:
    args: list[Any] = []
    for described, value in zip(method.ins, plain(call.body), strict=True):
        if described.signature == "h":
            kind = PassedSocket if described.socket else PassedFile
            args.append(_file(value, files, described.name, kind))
        elif described.signature == "a{sh}":
            args.append(
                {key: _file(index, files, f"{described.name}[{key}]") for key, index in value.items()}
            )
        else:
            args.append(value)
    return args


def _file(index: int, files: list[Passed], where: str, kind: type[Passed] = PassedFile) -> Passed:
    if index >= len(files):
        raise VmbusError("InvalidArgument", "no file came with the message for it", argument=where)
    if not isinstance(files[index], kind):
        found, wanted = ("file", "socket") if kind is PassedSocket else ("socket", "file")
        raise VmbusError("InvalidArgument", f"it is a {found}; a {wanted} is needed", argument=where)
    return files[index]


def _settle(files: list[Passed]) -> None:
    for file in files:
        if not file.claimed:
            file.close()
