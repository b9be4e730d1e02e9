# SPDX-License-Identifier: Apache-2.0
"""The units as systemd runs them: sandboxed, in their cgroups, restarted and stopped without harm."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

import pytest

from tests.lab.hugepages import enlarged
from tests.lab.system import ALICE, SLOW
from tests.local.worker_guest import image
from tests.testbed.systemd_host import UNITS, SystemdHost

pytestmark = [pytest.mark.requires("root", "kvm", "systemd-in-namespaces"), pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def host() -> Iterator[SystemdHost]:
    built = image()
    with SystemdHost() as made:
        for unit in UNITS:
            made.wait_active(f"{unit}.service")
        made.run(["install", "-d", "-o", ALICE, "-m", "0700", f"/srv/vm/{ALICE}"])
        made.run(["install", "-o", ALICE, "-m", "0600", built, f"/srv/vm/{ALICE}/kernel"])
        yield made


def vmbusctl(host: SystemdHost, *words: str, user: str = ALICE) -> str:
    done = host.run(["/usr/lib/vmbus/env/bin/vmbusctl", *words], user=user, timeout=60)
    assert done.returncode == 0, f"{done.stderr}\n{host.log[-4000:]}"
    return done.stdout


def start(host: SystemdHost, name: str, mode: str) -> None:
    kernel = f"/srv/vm/{ALICE}/kernel"
    vmbusctl(host, "define", "--name", name, "--memory", "16M", "--kernel", kernel, "--cmdline", mode)
    vmbusctl(host, "start", name)


def state(host: SystemdHost, name: str) -> str:
    return str(json.loads(vmbusctl(host, "show", name, "--json"))["state"])


def status(host: SystemdHost, pid: str) -> dict[str, str]:
    lines = host.run(["cat", f"/proc/{pid}/status"]).stdout.splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def wait_for_broker(host: SystemdHost) -> None:
    """Until vmbusd is connected again to one that was restarted."""
    deadline = time.monotonic() + 20 * SLOW
    while not json.loads(vmbusctl(host, "host", "--json"))["broker"]:
        assert time.monotonic() < deadline, host.log[-4000:]
        time.sleep(0.2)


def test_sysusers_and_tmpfiles_have_made_what_the_units_need(host: SystemdHost) -> None:
    found = host.run(["stat", "-c", "%U:%G %a", "/run/vmbus/system/broker", "/var/lib/vmbus/system"]).stdout
    assert found.split("\n")[:2] == ["root:vmbus 750", "vmbus:vmbus 700"]


def test_the_service_has_no_capability_and_a_filter(host: SystemdHost) -> None:
    found = status(host, host.show("vmbusd.service", "MainPID"))
    assert {found[key] for key in ("CapEff", "CapPrm", "CapBnd", "CapAmb")} == {"0" * 16}
    assert (found["NoNewPrivs"], found["Seccomp"]) == ("1", "2")


def test_the_broker_has_the_capabilities_of_its_unit_and_a_filter(host: SystemdHost) -> None:
    found = status(host, host.show("vmbus-broker.service", "MainPID"))
    sys_module, sys_rawio, sys_time = 16, 17, 25
    effective = int(found["CapEff"], 16)
    assert not [bit for bit in (sys_module, sys_rawio, sys_time) if effective >> bit & 1]
    assert (found["NoNewPrivs"], found["Seccomp"]) == ("1", "2")


@pytest.mark.requires("cgroup-v2-controllers")
def test_a_machine_runs_in_a_cgroup_below_the_machines_unit(host: SystemdHost) -> None:
    start(host, "placed", "idle")
    pid = json.loads(vmbusctl(host, "show", "placed", "--json"))["worker-pid"]
    placed = host.run(["cat", f"/proc/{pid}/cgroup"]).stdout.strip().removeprefix("0::")
    bound = host.run(["cat", f"/sys/fs/cgroup{placed}/memory.max"]).stdout.strip()
    vmbusctl(host, "kill", "placed")
    journal = host.run(["journalctl", "--no-pager", "-u", "vmbus-broker", "-u", "vmbus-machines"]).stdout
    assert placed.startswith("/system.slice/vmbus-machines.service/"), journal
    assert placed.count("/") == 3
    assert 16 << 20 < int(bound) < 1 << 30


def test_restarting_broker_and_service_leaves_guests_running(host: SystemdHost) -> None:
    start(host, "steady", "wait-power-button")
    pid = json.loads(vmbusctl(host, "show", "steady", "--json"))["worker-pid"]
    done = host.run(["systemctl", "restart", "vmbus-broker.service", "vmbusd.service"], timeout=60)
    assert done.returncode == 0, done.stderr
    deadline = time.monotonic() + 20 * SLOW
    while state(host, "steady") != "running" and time.monotonic() < deadline:
        time.sleep(0.2)
    assert json.loads(vmbusctl(host, "show", "steady", "--json"))["worker-pid"] == pid
    vmbusctl(host, "stop", "steady")
    assert state(host, "steady") == "stopped"
    wait_for_broker(host)


def test_the_bus_starts_the_service_when_it_is_called(host: SystemdHost) -> None:
    host.run(["systemctl", "stop", "vmbusd.service"])
    assert host.show("vmbusd.service", "ActiveState") == "inactive"
    assert "version" in vmbusctl(host, "host")
    assert host.show("vmbusd.service", "ActiveState") == "active"


def test_a_broken_configuration_does_not_end_the_broker(host: SystemdHost) -> None:
    pid = host.show("vmbus-broker.service", "MainPID")
    host.run(["sh", "-c", "cp /etc/vmbus/broker.toml /tmp/kept; echo nonsense >>/etc/vmbus/broker.toml"])
    assert host.run(["systemctl", "reload", "vmbus-broker.service"]).returncode == 0
    host.run(["cp", "/tmp/kept", "/etc/vmbus/broker.toml"])
    assert host.show("vmbus-broker.service", "MainPID") == pid
    assert host.show("vmbus-broker.service", "ActiveState") == "active"


@pytest.mark.requires("hugepages")
def test_huge_pages_for_other_programs_are_mounted_where_the_host_sees_them(host: SystemdHost) -> None:
    mount = '[[hugepages.mount]]\\npath = "/mnt/huge"\\nsize = "4M"\\nmin-size = "2M"\\n'
    with enlarged(2) as pool:
        before = pool.figures()
        file = "/etc/vmbus/broker.toml"
        host.run(["sh", "-c", f"mkdir -p /mnt/huge; cp {file} /tmp/kept; printf '{mount}' >>{file}"])
        assert host.run(["systemctl", "restart", "vmbus-broker.service"]).returncode == 0
        seen = host.run(["findmnt", "-n", "-o", "FSTYPE,SOURCE", "/mnt/huge"]).stdout.split()
        assert seen == ["hugetlbfs", "vmbus:system:pagesize=2M,size=4M,min_size=2M,uid=0,gid=0,mode=755"], (
            host.log[-4000:]
        )
        assert pool["resv"] == before["resv"] + 1
        host.run(["cp", "/tmp/kept", "/etc/vmbus/broker.toml"])
        assert host.run(["systemctl", "restart", "vmbus-broker.service"]).returncode == 0
        assert host.run(["findmnt", "/mnt/huge"]).returncode == 1
        assert pool.figures() == before
    wait_for_broker(host)


def test_stopping_the_machines_unit_shuts_guests_down_in_order(host: SystemdHost) -> None:
    start(host, "last", "wait-power-button")
    done = host.run(["systemctl", "stop", "vmbus-machines.service"], timeout=150)
    assert done.returncode == 0, done.stderr
    found = json.loads(vmbusctl(host, "show", "last", "--json"))
    assert (found["state"], found["state-reason"]) == ("stopped", "guest-poweroff")
