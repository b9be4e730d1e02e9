# SPDX-License-Identifier: Apache-2.0
"""Memory on a host with two NUMA nodes, and in pages of 1 GiB: what the kernel's own files show."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab import hugepages
from tests.lab.system import ALICE, System
from tests.local import worker_guest

pytestmark = [pytest.mark.requires("kvm-hardware", "numa", "hugepages"), pytest.mark.timeout(300)]

MIB = 1 << 20
PAGE = 2 * MIB
RULE = """polkit.addRule(function(action, subject) {
    if (action.id == "org.vmbus1.hugepages.use") return polkit.Result.YES;
});"""


@pytest.fixture(scope="module")
def system() -> Iterator[System]:
    with System(policy='[quota]\nhugepages = "2G"\nlocked = "64M"\n') as started:
        started.rule(RULE)
        yield started


def run(system: System, name: str, *words: str, memory: str = "32M") -> int:
    """A machine that idles, all its memory touched; its worker's pid."""
    kernel = system.files(ALICE) / "guest"
    if not kernel.exists():
        kernel.write_bytes(worker_guest.image().read_bytes())
        kernel.chmod(0o644)
    told = ["--memory", memory, "--prefault", "--kernel", str(kernel), "--cmdline", "idle"]
    done = system.vmbusctl(ALICE, "run", "--detach", "--name", name, *told, *words, timeout=60)
    assert done.returncode == 0, done.stderr
    shown = system.vmbusctl(ALICE, "show", name).stdout
    return int(re.search(r"worker-pid: (\d+)", shown)[1])  # type: ignore[index]


def bound(pid: int) -> list[tuple[str, dict[int, int]]]:
    """Of each mapping that is bound to nodes: the policy, and its pages by node (numa_maps, proc(5))."""
    found = []
    for line in Path(f"/proc/{pid}/numa_maps").read_text().splitlines():
        _, policy, *fields = line.split()
        if policy.startswith("bind:"):
            pages = {int(node): int(count) for node, count in re.findall(r"\bN(\d+)=(\d+)", " ".join(fields))}
            found.append((policy.partition("=")[0], pages))
    return found


@pytest.mark.parametrize("kind", ["mergeable", "shareable"])
def test_memory_lies_on_the_node_that_it_is_bound_to(system: System, kind: str) -> None:
    for nodes in ([0], [1]):
        pid = run(system, "bound", "--memory-kind", kind, *(f"--memory-node={node}" for node in nodes))
        ((policy, pages),) = bound(pid)
        assert policy == f"bind:{nodes[0]}"
        assert set(pages) == set(nodes), pages
        assert sum(pages.values()) in (32 * MIB // 4096, 32 * MIB // PAGE), pages  # transparent huge pages
        system.vmbusctl(ALICE, "kill", "bound")


def test_both_nodes_may_be_named_and_one_that_is_not_there_is_refused(system: System) -> None:
    pid = run(system, "both", "--memory-node=0", "--memory-node=1")
    ((policy, pages),) = bound(pid)
    assert policy == "bind:0-1" and set(pages) <= {0, 1}
    system.vmbusctl(ALICE, "kill", "both")
    words = ["--name", "w", "--memory", "32M", "--kernel", "/bin/true", "--memory-node", "2"]
    done = system.vmbusctl(ALICE, "define", *words)
    assert "this host has no memory on node 2; the nodes with memory: [0, 1]" in done.stderr


def test_a_machine_without_nodes_is_bound_to_none(system: System) -> None:
    assert bound(run(system, "anywhere")) == []
    system.vmbusctl(ALICE, "kill", "anywhere")


def test_huge_memory_comes_from_its_node_or_the_start_says_that_there_is_none(system: System) -> None:
    pools = [
        Path(f"/sys/devices/system/node/node{node}/hugepages/hugepages-2048kB/nr_hugepages")
        for node in (0, 1)
    ]
    before = hugepages.Pool().figures()
    try:
        pools[1].write_text("16")
        assert pools[1].read_text() == "16\n"
        pid = run(system, "huge", "--memory-kind", "huge", "--memory-node=1")
        ((policy, pages),) = bound(pid)
        assert (policy, pages) == ("bind:1", {1: 16})
        system.vmbusctl(ALICE, "kill", "huge")

        # The host has pages enough, but not where they are wanted.
        words = ["--memory", "32M", "--memory-kind", "huge", "--memory-node", "0", "--cmdline", "idle"]
        kernel = ["--kernel", str(system.files(ALICE) / "guest")]
        counts = system.counts()
        done = system.vmbusctl(ALICE, "run", "--detach", "--name", "none", *words, *kernel, timeout=60)
        assert "memory_nodes: the NUMA nodes [0] have too few free huge pages" in done.stderr, done.stderr
        assert done.returncode == 6
        assert system.settle(counts) == counts
    finally:
        for pool in pools:
            pool.write_text("0")
    assert hugepages.Pool().until(before, 1) == before


def test_all_guest_memory_is_mapped_in_a_page_of_1_gib(system: System) -> None:
    pool = hugepages.Pool(1 << 30)
    before = pool.figures()
    assert before["left"] >= 1
    pid = run(system, "large", "--memory-kind", "huge", "--page-size", "1G", memory="1G")
    smaps = Path(f"/proc/{pid}/smaps").read_text()
    mappings = re.split(r"^(?=[0-9a-f]+-)", smaps, flags=re.MULTILINE)
    (guest,) = [text for text in mappings if "1048576 kB" in text]
    kib = {name: int(value) for name, value in re.findall(r"^(\w+): +(\d+) kB$", guest, re.MULTILINE)}
    assert {kib[name] for name in ("Size", "KernelPageSize", "MMUPageSize")} == {1 << 20}
    assert kib["Shared_Hugetlb"] + kib["Private_Hugetlb"] == 1 << 20
    assert (pool["free"], pool["resv"]) == (before["free"] - 1, before["resv"])
    system.vmbusctl(ALICE, "kill", "large")
    assert pool.until(before, 1) == before


def test_locked_memory_stays_in_ram(system: System) -> None:
    size = 8 * MIB  # what the kernel lets be locked of itself; systemd's unit says infinity
    pid = run(system, "locked", "--locked", memory="8M")
    status = Path(f"/proc/{pid}/status").read_text()
    assert int(re.search(r"^VmLck:\s+(\d+) kB", status, re.MULTILINE)[1]) == size >> 10  # type: ignore[index]
    limits = Path(f"/proc/{pid}/limits").read_text()
    assert re.search(rf"^Max locked memory +{size} +{size} ", limits, re.MULTILINE)
    system.vmbusctl(ALICE, "kill", "locked")
