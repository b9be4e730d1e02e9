# SPDX-License-Identifier: Apache-2.0
"""What the service may ask for: each request is checked against the policy and the owners' record, then done.

A handler raises; ``answer`` is the one place that turns an error into a reply and writes the audit log: who
asked,
for whom, what, and how it ended.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vmbus.broker import files, policy, tap
from vmbus.broker.children import Crew
from vmbus.broker.loop import Task
from vmbus.broker.owners import Owners
from vmbus.broker.steps import log
from vmbus.broker.workers import Workers
from vmbus.wire import broker as wire
from vmbus.wire.errors import VmbusError
from vmbus.wire.inlet import Greeting

MOST_QUEUES, MOST_MEMORY, MOST_VCPUS = 16, 1 << 42, 16

Answer = tuple[wire.Reply, list[int]]  # the fds are the caller's to send and to close


class Requests:
    """The operations of one instance."""

    def __init__(self, config: Path, crew: Crew, owners: Owners, workers: Workers, instance: str) -> None:
        self._config, self._policy = config, policy.load(config)
        self._crew, self._owners, self._workers, self._instance = crew, owners, workers, instance
        self._handlers: dict[type, Callable[[Any], Task[Answer]]] = {
            **{wire.Hello: self._hello, wire.Own: self._own, wire.Disown: self._disown},
            **{wire.Check: self._check, wire.Spawn: self._spawn, wire.Open: self._open, wire.Tap: self._tap},
            **{wire.Kill: self._kill, wire.Workers: self._list, wire.Connect: self._connect},
        }

    def reload(self) -> None:
        """Read the policy again; if it is broken, the old one stays. The uid range never changes."""
        try:
            self._policy = policy.load(self._config)
            self._owners.forget_accounts()
            log(f"policy reloaded from {self._config}")
        except (VmbusError, OSError) as error:
            log(f"policy not reloaded: {error}")

    def answer(self, asker: str, request: Any) -> Task[Answer]:
        """Carry out ``request``; never raises. ``asker`` is for the audit log."""
        fields = [f"{name}={getattr(request, name)!r}" for name in request.__struct_fields__ if name != "id"]
        what = " ".join([f"{asker}: {type(request).__name__.lower()}", *fields])
        fds: list[int] = []
        try:
            reply, fds = yield from self._handlers[type(request)](request)
            log(f"{what}: done {reply.identity or ''}")
        except VmbusError as error:
            log(f"{what}: {error.kind}: {error}")
            failed = functools.partial(wire.Reply, id=request.id, error=error.kind, argument=error.argument)
            reply = failed(message=error.message)
        except Exception as error:
            log(f"{what}: Internal: {type(error).__name__}: {error}")
            reply = wire.Reply(id=request.id, error="Internal", message="the broker failed; its log says how")
        return reply, fds

    def _hello(self, request: wire.Hello) -> Task[Answer]:
        yield from ()
        if wire.VERSION not in request.versions:
            message = f"this broker speaks version {wire.VERSION} only; install service and broker together"
            raise VmbusError("NotSupported", message, argument="versions")
        notes = [self._workers.note] if self._workers.note else []
        return wire.Reply(id=request.id, version=wire.VERSION, instance=self._instance, notes=notes), []

    def _own(self, request: wire.Own) -> Task[Answer]:
        yield from self._owners.own(request.uuid, request.uid, self._policy)
        return wire.Reply(id=request.id), []

    def _disown(self, request: wire.Disown) -> Task[Answer]:
        yield from ()
        self._workers.must_not_have(request.uuid)
        self._owners.disown(request.uuid)
        return wire.Reply(id=request.id), []

    def _check(self, request: wire.Check) -> Task[Answer]:
        account = yield from self._owners.account(request.uid, self._policy)
        self._policy.check_quota(account, (0, 0, 0), request.memory, request.vcpus)
        for bridge in request.bridges:
            self._policy.check_bridge(account, bridge)
        for path in request.paths:
            self._policy.split_path(account, path)
        return wire.Reply(id=request.id), []

    def _spawn(self, request: wire.Spawn) -> Task[Answer]:
        account = yield from self._owners.account_of(request.uuid, self._policy)
        _in_range("memory", request.memory, MOST_MEMORY)
        _in_range("vcpus", request.vcpus, MOST_VCPUS)
        self._workers.must_not_have(request.uuid)
        used = self._workers.used_by(account.uid)
        self._policy.check_quota(account, used, request.memory, request.vcpus)
        wanted = (request.uuid, account.uid, request.memory, request.vcpus)
        fds = yield from self._workers.provide(*wanted, self._policy)
        return wire.Reply(id=request.id), fds

    def _open(self, request: wire.Open) -> Task[Answer]:
        account = yield from self._owners.account_of(request.uuid, self._policy)
        with self._workers.get(request.uuid).connect(Greeting(role="inlet")) as inlet:
            work = functools.partial(files.open_for, account, self._policy, request)
            identity = yield from self._crew.run(account.uid, work, wire.Identity, [inlet.fileno()])
        return wire.Reply(id=request.id, identity=identity), []

    def _tap(self, request: wire.Tap) -> Task[Answer]:
        account = yield from self._owners.account_of(request.uuid, self._policy)
        _in_range("queues", request.queues, MOST_QUEUES)
        self._policy.check_bridge(account, request.bridge)
        worker = self._workers.get(request.uuid)
        worker.taps += 1
        # At most 15 characters; a worker's uid is its own on the whole host, whatever the instance.
        name = f"vt{worker.record.worker_uid:08x}{worker.taps & 0xFFFF:x}"
        mark = f"vmbus:{self._instance}:{request.uuid}"
        with worker.connect(Greeting(role="inlet")) as inlet:
            work = functools.partial(
                tap.make, tap.Wanted(name, request.bridge, request.queues, mark), request.slot
            )
            made = yield from self._crew.run(0, work, tap.Made, [inlet.fileno()])
        log(f"{made.what}; index {made.index}")
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
        return wire.Reply(id=request.id), self._workers.get(request.uuid).connect_control()


def _in_range(argument: str, value: int, most: int) -> None:
    if not 0 < value <= most:
        raise VmbusError("InvalidArgument", f"{argument} is {value}, not 1 … {most}", argument=argument)
