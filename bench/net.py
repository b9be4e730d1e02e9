# SPDX-License-Identifier: Apache-2.0
"""Host CPU time of a packet through virtio-net on a tap, beside QEMU on the same /dev/kvm.

The same bare-metal guest (tests/guests, mode net-echo) answers echo requests that this program sends over the
bridge, a few at a time, so that each costs a packet in and a packet out. Counted is what the process used,
but for its vCPU: on a software KVM the guest's own instructions are most of that, and the same for both.
QEMU is run with its own tap back end (vhost=off), and as it is by default otherwise. Where the host has
vhost-net, vmbus is run with it too: the kernel's thread for it is then one of the process's. All run in turn;
``alone`` leaves QEMU out.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench import report
from bench.peers import EMULATOR
from bench.system import Measured
from tests.lab.bridge import RULE, bridge, grant
from tests.lab.system import ALICE
from tests.local.worker_guest import image

PACKETS = 5000
ROUNDS = 5
AT_ONCE = 8
SIZE = 1000  # bytes of data
GUEST = "10.97.0.2"
BRIDGE = f"vmbb{os.getpid()}"
TICK = os.sysconf("SC_CLK_TCK")
VHOST = Path("/sys/class/misc/vhost-net")
WORDS = f"net-echo count={1 << 30} address={0x0A610002}"


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


def device_seconds(pid: int) -> float:
    """What all threads of a process have used, but for its vCPU's."""
    ticks = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        name = (task / "comm").read_text()
        fields = (task / "stat").read_text().rpartition(")")[2].split()
        if not name.startswith(("vcpu", "CPU ")):
            ticks += int(fields[11]) + int(fields[12])
    return ticks / TICK


def checksum(data: bytes) -> int:
    total = sum(struct.unpack(f">{len(data) // 2}H", data))
    total = (total & 0xFFFF) + (total >> 16)
    return ~(total + (total >> 16)) & 0xFFFF


def exchange(packets: int) -> None:
    """Send so many echo requests, AT_ONCE of them on their way at a time, and take the answers."""
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as raw:
        raw.settimeout(20)
        raw.connect((GUEST, 0))
        body = bytes(SIZE)
        for number in range(packets + AT_ONCE):
            if number < packets:
                empty = struct.pack(">BBHHH", 8, 0, 0, 4711, number & 0xFFFF)
                sum_of = checksum(empty + body)
                raw.send(struct.pack(">BBHHH", 8, 0, sum_of, 4711, number & 0xFFFF) + body)
            if number >= AT_ONCE:
                while raw.recv(2000)[20] != 0:
                    pass


def wait_for_guest() -> None:
    """Until it answers."""
    for _ in range(100):
        words = ["busybox", "ping", "-c", "1", "-W", "1", GUEST]
        if subprocess.run(words, check=False, capture_output=True).returncode == 0:
            return
    raise RuntimeError("the guest does not answer")


def measure(pid: int) -> float:
    """Microseconds of a packet, in or out."""
    wait_for_guest()
    before = device_seconds(pid)
    exchange(PACKETS)
    return (device_seconds(pid) - before) / (2 * PACKETS) * 1e6


def ours(system: Measured) -> float:
    system.vmbusctl(ALICE, "start", "net", timeout=60)
    try:
        [pid] = system.workers()
        return measure(pid)
    finally:
        system.vmbusctl(ALICE, "kill", "net", timeout=60)
        ip("neighbour", "flush", "dev", BRIDGE)


def theirs() -> float:
    ip("tuntap", "add", "vmbbtap", "mode", "tap", "vnet_hdr")
    ip("link", "set", "vmbbtap", "master", BRIDGE, "up")
    words = [
        EMULATOR,
        "-name",
        "net,debug-threads=on",
        "-M",
        "q35,accel=kvm",
        "-m",
        "64",
        "-nodefaults",
        "-display",
        "none",
        "-no-reboot",
    ]
    words += ["-kernel", str(image()), "-append", WORDS, "-serial", "null"]
    words += ["-netdev", "tap,id=n,ifname=vmbbtap,script=no,downscript=no,vhost=off"]
    words += ["-device", "virtio-net-pci,netdev=n,addr=3,disable-legacy=on,romfile="]
    try:
        with subprocess.Popen(words) as process:
            try:
                return measure(process.pid)
            finally:
                process.kill()
    finally:
        ip("link", "del", "vmbbtap")
        ip("neighbour", "flush", "dev", BRIDGE)


def defined(system: Measured) -> Measured:
    """With the machine, and a rule that lets it have the bridge."""
    system.rule(RULE)
    words = ["define", "--name", "net", "--memory", "16M", "--kernel", str(system.kernel)]
    done = system.vmbusctl(ALICE, *words, "--cmdline", WORDS, "--nic", BRIDGE)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return system


def main() -> None:
    """Run and report."""
    words = sys.argv[1:]
    alone = "alone" in words
    rounds = next((int(word) for word in words if word.isdigit()), ROUNDS)
    kinds = {"vmbus": "[vhost-net]\nusers = []\n"}
    if VHOST.exists():
        kinds["vmbus-vhost"] = f'[vhost-net]\nusers = ["{ALICE}"]\n'
    found: dict[str, list[float]] = {name: [] for name in (*kinds, *([] if alone else ["qemu"]))}
    with contextlib.ExitStack() as stack:
        stack.enter_context(bridge(BRIDGE, "10.97.0.1/24"))
        systems = {
            name: defined(stack.enter_context(Measured(policy=grant(BRIDGE) + policy)))
            for name, policy in kinds.items()
        }
        for _ in range(rounds):
            for name, times in found.items():
                times.append(ours(systems[name]) if name in systems else theirs())
                time.sleep(0.1)
    least = {name: min(times) for name, times in found.items()}
    pairs = (("vmbus", "qemu"), ("vmbus-vhost", "vmbus"), ("vmbus-vhost", "qemu"))
    figures: dict[str, Any] = {f"{name}-us": report.spread(times, digits=2) for name, times in found.items()}
    for one, other in pairs:
        if one in least and other in least:
            figures[f"{one}-to-{other}"] = round(least[one] / least[other], 3)
    report.emit("net", packets=2 * PACKETS, **figures, aims={"vmbus-to-qemu": 0.5})


if __name__ == "__main__":
    main()
