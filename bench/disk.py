# SPDX-License-Identifier: Apache-2.0
"""Host CPU time of a virtio-blk request, beside QEMU on the same /dev/kvm.

The same bare-metal guest (tests/guests, mode disk-load) reads 4 KiB at a time from the first MiB of the same
raw file, one request after the other. Counted is what the process used, but for its vCPU: on a software KVM
the guest's own instructions are most of that, and the same for both. QEMU has an I/O thread for the disk,
io_uring and no cache of the host's (with it and with its adaptive polling switched off). All run in turn.
"""

from __future__ import annotations

import os
import pwd
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from bench import report
from bench.net import device_seconds
from bench.peers import EMULATOR
from bench.system import Measured
from tests.lab.guest import Console
from tests.lab.system import ALICE
from tests.local.worker_guest import image

ROUNDS = 5
SECONDS = 3.0
SIZE = 16 << 20
WORDS = "disk-load bytes=4096 beat=100"


def measure(pid: int, text: Callable[[], str]) -> float:
    """Microseconds of a request. ``text`` is the guest's console."""

    def next_count(last: int, deadline: float) -> int:
        while time.monotonic() < deadline:
            found = re.findall(r"load: (\d+)\n", text())
            if found and int(found[-1]) > last:
                return int(found[-1])
            time.sleep(0.001)
        raise RuntimeError(f"the guest does not read: {text()[-500:]}")

    first = next_count(next_count(0, time.monotonic() + 60), time.monotonic() + 60)
    before = device_seconds(pid)
    time.sleep(SECONDS)
    last = next_count(first + 1, time.monotonic() + 60)
    last = next_count(last, time.monotonic() + 60)
    return (device_seconds(pid) - before) / (last - first) * 1e6


def ours(system: Measured) -> float:
    system.vmbusctl(ALICE, "start", "disk", timeout=60)
    console = Console(system, ALICE, "disk", "--read-only")
    try:
        [pid] = system.workers()
        return measure(pid, lambda: console.text)
    finally:
        console.close()
        system.vmbusctl(ALICE, "kill", "disk", timeout=60)


def theirs(disk: Path, *, polls: bool) -> float:
    words = [EMULATOR, "-name", "disk,debug-threads=on", "-M", "q35,accel=kvm", "-m", "64", "-nodefaults"]
    words += ["-display", "none", "-no-reboot", "-serial", "stdio", "-kernel", str(image()), "-append", WORDS]
    words += ["-object", f"iothread,id=t{'' if polls else ',poll-max-ns=0'}"]
    words += ["-drive", f"file={disk},format=raw,if=none,id=d,aio=io_uring,cache.direct=on"]
    words += ["-device", "virtio-blk-pci,drive=d,iothread=t,addr=1,disable-legacy=on"]
    said: list[bytes] = []
    with subprocess.Popen(words, stdout=subprocess.PIPE) as process:
        assert process.stdout
        reader = threading.Thread(target=said.extend, args=(process.stdout,), daemon=True)
        reader.start()
        try:
            return measure(process.pid, lambda: b"".join(said).replace(b"\r", b"").decode(errors="replace"))
        finally:
            process.kill()
            reader.join()


def main() -> None:
    """Run and report. Argument: rounds."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS
    vmbus, polling, plain = [], [], []
    with Measured() as system, tempfile.NamedTemporaryFile(dir=system.files(ALICE)) as file:
        os.truncate(file.name, SIZE)
        Path(file.name).write_bytes(os.urandom(SIZE))
        os.chown(file.name, pwd.getpwnam(ALICE).pw_uid, -1)
        words = ["define", "--name", "disk", "--memory", "16M", "--kernel", str(system.kernel)]
        done = system.vmbusctl(ALICE, *words, "--cmdline", WORDS, "--disk", f"{file.name},format=raw")
        if done.returncode:
            raise RuntimeError(done.stderr)
        for _ in range(rounds):
            vmbus.append(ours(system))
            polling.append(theirs(Path(file.name), polls=True))
            plain.append(theirs(Path(file.name), polls=False))
    report.emit(
        "disk",
        bytes=4096,
        **{
            "vmbus-us": report.spread(vmbus, digits=2),
            "qemu-us": report.spread(polling, digits=2),
            "qemu-without-polling-us": report.spread(plain, digits=2),
            "vmbus-to-qemu": round(min(vmbus) / min(polling), 3),
            "vmbus-to-qemu-without-polling": round(min(vmbus) / min(plain), 3),
        },
        aims={"vmbus-to-qemu": 0.5},
    )


if __name__ == "__main__":
    main()
