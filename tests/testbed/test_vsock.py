# SPDX-License-Identifier: Apache-2.0
"""Debian's stock kernel and virtio-vsock: bulk data both ways, under each side's credit."""

from __future__ import annotations

import hashlib
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.guest import StockGuest
from tests.lab.system import SLOW, System

pytestmark = [pytest.mark.requires("kvm-hardware"), pytest.mark.timeout(900)]

SOURCE = Path(__file__).with_name("vsock.c")
BYTES = 3 << 20
SCRIPT = """\
vsock connect 513 </dev/null
vsock listen 1024 >/tmp/data
echo "got $(sha256sum </tmp/data)"
vsock connect 514 </tmp/data
echo "answered"
poweroff -f
"""


@pytest.fixture(scope="module")
def system() -> Iterator[System]:
    """A whole system."""
    with System() as whole:
        yield whole


@pytest.fixture
def program(tmp_path: Path) -> bytes:
    """The guest's, which needs no library."""
    made = tmp_path / "vsock"
    subprocess.run(["gcc", "-static", "-O1", "-o", made, SOURCE], check=True, timeout=60 * SLOW)
    return made.read_bytes()


def test_debian_connects_and_is_connected_to(system: System, program: bytes) -> None:
    data = random.Random(5).randbytes(BYTES)
    checksum = hashlib.sha256(data).hexdigest()
    files, modules = {"bin/vsock": program}, ("vmw_vsock_virtio_transport",)
    with StockGuest(system, "sockets", script=SCRIPT, files=files, modules=modules) as guest:
        guest.make_disk()
        guest.define("--vsock", "42")
        guest.start()
        guest.console.wait_for("connect: Connection reset by peer", 120)  # nobody listens there
        guest.console.wait_for("listening on port 1024", 60)
        pipe = subprocess.PIPE
        words = ["vmbusctl", "vsock", "listen", guest.name, "514"]
        listener = system.popen(guest.user, words, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe)
        assert listener.stderr and b"listening" in listener.stderr.readline()
        words = ["vmbusctl", "vsock", "connect", guest.name, "1024"]
        sender = system.popen(guest.user, words, stdin=pipe, stdout=pipe, stderr=pipe)
        assert sender.communicate(data, timeout=60 * SLOW) == (b"", b"")
        guest.console.wait_for(f"got {checksum}", 60)
        assert listener.communicate(timeout=60 * SLOW)[0] == data
        guest.console.wait_for("answered", 60)
        assert guest.wait_stopped()["state-reason"] == "guest-poweroff"
        guest.ctl("undefine", guest.name)
