# SPDX-License-Identifier: Apache-2.0
"""Machines of one owner among themselves: they hear each other, others do not, and they come and go."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.lab.guest import Console
from tests.lab.system import ALICE, BOB, SLOW, System
from tests.local.broker_bed import wait_until
from tests.local.ctl_bed import ctl, place_guest

pytestmark = [pytest.mark.requires("root", "kvm"), pytest.mark.long]


@pytest.fixture
def system() -> Iterator[System]:
    """A whole system; broker.toml grants no network to anybody."""
    with System() as whole:
        yield whole


class Station:
    """A machine in network ``lan``, started, with somebody at its console from the first word on."""

    def __init__(
        self, system: System, name: str, mode: str, *, user: str = ALICE, network: str = "lan"
    ) -> None:
        self.system, self.name, self.user = system, name, user
        kernel = place_guest(system, user)
        words = ["--name", name, "--memory", "16M", "--kernel", str(kernel), "--cmdline", mode]
        ctl(system, "define", *words, "--nic", f"kind=isolated,network={network},id=lan", user=user)
        self.start()

    def start(self) -> None:
        ctl(self.system, "start", self.name, "--paused", user=self.user)
        self.console = Console(self.system, self.user, self.name, "--read-only")
        ctl(self.system, "resume", self.name, user=self.user)
        self.console.wait_for("net: mac .*\n", 30)

    def kill(self) -> None:
        ctl(self.system, "kill", self.name, user=self.user)
        self.console.close()

    def says(self, pattern: str, seconds: float = 30) -> str:
        return self.console.wait_for(pattern, seconds)[0]


def number(last: int) -> int:
    """10.99.0.``last``."""
    return 0x0A630000 + last


def echo(last: int, count: int = 1000) -> str:
    return f"net-echo address={number(last)} count={count}"


def ping(last: int, own: int, count: int) -> str:
    return f"net-ping to={number(last)} from={number(own)} count={count}"


def test_machines_of_one_owner_hear_each_other_whoever_comes_first(system: System) -> None:
    before = system.counts()
    first = Station(system, "first", echo(2))
    second = Station(system, "second", ping(2, 3, 1 << 30))
    second.says("net: 20 answers")
    third = Station(system, "third", ping(2, 4, 1 << 30))
    third.says("net: 20 answers")
    for station in (first, second, third):
        station.kill()
    for name in ("first", "second", "third"):
        ctl(system, "undefine", name)
    assert system.settle(before) == before


def test_frames_flow_when_machines_come_and_go_and_the_service_is_killed(system: System) -> None:
    answering = Station(system, "answering", echo(2, 1 << 30))
    asking = Station(system, "asking", ping(2, 3, 1 << 30))
    asking.says("net: 20 answers")
    passing = Station(system, "passing", echo(4))
    passing.kill()
    system.service.kill()
    asking.says("net: .*00 answers", 60)
    system.service.start()
    wait_until(lambda: "running" in ctl(system, "show", "asking"), 20 * SLOW)
    asking.console.close()
    answering.kill()
    answering.start()
    asking.console = Console(system, ALICE, "asking", "--read-only")
    told = [int(word) for word in asking.says("(?s)net: \\d+ answers.*").split() if word.isdigit()]
    wait_until(lambda: f"net: {max(told) + 40} answers" in asking.console.text, 60 * SLOW)
    asking.kill()
    answering.kill()


def test_nobody_else_is_in_it(system: System) -> None:
    mine = Station(system, "mine", echo(2))
    asking = Station(system, "asking", ping(2, 3, 1 << 30))
    for stranger in (
        Station(system, "theirs", ping(2, 3, 1), user=BOB),
        Station(system, "elsewhere", ping(2, 5, 1), network="other"),
    ):
        asking.says("net: .* answers")
        already = asking.console.text.count("answers")
        wait_until(lambda already=already: asking.console.text.count("answers") > already + 2, 30 * SLOW)  # type: ignore[misc]
        assert "answers" not in stranger.console.text
        stranger.kill()
    asking.kill()
    mine.kill()


def test_a_second_machine_with_the_same_address_is_refused_where_both_would_be_heard(system: System) -> None:
    kernel = place_guest(system)
    nic = "kind=isolated,network=lan,id=lan,mac=52:54:00:00:00:01"
    for name in ("one", "two"):
        words = ["--name", name, "--memory", "16M", "--kernel", str(kernel), "--cmdline", "idle"]
        ctl(system, "define", *words, "--nic", nic)
    ctl(system, "start", "one")
    before = system.counts()
    refused = system.vmbusctl(ALICE, "start", "two")
    assert refused.returncode != 0
    assert "nic/lan" in refused.stderr and "52:54:00:00:00:01" in refused.stderr
    assert system.settle(before) == before
    ctl(system, "kill", "one")
    ctl(system, "start", "two")
    ctl(system, "kill", "two")


@pytest.mark.parametrize(
    ("flag", "argument"),
    [
        ("kind=isolated", "nics[0].network"),
        ("kind=isolated,network=A", "network"),
        ("br0,network=a", "network"),
    ],
)
def test_a_network_has_a_name_and_others_none(system: System, flag: str, argument: str) -> None:
    words = ["define", "--name", "x", "--memory", "16M", "--kernel", "/boot/vmlinuz", "--nic", flag]
    refused = system.vmbusctl(ALICE, *words)
    assert refused.returncode != 0
    assert argument in refused.stderr
