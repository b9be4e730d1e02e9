# SPDX-License-Identifier: Apache-2.0
"""What a machine can do, by name, and why it cannot.

A test says ``@pytest.mark.requires("kvm", "bridge")``. Where a capability is absent, the test runs in the
nested host if that has it (``NESTED``), else it is skipped; the end of a run lists what was absent and what
was skipped for it. A probe returns "" for present, or one sentence; each is asked at most once.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import mmap
import os
import shutil
import struct
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from tests.lab import guest_disk, mended, nested
from tests.lab.emulator import EmulatorUnavailable

NESTED: Final = frozenset(
    {"bridge", "cgroup-v2-controllers", "device-mapper", "fuse", "hugepages", "io-uring", "ksm", "kvm"}
    | {"kvm-hardware", "landlock", "macvtap", "numa", "psi", "root", "systemd-in-namespaces", "tap"}
    | {"vhost-net"}
)
"""What the nested host has."""
MENDED: Final = NESTED | {"guest-cr8"}
"""What it has where its emulator is the mended one (tests/lab/mended.py)."""

KVM_GET_API_VERSION: Final = 0xAE00
KVM_CREATE_VM: Final = 0xAE01
KVM_GET_VCPU_MMAP_SIZE: Final = 0xAE04
KVM_CREATE_VCPU: Final = 0xAE41
KVM_RUN: Final = 0xAE80
KVM_SET_USER_MEMORY_REGION: Final = 0x4020AE46
KVM_GET_SREGS: Final = 0x8138AE83
KVM_SET_SREGS: Final = 0x4138AE84
KVM_SET_REGS: Final = 0x4090AE82
KVM_SET_TSS_ADDR: Final = 0xAE47
KVM_EXIT_HLT: Final = 5

LOOPS: Final = 2_500_000
FAST_ENOUGH: Final = 0.25
"""Seconds for 2 * LOOPS instructions: 20 million a second. Back ends that emulate were seen to do 3 to 5
million, the nested host's emulated processor 310 to 350, a real one thousands."""
DRIVERS: Final = ("kvm_intel", "kvm_amd")
SYS_IO_URING_SETUP: Final = 425
SYS_LANDLOCK_CREATE_RULESET: Final = 444


def absent(name: str) -> str:
    """Why capability ``name`` is not there, "" if it is. Raises KeyError for a name that nobody
    registered."""
    return _answer(name)


@functools.cache
def _answer(name: str) -> str:
    return PROBES[name]()


def _root() -> str:
    return "" if os.geteuid() == 0 else "not root"


def _kvm() -> str:
    try:
        fd = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        return f"/dev/kvm: {error.strerror}"
    try:
        version = fcntl.ioctl(fd, KVM_GET_API_VERSION)
    finally:
        os.close(fd)
    return "" if version == 12 else f"KVM API version {version}, not 12"


def _kvm_hardware() -> str:
    """A stock kernel needs a KVM whose guests run on the processor, or on an emulated one at its speed."""
    why = absent("kvm")
    if why:
        return why
    if not any(Path("/sys/module", driver).is_dir() for driver in DRIVERS):
        return f"KVM here has neither {' nor '.join(DRIVERS)} below it: a stock kernel does not get up"
    try:
        seconds = time_guest_loop(LOOPS)
    except OSError as error:
        return f"a guest of three instructions does not run ({error})"
    speed = 2 * LOOPS / seconds / 1e6
    if seconds < FAST_ENOUGH:
        return ""
    return (
        f"KVM here emulates: {speed:.1f} million guest instructions a second, a stock kernel does not get up"
    )


def _guest_cr8() -> str:
    """A guest may write CR8 while an interrupt waits for it: on a processor, and on one that QEMU emulates if
    it was mended."""
    emulated = "QEMU TCG" in Path("/proc/cpuinfo").read_text()
    if not emulated or os.environ.get("VMBUS_LAB_EMULATOR") == "mended":
        return absent("kvm-hardware")
    return "the processor is emulated by a QEMU that aborts when a guest writes CR8"


def time_guest_loop(loops: int) -> float:
    """Seconds that a real-mode guest takes for ``loops`` times "dec ecx; jnz". Raises OSError."""
    code = b"\x66\xb9" + struct.pack("<I", loops) + b"\x66\x49" + b"\x75\xfc" + b"\xf4"
    memory = mmap.mmap(-1, 0x2000)
    memory[0x1000 : 0x1000 + len(code)] = code
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    opened: list[int] = []
    try:
        kvm = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
        opened.append(kvm)
        machine = fcntl.ioctl(kvm, KVM_CREATE_VM, 0)
        opened.append(machine)
        fcntl.ioctl(machine, KVM_SET_TSS_ADDR, 0x7FFF0000)
        fcntl.ioctl(machine, KVM_SET_USER_MEMORY_REGION, struct.pack("<IIQQQ", 0, 0, 0, 0x2000, address))
        vcpu = fcntl.ioctl(machine, KVM_CREATE_VCPU, 0)
        opened.append(vcpu)
        run = mmap.mmap(vcpu, fcntl.ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0))
        sregs = bytearray(fcntl.ioctl(vcpu, KVM_GET_SREGS, bytes(312)))
        sregs[0:8] = bytes(8)  # cs.base
        sregs[12:14] = bytes(2)  # cs.selector
        fcntl.ioctl(vcpu, KVM_SET_SREGS, bytes(sregs))
        fcntl.ioctl(vcpu, KVM_SET_REGS, struct.pack("<18Q", *[0] * 16, 0x1000, 2))
        begin = time.monotonic()
        while True:
            try:
                fcntl.ioctl(vcpu, KVM_RUN, 0)
                break
            except InterruptedError:
                continue
        seconds = time.monotonic() - begin
        reason = struct.unpack_from("<I", run, 8)[0]
        run.close()
        if reason != KVM_EXIT_HLT:
            raise OSError(f"exit reason {reason} instead of hlt")
        return seconds
    finally:
        for fd in reversed(opened):
            os.close(fd)


def _iommu() -> str:
    groups = Path("/sys/kernel/iommu_groups")
    return "" if groups.is_dir() and any(groups.iterdir()) else "no IOMMU groups"


def _cgroup() -> str:
    try:
        present = set(Path("/sys/fs/cgroup/cgroup.controllers").read_text().split())
    except OSError:
        return "/sys/fs/cgroup is not cgroup v2"
    missing = {"cpu", "io", "memory", "pids"} - present
    return f"cgroup v2 lacks {', '.join(sorted(missing))}" if missing else ""


def _systemd_in_namespaces() -> str:
    """tests/testbed/systemd_host.py"""
    if not Path("/lib/systemd/systemd").exists():
        return "systemd is not installed"
    if "\toverlay\n" not in Path("/proc/filesystems").read_text() and not shutil.which("modprobe"):
        return "no overlayfs"
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    places = [place for _, place, kind, *_ in mounts if kind == "cgroup2"]
    return "" if any(os.access(place, os.W_OK) for place in places) else "cgroup v2 is not mounted"


def _fuse() -> str:
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return f"/dev/fuse: {error.strerror}"
    return ""


def _in_a_network_of_its_own(*command: str) -> str:
    done = subprocess.run(
        ["unshare", "--net", "--", *command], capture_output=True, text=True, check=False, timeout=30
    )
    return done.stderr.strip().replace("\n", "; ") if done.returncode else ""


def _bridge() -> str:
    return _in_a_network_of_its_own("ip", "link", "add", "br0", "type", "bridge")


def _device_mapper() -> str:
    """Loop devices, and targets of the device mapper that go bad when they are told to."""
    if not shutil.which("dmsetup"):
        return "no dmsetup"
    if shutil.which("modprobe"):
        subprocess.run(["modprobe", "-a", "loop", "dm_flakey"], capture_output=True, check=False)
    done = subprocess.run(["dmsetup", "targets"], capture_output=True, text=True, check=False)
    if done.returncode:
        return done.stderr.strip().replace("\n", "; ")
    return "" if "flakey" in done.stdout else "the device mapper has no flakey target"


def _tap() -> str:
    return _in_a_network_of_its_own("ip", "tuntap", "add", "tap0", "mode", "tap")


def _macvtap() -> str:
    """The kind of interface, and a /dev that the kernel fills."""
    script = "ip link add v0 type veth peer name v1; ip link add link v0 name m0 type macvtap || exit 1; "
    script += (
        "n=$(ip -o link show m0 | cut -d: -f1); test -c /dev/tap$n || { echo no /dev/tap$n >&2; exit 1; }"
    )
    return _in_a_network_of_its_own("sh", "-c", script)


def _vhost_net() -> str:
    """The device, or a module that makes it."""
    if Path("/dev/vhost-net").exists() or shutil.which("modprobe") is None:
        return "" if Path("/dev/vhost-net").exists() else "no /dev/vhost-net"
    done = subprocess.run(["modprobe", "-n", "-q", "vhost_net"], check=False)
    return "no vhost_net" if done.returncode else ""


def _selinux() -> str:
    return "" if Path("/sys/fs/selinux/enforce").exists() else "SELinux is off"


def _hugepages() -> str:
    return "" if Path("/sys/kernel/mm/hugepages/hugepages-2048kB").is_dir() else "no 2 MiB huge pages"


def _ksm() -> str:
    return "" if Path("/sys/kernel/mm/ksm/run").exists() else "the kernel has no KSM"


def _numa() -> str:
    nodes = list(Path("/sys/devices/system/node").glob("node[0-9]*"))
    return "" if len(nodes) > 1 else "there are no two NUMA nodes"


def _psi() -> str:
    try:
        return "" if Path("/proc/pressure/memory").read_text() else "no memory pressure"
    except OSError:
        return "the kernel does not measure memory pressure"


def _systemd() -> str:
    return "" if Path("/run/systemd/system").is_dir() else "systemd is not the init of this machine"


def _io_uring() -> str:
    libc = ctypes.CDLL(None, use_errno=True)
    parameters = ctypes.create_string_buffer(120)
    fd = libc.syscall(SYS_IO_URING_SETUP, 1, parameters)
    if fd < 0:
        return f"io_uring_setup: {os.strerror(ctypes.get_errno())}"
    os.close(fd)
    return ""


def _landlock() -> str:
    libc = ctypes.CDLL(None, use_errno=True)
    version = libc.syscall(SYS_LANDLOCK_CREATE_RULESET, None, 0, 1)
    return "" if version > 0 else f"landlock_create_ruleset: {os.strerror(ctypes.get_errno())}"


def _nested_host() -> str:
    return "this is one" if os.environ.get("VMBUS_LAB") == "nested" else nested.absent()


def _program(name: str) -> Callable[[], str]:
    return lambda: "" if shutil.which(name) else f"no {name}"


def _guest_disk() -> str:
    """It is made the first time that it is asked for; in the nested host there is what was made outside."""
    try:
        guest_disk.image()
    except (guest_disk.GuestDiskFailed, OSError) as error:
        return f"it cannot be made: {error}"
    return ""


def _mended_emulator() -> str:
    """Built the first time that it is asked for."""
    try:
        mended.command()
    except EmulatorUnavailable as error:
        return str(error)
    return ""


PROBES: Final[dict[str, Callable[[], str]]] = {
    "bridge": _bridge,
    "cgroup-v2-controllers": _cgroup,
    "device-mapper": _device_mapper,
    "fuse": _fuse,
    "guest-cr8": _guest_cr8,
    "guest-disk": _guest_disk,
    "hugepages": _hugepages,
    "io-uring": _io_uring,
    "iommu": _iommu,
    "ksm": _ksm,
    "kvm": _kvm,
    "kvm-hardware": _kvm_hardware,
    "landlock": _landlock,
    "libvirt": _program("virsh"),
    "macvtap": _macvtap,
    "mended-emulator": _mended_emulator,
    "nested-host": _nested_host,
    "numa": _numa,
    "psi": _psi,
    "root": _root,
    "selinux": _selinux,
    "selinux-compiler": _program("checkmodule"),
    "systemd": _systemd,
    "systemd-in-namespaces": _systemd_in_namespaces,
    "systemd-analyze": _program("systemd-analyze"),
    "tap": _tap,
    "vhost-net": _vhost_net,
}
