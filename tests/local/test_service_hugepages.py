# SPDX-License-Identifier: Apache-2.0
"""Machines of huge pages on a whole system: what their owner sees, and what is left when all is killed."""

from __future__ import annotations

import itertools
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.hugepages import Pool, enlarged
from tests.lab.system import ALICE, System
from tests.local import worker_guest

pytestmark = pytest.mark.requires("root", "kvm", "hugepages")

RULE = """polkit.addRule(function(action, subject) {
    if (action.id == "org.vmbus1.hugepages.use") return polkit.Result.YES;
});"""
QUOTA = '[quota]\nhugepages = "2G"\n'


@pytest.fixture(scope="module")
def system() -> Iterator[System]:
    with System(policy=QUOTA) as started:
        started.rule(RULE)
        yield started


@pytest.fixture
def pool() -> Iterator[Pool]:
    with enlarged(24) as enough:
        yield enough


def run(system: System, name: str, *words: str, memory: str = "32M") -> int:
    """A machine of huge pages that idles; its worker's pid."""
    kernel = system.files(ALICE) / "guest"
    if not kernel.exists():
        kernel.write_bytes(worker_guest.image().read_bytes())
        kernel.chmod(0o644)
    told = ["--memory", memory, "--memory-kind", "huge", "--kernel", str(kernel), "--cmdline", "idle"]
    done = system.vmbusctl(ALICE, "run", "--detach", "--name", name, *told, *words)
    assert done.returncode == 0, done.stderr
    shown = system.vmbusctl(ALICE, "show", name).stdout
    assert re.search(r"memory-cannot: swap, balloon, merge$", shown, re.MULTILINE), shown
    return int(re.search(r"worker-pid: (\d+)", shown)[1])  # type: ignore[index]


def huge_mappings(pid: int) -> dict[int, int]:
    """Bytes of a process's mappings by the page size that the kernel uses for them, if not 4 KiB."""
    found: dict[int, int] = {}
    size = 0
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "Size":
            size = int(value.split()[0]) << 10
        elif name == "KernelPageSize" and (page := int(value.split()[0]) << 10) != 4096:
            found[page] = found.get(page, 0) + size
    return found


def test_all_guest_memory_is_mapped_in_pages_of_2_mib(system: System, pool: Pool) -> None:
    before = pool.figures()
    pid = run(system, "small")
    assert huge_mappings(pid) == {2 << 20: 32 << 20}
    assert pool["free"] - pool["resv"] == before["left"] - 16
    system.vmbusctl(ALICE, "kill", "small")
    assert pool.until(before, 1) == before


@pytest.mark.long
def test_all_guest_memory_is_mapped_in_pages_of_1_gib(system: System) -> None:
    with enlarged(1, 1 << 30) as pool:
        before = pool.figures()
        pid = run(system, "large", "--page-size", "1G", memory="1G")
        assert huge_mappings(pid) == {1 << 30: 1 << 30}
        system.vmbusctl(ALICE, "kill", "large")
        assert pool.until(before, 1) == before


@pytest.mark.parametrize(
    ("words", "status", "error"),
    [
        (["--memory", "31M", "--memory-kind", "huge"], 2, "memory: .*not a multiple of 2097152"),
        (
            ["--memory", "32M", "--page-size", "2M"],
            2,
            "page-size: is for memory-kind huge.*this is mergeable",
        ),
        (["--memory", "32M", "--memory-kind", "shareable", "--page-size", "1G"], 2, "this is shareable"),
        (
            ["--memory", "1500M", "--memory-kind", "huge", "--page-size", "1G"],
            2,
            "not a multiple of 1073741824",
        ),
        (["--memory", "3G", "--memory-kind", "huge"], 4, "2147483648 bytes of huge pages in all"),
    ],
)
def test_what_contradicts_itself_or_the_quota_is_refused_at_definition(
    system: System, words: list[str], status: int, error: str
) -> None:
    done = system.vmbusctl(ALICE, "define", "--name", "wrong", "--kernel", "/bin/true", *words)
    assert (done.returncode, bool(re.search(error, done.stderr))) == (status, True), done.stderr
    assert system.vmbusctl(ALICE, "list", "--names").stdout == ""


def test_without_a_grant_of_polkit_nobody_defines_them(system: System) -> None:
    system.rule("")
    words = ["--name", "w", "--memory", "32M", "--memory-kind", "huge", "--kernel", "/bin/true"]
    done = system.vmbusctl(ALICE, "--no-ask", "define", *words)
    system.rule(RULE)
    assert done.returncode == 4
    assert "org.vmbus1.hugepages.use" in done.stderr


def test_more_than_the_pool_has_is_refused_at_start(system: System, pool: Pool) -> None:
    before, counts = pool.figures(), system.counts()
    if before["left"] > 1000:
        pytest.skip("needs a pool that has not been enlarged by an administrator")
    words = ["--memory", "2G", "--memory-kind", "huge", "--kernel", str(worker_guest.image())]
    done = system.vmbusctl(ALICE, "run", "--detach", "--name", "much", *words)
    assert done.returncode == 6
    assert re.search(r"1024 pages of 2 MiB are wanted, and \d+ are free and unreserved", done.stderr)
    assert pool.until(before, 1) == before
    assert system.settle(counts) == counts


@pytest.mark.long
@pytest.mark.parametrize("order", list(itertools.permutations(["worker", "service", "broker"])))
def test_whatever_is_killed_in_whatever_order_nothing_stays_reserved(
    system: System, pool: Pool, order: tuple[str, ...]
) -> None:
    before = pool.figures()
    pid = run(system, f"m-{'-'.join(order)}")
    for victim in order:
        if victim == "worker":
            os.kill(pid, signal.SIGKILL)
        else:
            getattr(system, victim).kill()
    assert pool.until(before, 1) == before
    system.broker.start()
    system.service.start()
    assert pool.figures() == before
    assert system.vmbusctl(ALICE, "list", "--names").stdout == ""


def kill_while_touching(system: System, pool: Pool, rounds: int) -> None:
    """A worker killed at some moment of a prefault: its pages are back within a second."""
    before = pool.figures()
    for number in range(rounds):
        pid = run(system, f"touched-{number}", memory="128M")
        prefault = system.popen(ALICE, ["vmbusctl", "prefault", f"touched-{number}"], stderr=subprocess.PIPE)
        end = time.monotonic() + 0.01 * (number % 20)
        while pool["free"] == before["free"] and time.monotonic() < end + 5:
            time.sleep(0.001)
        time.sleep(max(0.0, end - time.monotonic()))
        os.kill(pid, signal.SIGKILL)
        assert pool.until(before, 1) == before, f"round {number}"
        prefault.communicate(timeout=30)


@pytest.mark.long
@pytest.mark.timeout(300)
def test_a_worker_killed_while_it_touches_memory_leaves_no_page(system: System) -> None:
    with enlarged(72) as pool:
        kill_while_touching(system, pool, 20)


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_200_workers_killed_while_they_touch_memory_leave_no_page(system: System) -> None:
    with enlarged(72) as pool:
        kill_while_touching(system, pool, 200)
