# SPDX-License-Identifier: Apache-2.0
"""Devices as Debian's stock kernel drives them: the SCSI host adapter, named ports, a watchdog."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest

from tests.lab.guest import StockGuest
from tests.lab.system import System

pytestmark = [pytest.mark.requires("kvm-hardware"), pytest.mark.timeout(3600)]

SCSI = """\
while [ ! -e /dev/sda ] || [ ! -e /dev/sr0 ]; do sleep 0.1; done
echo "disk $(cat /sys/block/sda/device/model) of $(cat /sys/block/sda/size) sectors"
dd if=/dev/urandom of=/dev/sda bs=64k count=8 conv=fsync 2>/dev/null && echo "written"
dd if=/dev/sr0 bs=2048 skip=16 count=1 2>/dev/null | head -c 4; echo " in the drive"
while [ $(cat /sys/block/sda/size) = 2048 ]; do sleep 0.1; done
echo "grown to $(cat /sys/block/sda/size) sectors"
while ! dd if=/dev/sr0 bs=2048 skip=16 count=1 2>/dev/null | head -c 4 | grep -q 2222; do sleep 0.5; done
echo "another in the drive"
poweroff -f
"""


PORT = """\
port=/dev/virtio-ports/agent
mkdir -p /dev/virtio-ports
while [ ! -e /sys/class/virtio-ports/vport*p0/name ]; do sleep 0.1; done
for sys in /sys/class/virtio-ports/*; do ln -s /dev/${sys##*/} /dev/virtio-ports/$(cat $sys/name); done
ls /dev/virtio-ports
exec 3<>$port
echo "from the guest" >&3
read words <&3; echo "heard: $words"
poweroff -f
"""


WATCHDOG = """\
cat /sys/class/watchdog/watchdog0/identity
echo "status $(cat /sys/class/watchdog/watchdog0/bootstatus)"
exec 3>/dev/watchdog
echo "set"
sleep 1000
"""


@pytest.fixture(scope="module")
def system() -> Iterator[System]:
    """A whole system."""
    with System() as whole:
        yield whole


def test_debian_uses_the_scsi_bus_and_its_drive(system: System) -> None:
    with StockGuest(system, "scsi", script=SCSI, modules=("virtio_scsi", "sd_mod", "sr_mod")) as guest:
        guest.make_disk()
        guest.shell("""umask 077; truncate -s 1M data.img
            for n in 1 2; do
                truncate -s 1M $n.iso
                printf $n$n$n$n | dd of=$n.iso bs=2048 seek=16 conv=notrunc 2>/dev/null
            done""")
        guest.define()
        guest.ctl("attach-disk", guest.name, "data.img,format=raw,bus=scsi,id=data")
        guest.ctl("attach-disk", guest.name, "1.iso,format=raw,cdrom,id=cd")
        guest.start()
        guest.console.wait_for("disk Virtual disk .* of 2048 sectors", 120)
        guest.console.wait_for("written", 30)
        guest.console.wait_for("1111 in the drive", 30)
        guest.ctl("resize-disk", guest.name, "data", "2M")
        guest.console.wait_for("grown to 4096 sectors", 30)
        guest.ctl("change-media", guest.name, "cd", "2.iso,format=raw")
        guest.console.wait_for("another in the drive", 60)
        assert guest.wait_stopped()["state-reason"] == "guest-poweroff"
        guest.ctl("undefine", guest.name)


def test_debian_uses_a_named_port(system: System) -> None:
    with StockGuest(system, "port", script=PORT, modules=("virtio_console",)) as guest:
        guest.make_disk()
        guest.define("--port", "agent", "--port", "other")
        guest.start()
        guest.console.wait_for("(?s)agent.*other", 120)
        port = guest.system.popen(
            guest.user,
            ["vmbusctl", "port", guest.name, "agent"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert port.stdin and port.stdout
        assert port.stdout.readline() == b"from the guest\n"
        port.stdin.write(b"from the host\n")
        port.stdin.flush()
        guest.console.wait_for("heard: from the host", 60)
        port.communicate(timeout=60)
        assert guest.wait_stopped()["state-reason"] == "guest-poweroff"
        guest.ctl("undefine", guest.name)


def test_debian_is_reset_by_its_watchdog(system: System) -> None:
    with StockGuest(system, "dog", script=WATCHDOG, modules=("i6300esb",)) as guest:
        guest.make_disk()
        guest.define("--watchdog", "reset")
        guest.start()
        guest.console.wait_for("i6300ESB", 120)
        # The second start of the system finds that a watchdog ended the first: WDIOF_CARDRESET.
        guest.console.wait_for("(?s)status 0.*set.*status 32", 240)
        assert guest.show()["state-reason"] == "watchdog"
        guest.ctl("kill", guest.name)
        guest.ctl("undefine", guest.name)
