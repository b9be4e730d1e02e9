# SPDX-License-Identifier: Apache-2.0
"""A machine whose network is passt: what it reaches, what it does not, and that nothing of it stays."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterator

import pytest

from tests.lab.system import ALICE, BOB, System
from tests.lab.uplink import OUTSIDE, PORT, uplink
from tests.local.broker_bed import wait_until
from tests.local.ctl_bed import ctl
from tests.local.test_network import definition, printed

pytestmark = pytest.mark.requires("root", "kvm", "bridge")

POLICY = f'[user-network]\nusers = ["{ALICE}"]\n'


@pytest.fixture
def system() -> Iterator[System]:
    """A whole system with a way out, which broker.toml lets alice use."""
    with uplink(), System(policy=POLICY) as whole:
        yield whole


def number(address: str) -> int:
    return int(ipaddress.IPv4Address(address))


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
    refused = system.vmbusctl(BOB, *definition(system, BOB, "--nic", "kind=user"))
    assert refused.returncode != 0
    assert "user-network" in refused.stderr


@pytest.mark.parametrize(
    ("flag", "argument"),
    [
        ("kind=user,bridge=br0", "nics[0].bridge"),
        ("kind=wifi", "nics[0].kind"),
        ("kind=bridge", "nics[0].bridge"),
    ],
)
def test_a_kind_and_what_belongs_to_it_are_checked(system: System, flag: str, argument: str) -> None:
    refused = system.vmbusctl(ALICE, *definition(system, ALICE, "--nic", flag))
    assert refused.returncode != 0
    assert argument in refused.stderr
