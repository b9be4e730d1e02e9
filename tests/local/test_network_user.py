# SPDX-License-Identifier: Apache-2.0
"""A machine whose network is passt: what it reaches, what it does not, and that nothing of it stays."""

from __future__ import annotations

import ipaddress
import json
import socket
import subprocess
from collections.abc import Iterator

import pytest

from tests.lab.system import ALICE, BOB, System
from tests.lab.uplink import OUTSIDE, PORT, uplink
from tests.local.broker_bed import wait_until
from tests.local.ctl_bed import ctl, refused
from tests.local.test_network import definition, printed

pytestmark = [pytest.mark.requires("root", "kvm", "bridge"), pytest.mark.long]

POLICY = f'[user-network]\nusers = ["{ALICE}"]\n'


@pytest.fixture
def outside() -> Iterator[str]:
    """The namespace out there."""
    with uplink() as space:
        yield space


@pytest.fixture
def system(outside: str) -> Iterator[System]:
    """A whole system with a way out, which broker.toml lets alice use."""
    with System(policy=POLICY) as whole:
        yield whole


def number(address: str) -> int:
    return int(ipaddress.IPv4Address(address))


def from_outside(space: str, port: int) -> str:
    """What greets somebody out there who connects to a port of this host's."""
    script = f"""
import socket
try:
    with socket.create_connection(("198.51.100.2", {port}), timeout=20) as connection:
        connection.sendall(b"hello\\n")
        print(connection.recv(100).decode().strip())
except OSError as error:
    print(type(error).__name__)
"""
    words = ["ip", "netns", "exec", space, "python3", "-c", script]
    done = subprocess.run(words, check=True, capture_output=True, text=True, timeout=60)
    return done.stdout.strip()


def reach(first: str, count: int) -> str:
    """The command line of a guest that tries ``count`` addresses, and then the server outside."""
    return f"net-reach first={number(first)} count={count} port={PORT} to={number(OUTSIDE)}"


def test_a_guest_reaches_the_outside_and_not_the_loopback_of_its_host(system: System) -> None:
    before = system.counts()
    ctl(system, *definition(system, ALICE, "--cmdline", reach("127.0.0.1", 3), "--nic", "kind=user"))
    with socket.create_server(("", PORT)) as tcp, socket.socket(type=socket.SOCK_DGRAM) as udp:
        udp.bind(("", PORT))
        tcp.settimeout(0.2)
        udp.settimeout(0.2)
        text = printed(system, "net: done", 60)
        for heard in (tcp.accept, lambda: udp.recvfrom(100)):
            with pytest.raises(TimeoutError):
                print(heard(), text)
    assert f"net: {OUTSIDE} open" in text
    assert "0.0.1 open" not in text and "0.0.0.0 open" not in text
    ctl(system, "kill", "net")
    ctl(system, "undefine", "net")
    assert system.settle(before) == before


def test_a_port_is_forwarded_from_inside_and_from_outside_when_that_is_asked_for(
    system: System, outside: str
) -> None:
    before = system.counts()
    nic = "kind=user,forwards=tcp:8022:22,forwards=tcp:198.51.100.2:8023:22"
    ctl(
        system,
        *definition(system, ALICE, "--cmdline", f"net-serve port=22 to={number(OUTSIDE)}", "--nic", nic),
    )
    printed(system, "net: serving", 60)
    for port in (8022, 8023):
        address = "127.0.0.1" if port == 8022 else "198.51.100.2"
        with socket.create_connection((address, port), timeout=20) as connection:
            connection.sendall(b"hello\n")
            assert connection.recv(100) == b"welcome\n"
    # The first is this host's alone.
    assert from_outside(outside, 8023) == "welcome"
    assert from_outside(outside, 8022) == "ConnectionRefusedError"
    # Whoever has the port has it.
    second = definition(system, ALICE, "--cmdline", "idle", "--nic", "kind=user,forwards=tcp:8022:22")
    ctl(system, *["two" if word == "net" else word for word in second])
    complaint = refused(system, "start", "two")
    assert "port 8022 of 127.0.0.1 cannot be forwarded: Address already in use" in complaint
    ctl(system, "kill", "net")
    for name in ("net", "two"):
        ctl(system, "undefine", name)
    assert system.settle(before) == before


def test_a_guest_reaches_its_host_when_that_is_asked_for_and_granted(outside: str) -> None:
    policy = f'{POLICY}[user-network-host]\nusers = ["{ALICE}"]\n'
    with System(policy=policy) as system, socket.create_server(("127.0.0.1", PORT)) as tcp:
        before = system.counts()
        # Its gateway's address is the host's own gateway's, OUTSIDE where there was none before.
        route = subprocess.run(
            ["ip", "-4", "-j", "route", "show", "default"], capture_output=True, check=True
        )
        gateway = json.loads(route.stdout)[0]["gateway"]
        reach = f"net-reach first=0 count=0 port={PORT} to={number(gateway)}"
        ctl(system, *definition(system, ALICE, "--cmdline", reach, "--nic", "kind=user,reach-host"))
        tcp.settimeout(60)
        printed(system, f"net: {gateway} open", 60)
        tcp.accept()[0].close()
        ctl(system, "kill", "net")
        ctl(system, "undefine", "net")
        assert system.settle(before) == before


def test_who_may_not_let_a_guest_reach_the_host_does_not(system: System) -> None:
    complaint = refused(system, *definition(system, ALICE, "--nic", "kind=user,reach-host"))
    assert "[user-network-host] of broker.toml" in complaint


def test_its_helper_is_a_process_of_its_own_and_ends_with_it(system: System) -> None:
    before = system.counts()
    ctl(system, *definition(system, ALICE, "--cmdline", "idle", "--nic", "kind=user,id=lan"))
    ctl(system, "start", "net")
    assert len(set(system.workers().values())) == 2
    ctl(system, "kill", "net")
    wait_until(lambda: not system.workers())
    ctl(system, "undefine", "net")
    assert system.settle(before) == before


def test_who_has_no_grant_has_no_user_network(system: System) -> None:
    assert "user-network" in refused(system, *definition(system, BOB, "--nic", "kind=user"), user=BOB)


@pytest.mark.parametrize(
    ("flag", "argument"),
    [
        ("kind=user,bridge=br0", "nics[0].bridge"),
        ("kind=wifi", "nics[0].kind"),
        ("kind=bridge", "nics[0].bridge"),
        ("kind=user,forwards=tcp:80:80", "nics[0].forwards[0]: port 80 of the host is below 1024"),
    ],
)
def test_a_kind_and_what_belongs_to_it_are_checked(system: System, flag: str, argument: str) -> None:
    assert argument in refused(system, *definition(system, ALICE, "--nic", flag))
