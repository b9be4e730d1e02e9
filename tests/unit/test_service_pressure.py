# SPDX-License-Identifier: Apache-2.0
"""The pressure policy: who gives how much, who gets it back, and who is left alone."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest

from vmbus.service import config
from vmbus.service.host_memory import Pressure, read_pressure
from vmbus.service.machine import Machine
from vmbus.service.pressure import PressurePolicy, Share, give, take
from vmbus.wire import dbus_form
from vmbus.wire.errors import VmbusError

MIB = 1 << 20
GIB = 1 << 30


def share(uuid: str, **changes: int) -> Share:
    values = {"floor": 256 * MIB, "ceiling": GIB, "target": GIB, "spare": GIB, **changes}
    return Share(uuid, **values)


def test_those_that_can_spare_more_give_more() -> None:
    shares = [share("a", spare=600 * MIB), share("b", spare=200 * MIB), share("c", spare=0)]
    assert take(shares, 100 * MIB) == {"a": GIB - 75 * MIB, "b": GIB - 25 * MIB}


def test_nobody_gives_below_the_floor_or_more_than_it_can_spare() -> None:
    shares = [share("a", target=300 * MIB), share("b", spare=10 * MIB), share("c", target=256 * MIB)]
    assert take(shares, 10 * GIB) == {"a": 256 * MIB, "b": GIB - 10 * MIB}


def test_what_is_given_back_goes_to_those_that_lack_up_to_their_ceiling() -> None:
    shares = [share("a", target=GIB - 300 * MIB), share("b", target=GIB - 100 * MIB), share("c")]
    assert give(shares, 100 * MIB) == {"a": GIB - 225 * MIB, "b": GIB - 75 * MIB}
    assert give(shares, 10 * GIB) == {"a": GIB, "b": GIB}
    wished = [share("a", ceiling=512 * MIB, target=512 * MIB)]
    assert give(wished, GIB) == {}


def test_whatever_the_numbers_are_floors_and_ceilings_hold() -> None:
    draw = random.Random(5)
    for _ in range(2000):
        shares = []
        for n in range(draw.randint(0, 6)):
            floor = draw.randint(1, 100) * MIB
            ceiling = floor + draw.randint(0, 100) * MIB
            target = draw.randint(floor // MIB, ceiling // MIB) * MIB
            spare = draw.choice([0, -5, draw.randint(0, 1 << 30), (1 << 64) - 1])
            shares.append(Share(str(n), floor, ceiling, target, spare))
        amount = draw.randint(0, 300 * MIB)
        known = {share.uuid: share for share in shares}
        for uuid, target in take(shares, amount).items():
            assert known[uuid].floor <= target <= known[uuid].target
            assert known[uuid].target - target <= known[uuid].spare
            assert target % 4096 == 0
        for uuid, target in give(shares, amount).items():
            assert known[uuid].target <= target <= known[uuid].ceiling


class FakeMemory:
    """Stands for service.memory.Memory: guests that obey at once, with what they say of themselves."""

    def __init__(self) -> None:
        self.available: dict[str, int] = {}
        self.lent: dict[str, int] = {}
        self.away: set[str] = set()

    async def look(self, machine: Machine) -> dict[str, Any]:
        if machine.uuid in self.away:
            raise VmbusError("Disconnected", "away")
        known = machine.uuid in self.available
        return {"guest": {"available": self.available[machine.uuid]}} if known else {}

    async def lend(self, machine: Machine, target: int) -> None:
        self.lent[machine.uuid] = target
        machine.set_memory(target, target)


class Host:
    """Machines, and a pressure that a test sets."""

    def __init__(self, *names: str, **changes: Any) -> None:
        self.pressure: Pressure | None = Pressure(0.0, 0.0)
        self.memory = FakeMemory()
        self.machines = [machine(name, **changes) for name in names]
        self.policy = PressurePolicy(
            self.memory,  # type: ignore[arg-type]
            lambda: self.machines,
            lambda: self.pressure,
            low=1.0,
            high=10.0,
            step=0.1,
            interval=1.0,
        )

    def round(self, some: float) -> dict[str, int]:
        self.pressure = Pressure(some, 0.0)
        return asyncio.run(self.policy.round())


def machine(name: str, **changes: Any) -> Machine:
    form = {"name": name, "memory": GIB, "kernel": {"path": "/vmlinuz"}, **changes}
    made = Machine(name, 1000, dbus_form.parse(form), persistent=True)
    made.set_state("running")
    made.set_memory(GIB, GIB)
    return made


def test_under_pressure_rounds_take_until_the_floors_and_without_it_give_until_all_is_back() -> None:
    host = Host("a", "b")
    host.memory.available = {"a": 900 * MIB, "b": 100 * MIB}
    host.round(50.0)
    first = dict(host.memory.lent)
    assert GIB - first["a"] > 5 * (GIB - first["b"]) > 0
    for _ in range(100):
        host.round(50.0)
    assert [one.memory_target for one in host.machines] == [256 * MIB, 256 * MIB]
    assert host.round(50.0) == {}
    for _ in range(100):
        host.round(0.5)
    assert [one.memory_target for one in host.machines] == [GIB, GIB]
    assert host.round(0.5) == {}


def test_between_low_and_high_nothing_changes() -> None:
    host = Host("a")
    assert host.round(5.0) == {}
    host.round(50.0)
    before = dict(host.memory.lent)
    assert host.round(1.5) == {} and host.round(9.9) == {}
    assert host.memory.lent == before


@pytest.mark.parametrize("changes", [{"memory-kind": "huge"}, {"balloon": False}, {"locked": True}])
def test_machines_without_a_balloon_are_left_alone(changes: dict[str, Any]) -> None:
    assert Host("a", **changes).round(90.0) == {}


def test_paused_machines_and_those_whose_worker_is_away_are_left_alone() -> None:
    host = Host("a", "b", "c")
    host.machines[0].set_state("paused")
    host.memory.away = {"b"}
    assert set(host.round(90.0)) == {"c"}


def test_a_guest_that_has_not_given_yet_is_not_asked_for_more() -> None:
    host = Host("a", "b")
    host.machines[0].set_memory(512 * MIB, 700 * MIB)
    assert set(host.round(90.0)) == {"b"}


def test_an_owner_s_wish_is_the_ceiling() -> None:
    host = Host("a")
    host.machines[0].memory_wish = 600 * MIB
    host.machines[0].set_memory(400 * MIB, 400 * MIB)
    for _ in range(50):
        host.round(0.0)
    assert host.machines[0].memory_target == 600 * MIB


def test_without_a_measure_nothing_is_done() -> None:
    host = Host("a")
    host.pressure = None
    assert asyncio.run(host.policy.round()) == {}


def test_the_measure_is_read_as_the_kernel_writes_it(tmp_path: Path) -> None:
    file = tmp_path / "pressure"
    file.write_text(
        "some avg10=12.34 avg60=5.00 avg300=1.00 total=123\nfull avg10=3.21 avg60=0.00 avg300=0.00 total=1\n"
    )
    assert read_pressure(file) == Pressure(12.34, 3.21)
    file.write_text("")
    assert read_pressure(file) is None
    assert read_pressure(tmp_path / "none") is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("low = 10.0\nhigh = 10.0", "not below high"),
        ("step = 0.0", "step"),
        ("source = 'relative'", "source"),
        ("hihg = 5.0", "hihg"),
        ("interval = 0.0", "interval"),
    ],
)
def test_a_mistake_in_the_policy_is_refused_by_name(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "vmbusd.toml"
    file.write_text(f"[pressure]\n{text}\n")
    with pytest.raises(VmbusError, match=said):
        config.load(file)


def test_the_policy_is_off_unless_it_is_said(tmp_path: Path) -> None:
    assert not config.load(tmp_path / "none").pressure.on
