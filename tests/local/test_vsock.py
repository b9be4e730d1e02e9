# SPDX-License-Identifier: Apache-2.0
"""Sockets between guest and host, through the whole system: the guest is bare metal in mode ``vsock``."""

from __future__ import annotations

import json
import subprocess

import pytest

from tests.lab.guest import Console
from tests.lab.system import ALICE, BOB, System
from tests.local.broker_bed import wait_until
from tests.local.ctl_bed import ctl, nothing_is_left, refused, system

__all__ = ["nothing_is_left", "system"]
pytestmark = [pytest.mark.requires("root", "kvm"), pytest.mark.long]

NAME = "sockets"
LISTENING = b"vmbusctl: listening on port 514; stop with ^C\n"


def started(system: System, mode: str = "vsock", *, cid: str = "77") -> Console:
    kernel = str(system.files(ALICE) / "guest")
    words = ["--memory", "16M", "--kernel", kernel, "--cmdline", mode, "--vsock", cid]
    ctl(system, "define", "--name", NAME, *words)
    ctl(system, "start", NAME)
    return Console(system, ALICE, NAME, "--read-only")


def vsock(system: System, *words: str) -> subprocess.Popen[bytes]:
    """``vmbusctl vsock`` in the background."""
    pipe = subprocess.PIPE
    return system.popen(ALICE, ["vmbusctl", "vsock", *words], stdin=pipe, stdout=pipe, stderr=pipe)


def listening(system: System, *command: str) -> subprocess.Popen[bytes]:
    """One that listens by now."""
    process = vsock(system, "listen", NAME, "514", *command)
    assert process.stderr
    assert process.stderr.readline() == LISTENING
    return process


def say(process: subprocess.Popen[bytes], words: bytes) -> None:
    """Write."""
    assert process.stdin
    process.stdin.write(words)
    process.stdin.flush()


def hear(process: subprocess.Popen[bytes], words: bytes) -> None:
    """Read these."""
    assert process.stdout and process.stderr
    heard = process.stdout.read(len(words))
    assert heard == words, process.stderr.read() if not heard else ""


def test_the_host_connects_to_a_port_of_the_guests(system: System) -> None:
    console = started(system)
    console.wait_for("vsock: cid 77", 20)
    one, two = vsock(system, "connect", NAME, "1000"), vsock(system, "connect", NAME, "1000")
    say(one, b"one")
    hear(one, b"heard one")
    say(two, b"two")
    hear(two, b"heard two")
    # Nor does it need the service.
    system.service.kill()
    say(one, b"alone")
    hear(one, b"heard alone")
    system.service.start()
    wait_until(lambda: json.loads(ctl(system, "show", NAME, "--json"))["state"] == "running")
    assert "takes connections on port 1001" in refused(system, "vsock", "connect", NAME, "1001")
    # An end of file is passed on, and ends it all.
    assert one.communicate(timeout=20) == (b"", b"")
    assert one.returncode == 0
    console.wait_for("vsock: 1000 ends with 2", 20)
    # So is the end of a program.
    two.kill()
    console.wait_for("(?s)vsock: 1000 ends with 2.*vsock: 1000 ends with [123]", 20)
    two.communicate(timeout=20)
    stats = json.loads(ctl(system, "show", NAME, "--stats", "--json"))["stats"]["devices"]["vsock"]
    assert (stats["connected"], stats["faults"], stats["strange"]) == (2, 0, 0)
    console.close()


def test_the_guest_connects_to_a_port_that_the_owner_listens_on(system: System) -> None:
    console = started(system, "vsock to=514")
    console.wait_for("vsock: 2000 is reset", 20)  # nobody listened
    listener = listening(system)
    assert "somebody listens on port 514" in refused(system, "vsock", "listen", NAME, "514")
    ctl(system, "reset", NAME)
    console.wait_for("vsock: connected from 2000", 20)
    hear(listener, b"hello from the guest\n")
    say(listener, b"and the host")
    hear(listener, b"heard and the host")
    assert listener.communicate(timeout=20)[1] == b"vmbusctl: connection from the guest's port 2000\n"
    # A program for each; the port is free again.
    listener = listening(system, "sed", "-u", "s/guest/echo/;q")
    ctl(system, "reset", NAME)
    # Which half ends first is whatever the program had time for.
    console.wait_for("(?s)(connected from 2000.*){2}vsock: 2000 ends with [123]", 20)
    listener.terminate()
    listener.communicate(timeout=20)
    console.close()


def test_a_listener_ends_with_the_machine_and_with_the_service(system: System) -> None:
    console = started(system)
    console.wait_for("vsock: cid 77", 20)
    listener = listening(system)
    ctl(system, "kill", NAME)
    assert b"has ended" in listener.communicate(timeout=20)[1]
    ctl(system, "start", NAME)
    listener = listening(system)
    system.service.kill()
    assert b"has ended" in listener.communicate(timeout=20)[1]
    system.service.start()
    wait_until(lambda: json.loads(ctl(system, "show", NAME, "--json"))["state"] == "running")
    listener = listening(system)
    listener.terminate()
    listener.communicate(timeout=20)
    console.close()


def test_what_is_not_there_or_somebody_elses_is_refused(system: System) -> None:
    console = started(system, cid="3")
    uuid = json.loads(ctl(system, "show", NAME, "--json"))["uuid"]
    for how in ("connect", "listen"):
        assert "console-any" in refused(system, "vsock", how, uuid, "1000", user=BOB)
    ctl(system, "kill", NAME)
    for how in ("connect", "listen"):
        assert "running" in refused(system, "vsock", how, NAME, "1000")
    ctl(system, "undefine", NAME)
    console.close()
    console = started(system, "idle", cid="0")
    assert "give its definition vsock" in refused(system, "vsock", "connect", NAME, "1000")
    assert "give its definition vsock" in refused(system, "vsock", "listen", NAME, "1000")
    console.close()
    words = ["--memory", "16M", "--kernel", str(system.files(ALICE) / "guest"), "--vsock", "2"]
    assert "from 3 on" in refused(system, "define", "--name", "other", *words)


def test_a_guest_without_a_driver_takes_nothing(system: System) -> None:
    console = started(system, "idle")
    assert "no driver in the guest" in refused(system, "vsock", "connect", NAME, "1000")
    console.close()


def test_a_driver_that_breaks_the_rules_resets_its_own_device(system: System) -> None:
    console = started(system, "vsock-hostile")
    console.wait_for("and then it works: refused", 60)
    for line in (
        "half a header: reset",
        "a packet to be written: reset",
        "a packet from nowhere: reset",
        "a loop: reset",
        "no room for a header: reset",
        "room to be read: reset",
        "fewer bytes than it says: reset",
        "a request where nobody listens: refused",
        "bytes of no connection: refused",
        "an unknown operation: refused",
        "an unknown type: refused",
        "another host: refused",
        "a reset of nothing: not answered",
        "somebody else's: not answered",
    ):
        assert f"vsock-hostile: {line}" in console.text, line
    console.close()


def test_a_restored_guest_hears_that_its_connections_are_gone(system: System) -> None:
    console = started(system)
    console.wait_for("vsock: cid 77", 20)
    connection = vsock(system, "connect", NAME, "1000")
    say(connection, b"before")
    hear(connection, b"heard before")
    file = system.files(ALICE) / "sockets.saved"
    ctl(system, "save", NAME, str(file))
    assert connection.communicate(timeout=20)[0] == b""
    console.close()
    ctl(system, "restore", NAME, str(file))
    console = Console(system, ALICE, NAME, "--read-only")
    console.wait_for("vsock: event 0, cid 77", 20)
    connection = vsock(system, "connect", NAME, "1000")
    say(connection, b"after")
    hear(connection, b"heard after")
    connection.terminate()
    connection.communicate(timeout=20)
    file.unlink()
    console.close()
