# SPDX-License-Identifier: Apache-2.0
"""A Debian disk that boots by itself, by BIOS and by UEFI, to a login on the serial port.

Made with mmdebstrap (minbase, sysvinit, Debian's cloud kernel) and GRUB, once; the cache keeps it, named by
what it is made from. Nothing is mounted and no loop device is used: ``mke2fs -d`` fills the root file system,
mtools the EFI system partition, and GRUB's images are put where its own setup would put them.

    python -m tests.lab.guest_disk          # make it, print where it is

| partition | what |
|---|---|
| 1 | BIOS boot partition: GRUB's core image for BIOS |
| 2 | EFI system partition: GRUB for x86_64-efi as EFI/BOOT/BOOTX64.EFI |
| 3 | root, ext4, label ``root`` |
"""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import struct
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

from tests.lab.kernels import CACHE

MIB: Final = 1 << 20
SECTOR: Final = 512
BIOS: Final = (1 * MIB, 1 * MIB)  # offset, size
ESP: Final = (2 * MIB, 34 * MIB)
ROOT: Final = (36 * MIB, 620 * MIB)
SIZE: Final = 657 * MIB
SUITE: Final = "bookworm"
PACKAGES: Final = "linux-image-cloud-amd64,sysvinit-core,initramfs-tools,busybox"
MODULES: Final = [
    "part_gpt",
    "ext2",
    "normal",
    "linux",
    "serial",
    "terminal",
    "configfile",
    "search",
    "search_label",
    "echo",
    "test",
]
LOGIN: Final = "vmbus-guest login:"
DEADLINE: Final = 900

GRUB_CONFIG: Final = """\
serial --unit=0 --speed=115200
terminal_input serial
terminal_output serial
set timeout=0
echo "GRUB on $grub_platform"
linux /vmlinuz root=LABEL=root ro console=ttyS0 quiet mitigations=off
initrd /initrd.img
boot
"""
EARLY_CONFIG: Final = """\
search --no-floppy --label root --set=root
set prefix=($root)/boot/grub
configfile ($root)/boot/grub/grub.cfg
"""
INITTAB: Final = """\
id:2:initdefault:
si::sysinit:/etc/vmbus-start
1:2:respawn:/sbin/getty -L ttyS0 115200 vt100
p0::powerwait:/sbin/poweroff
"""
START: Final = """\
#!/bin/sh
export PATH=/sbin:/bin:/usr/sbin:/usr/bin
mount -o remount,rw /
mount -t proc proc /proc; mount -t sysfs sysfs /sys; mount -t devtmpfs dev /dev; mount -t tmpfs run /run
hostname vmbus-guest
test -d /sys/firmware/efi && echo "booted by UEFI" || echo "booted by BIOS"
"""
CUSTOMIZE: Final = """\
set -e
cat >"$1/etc/inittab" <<'END'
{inittab}END
cat >"$1/etc/vmbus-start" <<'END'
{start}END
chmod 755 "$1/etc/vmbus-start"
echo vmbus-guest >"$1/etc/hostname"
mkdir -p "$1/boot/grub"
cat >"$1/boot/grub/grub.cfg" <<'END'
{grub}END
chroot "$1" passwd -d root >/dev/null
rm -rf "$1"/var/cache/apt/* "$1"/var/lib/apt/lists/* "$1"/usr/share/doc/* "$1"/usr/share/locale/*
"""


class GuestDiskFailed(Exception):
    """A tool that makes the disk failed; the message is its last lines."""


def image() -> Path:
    """The disk, a raw file that nobody may change; made when the cache has none. Raises GuestDiskFailed."""
    made_from = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]
    directory = CACHE / "guest-disks"
    directory.mkdir(parents=True, exist_ok=True)
    target = directory / f"debian-{made_from}.raw"
    with (directory / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            with tempfile.TemporaryDirectory(dir=directory) as place:
                _make(Path(place)).rename(target)
            target.chmod(0o444)
    return target


def _make(place: Path) -> Path:
    tree = place / "tree"
    hook = place / "customize"
    hook.write_text("#!/bin/sh\n" + CUSTOMIZE.format(inittab=INITTAB, start=START, grub=GRUB_CONFIG))
    hook.chmod(0o755)
    _run(
        "mmdebstrap", "--mode=root", "--variant=minbase", f"--include={PACKAGES}", f"--customize-hook={hook}",
        "--aptopt=Apt::Install-Recommends false", "--dpkgopt=path-exclude=/usr/share/man/*", SUITE, str(tree),
    )  # fmt: skip
    root = place / "root.ext4"
    _run("mke2fs", "-q", "-t", "ext4", "-L", "root", "-d", str(tree), str(root), f"{ROOT[1] // 1024}k")
    shutil.rmtree(tree)
    disk = place / "disk.raw"
    with disk.open("wb") as file:
        file.truncate(SIZE)
    _partition(disk)
    with disk.open("r+b") as file:
        file.seek(ROOT[0])
        with root.open("rb") as content:
            shutil.copyfileobj(content, file, MIB)
    _install_bios(disk, place)
    _install_efi(disk, place)
    _run("fallocate", "--dig-holes", str(disk))
    return disk


def _partition(disk: Path) -> None:
    def line(place: tuple[int, int], kind: str) -> str:
        return f"start={place[0] // SECTOR}, size={place[1] // SECTOR}, type={kind}\n"

    table = "label: gpt\nlabel-id: 7B8F1C52-6D1E-4E63-9A55-0D1B5C1E6A01\n"
    table += line(BIOS, "21686148-6449-6E6F-744E-656564454649") + line(ESP, "U") + line(ROOT, "L")
    _run("sfdisk", "--quiet", str(disk), text=table)


def _install_bios(disk: Path, place: Path) -> None:
    """As grub-bios-setup: the boot sector names the core image's first sector, which names the rest."""
    core = place / "core.img"
    early = place / "early.cfg"
    early.write_text(EARLY_CONFIG)
    modules = ["biosdisk", *MODULES]
    _run(
        "grub-mkimage", "-O", "i386-pc", "-o", str(core), "-p", "/boot/grub", "-c", str(early), *modules
    )  # fmt: skip
    boot = bytearray(Path("/usr/lib/grub/i386-pc/boot.img").read_bytes())
    content = bytearray(core.read_bytes())
    content += bytes(-len(content) % SECTOR)
    first = BIOS[0] // SECTOR
    struct.pack_into("<Q", boot, 0x5C, first)
    # diskboot.img's list: sector, count, segment; it begins with the second sector of the core image.
    struct.pack_into("<QHH", content, 0x1F4, first + 1, len(content) // SECTOR - 1, 0x820)
    with disk.open("r+b") as file:
        file.write(boot[:440])  # the partition table follows
        file.seek(BIOS[0])
        file.write(content)


def _install_efi(disk: Path, place: Path) -> None:
    program = place / "bootx64.efi"
    early = place / "early.cfg"
    _run(
        "grub-mkimage", "-O", "x86_64-efi", "-o", str(program), "-p", "/boot/grub", "-c", str(early), *MODULES
    )  # fmt: skip
    esp = place / "esp.fat"
    with esp.open("wb") as file:
        file.truncate(ESP[1])
    _run("mkfs.vfat", "-F", "32", str(esp))
    _run("mmd", "-i", str(esp), "::/EFI", "::/EFI/BOOT")
    _run("mcopy", "-i", str(esp), str(program), "::/EFI/BOOT/BOOTX64.EFI")
    with disk.open("r+b") as file:
        file.seek(ESP[0])
        file.write(esp.read_bytes())


def _run(*argv: str, text: str | None = None) -> None:
    done = subprocess.run(argv, input=text, capture_output=True, text=True, check=False, timeout=DEADLINE)
    if done.returncode:
        raise GuestDiskFailed(f"{argv[0]}: {done.stderr.strip()[-2000:] or done.stdout.strip()[-2000:]}")


if __name__ == "__main__":
    print(image())
    sys.exit(0)
