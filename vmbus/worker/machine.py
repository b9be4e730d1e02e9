# SPDX-License-Identifier: Apache-2.0
"""One machine's life in its worker: which request is possible in which state, and what the end means.

| state | comes from | requests |
|---|---|---|
| ready | the start | AddFile, Configure, Console, Stop |
| configured | Configure, once built | Run, Restore or Receive, Console, Stop, Stats, memory, links |
| running | Run, Resume, Receive | Shutdown, Reset, Pause, Save, Send, Stop, Stats, Console, and the rest |
| paused | Pause, Save, Restore, Receive | Resume, Reset, Save, Send, Stop, Stats, Console, and the rest |
| ended | the guest, Stop, Save, Send, an error, a build, a restore or Receive that failed | none |

The rest: memory, links and devices; about devices are Attach, Detach, Keep, Change, Media and Vsock.

A worker is used once: after the end (its last event is the reason) it goes as soon as the service has
stored that event, or when no control connection was there for LINGER_SECONDS. A machine that cannot be
built ends with reason ``error``; slots that are missing are refused before anything is built, and may be
filled and Configure sent again.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Final

from vmbus.wire.definition import disk_slots
from vmbus.wire.errors import VmbusError
from vmbus.wire.worker import (
    AddLink,
    Attach,
    CancelPrefault,
    CancelSave,
    Change,
    Configure,
    Console,
    Detach,
    Keep,
    Media,
    MemoryTarget,
    OpenPort,
    Pause,
    Prefault,
    Receive,
    Request,
    Reset,
    Restore,
    Resume,
    Run,
    Save,
    Send,
    Shutdown,
    Snapshot,
    State,
    Stats,
    Stop,
    Tidy,
    Vsock,
)
from vmbus.worker.console import Hub
from vmbus.worker.control import Reply
from vmbus.worker.core import (
    Core,
    CoreEvent,
    action_of,
    configuration,
    disk_configuration,
    end_of,
    error_of,
    gone_of,
    named_slots,
    nic_configuration,
    nic_slots,
    stats_of,
)
from vmbus.worker.events import EventQueue
from vmbus.worker.files import RESTORE, Files, close
from vmbus.worker.loop import Loop, Timer

LINGER_SECONDS: Final = 30.0
CONSOLE_SECONDS: Final = 1.0
_DETAIL_MAX: Final = 1000

# request: (the core's operation, the states in which it can be asked)
_OPERATIONS: Final[dict[type, tuple[str, frozenset[str]]]] = {
    Run: ("run", frozenset({"configured"})),
    Shutdown: ("power-button", frozenset({"running"})),
    Reset: ("reset", frozenset({"running", "paused"})),
    Pause: ("pause", frozenset({"running"})),
    Resume: ("resume", frozenset({"paused"})),
    Stop: ("stop", frozenset({"configured", "running", "paused"})),
    Stats: ("stats", frozenset({"configured", "running", "paused"})),
    MemoryTarget: ("memory-target", frozenset({"configured", "running", "paused"})),
    Prefault: ("prefault", frozenset({"configured", "running", "paused"})),
    CancelPrefault: ("cancel-prefault", frozenset({"configured", "running", "paused"})),
    CancelSave: ("cancel-save", frozenset({"configured", "running", "paused"})),
}


_PLUGGABLE: Final = frozenset({"running", "paused"})


class Machine:
    """Carries out the service's requests; the ``Desk`` of ``control.Control``."""

    def __init__(self, loop: Loop, files: Files, events: EventQueue, *, kvm: int) -> None:
        ours, core_end = socket.socketpair()
        core_end.setblocking(False)
        self.state: State = "ready"
        self.reason = ""
        self.core = Core(loop, self._core_event)
        self._loop = loop
        self._files = files
        self._events = events
        self._kvm = kvm
        self._console_end = core_end.detach()
        self._hub = Hub(loop, ours, self._output)
        self._ports: dict[str, Hub] = {}
        self._watchdog = ""  # what it did, until that is told
        self._building = False
        self._cloned = False
        self._stop_when_built: list[Reply] = []
        self._replies: dict[int, tuple[str, Reply]] = {}
        self._last_request = 0
        self._unsaid_output = False
        self._console_timer: Timer | None = None
        self._linger: Timer | None = None
        self._attended = False
        self.events_added: Callable[[], None] = lambda: None  # set by whoever sends them

    # The Desk.

    def handle(self, request: Request, fds: list[int], reply: Reply) -> None:
        """Begin ``request``. Raises VmbusError for what is not possible now."""
        if isinstance(request, Console):
            if not fds:
                raise VmbusError("InvalidArgument", "no file descriptor came with the message")
            self._hub.attach(fds[0], write=request.write, steal=request.steal)
            reply.done()
        elif isinstance(request, OpenPort):
            self._open_port(request, fds, reply)
        elif isinstance(request, Vsock):
            self._vsock(request, fds, reply)
        elif isinstance(request, AddLink):
            self._add_link(request, fds, reply)
        elif isinstance(request, Configure):
            self._configure(request, reply)
        elif isinstance(request, Stop) and self.state == "ready":
            self._stop_early(reply)
        elif isinstance(request, Attach):
            self._attach(request, reply)
        elif isinstance(request, Detach | Keep):
            self._require(type(request).__name__, _PLUGGABLE)
            operation = "detach" if isinstance(request, Detach) else "keep"
            self.core.slot(operation, self._expect(operation, reply), request.device)
        elif isinstance(request, Media):
            self._media(request, reply)
        elif isinstance(request, Change):
            self._change(request, reply)
        elif isinstance(request, Save | Snapshot):
            self._save(request, fds, reply)
        elif isinstance(request, Send | Receive):
            self._migrate(request, fds, reply)
        elif isinstance(request, Tidy):
            self._require("tidy", frozenset({"configured", *_PLUGGABLE}))
            self.core.keep("tidy", self._expect("tidy", reply), undo=request.undo, drop=request.drop)
        elif isinstance(request, Restore):
            self._restore(request, reply)
        else:
            self._operate(request, reply)

    def attended(self, present: bool) -> None:
        """Remember whether somebody listens; start or end the time that an ended worker lingers."""
        self._attended = present
        if self._linger is not None:
            self._linger.cancel()
            self._linger = None
        if self.state == "ended" and not present:
            self._linger = self._loop.after(LINGER_SECONDS, self._loop.stop)

    def acknowledged(self) -> None:
        """Leave once the end is known; say what the console had to keep back."""
        if self.state == "ended" and not self._events.holds("ended"):
            self._loop.stop()
        self._say_output()

    # Requests.

    def _configure(self, request: Configure, reply: Reply) -> None:
        if self.state != "ready" or self._building:
            raise VmbusError("InvalidState", "the machine is configured already")
        definition = request.definition
        config = configuration(
            request.uuid,
            definition,
            self._files,
            kvm=self._kvm,
            console=self._console_end,
            merge=request.merge,
            restore=request.restore,
            clone=request.clone,
        )
        for number, name in enumerate(definition.ports):
            ours = socket.socket(fileno=self._files.all(f"port/{number}")[0])
            self._ports[name] = Hub(self._loop, ours, lambda: None)
        self._cloned = request.clone
        slots = [*named_slots(definition, self._files), *([RESTORE] if request.clone else [])]
        self._files.hand_over(slots, keep=RESTORE if request.restore and not request.clone else "")
        self._files.built()
        self._building = True
        self.core.build(config, lambda error: self._built(error, reply))

    def _built(self, error: VmbusError | None, reply: Reply) -> None:
        self._building = False
        stops, self._stop_when_built = self._stop_when_built, []
        if error is not None:
            reply.failed(error)
            self._end("error", str(error))
            for stop in stops:
                stop.done()
            return
        self._enter("configured")
        reply.done()
        for stop in stops:
            self._ask("stop", stop)

    def _stop_early(self, reply: Reply) -> None:
        if self._building:
            self._stop_when_built.append(reply)
        else:
            reply.done()
            self._end("stopped", "")

    def _add_link(self, request: AddLink, fds: list[int], reply: Reply) -> None:
        if not fds or self.state not in ("configured", "running", "paused"):
            close(fds)
            raise VmbusError(
                "InvalidState", "a link comes with its file descriptor to a machine that is built"
            )
        self.core.link(self._expect("link", reply), request.device, request.peer, fds[0])

    def _vsock(self, request: Vsock, fds: list[int], reply: Reply) -> None:
        try:
            self._require("vsock", _PLUGGABLE)
            if not fds:
                raise VmbusError("InvalidArgument", "no file descriptor came with the message")
        except VmbusError:
            close(fds)
            raise
        self.core.vsock(self._expect("vsock", reply), request.port, fds[0], accept=request.accept)

    def _operate(self, request: Request, reply: Reply) -> None:
        operation, states = _OPERATIONS[type(request)]
        self._require(operation, states)
        self._ask(operation, reply, request.bytes if isinstance(request, MemoryTarget) else 0)

    def _require(self, operation: str, states: frozenset[str]) -> None:
        if self.state not in states:
            raise VmbusError(
                "InvalidState",
                f"{operation} needs a machine that is {' or '.join(sorted(states))}, not {self.state}",
            )

    def _ask(self, operation: str, reply: Reply, argument: int = 0) -> None:
        self.core.request(operation, self._expect(operation, reply), argument)

    def _expect(self, operation: str, reply: Reply) -> int:
        """The number of a request to the core, whose answer goes to ``reply``."""
        self._last_request += 1
        self._replies[self._last_request] = (operation, reply)
        return self._last_request

    def _change(self, request: Change, reply: Reply) -> None:
        self._require("change", _PLUGGABLE)
        wanted = {"carrier": request.carrier, "size": request.size}
        given = [(kind, value) for kind, value in wanted.items() if value is not None]
        if len(given) != 1:
            raise VmbusError("InvalidArgument", f"is one of {', '.join(wanted)}", argument="change")
        self.core.change(self._expect("change", reply), request.device, *given[0])

    def _open_port(self, request: OpenPort, fds: list[int], reply: Reply) -> None:
        hub = self._ports.get(request.name)
        if not fds or hub is None:
            close(fds)
            known = ", ".join(self._ports) or "none"
            raise VmbusError(
                "NotFound", f"there is no port {request.name!r}; there is {known}", argument="name"
            )
        hub.attach(fds[0], write=request.write, steal=request.steal)
        reply.done()

    def _media(self, request: Media, reply: Reply) -> None:
        try:
            self._require("medium", _PLUGGABLE)
            change = {"disk": disk_configuration(request.disk, self._files), "force": request.force}
        except VmbusError:
            self._files.close()
            raise
        self._files.hand_over([slot.name for slot in disk_slots(request.disk)])
        number = self._expect("medium", reply)
        self.core.attach("medium", number, change, lambda error: self._not_attached(number, error))

    def _attach(self, request: Attach, reply: Reply) -> None:
        """The device's files are given to the core; whatever else was delivered belongs to nobody."""
        try:
            self._require("attach", _PLUGGABLE)
            if request.disk is not None:
                operation, slots = "attach-disk", [slot.name for slot in disk_slots(request.disk)]
                device = disk_configuration(request.disk, self._files)
            elif request.nic is not None:
                operation, slots = "attach-nic", nic_slots(request.nic)
                device = nic_configuration(request.nic, self._files)
            else:
                raise VmbusError("InvalidArgument", "neither a disk nor a nic", argument="device")
        except VmbusError:
            self._files.close()
            raise
        self._files.hand_over(slots)
        number = self._expect(operation, reply)
        self.core.attach(operation, number, device, lambda error: self._not_attached(number, error))

    def _not_attached(self, number: int, error: VmbusError) -> None:
        if waiting := self._replies.pop(number, None):
            waiting[1].failed(error)

    def _save(self, request: Save | Snapshot, fds: list[int], reply: Reply) -> None:
        try:
            self._require("save", _PLUGGABLE)
            if not fds:
                raise VmbusError("InvalidArgument", "no file descriptor came with the message")
        except VmbusError:
            close(fds)
            raise
        number = self._expect("save", reply)
        if isinstance(request, Snapshot):
            self.core.keep("save", number, fd=fds[0], snapshot=request.name)
        else:
            self.core.keep("save", number, fd=fds[0], end=request.end)

    def _migrate(self, request: Send | Receive, fds: list[int], reply: Reply) -> None:
        what, states = "send", _PLUGGABLE
        if isinstance(request, Receive):
            what, states = "receive", frozenset({"configured"})
        try:
            self._require(what, states)
            if not fds:
                raise VmbusError("InvalidArgument", "no socket came with the message", argument="socket")
        except VmbusError:
            close(fds)
            raise
        number = self._expect(what, reply)
        if isinstance(request, Receive):
            also = {"copy": request.copy, "separate": request.separate}
            self.core.keep(what, number, fd=fds[0], paused=request.paused, **also)
        else:
            pace = {"downtime": request.downtime, "bandwidth": request.bandwidth}
            self.core.keep(what, number, fd=fds[0], copy=request.copy, **pace)

    def _restore(self, request: Restore, reply: Reply) -> None:
        self._require("restore", frozenset({"configured"}))
        if self._cloned:
            self.core.keep("restore", self._expect("restore", reply), changed_disks=request.changed_disks)
            return
        fd = self._files.one(RESTORE)
        self._files.hand_over([RESTORE])
        number = self._expect("restore", reply)
        revert = {"to": request.revert_to, "aside": request.aside} if request.revert_to else None
        self.core.keep("restore", number, fd=fd, changed_disks=request.changed_disks, revert=revert)

    # What the core says.

    def _core_event(self, event: CoreEvent) -> None:
        if event.kind == "done":
            self._replies.pop(event.id)[1].done(stats_of(event))
        elif event.kind == "failed":
            self._replies.pop(event.id)[1].failed(error_of(event))
        elif event.kind == "running":
            self._enter("running")
        elif event.kind == "paused":
            self._enter("paused")
        elif event.kind == "watchdog":
            self._watchdog = action_of(event)
            self._enter(self.state)
        elif event.kind == "reset":
            self._events.add("reset")
            self.events_added()
        elif event.kind == "detached":
            gone = gone_of(event)
            self._events.add("detached", device=gone.device, detail=gone.detail[:_DETAIL_MAX])
            self.events_added()
        else:
            end = end_of(event)
            self._end(end.reason, end.detail)

    def _enter(self, state: State) -> None:
        self.state = state
        # What the watchdog did is why the machine stands still, or went on from its start.
        reason, detail = ("watchdog", self._watchdog) if self._watchdog else ("", "")
        if self._watchdog != "pause" or state == "paused":
            self._watchdog = ""
        self._events.add("state", state=state, reason=reason, detail=detail)
        self.events_added()

    def _end(self, reason: str, detail: str) -> None:
        """The machine is over: what is pending is answered, the reason is the last event."""
        for hub in (self._hub, *self._ports.values()):
            hub.close()
        self.state = "ended"
        self.reason = reason
        for operation, reply in self._replies.values():
            if operation == "stop":
                reply.done()
            else:
                reply.failed(VmbusError("InvalidState", f"the machine has ended: {reason}"))
        self._replies.clear()
        self._files.close()
        self.core.free()
        self._events.add("ended", state="ended", reason=reason, detail=detail[:_DETAIL_MAX])
        self.events_added()
        self.attended(self._attended)

    # Console activity.

    def _output(self) -> None:
        self._unsaid_output = True
        self._say_output()

    def _say_output(self) -> None:
        """At most one event a second, and none while one is not acknowledged."""
        if (
            not self._unsaid_output
            or self.state == "ended"
            or self._console_timer is not None
            or self._events.holds("console")
        ):
            return
        self._unsaid_output = False
        self._console_timer = self._loop.after(CONSOLE_SECONDS, self._console_again)
        self._events.add("console")
        self.events_added()

    def _console_again(self) -> None:
        self._console_timer = None
        self._say_output()
