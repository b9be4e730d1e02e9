# SPDX-License-Identifier: Apache-2.0
"""The connection to the bus under pressure: a daemon that does not read for a while loses no message and no
file."""

from __future__ import annotations

import array
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.kernels import CHECKOUT
from tests.local.service_fakes import eventually
from vmbus.bus import _PatientSocket

FLOOD = """
import asyncio, os, sys
from vmbus.bus import LIBRARY, Bus, RemoteError

async def main():
    sender, receiver = await Bus.connect(sys.argv[1]), await Bus.connect(sys.argv[1])
    taken = []
    receiver.on_call = taken.append
    print("ready", flush=True)
    sys.stdin.readline()
    calls = []
    for number in range(100):
        fds = [0] if number % 10 == 0 else []
        body = [str(number), "x" * 50000]
        call = sender.call(receiver.unique_name, "/x", "x.y", "Z", "ss", body, fds=fds, timeout=60)
        calls.append(asyncio.ensure_future(call))
    await asyncio.sleep(0.5)
    print("sent", flush=True)
    while len(taken) < 100:
        await asyncio.sleep(0.01)
    assert [int(call.body[0]) for call in taken] == list(range(100))
    assert [len(call.fds) for call in taken] == [int(n % 10 == 0) for n in range(100)]
    for number, call in enumerate(taken):
        if number % 2:
            receiver.error(call, "x.y.Error", "no file for you")
            for fd in call.fds:
                os.close(fd)
        else:
            receiver.reply(call, "h", [0], call.fds or [os.dup(0)])
    for number, done in enumerate(await asyncio.gather(*calls, return_exceptions=True)):
        if number % 2:
            assert isinstance(done, RemoteError), done
        else:
            os.close(done.fds[0])  # each has its own, and nobody else has closed it
    assert len(os.listdir("/proc/self/fd")) < 30
    print("done", LIBRARY, flush=True)

asyncio.run(main())
"""


CONFIGURATION = """
<busconfig>
  <listen>unix:path={path}</listen>
  <policy context="default">
    <allow send_destination="*" eavesdrop="true"/>
    <allow eavesdrop="true"/>
    <allow own="*"/>
  </policy>
</busconfig>
"""


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A bus that lets everybody talk to everybody: its address and its process."""
    path = tmp_path / "bus"
    (tmp_path / "bus.conf").write_text(CONFIGURATION.format(path=path))
    command = ["dbus-daemon", "--nofork", "--nosyslog", f"--config-file={tmp_path}/bus.conf"]
    with subprocess.Popen(command) as process:
        assert eventually(path.exists)
        yield f"unix:path={path}", process
        process.terminate()


@pytest.mark.parametrize("library", ["dbus_next", "dbus_fast"])
def test_a_daemon_that_does_not_read_for_a_while_loses_nothing(
    daemon: tuple[str, subprocess.Popen[bytes]], library: str
) -> None:
    address, bus = daemon
    environment = {**os.environ, "VMBUS_DBUS_LIBRARY": library, "PYTHONPATH": str(CHECKOUT)}
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", FLOOD, address]
    with subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdin and process.stdout
        assert process.stdout.readline() == "ready\n"
        bus.send_signal(signal.SIGSTOP)
        try:
            process.stdin.write("go\n")
            process.stdin.flush()
            assert process.stdout.readline() == "sent\n"
            time.sleep(0.2)
        finally:
            bus.send_signal(signal.SIGCONT)
        try:
            assert process.communicate(timeout=60)[0] == f"done {library}\n"
        finally:
            process.kill()


def test_a_full_socket_takes_nothing_and_keeps_the_files_for_later() -> None:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    patient = _PatientSocket(ours)
    while patient.send(memoryview(b"x" * 65536)):
        pass
    with open("/etc/hostname", "rb") as file:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [file.fileno()]))]
        assert patient.sendmsg([memoryview(b"message")], rights) == 0
        theirs.setblocking(False)
        with pytest.raises(BlockingIOError):
            while True:
                theirs.recv(1 << 20)
        assert patient.send(memoryview(b"message")) == 7
        data, fds, _, _ = socket.recv_fds(theirs, 100, 4)
        assert data == b"message"
        assert len(fds) == 1
        assert os.path.samestat(os.fstat(fds[0]), os.fstat(file.fileno()))
    os.close(fds[0])
    ours.close()
    theirs.close()
