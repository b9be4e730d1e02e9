# SPDX-License-Identifier: Apache-2.0
"""Pools of huge pages on a whole system: enlarged and given back, within what broker.toml allows."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.lab.hugepages import Pool, enlarged
from tests.lab.system import ALICE, BOB, System
from tests.local.service_bed import connect, scenario
from tests.local.test_service_hugepages import run
from vmbus.wire.errors import VmbusError

pytestmark = pytest.mark.requires("root", "kvm", "hugepages")

RULE = """polkit.addRule(function(action, subject) {
    if (action.id == "org.vmbus1.hugepages.use") return polkit.Result.YES;
    if (action.id == "org.vmbus1.hugepages.manage" && subject.user == "vmbus-alice") return polkit.Result.YES;
});"""
POLICY = '[quota]\nhugepages = "2G"\n[hugepages]\ngrow = "96M"\n'
NODES = Path("/sys/devices/system/node/node0/hugepages").is_dir()
POOL = f"/org/vmbus1/hugepages/2M_{'node0' if NODES else 'host'}"


@pytest.fixture(scope="module")
def system() -> Iterator[System]:
    with System(policy=POLICY) as started:
        started.rule(RULE)
        yield started


@pytest.fixture
def pool() -> Iterator[Pool]:
    with enlarged(4) as theirs:  # the administrator has some
        yield theirs


def ctl(system: System, *words: str) -> Any:
    done = system.vmbusctl(ALICE, "hugepages", *words, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def refused(system: System, *words: str) -> tuple[str, str]:
    """Kind and message."""
    done = system.vmbusctl(ALICE, "hugepages", *words, "--json")
    assert done.returncode != 0, done.stdout
    error = json.loads(done.stderr)["error"]
    return error["kind"], error["message"]


def test_a_pool_shows_the_kernel_s_figures(system: System, pool: Pool) -> None:
    (shown,) = (one for one in ctl(system) if one["path"] == POOL)
    figures = pool.figures()
    assert shown["page-size"] == 2 << 20
    assert (shown["total"], shown["free"], shown["reserved"]) == tuple(
        figures[name] for name in ("nr", "free", "resv")
    )
    assert shown["machines"] == {}
    if Path("/sys/kernel/mm/hugepages/hugepages-1048576kB").is_dir():
        assert [one for one in ctl(system) if one["page-size"] == 1 << 30]


def test_it_grows_and_shrinks_by_what_vmbus_added(system: System, pool: Pool) -> None:
    before = pool["nr"]
    assert ctl(system, "grow", "16")["grown"] == 16
    assert pool["nr"] == before + 16
    kind, message = refused(system, "shrink", "17")
    assert kind == "AccessDenied"
    assert "16 pages of this pool were added by vmbus; the others are the administrator's" in message
    assert ctl(system, "shrink", "10")["grown"] == 6
    assert ctl(system, "shrink", "6")["grown"] == 0
    assert pool["nr"] == before


def test_more_than_broker_toml_allows_is_refused_and_changes_nothing(system: System, pool: Pool) -> None:
    before = pool["nr"]
    kind, message = refused(system, "grow", "49")
    assert kind == "AccessDenied"
    assert "vmbus may add 100663296 bytes to the pools in all" in message
    assert pool["nr"] == before


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        (["grow", "0"], "InvalidArgument"),
        (["grow"], "InvalidArgument"),
        (["list", "3"], "InvalidArgument"),
        (["grow", "99999999"], "InvalidArgument"),
        (["grow", "1", "--node", "77"], "NotFound"),
    ],
)
def test_bad_input_is_named(system: System, words: list[str], kind: str) -> None:
    assert refused(system, *words)[0] == kind


def test_what_machines_hold_is_not_taken_away_and_goes_back_with_the_last(system: System, pool: Pool) -> None:
    before = pool["nr"]
    ctl(system, "grow", "28")
    pid, other = run(system, "one"), run(system, "two", memory="16M")
    (shown,) = (one for one in ctl(system) if one["path"] == POOL)
    assert sorted(shown["machines"].values()) == [8, 16]
    kind, message = refused(system, "shrink", "12")
    assert kind == "InUse"
    assert re.search(r"neither used nor reserved; machines hold 24", message)
    os.kill(other, signal.SIGKILL)
    time.sleep(0.3)
    assert pool["nr"] == before + 28  # one is still there
    os.kill(pid, signal.SIGKILL)
    assert pool.until_it_has(before)
    (shown,) = (one for one in ctl(system) if one["path"] == POOL)
    assert (shown["grown"], shown["machines"]) == (0, {})


def test_pages_that_the_administrator_adds_meanwhile_stay(system: System, pool: Pool) -> None:
    before = pool["nr"]
    ctl(system, "grow", "8")
    pool.set(before + 8 + 2)
    assert refused(system, "shrink", "9")[0] == "AccessDenied"
    ctl(system, "shrink", "8")
    assert pool["nr"] == before + 2


def test_after_a_crash_of_all_what_nobody_uses_is_given_back(system: System, pool: Pool) -> None:
    before = pool["nr"]
    ctl(system, "grow", "20")
    pid = run(system, "lost")
    system.service.kill()
    system.broker.kill()
    os.kill(pid, signal.SIGKILL)
    assert pool["nr"] == before + 20
    system.broker.start()
    system.service.start()
    assert pool.until_it_has(before)


def test_an_ordinary_user_may_look_and_not_change(system: System, pool: Pool) -> None:
    assert system.vmbusctl(BOB, "hugepages").returncode == 0
    done = system.vmbusctl(BOB, "--no-ask", "hugepages", "grow", "1")
    assert done.returncode == 4
    assert "org.vmbus1.hugepages.manage" in done.stderr


@scenario
async def test_two_jobs_on_one_pool_do_not_mix(system: System, pool: Pool) -> None:
    async with connect(system, ALICE) as alice:
        await alice(POOL, "HugePages.Grow", 8)
        try:
            await alice(POOL, "HugePages.Grow", 8)
        except VmbusError as error:
            assert error.kind == "InvalidState"
        else:
            raise AssertionError("the second was accepted")
    ctl(system, "shrink", "8")


@pytest.mark.long
def test_persistent_pages_are_there_from_the_start_and_stay(pool: Pool) -> None:
    before = pool["nr"]
    config = f"[[hugepages.persistent]]\npages = {before + 6}\n"
    with System(policy=POLICY, config=config) as system:
        system.rule(RULE)
        assert pool.until_it_has(before + 6)
        ctl(system, "grow", "12")
        pid = run(system, "only", memory="16M")
        os.kill(pid, signal.SIGKILL)
        assert pool.until_it_has(before + 6)


def test_a_mistake_in_vmbusd_toml_is_named(tmp_path: Path) -> None:
    from vmbus.service import config  # noqa: PLC0415

    file = tmp_path / "vmbusd.toml"
    file.write_text("[[hugepages.persistent]]\npage-size = '4M'\npages = 1\n")
    with pytest.raises(VmbusError, match=r"page-size"):
        config.load(file)
    file.write_text("[hugepage]\n")
    with pytest.raises(VmbusError, match=r"hugepage"):
        config.load(file)
    assert config.load(tmp_path / "none") == config.Config()
