# SPDX-License-Identifier: Apache-2.0
"""The service's side of a worker's connection."""

from __future__ import annotations

import asyncio
import socket

import msgspec

from vmbus.service.worker_client import WorkerClient
from vmbus.wire import packet
from vmbus.wire import worker as wire


def test_an_event_right_behind_a_hello_is_the_newer_word() -> None:
    """Both are read before whoever asked goes on."""

    async def scenario() -> str:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            worker = WorkerClient(
                [ours.detach()], last_seq=0, on_event=lambda event: None, on_closed=lambda: None
            )
            asking = asyncio.ensure_future(worker.hello())
            await asyncio.sleep(0)
            request = packet.receive(theirs, msgspec.msgpack.Decoder(wire.Request))
            assert isinstance(request, wire.Hello)
            answer = wire.Result(id=request.id, version=wire.VERSION, lifeline=wire.LIFELINE)
            packet.send(theirs, msgspec.structs.replace(answer, state="configured"))
            packet.send(theirs, wire.Event(seq=1, kind="state", state="paused"))
            assert (await asking).state == "configured"
            worker.close()
        return worker.state

    assert asyncio.run(scenario()) == "paused"
