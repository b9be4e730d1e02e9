# SPDX-License-Identifier: Apache-2.0
"""``make run``: the main job, on real input, shown step by step.

An ordinary user, in no special group, defines and starts a machine whose disk is that user's own qcow2 file
(mode 0600, ext4) and whose kernel is Debian's stock kernel. The guest mounts the disk, writes a file,
powers off. Then the image is checked by qemu-img and the file read back from it. In between, a table shows
what each process may do.

It runs on this host's KVM when that can run a stock kernel, else in the nested host (tests/lab/nested.py),
where it does exactly the same. Exit code 0 when all of it went as said.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import BinaryIO, Final

from tests.lab import capabilities, initramfs, kernels, namespace, processes
from tests.lab.daemon import NotReady
from tests.lab.kernels import CHECKOUT
from tests.lab.nested import NestedHost, NestedHostFailed
from tests.lab.system import ALICE, SLOW, System

MACHINE: Final = "debian"
DISK_SIZE: Final = "64M"

GUEST: Final = """\
echo "guest: kernel $(uname -r), $(grep -c ^processor /proc/cpuinfo) processor(s)"
mount -t ext4 /dev/vda /mnt && echo "guest: /dev/vda mounted"
echo "{word} from $(uname -r)" >/mnt/written-by-the-guest && echo "guest: file written"
sync
umount /mnt
sleep {linger}
echo "guest: powering off"
poweroff -f
"""

DEFINITION: Final = """\
name = "{name}"
memory = "256M"
vcpus = 1

[kernel]
path = "{kernel}"
initrd-path = "{initrd}"
cmdline = "console=ttyS0 quiet panic=-1"

[[disks]]
id = "root"
[[disks.layers]]
path = "{disk}"
format = "qcow2"
"""


class WentWrong(Exception):
    """A step did not do what it was said to do."""


def main() -> int:
    """Choose the place and do the job there."""
    parser = argparse.ArgumentParser(prog="make run", description="The main job of vmbus, step by step.")
    parser.add_argument("--here", action="store_true", help="never in a nested host")
    options = parser.parse_args()
    namespace.enter()
    try:
        kernel = kernels.stock("6.12")
        say(f"Debian's stock kernel {kernel.release} is in {kernel.image.relative_to(CHECKOUT)}")
        initramfs.base(kernel)
        why = "" if options.here else capabilities.absent("kvm-hardware")
        return in_nested_host(why) if why else here(kernel)
    except (WentWrong, NotReady, NestedHostFailed, kernels.KernelUnavailable) as error:
        print(f"make run: {error}", file=sys.stderr)
        return 1


def say(what: str) -> None:
    """A step, for people."""
    print(f"==> {what}", flush=True)


def since_command() -> str:
    """How long ago ``make run`` was entered."""
    begun = float(os.environ.get("VMBUS_RUN_BEGUN") or time.time())
    return f"{time.time() - begun:.1f} s after the command"


def in_nested_host(why: str) -> int:
    """The same job in the nested host."""
    say(f"this host cannot run a stock kernel: {why}")
    say(
        f"starting the nested host, {since_command()}: QEMU emulates a processor with SVM, so it has real KVM"
    )
    with NestedHost() as host:
        say("the nested host is up; the rest runs in it")
        words = [sys.executable, "-m", "setup.run", "--here"]
        done = host.run(words, cwd=CHECKOUT, timeout=600, stream=sys.stdout.buffer)
        say("powering the nested host off")
    return 1 if done.code is None else done.code


def here(kernel: kernels.Kernel) -> int:
    """The job, on this machine's /dev/kvm."""
    if not os.environ.get("VMBUS_LAB"):
        say(f"this host's KVM runs stock kernels; starting the private bus, {since_command()}")
    say("a private system bus (dbus-daemon) with polkitd; vmbus-broker as root; vmbusd as user vmbus")
    with System() as system:
        say(f"user {ALICE} makes a disk: qcow2, {DISK_SIZE}, ext4, mode 0600, in a directory of its own")
        disk = make_disk(system)
        word = secrets.token_hex(8)
        initrd = initramfs.guest(GUEST.format(word=word, linger=2 * SLOW), kernel=kernel)
        define(system, kernel, initrd, disk)
        before = system.counts()
        run_machine(system)
        check_image(system, disk, word)
        say(
            "the machine has left nothing behind: fds, processes, cgroups, taps, records in the run directory"
        )
        after = system.settle(before)
        if after != before:
            raise WentWrong(f"left over: {before} before, {after} after")
        ctl(system, "undefine", MACHINE)
    say("all as it should be")
    return 0


def make_disk(system: System) -> Path:
    """An image of the user's own, made by the user."""
    disk = system.files(ALICE) / "disk.qcow2"
    script = f"""set -e; umask 077
truncate -s {DISK_SIZE} disk.raw; /sbin/mkfs.ext4 -q disk.raw
qemu-img convert -f raw -O qcow2 disk.raw {disk}; rm disk.raw; ls -l {disk}"""
    print(succeed(system.run_as(ALICE, ["sh", "-c", script], timeout=60)), end="")
    return disk


def define(system: System, kernel: kernels.Kernel, initrd: Path, disk: Path) -> None:
    """vmbusctl define, and what it says."""
    say(f"{ALICE}: vmbusctl define {MACHINE}.toml (the chain of the disk is looked up as that user)")
    text = DEFINITION.format(name=MACHINE, kernel=kernel.image, initrd=initrd, disk=disk)
    succeed(system.run_as(ALICE, ["sh", "-c", f"cat >{MACHINE}.toml"], stdin=text))
    print(ctl(system, "define", f"{MACHINE}.toml"), end="")


def run_machine(system: System) -> None:
    """Start it, show its console and the table, wait for its end."""
    say(f"{ALICE}: vmbusctl start {MACHINE}")
    print(ctl(system, "start", MACHINE), end="")
    say(f"{ALICE}: vmbusctl console {MACHINE} --read-only")
    console = system.popen(
        ALICE,
        ["vmbusctl", "console", MACHINE, "--read-only"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
    )
    written = threading.Event()
    assert console.stdout
    show = threading.Thread(target=show_console, args=(console.stdout, written), daemon=True)
    show.start()
    if not written.wait(60 * SLOW):
        console.kill()
        raise WentWrong(f"the guest has not written its file\n{logs(system)}")
    say("what each process may do, while the machine runs")
    print(table(system))
    print(ctl(system, "wait", MACHINE, "--timeout", str(60 * SLOW), timeout=70), end="")
    console.wait(10 * SLOW)
    show.join(5)
    print(ctl(system, "show", MACHINE), end="")
    shown = json.loads(ctl(system, "show", MACHINE, "--json"))
    if "guest-poweroff" not in json.dumps(shown):
        raise WentWrong(f"the machine did not end by powering off: {shown}")


def show_console(stream: BinaryIO, written: threading.Event) -> None:
    """Copy the console to our output."""
    for line in stream:
        print("  | " + line.decode(errors="replace").rstrip("\r\n"), flush=True)
        if b"guest: file written" in line:
            written.set()


def check_image(system: System, disk: Path, word: str) -> None:
    """qemu-img check, and the file read back without the guest."""
    say("qemu-img check, and the file read back with debugfs")
    print(succeed(system.run_as(ALICE, ["qemu-img", "check", str(disk)], timeout=60)), end="")
    script = f"""qemu-img convert -f qcow2 -O raw {disk} back.raw
/sbin/debugfs -R 'cat /written-by-the-guest' back.raw"""
    read = succeed(system.run_as(ALICE, ["sh", "-c", script], timeout=60))
    print(read, end="")
    if not read.startswith(f"{word} from "):
        raise WentWrong(f"the file in the image is not the one that the guest wrote: {read!r}")


def table(system: System) -> str:
    """The processes of this system."""
    named = [("dbus-daemon", system.bus.pid), ("polkitd", system.polkitd.pid)]
    named += [("vmbus-broker", system.broker.pid), ("vmbusd", system.service.pid)]
    named += [("vmbus-worker", pid) for pid in sorted(system.workers())]
    seen = [(name, processes.look(pid)) for name, pid in named]
    lines = [processes.table(seen)]
    for name, process in seen:
        if name == "vmbus-worker":
            lines.append(f"fds of {name} {process.pid}:")
            lines += [f"  {number:>3} {target}" for number, target in process.fds.items()]
    return "\n".join(lines)


def ctl(system: System, *words: str, timeout: float = 60) -> str:
    """vmbusctl as the user; its output."""
    return succeed(system.vmbusctl(ALICE, *words, timeout=timeout), logs(system))


def logs(system: System) -> str:
    """All logs in one text."""
    return "\n".join(f"-- {name}\n{text[-3000:]}" for name, text in system.logs().items())


def succeed(done: subprocess.CompletedProcess[str], more: str = "") -> str:
    """The output of a command that went well."""
    if done.returncode:
        words = " ".join(str(word) for word in done.args)
        raise WentWrong(f"{words}: exit code {done.returncode}\n{done.stdout}{done.stderr}{more}")
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
