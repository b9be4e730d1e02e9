# SPDX-License-Identifier: Apache-2.0
"""SELinux, enforcing: vmbus lives in its domains, nothing of that is denied, and a worker gets no further.

One nested host with a policy of its own (tests/testbed/selinux_host.py): about two minutes on a quiet host.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from tests.lab.nested import NestedHostDied
from tests.testbed.selinux_host import SelinuxHost

pytestmark = [
    pytest.mark.requires("root", "nested-host", "selinux-compiler"),
    pytest.mark.long,
    pytest.mark.timeout(1800),
]

ATTACK = Path(__file__).with_name("selinux_attack.py")
SIGNAL = 1 << 6
EVERYTHING = (1 << 8) - 1
FOREIGN = "c1000,c1001"  # categories that no worker has here
DOMAIN = "system_u:system_r:vmbus_worker_t:s0"
INTERPRETER = f"python3.{sys.version_info.minor}"
DENIED = {  # what the kernel says of each attempt by root: rights, and on what
    "an image below /var/lib": r"{ search } .* name=\"lib\" .*tclass=dir",
    "/dev/kvm": r"{ open } .* path=\"/dev/kvm\" .*tclass=chr_file",
    "/etc/shadow": r"{ read } .* name=\"shadow\" .*tclass=file",
    "the broker's socket": r"{ search } .* name=\"vmbus\" .*tclass=dir",
    "another worker in /proc": r"{ search } .* dev=\"proc\" .*vmbus_worker_t:s0:c.*tclass=dir",
    "a signal as root": r"{ kill } .*tclass=capability",
    "a network socket": r"{ create } .*tclass=tcp_socket",
}


class Life:
    """One life in the host, told once: what each test looks at."""

    def __init__(self, host: SelinuxHost) -> None:
        self.console = host.start()
        self.broker = host.labels("vmbus-broker")
        self.service = host.labels("vmbusd")
        self.workers = host.labels(INTERPRETER)
        self.helpers = host.labels("passt,passt.avx2")
        pid, uid, label = self.workers[0]  # the machine's; another waits for the next one
        words = f"python3 -I -S /usr/lib/vmbus/attack.py {pid} /var/lib/vmbus/images/root.qcow2"
        domain = f"runcon {DOMAIN}"
        self.unconfined = host.run(words).code
        self.as_root = host.run(f"{domain}:{FOREIGN} {words}").code
        self.as_itself = host.run(f"as {uid} {domain}:{label.split('s0:')[1]} {words}").code
        self.as_neighbour = host.run(f"as {uid} {domain}:{FOREIGN} {words}").code
        self.listed = host.go_on()
        self.denials = host.denials()


@pytest.fixture(scope="module")
def life() -> Life:
    try:
        return lived()
    except NestedHostDied:  # as tests/lab/remote.py has it: one more try
        return lived()


def lived() -> Life:
    with SelinuxHost(ATTACK) as host:
        return Life(host)


def test_a_guest_boots_and_reads_and_writes_its_disk(life: Life) -> None:
    assert "the disk says hello" in life.console
    assert "cannot mount" not in life.console


def test_each_program_is_in_its_domain_and_a_worker_has_categories_of_its_own(life: Life) -> None:
    assert {label for _, _, label in life.broker} == {"system_u:system_r:vmbus_broker_t:s0"}
    assert [label for _, _, label in life.service] == ["system_u:system_r:vmbusd_t:s0"]
    labels = [label for _, _, label in life.workers]
    assert len(set(labels)) == len(labels)
    for label in labels:
        assert re.fullmatch(rf"{DOMAIN}:c\d+,c\d+", label)
    [(_, _, label)] = life.helpers
    assert re.fullmatch(r"system_u:system_r:vmbus_helper_t:s0:c\d+,c\d+", label)


def test_a_killed_service_finds_its_machine_again_and_runs_one_of_passed_files(life: Life) -> None:
    assert re.search(r"\bweb\b.*\brunning\b", life.listed)
    assert re.search(r"\bpassed\b.*\brunning\b", life.listed)


def test_nothing_of_their_life_is_denied(life: Life) -> None:
    ours = [line for line in life.denials if re.search(r"context=\S+:vmbus\w*_t:", line)]
    agents = re.compile(r"comm=\"(runcon|python3)\"")  # of the attacks
    assert [line for line in ours if not agents.search(line)] == []


def test_what_the_attack_tries_works_for_who_may(life: Life) -> None:
    assert life.unconfined == EVERYTHING


def test_root_in_a_workers_domain_does_none_of_it(life: Life) -> None:
    assert life.as_root == 0


@pytest.mark.parametrize("what", DENIED)
def test_the_kernel_says_what_it_denied_to_root_in_a_workers_domain(life: Life, what: str) -> None:
    denied = [line for line in life.denials if f"scontext={DOMAIN}:{FOREIGN}" in line]
    assert any(re.search(DENIED[what], line) for line in denied), "\n".join(denied)


def test_a_worker_reaches_processes_of_its_own_categories_only(life: Life) -> None:
    assert life.as_itself == SIGNAL
    assert life.as_neighbour == 0
