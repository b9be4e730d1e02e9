# SPDX-License-Identifier: Apache-2.0
"""What the service may ask for: each request is checked against the policy and the owners' record, then done.

A handler raises; ``answer`` is the one place that turns an error into a reply and writes the audit log: who
asked, for whom, what, and how it ended.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from vmbus.broker import files, policy, tap
from vmbus.broker.children import Crew
from vmbus.broker.loop import Task
from vmbus.broker.owners import Owner, Owners
from vmbus.broker.steps import log
from vmbus.broker.workers import Workers
from vmbus.wire import broker as wire
from vmbus.wire.errors import VmbusError

MOST_QUEUES: Final = 16
_MOST_MEMORY: Final = 1 << 42
_MOST_VCPUS: Final = 16

Answer = tuple[wire.Reply, list[int]]  # the fds are the caller's to send and to close


class Requests:
    """The operations of one instance."""

    def __init__(self, config: Path, crew: Crew, owners: Owners, workers: Workers, instance: str) -> None:
        self._config = config
        self.policy = policy.load(config)
        self._crew, self._owners, self._workers, self._instance = crew, owners, workers, instance
        self._taps = 0
        self._handlers: dict[type, Callable[[Any], Task[Answer]]] = {
            wire.Hello: self._hello,
            wire.Own: self._own,
            wire.Disown: self._disown,
            wire.Check: self._check,
            wire.Spawn: self._spawn,
            wire.Open: self._open,
            wire.Tap: self._tap,
            wire.Kill: self._kill,
            wire.Workers: self._list,
            wire.Connect: self._connect,
        }

    def reload(self) -> None:
        """Read the policy again; if it is broken, the old one stays. The uid range never changes."""
        try:
            self.policy = policy.load(self._config)
        except VmbusError as error:
            log(f"policy not reloaded: {error}")
            return
        self._owners.forget_accounts()
        log(f"policy reloaded from {self._config}")

    def answer(self, asker: str, request: Any) -> Task[Answer]:
        """Carry out ``request``; never raises. ``asker`` is for the audit log."""
        what = f"{asker}: {_describe(request)}"
        try:
            reply, fds = yield from self._handlers[type(request)](request)
        except VmbusError as error:
            log(f"{what}: {error.kind}: {error}")
            return wire.Reply(
                id=request.id, error=error.kind, message=error.message, argument=error.argument
            ), []
        except Exception as error:
            log(f"{what}: Internal: {type(error).__name__}: {error}")
            return wire.Reply(
                id=request.id, error="Internal", message="the broker failed; its log says how"
            ), []
        detail = f" {reply.identity}" if reply.identity is not None else ""
        log(f"{what}: done{detail}")
        return reply, fds

    # Handlers: each is a task, though some never wait.

    def _hello(self, request: wire.Hello) -> Task[Answer]:
        yield from ()
        if wire.VERSION not in request.versions:
            message = f"this broker speaks version {wire.VERSION} only; install service and broker together"
            raise VmbusError("NotSupported", message, argument="versions")
        notes = [self._workers.cgroups.note] if self._workers.cgroups.note else []
        return wire.Reply(id=request.id, version=wire.VERSION, instance=self._instance, notes=notes), []

    def _own(self, request: wire.Own) -> Task[Answer]:
        yield from self._owners.own(request.uuid, request.uid, self.policy)
        return wire.Reply(id=request.id), []

    def _disown(self, request: wire.Disown) -> Task[Answer]:
        yield from ()
        if self._workers.has(request.uuid):
            raise VmbusError(
                "InvalidState", f"machine {request.uuid} has a worker; end it first", argument="uuid"
            )
        self._owners.disown(request.uuid)
        return wire.Reply(id=request.id), []

    def _check(self, request: wire.Check) -> Task[Answer]:
        account = yield from self._owners.account(request.uid, self.policy)
        if request.memory or request.vcpus:
            self.policy.check_quota(account, (0, 0, 0), request.memory, request.vcpus)
        for bridge in request.bridges:
            self.policy.check_bridge(account, bridge)
        for path in request.paths:
            self.policy.check_path(account, path)
        return wire.Reply(id=request.id), []

    def _spawn(self, request: wire.Spawn) -> Task[Answer]:
        owner = self._owners.of(request.uuid)
        account = yield from self._account(owner)
        if not 0 < request.memory <= _MOST_MEMORY:
            raise VmbusError(
                "InvalidArgument", f"memory is {request.memory}, not 1 … 2^42 bytes", argument="memory"
            )
        if not 0 < request.vcpus <= _MOST_VCPUS:
            raise VmbusError(
                "InvalidArgument", f"{request.vcpus} vCPUs, not 1 … {_MOST_VCPUS}", argument="vcpus"
            )
        if self._workers.has(request.uuid):
            raise VmbusError("InvalidState", f"machine {request.uuid} has a worker already", argument="uuid")
        used = self._workers.used_by(owner.uid)
        self.policy.check_quota(account, used, request.memory, request.vcpus)
        fds = yield from self._workers.provide(
            request.uuid, owner.uid, request.memory, request.vcpus, self.policy
        )
        return wire.Reply(id=request.id), fds

    def _open(self, request: wire.Open) -> Task[Answer]:
        owner = self._owners.of(request.uuid)
        worker = self._workers.get(request.uuid)
        with self._workers.inlet(worker) as inlet:
            run = functools.partial(files.open_for, owner, self.policy, request)
            identity = yield from self._crew.run(owner.uid, run, wire.Identity, [inlet.fileno()])
        return wire.Reply(id=request.id, identity=identity), []

    def _tap(self, request: wire.Tap) -> Task[Answer]:
        owner = self._owners.of(request.uuid)
        account = yield from self._account(owner)
        if not 0 < request.queues <= MOST_QUEUES:
            message = f"{request.queues} queues, not 1 … {MOST_QUEUES}"
            raise VmbusError("InvalidArgument", message, argument="queues")
        self.policy.check_bridge(account, request.bridge)
        worker = self._workers.get(request.uuid)
        worker.taps += 1
        # At most 15 characters; a worker's uid is its own on the whole host, whatever the instance.
        name = f"vt{worker.record.worker_uid:08x}{worker.taps & 0xFFFF:x}"
        mark = tap.mark_of(self._instance, request.uuid)
        with self._workers.inlet(worker) as inlet:
            run = functools.partial(
                tap.make, tap.Wanted(name, request.bridge, request.queues, mark), request.slot
            )
            made = yield from self._crew.run(0, run, tap.Made, [inlet.fileno()])
        log(f"tap {made.name} (index {made.index}) on bridge {request.bridge} for {request.uuid}")
        return wire.Reply(id=request.id), []

    def _kill(self, request: wire.Kill) -> Task[Answer]:
        yield from ()
        self._workers.kill(self._workers.get(request.uuid))
        return wire.Reply(id=request.id), []

    def _list(self, request: wire.Workers) -> Task[Answer]:
        yield from ()
        return wire.Reply(id=request.id, workers=self._workers.listed()), []

    def _connect(self, request: wire.Connect) -> Task[Answer]:
        yield from ()
        return wire.Reply(id=request.id), self._workers.connect(self._workers.get(request.uuid))

    def _account(self, owner: Owner) -> Task[policy.Account]:
        """The owner's account; refused if the name behind the uid is another now."""
        account = yield from self._owners.account(owner.uid, self.policy)
        if account.name != owner.user:
            message = f"uid {owner.uid} is now {account.name}; the machine was defined by {owner.user}"
            raise VmbusError("AccessDenied", message, argument="uid")
        return account


def _describe(request: Any) -> str:
    fields = " ".join(
        f"{name}={getattr(request, name)!r}" for name in request.__struct_fields__ if name != "id"
    )
    return f"{type(request).__name__.lower()} {fields}".rstrip()


def close(fds: list[int]) -> None:
    """Close what a reply carried: sockets and files of /proc, whose close never blocks."""
    for fd in fds:
        os.close(fd)
