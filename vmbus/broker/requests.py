# SPDX-License-Identifier: Apache-2.0
"""What the service may ask for: each request is checked against the policy and the owners' record, then done.

A request of type Open is done by ``do_open``, and so on: there are no others than those of the typed union
that the datagram was decoded to. A handler raises; ``answer`` is the one place that turns an error into a
reply and writes the audit log: who asked, for whom, what, and how it ended.
"""

from typing import Any

import prctl

from vmbus.broker import owners, tap, workers
from vmbus.broker.children import dropped
from vmbus.broker.loop import Task, start
from vmbus.broker.policy import amounts
from vmbus.broker.steps import log
from vmbus.wire import broker as wire
from vmbus.wire.errors import VmbusError
from vmbus.wire.inlet import Greeting

Answer = tuple[wire.Reply, list[int]]  # the fds are the caller's to send and to close


class Requests:
    """The operations of one instance."""

    def __init__(self, records: owners.Owners, fleet: workers.Workers) -> None:
        self._owners, self._workers = records, fleet
        self._policy, self._crew = fleet.rules, fleet.rules.crew

    def reload(self) -> None:
        """Read the policy again; if it is broken, the old one stays. The uid range never changes."""
        start(self._reload())

    def _reload(self) -> Task[None]:
        try:
            yield from self._policy.read()
            self._owners.forget_rights()
            log(f"policy reloaded from {self._policy.config}")
        except (VmbusError, OSError) as error:
            log(f"policy not reloaded: {error}")

    def answer(self, asker: str, request: Any) -> Task[Answer]:
        """Carry out ``request``; never raises. ``asker`` is for the audit log."""
        # All but the id, which comes first; cut, so that the outcome has room in the line.
        fields = [f"{name}={getattr(request, name)!r:.1000}" for name in request.__struct_fields__[1:]]
        whom = f"for {self._owners.known(request.uuid)}:" if hasattr(request, "uuid") else "for itself:"
        what = " ".join([asker, whom, type(request).__name__.lower(), *fields])
        fds: list[int] = []
        try:
            answer = getattr(self, f"do_{type(request).__name__.lower()}")(request)
            reply, fds = answer if isinstance(answer, tuple) else (yield from answer)
            log(f"{what}: done {reply.identity or ''}")
        except Exception as error:
            ours = VmbusError("Internal", f"the broker failed ({type(error).__name__}); its log says how")
            named = error if isinstance(error, VmbusError) else ours
            log(f"{what}: {named.kind}: {error}")
            kind, message = named.kind, named.message
            reply = wire.Reply(id=request.id, error=kind, message=message, argument=named.argument)
        return reply, fds

    def do_hello(self, request: wire.Hello) -> Answer:
        if wire.VERSION not in request.versions:
            message = f"this broker speaks version {wire.VERSION} only; install service and broker together"
            raise VmbusError("NotSupported", message, argument="versions")
        name, notes = self._workers.instance, self._workers.notes
        return wire.Reply(id=request.id, version=wire.VERSION, instance=name, notes=notes), []

    def do_own(self, request: wire.Own) -> Task[Answer]:
        yield from self._owners.own(request.uuid, request.uid)
        return wire.Reply(id=request.id), []

    def do_disown(self, request: wire.Disown) -> Answer:
        self._workers.must_not_have(request.uuid)
        self._owners.disown(request.uuid)
        return wire.Reply(id=request.id), []

    def do_check(self, request: wire.Check) -> Task[Answer]:
        rights = yield from self._owners.rights(request.uid)
        rights.check_quota([0] * 5, amounts(request))
        for grant in request.grants:
            rights.check_grant(grant)
        work = dropped("paths", "check", rights, request.paths)
        yield from self._crew.run(rights.uid, work, int, [])
        return wire.Reply(id=request.id), []

    def do_spawn(self, request: wire.Spawn) -> Task[Answer]:
        rights = yield from self._owners.rights_of(request.uuid)
        if request.kind != "worker":
            # Each kind of passt is granted by a table of its own: user-network, user-network-host.
            rights.check_grant("user-network" + request.kind.removeprefix("passt"))
            yield from self._workers.help(request)
            return wire.Reply(id=request.id), []
        self._workers.must_not_have(request.uuid)
        rights.check_quota(self._workers.used_by(rights.uid), amounts(request))
        fds = yield from self._workers.provide(request, rights.uid)
        info = wire.WorkerInfo(request.uuid, self._workers.get(request.uuid).record.pid)
        return wire.Reply(id=request.id, workers=[info]), fds

    def do_open(self, request: wire.Open) -> Task[Answer]:
        rights = yield from self._owners.rights_of(request.uuid)
        with self._workers.get(request.uuid).directory.connect(Greeting(role="inlet")) as inlet:
            fuse, user = self._policy.survey.fuse, (rights.uid, rights.gids)
            work = dropped("files", "deliver", rights, request, fuse, user=user)
            identity = yield from self._crew.run(rights.uid, work, wire.Identity, [inlet.fileno()])
        return wire.Reply(id=request.id, identity=identity), []

    def do_tap(self, request: wire.Tap) -> Task[Answer]:
        rights, worker = (yield from self._owners.rights_of(request.uuid)), self._workers.get(request.uuid)
        worker.taps += 1
        # At most 15 characters; a worker's uid is its own on the whole host, whatever the instance.
        name = f"vt{worker.record.worker_uid:08x}{worker.taps & 0xFFFF:x}"
        mark = self._workers.mark(worker.name, worker.record.worker_uid) + f"{request.slot};"
        if not request.queues:
            yield from self._crew.run(0, tap.sweep([], [mark]), int, [])
            return wire.Reply(id=request.id), []
        wanted = f"interfaces.{request.interface}" if request.interface else f"bridges.{request.bridge}"
        rights.check_grant(wanted)
        node = "/dev/net/tun"
        if request.interface:
            node = f"/dev/tap{(yield from self._crew.run(0, tap.prepare(request, name, mark), int, []))}"
        with worker.directory.connect(Greeting(role="inlet")) as inlet:
            work = tap.make(request, name, mark, [node] * request.queues, "vhost-net" in rights.grants)
            log((yield from self._crew.run(0, work, str, [inlet.fileno()])))
        return wire.Reply(id=request.id), []

    def do_tune(self, request: wire.Tune) -> Task[Answer]:
        opened = [str(self._workers.settings), *(f"/sys/{name}" for name in request.settings)]
        work = dropped("settings", "apply", request.settings, self._policy.text, opened=opened)
        report = yield from self._crew.run(0, work, dict[str, Any], [])
        if any("/hugepages/" in name for name in request.settings):
            yield from self._policy.mount()  # what there were not pages enough for
        return wire.Reply(id=request.id, report=report), []

    def do_look(self, request: wire.Look) -> Task[Answer]:
        work = dropped("mergers", "look", caps=[prctl.CAP_DAC_READ_SEARCH])
        return wire.Reply(id=request.id, report=(yield from self._crew.run(0, work, dict[str, Any], []))), []

    def do_kill(self, request: wire.Kill) -> Answer:
        self._workers.kill(self._workers.get(request.uuid))
        return wire.Reply(id=request.id), []

    def do_workers(self, request: wire.Workers) -> Answer:
        return wire.Reply(id=request.id, workers=self._workers.listed()), []

    def do_connect(self, request: wire.Connect) -> Answer:
        return wire.Reply(id=request.id), self._workers.get(request.uuid).connect_control()
