# SPDX-License-Identifier: Apache-2.0
"""The service's side of one worker: requests, events, and the files of its figures.

The worker is hostile: what it says is checked by the decoder, bounded, and used only as this machine's state.
It cannot send fds (the channel has no control buffer). Events come at least once; one whose number is not
above the last acknowledged is acknowledged again and dropped. A worker that says more than ``EVENTS`` a
second is read more slowly.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Mapping
from typing import Any, Final

import msgspec

from vmbus.service.channel import Channel
from vmbus.service.figures import Figures
from vmbus.wire import worker as wire
from vmbus.wire.definition import Definition, Disk, Nic
from vmbus.wire.errors import VmbusError

_decoder = msgspec.msgpack.Decoder(wire.Answer)

SUPPORTED: Final = [wire.VERSION]
"""Versions beyond the lifeline that this service drives: N and N-1, when there is an N-1."""
EVENTS: Final = 100
"""Events that are taken from a worker in a second; each is written down and sent on."""
PREFAULT_DEADLINE: Final = 3600.0
"""Seconds for a guest's memory to be touched: a TiB takes some minutes."""
WAITING: Final = 1e9
"""Seconds for what may never come: whoever waits ends it."""
SAVE_DEADLINE: Final = 86400.0
"""Seconds for a machine to be written to a file, or read: the client cancels what takes too long."""
BUILD_DEADLINE: Final = 60.0
"""Seconds for a machine to be built: images are opened, huge pages are touched."""
TIDY_DEADLINE: Final = 3600.0
"""Seconds for internal snapshots to be dropped: all tables of the images are read."""
CHANGE_DEADLINE: Final = 60.0
"""Seconds for a device to change: a disk that grows writes its tables first."""


class WorkerClient:
    """A control connection. ``fds``: the connection, smaps_rollup, smaps and perhaps ksm_stat; all are taken
    over."""

    def __init__(
        self,
        fds: list[int],
        *,
        last_seq: int,
        on_event: Callable[[wire.Event], None],
        on_closed: Callable[[], None],
    ) -> None:
        if not fds:
            raise VmbusError("Internal", "the broker gave no connection to the worker")
        self.figures = Figures(fds[1:])
        """The worker's memory, from /proc."""
        self._seq = last_seq
        self._on_event = on_event
        self.restricted = False
        self._second = 0
        self._events = 0
        self.told_state = False
        """Whether an event on this connection told a state, which is then newer than Hello's."""
        self.state: str = ""
        """What the worker said last on this connection: ready, configured, running, paused or ended."""
        self._channel: Channel[wire.Result, wire.Event] = Channel(
            socket.socket(fileno=fds[0]),
            _decoder,
            wire.Result,
            peer="the worker",
            on_event=self._event,
            on_closed=on_closed,
        )

    @property
    def open(self) -> bool:
        """Whether the connection stands."""
        return self._channel.open

    async def _ask(
        self,
        make: Callable[[int], msgspec.Struct],
        *,
        fds: list[int] | None = None,
        timeout: float = 10,
        on_sent: Callable[[], None] = lambda: None,
    ) -> wire.Result:
        number = self._channel.number()
        result, _ = await self._channel.request(
            make(number), number, fds=fds, timeout=timeout, on_sent=on_sent
        )
        return result

    async def hello(self) -> wire.Result:
        """Exchange versions. An older worker is driven by the lifeline alone."""
        result = await self._ask(lambda n: wire.Hello(id=n, versions=SUPPORTED))
        if result.lifeline != wire.LIFELINE:
            raise VmbusError("Restricted", f"the worker's lifeline is version {result.lifeline}")
        self.restricted = result.version not in SUPPORTED
        if not self.told_state:  # an event that came right behind is newer
            self.state = result.state or ""
        return result

    def acknowledge(self, seq: int) -> None:
        """Say that all events up to ``seq`` are stored."""
        self._seq = max(self._seq, seq)
        with contextlib.suppress(VmbusError):
            self._channel.send(wire.Ack(id=self._channel.number(), seq=seq))

    async def add_file(self, slot: str, fd: int) -> None:
        """Hand over a client's file; ``fd`` stays the caller's."""
        self._unrestricted()
        await self._ask(lambda n: wire.AddFile(id=n, slot=slot), fds=[fd])

    async def add_port(self, number: int, fds: list[int]) -> None:
        """Give both ends of a socketpair for named port ``number``; they stay the caller's."""
        self._unrestricted()
        await self._ask(lambda n: wire.AddFile(id=n, slot=f"port/{number}"), fds=fds)

    async def open_port(self, name: str, fd: int, *, write: bool, steal: bool) -> None:
        """Give a port's hub one end of a socketpair; ``fd`` stays the caller's."""
        self._unrestricted()
        await self._ask(lambda n: wire.OpenPort(id=n, name=name, write=write, steal=steal), fds=[fd])

    async def vsock_connect(self, port: int, fd: int, *, timeout: float) -> None:
        """Connect a socket with a port of the guest's; returns when it has said yes."""
        self._unrestricted()
        await self._ask(lambda n: wire.Vsock(id=n, port=port), fds=[fd], timeout=timeout)

    async def vsock_accept(self, port: int, fd: int) -> int:
        """Have a socket wait for the guest to connect to a port of the host's; the guest's port, then."""
        self._unrestricted()
        ask = self._ask(lambda n: wire.Vsock(id=n, port=port, accept=True), fds=[fd], timeout=WAITING)
        guests = (await ask).stats.get("port")
        if not isinstance(guests, int) or not 0 <= guests < 1 << 32:
            raise VmbusError("Internal", "the worker names no port of its guest's")
        return guests

    async def add_link(self, device: str, peer: str, fd: int) -> None:
        """Give one end of a pair of sockets to an isolated network; ``fd`` stays the caller's."""
        self._unrestricted()
        await self._ask(lambda n: wire.AddLink(id=n, device=device, peer=peer), fds=[fd])

    async def configure(
        self,
        uuid: str,
        definition: Definition,
        *,
        merge: bool,
        restore: bool = False,
        clone: bool = False,
    ) -> None:
        """Build the machine. ``merge``: its memory is offered to KSM; ``restore``: it is restored then, and
        as a ``clone`` its memory is the file's."""
        self._unrestricted()
        await self._ask(
            lambda n: wire.Configure(
                id=n, uuid=uuid, definition=definition, merge=merge, restore=restore, clone=clone
            ),
            timeout=BUILD_DEADLINE,
        )

    async def run(self) -> None:
        """Let the vCPUs go for the first time."""
        self._unrestricted()
        await self._ask(lambda n: wire.Run(id=n))

    async def shutdown(self) -> None:
        """Press the power button."""
        await self._ask(lambda n: wire.Shutdown(id=n))

    async def stop(self) -> None:
        """Stop, flush and end."""
        await self._ask(lambda n: wire.Stop(id=n), timeout=30)

    async def reset(self) -> None:
        """Pull the reset line."""
        await self._ask(lambda n: wire.Reset(id=n))

    async def pause(self) -> None:
        """Stop the vCPUs."""
        await self._ask(lambda n: wire.Pause(id=n))

    async def resume(self) -> None:
        """Let them go on."""
        await self._ask(lambda n: wire.Resume(id=n))

    async def console(self, fd: int, *, write: bool, steal: bool) -> None:
        """Give the console hub one end of a socketpair; ``fd`` stays the caller's."""
        await self._ask(lambda n: wire.Console(id=n, write=write, steal=steal), fds=[fd])

    async def attach(self, device: Disk | Nic) -> None:
        """Put a device into its hotplug slot; its files were handed over before."""
        self._unrestricted()
        disk, nic = (device, None) if isinstance(device, Disk) else (None, device)
        await self._ask(lambda n: wire.Attach(id=n, disk=disk, nic=nic), timeout=BUILD_DEADLINE)

    async def detach(self, device: str) -> None:
        """Ask the guest to let go of ``device``; the event ``detached`` says that it has."""
        self._unrestricted()
        await self._ask(lambda n: wire.Detach(id=n, device=device))

    async def keep(self, device: str) -> None:
        """It may keep it."""
        await self._ask(lambda n: wire.Keep(id=n, device=device))

    async def change(self, device: str, *, carrier: bool | None = None, size: int | None = None) -> None:
        """Change a device that the guest has: one of what ``wire.Change`` knows."""
        self._unrestricted()
        await self._ask(
            lambda n: wire.Change(id=n, device=device, carrier=carrier, size=size), timeout=CHANGE_DEADLINE
        )

    async def change_medium(self, drive: Disk, *, force: bool) -> None:
        """Put the medium of ``drive`` into it, whose files were handed over before, or take its one out."""
        self._unrestricted()
        await self._ask(lambda n: wire.Media(id=n, disk=drive, force=force), timeout=BUILD_DEADLINE)

    async def stats(self) -> dict[str, Any]:
        """What the machine counts."""
        self._unrestricted()
        return (await self._ask(lambda n: wire.Stats(id=n))).stats

    async def set_memory_target(self, target: int) -> None:
        """Ask the guest to get by with so many bytes."""
        self._unrestricted()
        await self._ask(lambda n: wire.MemoryTarget(id=n, bytes=target))

    async def prefault(self) -> None:
        """Touch all of the guest's memory; returns when that is done."""
        self._unrestricted()
        await self._ask(lambda n: wire.Prefault(id=n), timeout=PREFAULT_DEADLINE)

    async def cancel_prefault(self) -> None:
        """Stop that."""
        await self._ask(lambda n: wire.CancelPrefault(id=n))

    async def save(self, fd: int, *, end: bool) -> None:
        """Write the machine to a file; returns when that is done. ``fd`` stays the caller's."""
        await self._ask(lambda n: wire.Save(id=n, end=end), fds=[fd], timeout=SAVE_DEADLINE)

    async def restore(self, *, changed_disks: bool, revert_to: str = "", aside: str = "") -> None:
        """Go on from the file in slot ``restore``; returns when the machine is paused where it was."""
        self._unrestricted()
        await self._ask(
            lambda n: wire.Restore(id=n, changed_disks=changed_disks, revert_to=revert_to, aside=aside),
            timeout=SAVE_DEADLINE,
        )

    async def snapshot(self, fd: int, name: str) -> None:
        """Write the machine to a file and take internal snapshots of its disks; ``fd`` stays the caller's."""
        self._unrestricted()
        await self._ask(lambda n: wire.Snapshot(id=n, name=name), fds=[fd], timeout=SAVE_DEADLINE)

    async def tidy(self, *, undo: list[str], drop: list[str]) -> None:
        """Undo and drop internal snapshots of the disks."""
        self._unrestricted()
        await self._ask(lambda n: wire.Tidy(id=n, undo=undo, drop=drop), timeout=TIDY_DEADLINE)

    async def send(
        self, fd: int, copy: list[str], *, downtime: int, bandwidth: int, on_sent: Callable[[], None]
    ) -> dict[str, Any]:
        """Send the machine through a socket, with the disks ``copy``; returns, with what was counted, when it
        runs at the other end. ``fd`` stays the caller's, and is not needed here after ``on_sent``."""
        self._unrestricted()
        ask = self._ask(
            lambda n: wire.Send(id=n, downtime=downtime, bandwidth=bandwidth, copy=copy),
            fds=[fd],
            timeout=SAVE_DEADLINE,
            on_sent=on_sent,
        )
        return (await ask).stats

    async def receive(
        self, fd: int, disks: Mapping[str, list[str]], *, paused: bool, on_sent: Callable[[], None]
    ) -> dict[str, Any]:
        """Go on as the machine that comes through a socket; returns when it does. ``fd`` as of ``send``;
        ``disks``: wire.Receive's ``copy`` and ``separate``."""
        self._unrestricted()
        ask = self._ask(
            lambda n: wire.Receive(id=n, paused=paused, **disks),
            fds=[fd],
            timeout=SAVE_DEADLINE,
            on_sent=on_sent,
        )
        return (await ask).stats

    async def cancel_save(self) -> None:
        """Stop a save or a restore, or what moves the machine, if the other side does not have it yet."""
        await self._ask(lambda n: wire.CancelSave(id=n))

    def close(self) -> None:
        """Close the connection and the files."""
        self._channel.close()
        self.figures.close()

    def _unrestricted(self) -> None:
        if self.restricted:
            raise VmbusError(
                "Restricted", "the worker is older than this service; restart the machine to change it"
            )

    def _event(self, event: wire.Event) -> None:
        second = int(time.monotonic())
        self._events = self._events + 1 if second == self._second else 1
        self._second = second
        if self._events >= EVENTS:
            self._channel.rest(1.0)
        if event.seq <= self._seq:
            self.acknowledge(self._seq)
            return
        self.told_state |= event.kind in ("state", "ended")
        if event.kind in ("state", "ended"):
            self.state = "ended" if event.kind == "ended" else event.state or ""
        self._on_event(event)
