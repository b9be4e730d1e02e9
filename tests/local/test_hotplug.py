# SPDX-License-Identifier: Apache-2.0
"""Devices that are attached to and detached from a running machine, through the whole system.

The guest is the bare-metal one in mode ``plug``: it serves its slots as a PCIe hotplug driver would.
"""

from __future__ import annotations

import json
import os
import pwd
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.lab.bridge import RULE, granted
from tests.lab.guest import Console
from tests.lab.system import ALICE, BOB, System
from tests.local.broker_bed import wait_until
from tests.local.ctl_bed import ctl, place_guest, refused

pytestmark = [pytest.mark.requires("root", "kvm", "tap", "bridge"), pytest.mark.long]

BRIDGE = f"vmbp{os.getpid()}"
MARK = b"vmbus"
"""What the guest writes at the start of a disk."""


@pytest.fixture(scope="module")
def system() -> Iterator[System]:
    """A whole system, and a bridge that broker.toml grants to alice."""
    with granted(BRIDGE) as whole:
        yield whole


@pytest.fixture
def machine(system: System) -> Iterator[str]:
    """The name of a machine of alice's that is stopped; whatever became of it, nothing is left."""
    before = system.counts()
    kernel = place_guest(system)
    ctl(
        system,
        "define",
        "--name",
        "plug",
        "--memory",
        "16M",
        "--kernel",
        str(kernel),
        "--cmdline",
        "plug count=99",
    )
    yield "plug"
    system.vmbusctl(ALICE, "kill", "plug")
    ctl(system, "undefine", "plug")
    assert system.settle(before) == before


def image(system: System, name: str) -> Path:
    """A raw disk of alice's, 1 MiB."""
    path = system.files(ALICE) / name
    path.write_bytes(bytes(1 << 20))
    os.chown(path, pwd.getpwnam(ALICE).pw_uid, -1)
    path.chmod(0o600)
    return path


def definition(system: System) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(ctl(system, "show", "plug", "--json"))["definition"]
    return found


def started(system: System) -> Console:
    ctl(system, "start", "plug")
    console = Console(system, ALICE, "plug", "--read-only")
    console.wait_for("plug: ready", 30)
    return console


def ports() -> list[str]:
    return os.listdir(f"/sys/class/net/{BRIDGE}/brif")


def test_a_disk_is_attached_written_and_detached(system: System, machine: str) -> None:
    path = image(system, "data.img")
    console = started(system)
    assert "slot 1" in ctl(system, "attach-disk", machine, f"{path},format=raw,id=data")
    console.wait_for("plug: slot 1 has a disk of 2048 sectors, written: 0", 20)
    [disk] = definition(system)["disks"]
    assert (disk["id"], disk["slot"]) == ("data", 1)
    stats = json.loads(ctl(system, "show", machine, "--stats", "--json"))["stats"]
    assert stats["devices"]["disk/data"]

    # Nobody else gets it meanwhile; afterwards everybody does.
    assert "InUse" in refused(system, "attach-disk", machine, f"{path},format=raw", "--json")
    ctl(system, "detach-disk", machine, "data")
    console.wait_for("plug: slot 1 is empty", 20)
    assert path.read_bytes()[:5] == MARK
    assert definition(system)["disks"] == []
    ctl(system, "attach-disk", machine, f"{path},format=raw,slot=8")
    console.wait_for("plug: slot 8 has a disk", 20)
    console.close()


def test_ten_nics_come_and_go(system: System, machine: str) -> None:
    console = started(system)
    for _ in range(10):
        ctl(system, "attach-nic", machine, f"{BRIDGE},id=lan")
        [nic] = definition(system)["nics"]
        assert nic["slot"] == 1
        assert len(ports()) == 1
        ctl(system, "detach-nic", machine, "lan")
        wait_until(lambda: ports() == [])
    console.wait_for(
        r"(?s)(plug: slot 1 has 1041.*plug: slot 1 is asked for.*plug: slot 1 is empty.*){10}", 10
    )
    assert definition(system)["nics"] == []
    console.close()


def test_an_attached_device_is_where_it_was_at_the_next_start(system: System, machine: str) -> None:
    ctl(system, "attach-nic", machine, f"{BRIDGE},slot=5")
    assert definition(system)["nics"][0]["slot"] == 5
    console = started(system)
    assert "plug: slot 5 is filled" in console.text
    ctl(system, "detach-nic", machine, "nic0")
    console.wait_for("plug: slot 5 is empty", 20)
    console.close()
    ctl(system, "kill", machine)
    console = started(system)
    assert "is filled" not in console.text
    console.close()


def test_a_guest_that_does_not_let_go_keeps_its_device(system: System, machine: str) -> None:
    ctl(system, "undefine", machine)
    kernel = str(system.files(ALICE) / "guest")
    words = ["--memory", "16M", "--kernel", kernel, "--cmdline", "plug stubborn"]
    ctl(system, "define", "--name", machine, *words)
    ctl(system, "attach-nic", machine, BRIDGE)
    console = started(system)
    before = definition(system)
    assert "not let go" in refused(system, "detach-nic", machine, "nic0", "--deadline", "0.5")
    console.wait_for("plug: slot 1 is asked for", 10)
    assert definition(system) == before
    assert len(ports()) == 1
    assert "not let go" in refused(system, "detach-nic", machine, "nic0", "--deadline", "0.5")
    console.close()


def test_a_detach_outlives_vmbusd(system: System, machine: str) -> None:
    path = image(system, "data.img")
    console = started(system)
    ctl(system, "attach-disk", machine, f"{path},format=raw,id=data")
    console.wait_for("plug: slot 1 has a disk", 20)
    system.service.kill()
    system.service.start()
    wait_until(lambda: json.loads(ctl(system, "show", machine, "--json"))["state"] == "running")
    assert definition(system)["disks"][0]["id"] == "data"
    ctl(system, "detach-disk", machine, "data")
    assert definition(system)["disks"] == []
    console.close()


def test_files_are_passed_to_a_running_machine(system: System, machine: str) -> None:
    path = image(system, "passed.img")
    console = started(system)
    ctl(system, "attach-disk", machine, f"{path},format=raw", "--pass-files")
    console.wait_for("plug: slot 1 has a disk", 20)
    ctl(system, "detach-disk", machine, "disk0")
    assert path.read_bytes()[:5] == MARK
    console.close()


def test_what_cannot_be_attached_leaves_the_machine_as_it_was(system: System, machine: str) -> None:
    path = image(system, "data.img")
    qcow2 = image(system, "no.qcow2")
    console = started(system)
    ctl(system, "attach-nic", machine, f"{BRIDGE},id=lan,slot=2")
    before, counts = definition(system), system.counts()
    for words, said in (
        (("attach-nic", machine, "no-such-bridge"), "no-such-bridge"),
        (("attach-nic", machine, f"{BRIDGE},slot=2"), "slot 2 holds nic/lan"),
        (("attach-nic", machine, f"{BRIDGE},slot=9"), "not in 0–8"),
        (("attach-nic", machine, f"{BRIDGE},id=lan"), "another id"),
        (("attach-disk", machine, f"{path}.missing,format=raw"), "does not exist"),
        (("attach-disk", machine, "/etc/shadow,format=raw"), "shadow"),
        (("attach-disk", machine, f"{qcow2},format=qcow2"), "qcow2"),
        (("detach-nic", machine, "wan"), "it has nic/lan"),
        (("detach-disk", machine, "lan"), "it has nic/lan"),
    ):
        assert said in refused(system, *words), words
        assert definition(system) == before
    assert system.settle(counts) == counts
    assert ctl(system, "list").count("running") == 1
    console.close()


def test_nine_devices_do_not_fit_into_eight_slots(system: System, machine: str) -> None:
    for number in range(8):
        assert f"slot {number + 1}" in ctl(system, "attach-nic", machine, BRIDGE)
    assert "all 8 hotplug slots" in refused(system, "attach-nic", machine, BRIDGE)


def test_a_cable_is_pulled_and_plugged_in_again(system: System, machine: str) -> None:
    console = started(system)
    ctl(system, "attach-nic", machine, f"{BRIDGE},id=lan")
    console.wait_for("plug: slot 1 has 1041", 20)
    ctl(system, "set-link", machine, "lan", "down")
    console.wait_for("plug: slot 1: link down", 20)
    assert definition(system)["nics"][0]["carrier"] is False
    ctl(system, "set-link", machine, "lan", "up")
    console.wait_for("plug: slot 1: link up", 20)
    assert definition(system)["nics"][0]["carrier"] is True
    console.close()


def test_a_cable_that_is_pulled_is_so_at_the_next_start(system: System, machine: str) -> None:
    ctl(system, "attach-nic", machine, f"{BRIDGE},id=lan,carrier=no")
    assert definition(system)["nics"][0]["carrier"] is False
    console = started(system)
    ctl(system, "set-link", machine, "lan", "up")
    console.wait_for("plug: slot 1: link up", 20)
    console.close()
    ctl(system, "kill", machine)
    ctl(system, "set-link", machine, "lan", "down")
    assert definition(system)["nics"][0]["carrier"] is False


def test_a_disk_grows_while_the_guest_has_it(system: System, machine: str) -> None:
    path = image(system, "data.img")
    console = started(system)
    ctl(system, "attach-disk", machine, f"{path},format=raw,id=data")
    console.wait_for("plug: slot 1 has a disk of 2048 sectors", 20)
    ctl(system, "resize-disk", machine, "data", "3M")
    # The configuration's bit in the interrupt status says why the guest was told.
    console.wait_for("plug: slot 1 has 6144 sectors, status [23]", 20)
    assert path.stat().st_size == 3 << 20
    for words, said in (
        (("resize-disk", machine, "data", "1M"), "lose its end"),
        (("resize-disk", machine, "data", "1000"), "multiple of 512"),
        (("resize-disk", machine, "data", "0"), "multiple of 512"),
        (("resize-disk", machine, "data", str((1 << 64) - 512)), "below 2^63"),
        (("resize-disk", machine, "root", "9M"), "it has disk/data"),
        (("set-link", machine, "lan", "down"), "it has disk/data"),
    ):
        assert said in refused(system, *words), words
    assert path.stat().st_size == 3 << 20
    ctl(system, "detach-disk", machine, "data")
    console.close()
    ctl(system, "kill", machine)
    ctl(system, "attach-disk", machine, f"{path},format=raw,id=data")
    assert "running or paused" in refused(system, "resize-disk", machine, "data", "4M")


def test_the_address_of_a_detached_nic_is_free_at_once(system: System, machine: str) -> None:
    mac = "52:54:00:77:88:99"
    kernel = str(system.files(ALICE) / "guest")
    words = ["--memory", "16M", "--kernel", kernel, "--cmdline", "plug count=99"]
    ctl(system, "define", "--name", "second", *words)
    try:
        console = started(system)
        ctl(system, "attach-nic", machine, f"{BRIDGE},id=lan,mac={mac}")
        ctl(system, "start", "second")
        attach = ("attach-nic", "second", f"{BRIDGE},mac={mac}")
        assert "change one of them" in refused(system, *attach)
        ctl(system, "detach-nic", machine, "lan")
        ctl(system, *attach)
        # And the first machine has no claim on it any more.
        assert "change one of them" in refused(system, "attach-nic", machine, f"{BRIDGE},mac={mac}")
        console.close()
    finally:
        system.vmbusctl(ALICE, "kill", "second")
        ctl(system, "undefine", "second")


def test_another_users_machine_is_not_changed(system: System, machine: str) -> None:
    uuid = json.loads(ctl(system, "show", machine, "--json"))["uuid"]
    for words in (
        ("attach-nic", uuid, BRIDGE),
        ("detach-nic", uuid, "nic0"),
        ("set-link", uuid, "nic0", "down"),
        ("resize-disk", uuid, "disk0", "1M"),
    ):
        assert "change-any" in refused(system, *words, user=BOB)


def test_a_bridge_is_asked_for_when_a_nic_is_attached(system: System, machine: str) -> None:
    system.rule("")
    try:
        assert "org.vmbus1.bridge.use" in refused(system, "attach-nic", machine, BRIDGE)
    finally:
        system.rule(RULE)
