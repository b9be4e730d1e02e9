# SPDX-License-Identifier: Apache-2.0
"""``make run``: the main job, on real input, shown step by step.

An ordinary user, in no special group, defines and starts a machine whose disk is that user's own qcow2 file
(mode 0600, ext4) and whose kernel is Debian's stock kernel. The guest mounts the disk, writes a file, powers
off. Then the image is checked by qemu-img and the file read back from it. In between, a table shows what
each process may do.

It runs on this host's KVM when that can run a stock kernel, else in the nested host (tests/lab/nested.py),
where it does exactly the same. Exit code 0 when all of it went as said.
"""

from __future__ import annotations

import argparse
import os
import secrets
import sys
import time
from typing import Final

from tests.lab import capabilities, initramfs, kernels, namespace, processes
from tests.lab.daemon import NotReady
from tests.lab.guest import GuestFailed, StockGuest
from tests.lab.kernels import CHECKOUT
from tests.lab.nested import NestedHost, NestedHostFailed
from tests.lab.system import ALICE, SLOW, System

MACHINE: Final = "debian"

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
        say(f"Debian's stock kernel {kernel.release}, unpacked in {kernel.image.parent}")
        initramfs.base(kernel)
        why = "" if options.here else capabilities.absent("kvm-hardware")
        return in_nested_host(why) if why else here()
    except (WentWrong, GuestFailed, NotReady, NestedHostFailed, kernels.KernelUnavailable) as error:
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


def here() -> int:
    """The job, on this machine's /dev/kvm."""
    if not os.environ.get("VMBUS_LAB"):
        say(f"this host's KVM runs stock kernels; starting the private bus, {since_command()}")
    say("a private system bus (dbus-daemon) with polkitd; vmbus-broker as root; vmbusd as user vmbus")
    with System() as system:
        try:
            job(system)
        except (GuestFailed, WentWrong):
            for name, text in system.logs().items():
                print(f"-- log of {name}\n{text[-3000:]}", file=sys.stderr)
            raise
    say("all as it should be")
    return 0


def job(system: System) -> None:
    """Disk, definition, start, end, check."""
    word = secrets.token_hex(8)
    script = GUEST.format(word=word, linger=2 * SLOW)
    with StockGuest(system, MACHINE, script=script) as guest:
        say(f"user {ALICE} makes a disk: qcow2, ext4, mode 0600, in a directory that only {ALICE} can enter")
        print(guest.make_disk(), end="")
        say(f"{ALICE}: vmbusctl define {MACHINE}.toml (the disk's chain is looked up as that user)")
        print(guest.define(), end="")
        before = system.counts()
        say(f"{ALICE}: vmbusctl start {MACHINE}; its console, from vmbusctl console {MACHINE}:")
        guest.start(show=lambda line: print(f"  | {line}", flush=True))
        guest.console.wait_for("guest: file written", 60)
        say("what each process may do, while the machine runs")
        print(table(system))
        ended = guest.wait_stopped()
        say(f"the machine has ended: state {ended['state']}, reason {ended['state-reason']}")
        if ended["state-reason"] != "guest-poweroff":
            raise WentWrong("it did not end by powering off")
        say("qemu-img check, and the file read back with debugfs")
        print(guest.check_disk(), end="")
        found = guest.read_back("/written-by-the-guest")
        print(found, end="")
        if not found.startswith(f"{word} from "):
            raise WentWrong("the file in the image is not the one that the guest wrote")
        say("nothing of it is left: fds, processes, cgroups, taps, records in the run directory")
        after = system.settle(before)
        print(after)
        if after != before:
            raise WentWrong(f"before the start there were {before}")
        guest.ctl("undefine", MACHINE)


def table(system: System) -> str:
    """The processes of this system, and what the worker holds open."""
    named = [("dbus-daemon", system.bus.pid), ("polkitd", system.polkitd.pid)]
    named += [("vmbus-broker", system.broker.pid), ("vmbusd", system.service.pid)]
    named += [("vmbus-worker", pid) for pid in sorted(system.workers())]
    seen = [(name, processes.look(pid)) for name, pid in named]
    lines = [processes.table(seen)]
    for name, process in seen:
        if name == "vmbus-worker":
            lines.append(f"open in {name} {process.pid}:")
            lines += [f"  {number:>3} {target}" for number, target in process.fds.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
