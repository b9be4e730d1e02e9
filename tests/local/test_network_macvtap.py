# SPDX-License-Identifier: Apache-2.0
"""A machine beside the host on an interface of it: who may, whom it hears, who hears it, and what is left."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.guest import Console
from tests.lab.macvtap import RULE, granted
from tests.lab.system import ALICE, BOB, SLOW, System
from tests.local.broker_bed import wait_until
from tests.local.ctl_bed import ctl, place_guest, refused

pytestmark = [pytest.mark.requires("root", "kvm", "macvtap"), pytest.mark.long]

NEAR, FAR = f"vmbm{os.getpid()}", f"vmbf{os.getpid()}"
NET = Path("/sys/class/net")
MAC, OTHER = "52:54:00:00:00:01", "52:54:00:00:00:02"
NIC = f"kind=macvtap,interface={NEAR},id=lan"


@pytest.fixture(scope="module")
def system() -> Iterator[System]:
    """A whole system, an interface that broker.toml grants to alice, and the host at its other end."""
    with granted(NEAR, FAR, "10.99.0.1/24") as whole:
        yield whole


@pytest.fixture(autouse=True)
def nothing_is_left(system: System) -> Iterator[None]:
    """Whatever becomes of them, the machines are ended and undefined, and nothing of them is left."""
    before = system.counts()
    yield
    for machine in json.loads(ctl(system, "list", "--json")):
        name = machine["name"]
        system.vmbusctl(ALICE, "kill", name)
        system.vmbusctl(ALICE, "undefine", name)
    wait_until(lambda: macvtaps() == [])
    assert system.settle(before) == before


def macvtaps() -> list[Path]:
    """Those on the interface."""
    return [link for link in NET.iterdir() if (link / f"lower_{NEAR}").exists()]


def define(system: System, name: str, mode: str, nic: str, *words: str, user: str = ALICE) -> list[str]:
    kernel = place_guest(system, user)
    given = ["--name", name, "--memory", "16M", "--kernel", str(kernel), "--cmdline", mode]
    return ["define", *given, *(["--nic", nic] if nic else []), *words]


def started(system: System, name: str) -> Console:
    """It runs, its driver too, and somebody has heard its words from the first one on."""
    ctl(system, "start", name, "--paused")
    console = Console(system, ALICE, name, "--read-only")
    ctl(system, "resume", name)
    console.wait_for("net: mac .*\n", 30)
    ctl(system, "pause", name)  # its network's thread answers after it has begun
    ctl(system, "resume", name)
    return console


def ping(count: int, size: int) -> int:
    """How many of ``count`` echo requests with so many bytes the guest answers."""
    subprocess.run(["ip", "neighbour", "flush", "dev", FAR], check=True)  # another guest's was there before
    words = ["ping", "-i", "0.2", "-I", FAR, "-W", str(10 * SLOW), "-c", str(count), "-s", str(size)]
    command = ["busybox", *words, "10.99.0.2"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120 * SLOW)
    return done.stdout.count("bytes from 10.99.0.2")


def frame(to: str, letter: str) -> bytes:
    """60 bytes that end with the letter, from nobody, of a type that nobody has."""
    return bytes.fromhex(to.replace(":", "") + "0200000000aa88b5") + bytes(40) + b"vmbus" + letter.encode()


def test_a_machine_is_reached_by_the_interface_with_an_address_of_its_own(system: System) -> None:
    words = define(system, "net", "net-echo count=5", NIC, "--vcpus", "2")
    system.rule("")
    assert "org.vmbus1.interface.use" in refused(system, *words)
    system.rule(RULE)
    ctl(system, *words)
    system.rule("")  # asked when it is defined, not when it starts
    try:
        _reached_twice(system)
    finally:
        system.rule(RULE)
    assert not int((NET / NEAR / "flags").read_text(), 16) & 0x300  # neither promiscuous nor with all groups


def _reached_twice(system: System) -> None:
    [nic] = json.loads(ctl(system, "show", "net", "--json"))["definition"]["nics"]
    for _ in range(2):
        console = started(system, "net")
        [link] = macvtaps()
        assert (link / "address").read_text().strip() == nic["mac"]
        assert ping(4, 1400) == 4
        told = subprocess.run(
            ["ip", "neighbour", "show", "10.99.0.2"], capture_output=True, text=True, check=True
        )
        assert nic["mac"] in told.stdout
        assert ping(1, 56) == 1
        ctl(system, "wait", "net", "--state", "stopped", "--timeout", str(30 * SLOW))
        wait_until(lambda: macvtaps() == [])
        console.close()


@pytest.mark.parametrize(("address", "heard"), [("", "cefhijJKLMN"), (",address=10.99.0.2", "JKLMN")])
def test_a_guest_that_says_it_is_somebody_else_is_not_heard(system: System, address: str, heard: str) -> None:
    ctl(system, *define(system, "net", "net-spoof", NIC + address))
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3)) as ear:
        ear.bind((FAR, 0))
        ear.settimeout(20 * SLOW)
        console = started(system, "net")
        letters = set()
        while "M" not in letters:  # the last
            said = ear.recv(2000)
            if said[54:59] == b"vmbus":
                letters.add(chr(said[59]))
    assert "".join(sorted(letters)) == "".join(sorted(heard))
    console.close()


def test_a_promiscuous_guest_hears_what_is_for_it_and_for_all_and_no_more(system: System) -> None:
    ctl(system, *define(system, "net", "net-hear", f"{NIC},mac={MAC}"))
    ctl(system, *define(system, "two", "net-hear", f"{NIC},mac={OTHER}"))
    one, two = started(system, "net"), started(system, "two")
    for console in (one, two):
        console.wait_for("net: promiscuous: 0\n", 20)
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as mouth:
        mouth.bind((FAR, 0))
        for to, letter in (
            ("52:54:00:00:00:99", "a"),  # nobody's
            (OTHER, "b"),
            (MAC, "C"),
            ("33:33:00:00:00:07", "D"),
            ("ff:ff:ff:ff:ff:ff", "E"),
        ):
            mouth.send(frame(to, letter))
    heard = []
    for console in (one, two):
        console.wait_for("net: heard E", 20)
        heard.append("".join(re.findall("net: heard (.)", console.text)))
        console.close()
    assert heard == ["CDE", "bDE"]
    assert [int((link / "flags").read_text(), 16) & 0x100 for link in macvtaps()] == [0, 0]


@pytest.mark.parametrize(("mode", "heard"), [("bridge", True), ("private", False), ("vepa", False)])
def test_machines_on_one_interface_hear_each_other_as_the_mode_says(
    system: System, mode: str, heard: bool
) -> None:
    # The other end of this cable sends nothing back, as a switch without a hairpin.
    ctl(system, *define(system, "one", "net-hear", f"{NIC},mode={mode}"))
    ctl(system, *define(system, "two", "net-spoof", f"{NIC},mode={mode}"))
    hearing = started(system, "one")
    speaking = started(system, "two")
    speaking.wait_for("net: done", 20)
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as mouth:
        mouth.bind((FAR, 0))
        mouth.send(frame("ff:ff:ff:ff:ff:ff", "Z"))  # what came before this has come
    hearing.wait_for("net: heard Z", 20)
    assert ("net: heard M" in hearing.text) == heard
    for console in (hearing, speaking):
        console.close()


def test_it_is_attached_detached_and_its_address_is_anybody_s_then(system: System) -> None:
    ctl(system, *define(system, "plug", "plug count=99", ""))
    ctl(system, *define(system, "other", "idle", f"{NIC},mac={MAC}"))
    ctl(system, "start", "plug")
    console = Console(system, ALICE, "plug", "--read-only")
    console.wait_for("plug: ready", 30)
    for _ in range(3):
        ctl(system, "attach-nic", "plug", f"{NIC},mac={MAC}")
        assert len(macvtaps()) == 1
        assert "InUse" in refused(system, "start", "other", "--json")
        ctl(system, "detach-nic", "plug", "lan")
        assert macvtaps() == []
    ctl(system, "start", "other")
    assert "InUse" in refused(system, "attach-nic", "plug", f"{NIC},mac={MAC}", "--json")
    assert len(macvtaps()) == 1
    console.close()


@pytest.mark.parametrize("killed", ["service", "broker", "worker"])
def test_nothing_is_left_whatever_part_is_killed(system: System, killed: str) -> None:
    ctl(system, *define(system, "net", "net-echo count=1000", NIC))
    started(system, "net").close()
    if killed == "worker":
        [pid] = system.workers()
        os.kill(pid, 9)
    else:
        daemon = system.service if killed == "service" else system.broker
        daemon.kill()
        daemon.start()
        wait_until(lambda: "running" in ctl(system, "show", "net"), 20 * SLOW)
        assert len(macvtaps()) == 1 and ping(2, 56) == 2  # it goes on
        ctl(system, "kill", "net")
    wait_until(lambda: macvtaps() == [])


def test_an_interface_that_is_not_granted_not_there_or_a_port_is_refused_by_name(system: System) -> None:
    words = define(system, "net", "idle", NIC, user=BOB)
    assert "[interfaces." in refused(system, *words, user=BOB)
    assert "AccessDenied" in refused(
        system, *define(system, "x", "idle", "kind=macvtap,interface=lo"), "--json"
    )
    ctl(system, *define(system, "net", "idle", NIC))
    before = system.counts()
    bridge = f"vmbz{os.getpid()}"
    subprocess.run(["ip", "link", "add", bridge, "type", "bridge"], check=True)
    try:
        subprocess.run(["ip", "link", "set", NEAR, "master", bridge], check=True)
        assert f"no macvtap on interface '{NEAR}'" in (text := refused(system, "start", "net")), text
        assert "nic/lan" in text
    finally:
        subprocess.run(["ip", "link", "del", bridge], check=True)
    subprocess.run(["ip", "link", "set", NEAR, "name", f"{NEAR}x"], check=True)
    assert f"there is no interface '{NEAR}'" in refused(system, "start", "net")
    subprocess.run(["ip", "link", "set", f"{NEAR}x", "name", NEAR], check=True)
    assert system.settle(before) == before and macvtaps() == []
    ctl(system, "start", "net")


@pytest.mark.parametrize(
    ("flag", "argument"),
    [
        ("kind=macvtap", "nics[0].interface"),
        (f"{NIC},mode=passthru", "nics[0].mode"),
        ("br0,mode=vepa", "nics[0].mode"),
        ("br0,interface=eth0", "nics[0].interface"),
        (f"{NIC},bridge=br0", "nics[0].bridge"),
        ("kind=macvtap,interface=../lo", "nics[0].interface"),
    ],
)
def test_what_belongs_to_it_is_checked(system: System, flag: str, argument: str) -> None:
    assert argument in refused(system, *define(system, "x", "idle", flag))
