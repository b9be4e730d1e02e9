# SPDX-License-Identifier: Apache-2.0
"""Devices of Debian's stock kernel come and go while it runs: network interfaces with traffic, and a disk."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.lab.bridge import granted
from tests.lab.guest import StockGuest
from tests.lab.system import SLOW, System

pytestmark = [pytest.mark.requires("kvm-hardware", "tap", "bridge"), pytest.mark.timeout(3600)]

BRIDGE = f"vmbh{os.getpid()}"
HOST = "10.97.0.1"

NICS = f"""\
echo "ready"
n=0
while [ $n -lt COUNT ]; do
    while [ ! -e /sys/class/net/eth0 ]; do sleep 0.1; done
    ip link set eth0 up; ip address add 10.97.0.2/24 dev eth0
    ping -c 2 -W 20 {HOST} >/dev/null && echo "cycle $n reached"
    ping {HOST} >/dev/null 2>&1 &
    while [ -e /sys/class/net/eth0 ]; do sleep 0.1; done
    echo "cycle $n gone"
    kill %1 2>/dev/null; wait
    n=$((n + 1))
done
poweroff -f
"""

DISK = """\
echo "ready"
while [ ! -e /dev/vdb ]; do sleep 0.1; done
mkdir /new; mount -t ext4 /dev/vdb /new && echo "kept" >/new/file; sync; umount /new
echo "written to $(cat /sys/block/vdb/size) sectors"
while [ -e /dev/vdb ]; do sleep 0.1; done
echo "gone"
poweroff -f
"""


LIVE = """\
carrier() { cat /sys/class/net/eth0/carrier; }
ip link set eth0 up
while [ "$(carrier)" != 1 ]; do sleep 0.1; done
echo "link up"
while [ "$(carrier)" != 0 ]; do sleep 0.1; done
echo "link down"
while [ "$(carrier)" != 1 ]; do sleep 0.1; done
echo "link up again"
while [ $(cat /sys/block/vda/size) = 131072 ]; do sleep 0.1; done
echo "grown to $(cat /sys/block/vda/size) sectors"
dd if=/dev/urandom of=/dev/vda bs=1M seek=90 count=1 conv=fsync 2>/dev/null &&
    echo "written behind the old end"
poweroff -f
"""


@pytest.fixture(scope="module")
def system() -> Iterator[System]:
    """A whole system, and a bridge with an address that broker.toml grants."""
    with granted(BRIDGE, f"{HOST}/24") as whole:
        yield whole


@pytest.mark.parametrize(
    "cycles", [pytest.param(10, id="ten"), pytest.param(100, id="hundred", marks=pytest.mark.soak)]
)
def test_a_nic_with_traffic_comes_and_goes(system: System, cycles: int) -> None:
    before = system.counts()
    script = NICS.replace("COUNT", str(cycles))
    with StockGuest(system, f"plug-{cycles}", script=script, vcpus=2) as guest:
        guest.make_disk()
        guest.define()
        guest.start()
        guest.console.wait_for("ready", 120)
        for cycle in range(cycles):
            guest.ctl("attach-nic", guest.name, f"{BRIDGE},id=lan")
            guest.console.wait_for(f"cycle {cycle} reached", 60)
            guest.ctl("detach-nic", guest.name, "lan", "--deadline", str(60 * SLOW), timeout=90)
            guest.console.wait_for(f"cycle {cycle} gone", 20)
            assert guest.show()["definition"]["nics"] == []
        assert guest.wait_stopped()["state-reason"] == "guest-poweroff"
        guest.ctl("undefine", guest.name)
    assert system.settle(before) == before


def test_a_disk_comes_is_written_to_and_goes(system: System) -> None:
    with StockGuest(system, "plug-disk", script=DISK) as guest:
        guest.make_disk()
        guest.shell("cp plug-disk.qcow2 more.qcow2")
        guest.define()
        guest.start()
        guest.console.wait_for("ready", 120)
        guest.ctl("attach-disk", guest.name, "more.qcow2,format=qcow2,id=more")
        guest.console.wait_for("written to 131072 sectors", 60)
        guest.ctl("detach-disk", guest.name, "more", "--deadline", str(60 * SLOW), timeout=90)
        guest.console.wait_for("gone", 20)
        assert guest.wait_stopped()["state-reason"] == "guest-poweroff"
        # The running machine is over; what was written is in the image, and the image is whole.
        guest.shell("qemu-img check -q more.qcow2 && qemu-img convert -O raw more.qcow2 more.raw")
        assert "kept" in guest.shell("/sbin/debugfs -R 'cat file' more.raw 2>/dev/null")
        guest.ctl("undefine", guest.name)


def test_a_cable_is_pulled_and_a_disk_grows(system: System) -> None:
    with StockGuest(system, "live", script=LIVE, bridge=f"{BRIDGE},id=lan") as guest:
        guest.make_disk()
        guest.define()
        guest.start()
        guest.console.wait_for("link up", 120)
        guest.ctl("set-link", guest.name, "lan", "down")
        guest.console.wait_for("link down", 30)
        guest.ctl("set-link", guest.name, "lan", "up")
        guest.console.wait_for("link up again", 30)
        guest.ctl("resize-disk", guest.name, "root", "96M")
        guest.console.wait_for("grown to 196608 sectors", 30)
        guest.console.wait_for("written behind the old end", 30)
        assert guest.wait_stopped()["state-reason"] == "guest-poweroff"
        assert "96 MiB" in guest.shell("qemu-img check -q live.qcow2 && qemu-img info live.qcow2")
        guest.ctl("undefine", guest.name)
