# SPDX-License-Identifier: Apache-2.0
"""Random input to the worker's parsers, FUZZ_SECONDS long: it never ends, never hangs, leaks nothing.

Input is what a peer could write: valid messages with bytes changed, cut, repeated and joined, and noise;
as greeting, as delivery and as request, with and without descriptors.
"""

from __future__ import annotations

import os
import random
import socket
import time

import msgspec
import pytest

from tests.local.worker_process import WorkerProcess
from vmbus.wire import packet
from vmbus.wire.definition import Definition, Disk, Kernel, Layer
from vmbus.wire.inlet import Delivery, Greeting
from vmbus.wire.worker import Ack, AddFile, Configure, Console, Hello, Pause, Request, Run, Stats, Stop

pytestmark = pytest.mark.fuzz

DEFINITION = Definition(
    name="fuzzed",
    memory=16 << 20,
    kernel=Kernel(source="fd", cmdline="console=ttyS0"),
    disks=[Disk(id="a", layers=[Layer(format="qcow2", backing_name="b")], source="fd")],
)
SEEDS: list[msgspec.Struct] = [
    Greeting(role="control", epoch=3),
    Greeting(role="inlet"),
    Delivery(slot="kernel"),
    Hello(id=1, versions=[1]),
    Ack(id=2, seq=1),
    AddFile(id=3, slot="disk/a/0"),
    Configure(id=4, uuid="6ba7b810-9dad-11d1-80b4-00c04fd430c8", definition=DEFINITION),
    Run(id=5),
    Pause(id=6),
    Console(id=7, write=True),
    Stats(id=8),
]


def mutated(noise: random.Random) -> bytes:
    """A datagram made from one or two valid ones."""
    data = bytearray(msgspec.msgpack.encode(noise.choice(SEEDS)))
    for _ in range(noise.randrange(4)):
        place = noise.randrange(len(data) + 1)
        match noise.randrange(5):
            case 0:
                data[place : place + 1] = noise.randbytes(1)
            case 1:
                del data[place : place + noise.randrange(1, 8)]
            case 2:
                data[place:place] = noise.randbytes(noise.randrange(1, 8))
            case 3:
                data += msgspec.msgpack.encode(noise.choice(SEEDS))
            case _:
                data[place:place] = data[place : place + 20] * noise.randrange(1, 50)
    return bytes(data[: packet.LIMIT + 1]) or b"\xc0"


_requests = msgspec.msgpack.Decoder(Request)
_deliveries = msgspec.msgpack.Decoder(Delivery)
_greetings = msgspec.msgpack.Decoder(Greeting)


def decoded(data: bytes) -> msgspec.Struct | None:
    """What the worker makes of a datagram, None for a violation."""
    for decoder in (_requests, _deliveries, _greetings):
        try:
            return decoder.decode(data)
        except (msgspec.MsgspecError, ValueError):
            continue
    return None


def test_whatever_comes_the_worker_serves_on_and_keeps_no_descriptor() -> None:
    seed = int(os.environ.get("FUZZ_SEED", str(random.randrange(1 << 32))))
    print(f"FUZZ_SEED={seed}")
    noise = random.Random(seed)
    end = time.monotonic() + float(os.environ.get("FUZZ_SECONDS", "60"))
    with WorkerProcess() as worker:
        worker.control(epoch=10)
        held = len(os.listdir(f"/proc/{worker.pid}/fd"))
        rounds = 0
        while time.monotonic() < end:
            rounds += 1
            if noise.random() < 0.5:
                sock = worker.control().sock
            else:
                sock = worker.connect()
                if noise.random() < 0.5:
                    packet.send(sock, Greeting(role="inlet"))
            for _ in range(noise.randrange(1, 5)):
                data = mutated(noise)
                message = decoded(data)
                if isinstance(message, Stop) or (isinstance(message, Greeting) and message.epoch > 3):
                    continue  # the end of the worker, or of the epochs that this test can use
                # Files that are rightly delivered stay, so those come without.
                fds = [] if isinstance(message, (Delivery, AddFile)) else [0] * noise.choice([0, 0, 1, 2, 17])
                try:
                    socket.send_fds(sock, [data], fds)
                except OSError:
                    break
            sock.close()
            if rounds % 50 == 0:
                assert worker.control().welcome.state == "ready"
                assert len(os.listdir(f"/proc/{worker.pid}/fd")) == held
        assert rounds > 100
