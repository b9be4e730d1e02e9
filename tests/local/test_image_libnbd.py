# SPDX-License-Identifier: Apache-2.0
"""vmbus-img serve as libnbd's tools see it: nbdinfo, nbdcopy and nbdsh, over a socket by name, one that a
service manager passes, and one passed by number."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.local.test_image_nbd import Server
from vmbus import image

pytestmark = pytest.mark.skipif(
    not all(shutil.which(name) for name in ("nbdinfo", "nbdcopy", "nbdsh")),
    reason="nbdinfo, nbdcopy, nbdsh (packages libnbd-bin, python3-libnbd)",
)
MIB = 1 << 20
SERVE = [sys.executable, "-m", "vmbus.cli.img", "serve"]


def run(*words: str | Path) -> str:
    done = subprocess.run([*map(str, words)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """4 MiB: data, a hole, zeros, data to the last byte."""
    path = tmp_path / "image"
    image.create(str(path), size=4 * MIB)
    with image.open(str(path), "qcow2") as opened:
        opened.write(0, b"\x11" * MIB)
        opened.write_zeroes(2 * MIB, MIB)
        opened.write(3 * MIB, b"\x22" * MIB)
    return path


@pytest.fixture
def server(disk: Path, tmp_path: Path) -> Iterator[Server]:
    served = Server(tmp_path)
    yield served
    assert served.stop() == 0


def content(path: Path) -> bytes:
    with image.open(str(path), "qcow2", read_only=True) as opened:
        return opened.read(0, opened.size)


def sh(uri: str, script: str) -> str:
    """Python that knows ``h``, a handle connected to the export with base:allocation."""
    # nbdsh itself takes the first python3 of PATH, which need not be the one that has libnbd.
    return run(
        "/usr/bin/python3", "-m", "nbd", "-c", "h.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)",
        "-c", f"h.connect_uri({uri!r})", "-c", script,
    )  # fmt: skip


def test_nbdinfo_shows_the_export_and_its_map(server: Server) -> None:
    export = json.loads(run("nbdinfo", "--json", server.uri))["exports"][0]
    assert export["export-size"] == 4 * MIB
    for ability in ("can_flush", "can_fua", "can_multi_conn", "can_trim", "can_zero", "can_df"):
        assert export[ability] is True, ability
    assert export["is_read_only"] is False
    assert export["contexts"] == ["base:allocation"]
    found = json.loads(run("nbdinfo", "--json", "--map", server.uri))
    data = [(one["offset"], one["length"]) for one in found if one["type"] == 0]
    assert data == [(0, MIB), (3 * MIB, MIB)]
    assert sum(one["length"] for one in found) == 4 * MIB


def test_nbdcopy_takes_a_disk_out_and_puts_one_in(server: Server, disk: Path, tmp_path: Path) -> None:
    out, back = tmp_path / "out", tmp_path / "back"
    run("nbdcopy", server.uri, out)
    assert out.read_bytes() == b"\x11" * MIB + bytes(2 * MIB) + b"\x22" * MIB
    back.write_bytes(os.urandom(MIB) + bytes(MIB) + os.urandom(2 * MIB))
    run("nbdcopy", "--connections=4", "--requests=16", "--flush", back, server.uri)
    run("nbdcopy", server.uri, out)
    assert out.read_bytes() == back.read_bytes()
    assert server.stop() == 0
    assert content(disk) == back.read_bytes()
    server.start()


def test_each_request_by_itself(server: Server, disk: Path) -> None:
    shown = sh(
        server.uri,
        """
h.pwrite(b"x" * 5000, 70001, nbd.CMD_FLAG_FUA)
assert h.pread(5002, 70000) == b"\\x11" + b"x" * 5000 + b"\\x11"
h.trim(65536, 65536)
h.zero(4096, 1000000, nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FUA)
assert h.pread(4096, 1000000) == bytes(4096)
h.flush()
pieces = []
h.pread_structured(2 * 1048576, 0, lambda data, offset, kind, error: pieces.append((offset, len(data), kind)))
assert sum(piece[1] for piece in pieces if piece[2] == nbd.READ_DATA) <= 2 * 1048576
ranges = []
h.block_status(4 * 1048576, 0, lambda name, offset, entries, error: ranges.extend(entries))
assert sum(ranges[::2]) == 4 * 1048576, ranges
ranges.clear()
keep = lambda name, offset, entries, error: ranges.extend(entries)
h.block_status(4 * 1048576, 0, keep, nbd.CMD_FLAG_REQ_ONE)
assert len(ranges) == 2, ranges
print("through")
""",
    )
    assert shown.strip() == "through"


def test_what_lies_outside_is_refused_and_the_connection_goes_on(server: Server) -> None:
    shown = sh(
        server.uri,
        """
h.set_strict_mode(0)
for call in (
    lambda: h.pread(512, 4 * 1048576),
    lambda: h.pwrite(b"x", 1 << 62),
    lambda: h.trim(512, 4 * 1048576 - 1),
    lambda: h.zero(1 << 20, (1 << 64) - 512),
    lambda: h.block_status(512, 4 * 1048576, lambda *_: 0),
):
    try:
        call()
        raise SystemExit("it was taken")
    except nbd.Error as error:
        assert error.errnum in ("EINVAL", 22, "ENOSPC"), (error.errnum, error)
assert h.pread(1, 0) == b"\\x11"
print("through")
""",
    )
    assert shown.strip() == "through"


def test_two_connections_see_each_others_writes(server: Server) -> None:
    shown = sh(
        server.uri,
        f"""
other = nbd.NBD()
other.connect_uri({server.uri!r})
for n in range(50):
    h.pwrite(bytes([n]) * 512, n * 65536)
    assert other.pread(512, n * 65536) == bytes([n]) * 512
    other.pwrite(bytes([n + 1]) * 512, n * 65536)
    assert h.pread(512, n * 65536) == bytes([n + 1]) * 512
other.shutdown()
print("through")
""",
    )
    assert shown.strip() == "through"


def test_a_service_manager_may_pass_the_socket(disk: Path) -> None:
    # libnbd starts the server itself, as systemd would: LISTEN_PID, LISTEN_FDS=1, the socket as number 3.
    shown = json.loads(run("nbdinfo", "--json", "--", "[", *SERVE, disk, "]"))
    assert shown["exports"][0]["export-size"] == 4 * MIB


def test_a_listening_socket_may_be_passed_by_number(disk: Path, tmp_path: Path) -> None:
    path = tmp_path / "passed"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(4)
        number = listener.fileno()
        process = subprocess.Popen([*SERVE, "--fd", str(number), str(disk)], pass_fds=[number])
    try:
        assert run("nbdinfo", "--size", f"nbd+unix:///?socket={path}").strip() == str(4 * MIB)
        # Not persistent: it has ended with its only client.
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("passed", ["nothing", "a file", "a socket that does not listen"])
def test_what_is_no_listening_socket_is_refused_by_name(disk: Path, passed: str) -> None:
    one, other = socket.socketpair(socket.AF_UNIX)
    with disk.open("rb") as file, one, other:
        fd = {"nothing": 999, "a file": file.fileno()}.get(passed, one.fileno())
        done = subprocess.run(
            [*SERVE, "--fd", str(fd), str(disk)],
            pass_fds=[] if passed == "nothing" else [fd],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert done.returncode == 1
    assert done.stderr.startswith("vmbus-img: ") and "Traceback" not in done.stderr, done.stderr


def test_without_a_socket_it_says_what_would_work(disk: Path) -> None:
    environment = {**os.environ, "LISTEN_PID": "1", "LISTEN_FDS": "1"}
    done = subprocess.run(
        [*SERVE, str(disk)], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert "-k SOCKET, --fd N" in done.stderr
