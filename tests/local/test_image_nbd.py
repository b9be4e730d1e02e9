# SPDX-License-Identifier: Apache-2.0
"""vmbus-img serve: what QEMU's clients see, and what clients that break the protocol get."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.local.image_bed import serves
from vmbus import image

pytestmark = pytest.mark.skipif(shutil.which("qemu-io") is None, reason="qemu-io (package qemu-utils)")
MIB = 1 << 20
OPTION = 0x49484156454F5054


class Server:
    """A running ``vmbus-img serve``."""

    def __init__(self, place: Path, *options: str) -> None:
        self.image, self.socket = place / "image", place / "nbd"
        self.command = [
            sys.executable,
            "-m",
            "vmbus.cli.img",
            "serve",
            "-t",
            "-k",
            self.socket,
            *options,
            self.image,
        ]
        self.uri = f"nbd+unix:///?socket={self.socket}"
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen([str(word) for word in self.command])
        assert serves(self.process, self.socket), "the server does not come up"

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(20)

    def qemu(self, *words: str) -> str:
        return subprocess.run([*words, self.uri], check=True, capture_output=True, text=True).stdout

    def connect(self) -> socket.socket:
        client = socket.socket(socket.AF_UNIX)
        client.settimeout(20)
        client.connect(str(self.socket))
        assert _exactly(client, 18)[:16] == b"NBDMAGICIHAVEOPT"
        return client


def _exactly(client: socket.socket, length: int) -> bytes:
    data = b""
    while len(data) < length:
        more = client.recv(length - len(data))
        if not more:
            raise ConnectionError(f"hung up after {len(data)} bytes")
        data += more
    return data


def _enter(client: socket.socket) -> int:
    """EXPORT_NAME without structured replies; gives the disk's size."""
    client.sendall(struct.pack(">IQII", 3, OPTION, 1, 0))
    size, _ = struct.unpack(">QH", _exactly(client, 10))
    return int(size)


def _request(client: socket.socket, kind: int, offset: int, length: int, data: bytes = b"") -> int:
    client.sendall(struct.pack(">IHHQQI", 0x25609513, 0, kind, 99, offset, length) + data)
    magic, error, cookie = struct.unpack(">IIQ", _exactly(client, 16))
    assert (magic, cookie) == (0x67446698, 99)
    return int(error)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    image.create(str(tmp_path / "image"), size=32 * MIB)
    server = Server(tmp_path)
    yield server
    assert server.stop() == 0
    assert not server.socket.exists()
    found = subprocess.run(["qemu-img", "check", "-q", server.image], check=False)
    assert found.returncode == 0


def test_qemu_writes_reads_zeroes_and_discards(server: Server) -> None:
    said = server.qemu(
        "qemu-io", "-f", "raw", "-d", "unmap",
        "-c", "write -P 7 1M 2M", "-c", "write -z 2M 64k", "-c", "discard 5M 1M", "-c", "flush",
        "-c", "write -f -P 8 31M 1M", "-c", "read -P 7 1M 1M", "-c", "read -P 0 2M 64k",
        "-c", "read -P 8 31M 1M",
    )  # fmt: skip
    assert "failed" not in said and "verif" not in said


def test_qemu_sees_which_ranges_are_holes(server: Server) -> None:
    server.qemu("qemu-io", "-f", "raw", "-c", "write -P 7 1M 2M")
    ranges = json.loads(server.qemu("qemu-img", "map", "--output=json", "-f", "raw"))
    seen = [(one["start"], one["length"], one["data"], one["zero"]) for one in ranges]
    assert seen == [
        (0, MIB, False, True),
        (MIB, 2 * MIB, True, False),
        (3 * MIB, 29 * MIB, False, True),
    ]


def test_a_copy_through_qemu_is_the_same(server: Server, tmp_path: Path) -> None:
    source, back = tmp_path / "source", tmp_path / "back"
    source.write_bytes(random.Random(3).randbytes(5 * MIB) + bytes(27 * MIB))
    subprocess.run(["qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", source, server.uri], check=True)
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "raw", server.uri, back], check=True)
    assert back.read_bytes() == source.read_bytes()


def test_clients_at_once_see_each_others_writes(server: Server) -> None:
    def write(number: int) -> str:
        offset = f"{number}M"
        return server.qemu(
            "qemu-io", "-f", "raw", "-c", f"write -P {number + 1} {offset} 1M", "-c", "flush",
            "-c", f"read -P {number + 1} {offset} 1M",
        )  # fmt: skip

    with ThreadPoolExecutor(8) as pool:
        assert all("failed" not in said for said in pool.map(write, range(16)))
    checks = [word for n in range(16) for word in ("-c", f"read -P {n + 1} {n}M 1M")]
    assert "failed" not in server.qemu("qemu-io", "-f", "raw", *checks)


def test_requests_off_the_disk_are_errors_and_the_connection_goes_on(server: Server) -> None:
    with server.connect() as client:
        size = _enter(client)
        assert size == 32 * MIB
        assert _request(client, 1, size - 512, 1024, bytes(1024)) == 22
        assert _request(client, 0, 2**64 - 1, 512) == 22
        assert _request(client, 0, 0, 2**32 - 1) == 22
        assert _request(client, 4, size, 512) == 22
        assert _request(client, 77, 0, 512) == 95
        assert _request(client, 3, 0, 0) == 0


@pytest.mark.parametrize(
    "noise",
    [
        b"\xff" * 4,
        struct.pack(">I", 3) + b"GET / HTTP/1.1\r\n\r\n",
        struct.pack(">IQII", 3, OPTION, 7, 2**32 - 1),
        struct.pack(">IQII", 3, OPTION, 1, 0) + b"\0" * 28,
        struct.pack(">IQII", 3, OPTION, 1, 0) + struct.pack(">IHHQQI", 0x25609513, 0, 1, 1, 0, 2**31),
    ],
)
def test_a_client_that_breaks_the_protocol_is_dropped_alone(server: Server, noise: bytes) -> None:
    with server.connect() as good, server.connect() as bad:
        _enter(good)
        bad.sendall(noise)
        with pytest.raises((ConnectionError, AssertionError)):
            while True:
                assert bad.recv(4096)
        assert _request(good, 1, 0, 512, b"x" * 512) == 0


def test_random_bytes_do_no_harm(server: Server) -> None:
    numbers = random.Random(int(os.environ.get("VMBUS_SEED", time.time_ns())))
    print("state", numbers.getstate()[1][0])
    for _ in range(50):
        with server.connect() as client:
            start = struct.pack(">I", 3)
            if numbers.random() < 0.5:
                start += struct.pack(">IQII", 3, OPTION, 1, 0)[4:]
            client.sendall(start + numbers.randbytes(numbers.randrange(200)))
    assert "failed" not in server.qemu("qemu-io", "-f", "raw", "-c", "read -P 0 0 1M")


def test_a_read_only_export_refuses_writes(tmp_path: Path) -> None:
    image.create(str(tmp_path / "image"), size=MIB)
    server = Server(tmp_path, "-r")
    with server.connect() as client:
        _enter(client)
        assert _request(client, 1, 0, 512, bytes(512)) == 1
        assert _request(client, 3, 0, 0) == 0
    assert server.stop() == 0


def test_a_served_image_is_locked(server: Server) -> None:
    done = subprocess.run(["qemu-img", "info", server.image], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "lock" in done.stderr
