# SPDX-License-Identifier: Apache-2.0
"""The service's side of the broker's socket: connects, connects again, asks.

While there is no broker every request fails at once with Unavailable: nobody waits for a process that
may never come. A restarted broker is found within ``RETRY`` seconds, and ``on_connected`` runs before any
other request is let through, so that the registry has seen which workers live.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Final, Literal

import msgspec

from vmbus.service.channel import Channel
from vmbus.wire import broker as wire
from vmbus.wire.definition import Definition, Nic, grants, huge_page_size
from vmbus.wire.errors import VmbusError
from vmbus.wire.memory import Seen, Tuned
from vmbus.wire.packet import MAX_FDS

log = logging.getLogger("vmbus.broker")

RETRY: Final = 0.2
"""Seconds between attempts to connect."""
OPEN_DEADLINE: Final = 30.0
"""Seconds for an Open: the broker's own deadline is 10, and four may wait before it."""

_decoder = msgspec.msgpack.Decoder(wire.Answer)


class BrokerClient:
    """One connection to the broker of this instance, kept up by ``run``."""

    def __init__(
        self,
        path: Path,
        *,
        on_connected: Callable[[], Awaitable[None]],
        on_ended: Callable[[wire.Ended], None],
    ) -> None:
        self._path = path
        self._on_connected = on_connected
        self._on_ended = on_ended
        self._channel: Channel[wire.Reply, wire.Ended] | None = None
        self._lost = asyncio.Event()
        self._ready = False
        self.notes: list[str] = []

    @property
    def connected(self) -> bool:
        """Whether requests are taken just now."""
        return self._ready

    async def run(self) -> None:
        """Keep the connection up, for ever."""
        complained = False
        while True:
            try:
                await self._connect()
                complained = False
                await self._lost.wait()
                log.warning("the broker is gone; connecting again")
            except (OSError, VmbusError) as error:
                if not complained:
                    log.warning("no broker at %s: %s", self._path, error)
                    complained = True
            except Exception:
                log.exception("the connection to the broker failed")
            finally:
                self._ready = False
                if self._channel:
                    self._channel.close()
            await asyncio.sleep(RETRY)

    async def _connect(self) -> None:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        try:
            sock.setblocking(False)
            sock.connect(str(self._path))
        except BaseException:
            sock.close()
            raise
        self._lost.clear()
        self._channel = Channel(
            sock,
            _decoder,
            wire.Reply,
            peer="the broker",
            on_event=self._on_ended,
            on_closed=self._lost.set,
            max_fds=MAX_FDS,
        )
        reply, _ = await self._ask(lambda n: wire.Hello(id=n, versions=[wire.VERSION]), timeout=10)
        if reply.version != wire.VERSION:
            raise VmbusError("NotSupported", f"the broker speaks version {reply.version}, not {wire.VERSION}")
        self.notes = reply.notes
        log.info("connected to the broker of instance %s", reply.instance)
        await self._on_connected()
        self._ready = True

    async def _ask(
        self, make: Callable[[int], msgspec.Struct], *, timeout: float = 20
    ) -> tuple[wire.Reply, list[int]]:
        if self._channel is None or not self._channel.open:
            raise _absent()
        number = self._channel.number()
        return await self._channel.request(make(number), number, timeout=timeout)

    def check_there(self) -> None:
        """Raise Unavailable if there is no broker to be asked just now."""
        if not self._ready:
            raise _absent()

    async def own(self, uuid: str, uid: int) -> None:
        """Record that the machine belongs to ``uid``."""
        await self._ask(lambda n: wire.Own(id=n, uuid=uuid, uid=uid))

    async def disown(self, uuid: str) -> None:
        """Forget that record."""
        await self._ask(lambda n: wire.Disown(id=n, uuid=uuid))

    async def check_device(self, uid: int, *, grants: Sequence[str] = (), paths: Sequence[str] = ()) -> None:
        """The same for one device."""
        await self._ask(lambda n: wire.Check(id=n, uid=uid, grants=list(grants), paths=list(paths)))

    async def check(self, uid: int, definition: Definition, paths: list[str]) -> None:
        """Raise QuotaExceeded or AccessDenied if broker.toml would not let ``uid`` have such a machine."""
        memory = definition.memory
        await self._ask(
            lambda n: wire.Check(
                id=n,
                uid=uid,
                memory=memory,
                hugepages=memory if huge_page_size(definition) else 0,
                locked=memory if definition.locked else 0,
                vcpus=definition.vcpus,
                grants=grants(definition.nics),
                paths=paths,
            )
        )

    async def spawn(self, uuid: str, definition: Definition) -> tuple[int, list[int]]:
        """A worker: its pid (0: not told); its control connection and the files of its figures."""
        reply, fds = await self._ask(
            lambda n: wire.Spawn(
                id=n,
                uuid=uuid,
                memory=definition.memory,
                vcpus=definition.vcpus,
                memory_kind=definition.memory_kind,
                page_size=huge_page_size(definition),
                locked=definition.memory if definition.locked else 0,
            ),
            timeout=60,
        )
        return (reply.workers[0].pid if reply.workers else 0), fds

    async def open(self, uuid: str, slot: str, path: str, *, writable: bool) -> wire.Identity:
        """Have the owner's file opened and handed to the worker; what was opened."""
        reply, _ = await self._ask(
            lambda n: wire.Open(id=n, uuid=uuid, slot=slot, path=path, writable=writable),
            timeout=OPEN_DEADLINE,
        )
        if reply.identity is None:
            raise VmbusError("Internal", "the broker opened a file and did not say which")
        return reply.identity

    async def tap(self, uuid: str, nic: Nic, queues: int) -> None:
        """Make a tap for ``nic`` on its bridge, or a macvtap on its interface, and hand it to the worker; for
        no ``queues`` take it away."""
        wanted = wire.Tap(
            id=0,
            uuid=uuid,
            slot=f"nic/{nic.id}",
            bridge=nic.bridge,
            interface=nic.interface,
            mode=nic.mode,
            queues=queues,
            mac=nic.mac,
            address=nic.address,
        )
        await self._ask(lambda n: msgspec.structs.replace(wanted, id=n))

    async def helper(
        self, uuid: str, slot: str, kind: Literal["passt", "passt-host"], options: list[str]
    ) -> None:
        """Start a helper beside the machine's worker, which gets a socket to it."""
        await self._ask(lambda n: wire.Spawn(id=n, uuid=uuid, kind=kind, slot=slot, options=options))

    async def tune(self, settings: dict[str, str]) -> Tuned:
        """Write settings of KSM and of pools of huge pages (names below /sys), in order; what came of it."""
        reply, _ = await self._ask(lambda n: wire.Tune(id=n, settings=settings))
        return msgspec.convert(reply.report, Tuned)

    async def look(self) -> Seen:
        """Who uses KSM, and ksmd's CPU time."""
        reply, _ = await self._ask(lambda n: wire.Look(id=n))
        return msgspec.convert(reply.report, Seen)

    async def kill(self, uuid: str) -> None:
        """End the worker now; Ended follows."""
        await self._ask(lambda n: wire.Kill(id=n, uuid=uuid))

    async def workers(self) -> list[wire.WorkerInfo]:
        """The living workers of this instance."""
        reply, _ = await self._ask(lambda n: wire.Workers(id=n))
        return reply.workers

    async def connect_worker(self, uuid: str) -> list[int]:
        """A new control connection to a living worker, and the files of its figures."""
        _, fds = await self._ask(lambda n: wire.Connect(id=n, uuid=uuid))
        return fds

    def close(self) -> None:
        """End the connection."""
        if self._channel:
            with contextlib.suppress(VmbusError):
                self._channel.close()


def _absent() -> VmbusError:
    return VmbusError("Unavailable", "the broker is not running; start vmbus-broker and try again")
