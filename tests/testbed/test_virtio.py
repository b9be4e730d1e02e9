# SPDX-License-Identifier: Apache-2.0
"""Linux's own drivers on our PCI bus and disks, beyond plain use: what they make of the device's details, and
all the ways in which they let go of a device and take it again.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from tests.lab.guest import StockGuest
from tests.lab.system import System

pytestmark = [pytest.mark.requires("kvm-hardware"), pytest.mark.timeout(600)]

DISK = "/sys/bus/pci/devices/0000:00:01.0"

LOOK = f"""\
echo "queues: $(ls /sys/block/vda/mq | wc -l)"
echo "cache: $(cat /sys/block/vda/queue/write_cache)"
echo "blocks: $(cat /sys/block/vda/queue/logical_block_size) $(cat /sys/block/vda/queue/physical_block_size)"
echo "segments: $(cat /sys/block/vda/queue/max_segments)"
echo "vectors: $(ls {DISK}/msi_irqs | wc -l)"
echo "random: $(head -c 16 /dev/hwrng | od -An -tx1)"
for device in /sys/bus/pci/devices/*; do
    echo "at ${{device##*:}}: $(cat $device/vendor) $(cat $device/device)"
done
dmesg | grep -E "can't claim|no compatible bridge|failed to assign|Oops|BUG:" && echo "complaints"
poweroff -f
"""

TAKE_AGAIN = f"""\
sum() {{ dd if=/dev/vda bs=64k 2>/dev/null | sha256sum; }}
check() {{
    i=0
    while [ ! -b /dev/vda ] && [ $i -lt 100 ]; do i=$((i + 1)); sleep 0.1; done
    [ "$(sum)" = "$first" ] && echo "same after $1" || echo "DIFFERENT after $1"
}}
mount -t ext4 /dev/vda /mnt && dd if=/dev/urandom of=/mnt/data bs=64k count=64 2>/dev/null
umount /mnt
first=$(sum)
echo 3 >/proc/sys/vm/drop_caches
check caches
name=$(ls {DISK} | grep virtio)
echo $name >/sys/bus/virtio/drivers/virtio_blk/unbind
[ -e /sys/block/vda ] && echo "STILL THERE"
echo $name >/sys/bus/virtio/drivers/virtio_blk/bind
check unbind
echo 1 >{DISK}/remove
[ -e /sys/block/vda ] && echo "STILL THERE"
echo 1 >/sys/bus/pci/rescan
check rescan
echo 0000:00:01.0 >/sys/bus/pci/drivers/virtio-pci/unbind
echo "reset by: $(cat {DISK}/reset_method)"
echo 1 >{DISK}/reset
echo 0000:00:01.0 >/sys/bus/pci/drivers/virtio-pci/bind
check reset
mount -t ext4 /dev/vda /mnt && [ -e /mnt/data ] && echo "mounted"
umount /mnt
poweroff -f
"""


@pytest.fixture(scope="module")
def system() -> Iterator[System]:
    with System() as whole:
        yield whole


def printed(system: System, name: str, script: str) -> str:
    """What a guest of two vCPUs prints until it has powered off."""
    with StockGuest(system, name, script=script, vcpus=2) as guest:
        guest.make_disk()
        guest.define()
        guest.start_at_console()
        guest.console.wait_closed(90)
        text = guest.console.text.replace("\r", "")
        ended = guest.wait_stopped()
        assert (ended["state"], ended["state-reason"]) == ("stopped", "guest-poweroff"), text
        guest.check_disk()
        guest.ctl("undefine", name)
    return text


def test_linux_finds_the_devices_and_their_limits(system: System) -> None:
    text = printed(system, "look", LOOK)
    assert "queues: 2\n" in text
    assert "cache: write back\n" in text
    assert "blocks: 512 4096\n" in text
    assert "segments: 254\n" in text
    assert "vectors: 3\n" in text
    assert re.search(r"random: +([0-9a-f]{2} ?){16}\n", text)
    assert re.findall(r"at ([0-9a-f.]+): (0x\w+) (0x\w+)", text) == [
        ("00.0", "0x8086", "0x29c0"),
        ("01.0", "0x1af4", "0x1042"),
        ("05.0", "0x1af4", "0x1044"),
        ("06.0", "0x1af4", "0x1045"),
        *((f"10.{port}", "0x1b36", "0x000c") for port in range(8)),
        ("1f.0", "0x8086", "0x2918"),
    ]
    assert "complaints" not in text


def test_linux_lets_go_of_a_disk_and_takes_it_again(system: System) -> None:
    text = printed(system, "again", TAKE_AGAIN)
    for way in ("caches", "unbind", "rescan", "reset"):
        assert f"same after {way}\n" in text, text
    assert "reset by: flr" in text
    assert "STILL THERE" not in text
    assert "mounted\n" in text
