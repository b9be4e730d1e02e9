# SPDX-License-Identifier: Apache-2.0
"""The nested host: a real Linux host with KVM, in a QEMU machine under pure emulation.

QEMU's emulated CPU has SVM and nested paging, so kvm-amd works in it and stock Debian guests boot there at
a usable speed whatever KVM this machine has. Words: L0 is this machine, L1 the nested host, L2 a guest of
vmbus in L1.

L1's root is L0's ``/``, read-only over 9p with a tmpfs overlay, so the checkout and its ``.venv`` are at
the same path; what L1 writes is gone with it, except under ``/out``, which is a directory of L0
(``NestedHost.out``). L1 has Debian's stock 6.12 kernel, no systemd and no network; pid 1 is ``AGENT``
below. It has /dev/kvm, /dev/fuse, tun, securityfs, PSI, two NUMA nodes, a page of 1 GiB, and cgroup v2 with
all controllers delegated at the root.

    python -m tests.lab.nested run -- ls -l /dev/kvm    # boot (6-12 s), run, power off; CMD's exit code
    python -m tests.lab.nested shell-script FILE        # the same for a script (bash)
    python -m tests.lab.nested run --memory 4096 --cpus 1 --timeout 300 --qemu '-device igb' -- CMD…

or, one boot for many commands (0.1 s each):

    with NestedHost() as host:
        done = host.run(["dmesg"], timeout=20)                # done.code, done.output
        command = host.spawn("sleep 100", stream=sys.stdout.buffer)
        command.kill()

Stock kernels and small initrds for L2: tests/lab/kernels.py and tests/lab/initramfs.py.

A command runs in a session of its own; output goes to a file on the share and is read here while it grows;
orders and ends go over a virtio-serial port, so nothing polls inside L1. QEMU is killed with the thread
that started it (PR_SET_PDEATHSIG). What is left out: KVM of L0 is never used for L1, so that the bed is the
same everywhere.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import fcntl
import os
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Final

from tests.lab import emulator, initramfs, kernels, mended
from tests.lab.kernels import CACHE, CHECKOUT

BOOT_MODULES: Final = ("virtio_pci", "virtio_console", "virtio_rng", "9pnet_virtio", "9p", "overlay")
SHARE: Final = "trans=virtio,version=9p2000.L,msize=512000,access=any"
PR_SET_PDEATHSIG: Final = 1
POLL: Final = 0.05
MEMORY: Final = 4096
"""MiB, of which a page of 1 GiB is set aside at boot: later there is none in one piece."""
CPUS: Final = 1
"""With two, the emulation of nested SVM goes wrong now and then: an L2 goes on with the page tables of L1, or
L1 with those of L2. With one it is as fast, since the thread of the other mostly waited."""
SECOND_NODE: Final = 512
"""MiB of memory on the second NUMA node."""

# The first stage, busybox in the initramfs. It has to *switch* root: after a mere chroot the kernel finds no
# /sbin/modprobe, and every module that would load by itself fails in silence.
INIT: Final = f"""\
#!/bin/sh
export PATH=/bin
mkdir -p /proc /sys /dev /low /up /new
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
while read module; do insmod /modules/$module; done </modules/order
mount -t 9p -o ro,cache=loose,{SHARE} root /low || echo "no root share"
mount -t tmpfs -o mode=755,size=80% up /up
mkdir /up/upper /up/work
mount -t overlay -o lowerdir=/low,upperdir=/up/upper,workdir=/up/work root /new || echo "no overlay"
mkdir -p /new/out /new/lib/modules /new/proc /new/sys /new/dev
mount -t 9p -o cache=none,{SHARE} out /new/out || echo "no out share"
mount -t tmpfs -o mode=755 run /new/run
mkdir /new/run/lab
cp /agent /new/run/lab/agent
mount --move /proc /new/proc
mount --move /sys /new/sys
mount --move /dev /new/dev
exec switch_root /new /bin/bash /run/lab/agent
"""

# The second stage and pid 1. Words on the port: "run N", "kill N", "off"; answers: "ready", "done N CODE".
AGENT: Final = """\
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
export HOME=/root LANG=C.UTF-8 TERM=dumb VMBUS_LAB=nested
cd /
for word in $(cat /proc/cmdline); do case $word in lab.modules=*) modules=${word#lab.modules=};; esac; done
mkdir -p /lib/modules/$(uname -r) /dev/pts /dev/shm /dev/mqueue /dev/hugepages /run/lock
mount --bind "$modules" /lib/modules/$(uname -r)
mount -t devpts -o mode=600,ptmxmode=666 devpts /dev/pts
mount -t tmpfs -o mode=1777 shm /dev/shm
mount -t securityfs securityfs /sys/kernel/security
mount -t cgroup2 cgroup2 /sys/fs/cgroup
for controller in $(cat /sys/fs/cgroup/cgroup.controllers); do
    echo "+$controller" >/sys/fs/cgroup/cgroup.subtree_control
done
hostname nested
ip link set lo up
chmod 666 /dev/null /dev/zero /dev/full /dev/random /dev/urandom /dev/tty
ln -sf /proc/self/fd /dev/fd
modprobe -a kvm-amd fuse tun
chmod 666 /dev/fuse /dev/net/tun
mount -t hugetlbfs hugetlbfs /dev/hugepages
exec 3<>/dev/vport*p1
echo ready >&3
while :; do
    while read -r -u 3 verb number; do
        case $verb in
        run)
            (
                setsid bash /out/$number.sh >/out/$number.log 2>&1 </dev/null 3>&- &
                echo $! >/run/lab/$number.pid
                wait $!
                echo "done $number $?" >&3
            ) &
            ;;
        kill) kill -KILL -- -$(cat /run/lab/$number.pid) ;;
        off) sync; echo o >/proc/sysrq-trigger ;;
        esac
    done
    sleep 0.2
done
"""


class NestedHostFailed(Exception):
    """The nested host did not boot or died; the message ends with the last lines of its console."""


class NestedHostDied(NestedHostFailed):
    """QEMU has ended by itself: it aborted, or L1 had a triple fault, of which no console tells; then the
    message has the registers."""


@dataclass(frozen=True)
class Done:
    """A command that has ended.

    ``code`` is as bash has it, 128 + n for signal n; None says that it was ended by us at its deadline.
    """

    code: int | None
    output: str


class Command:
    """A command running in L1."""

    def __init__(self, host: NestedHost, number: int, stream: BinaryIO | None) -> None:
        self._host = host
        self._number = number
        self._stream = stream
        self._shown = 0
        self.code: int | None = None

    @property
    def _log(self) -> Path:
        return self._host.out / f"{self._number}.log"

    def output(self) -> str:
        """Everything that it has written so far, stdout and stderr as they came."""
        return self._log.read_bytes().decode(errors="replace") if self._log.exists() else ""

    def poll(self) -> bool:
        """Pass new output to the stream; whether the command has ended."""
        self._host._receive(0)
        self.code = self._host._ended.get(self._number)
        if self._stream and self._log.exists():
            with self._log.open("rb") as log:
                log.seek(self._shown)
                new = log.read()
            self._shown += len(new)
            self._stream.write(new)
            self._stream.flush()
        return self.code is not None

    def wait(self, timeout: float) -> Done:
        """Wait for the end, at most ``timeout`` seconds; then kill it (code None)."""
        deadline = time.monotonic() + timeout
        while not self.poll():
            if time.monotonic() > deadline:
                self.kill()
                return Done(None, self.output())
            self._host._receive(POLL)
        return Done(self.code, self.output())

    def kill(self) -> None:
        """SIGKILL to its process group; what made a session of its own is not reached."""
        self._host._send(f"kill {self._number}")


class NestedHost:
    """One L1. A context manager; ``start`` and ``stop`` may also be called alone.

    ``memory`` is in MiB, ``qemu`` further arguments to QEMU, ``append`` further words of the kernel command
    line, ``program`` the words that start QEMU (those of emulator.py). Raises NestedHostFailed and
    KernelUnavailable from ``start``.
    """

    def __init__(
        self,
        *,
        memory: int = MEMORY,
        cpus: int = CPUS,
        qemu: Sequence[str] = (),
        append: str = "",
        machine: str = "q35",
        boot_timeout: float = 600,
        program: Sequence[str] = (),
    ) -> None:
        self._memory = memory
        self._cpus = cpus
        self._extra = list(qemu)
        self._append = append
        self._machine = machine
        self._boot_timeout = boot_timeout
        self._program = list(program)
        self._process: subprocess.Popen[bytes] | None = None
        self._port: socket.socket | None = None
        self._pending = b""
        self._count = 0
        self._ready = False
        self._ended: dict[int, int] = {}
        self._lock = threading.RLock()
        self._place: Path | None = None
        self._claim = -1

    def __enter__(self) -> NestedHost:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def out(self) -> Path:
        """The directory of L0 that is /out in L1 (writable by root there)."""
        assert self._place, "not started"
        return self._place / "out"

    @property
    def console(self) -> str:
        """What L1's kernel has written on its serial console."""
        path = self._place / "console" if self._place else None
        return path.read_bytes().decode(errors="replace") if path and path.exists() else ""

    def start(self) -> None:
        """Boot, and return when L1 takes commands (6-12 s on two cores)."""
        kernel = kernels.stock("6.12")
        initrd = initramfs.build({"init": INIT.encode(), "agent": AGENT.encode()}, kernel, BOOT_MODULES)
        self._make_place()
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                self._command_line(kernel, initrd, theirs.fileno()),
                stdin=subprocess.DEVNULL,
                stdout=(self.out.parent / "qemu.log").open("wb"),
                stderr=subprocess.STDOUT,
                pass_fds=[theirs.fileno()],
                preexec_fn=_die_with_parent,  # noqa: PLW1509 -- one prctl, no lock can be held by it
            )
        self._port = ours
        ours.setblocking(False)
        deadline = time.monotonic() + self._boot_timeout
        while not self._ready:
            if time.monotonic() > deadline:
                raise self._failure(f"not up after {self._boot_timeout:.0f} s")
            self._receive(1)

    def stop(self) -> None:
        """Power off (20 s at most, then SIGKILL) and remove what the host had on L0."""
        if self._process:
            with contextlib.suppress(OSError, NestedHostFailed):
                self._send("off")
            try:
                self._process.wait(20)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None
        if self._port:
            self._port.close()
            self._port = None
        if self._place:
            shutil.rmtree(self._place, ignore_errors=True)
            os.close(self._claim)
            self._place = None

    def spawn(
        self,
        command: str | Sequence[str],
        *,
        cwd: str | Path = CHECKOUT,
        env: Mapping[str, str] | None = None,
        stream: BinaryIO | None = None,
    ) -> Command:
        """Start a command (a list of words, or a bash script) as root in L1; several may run at once."""
        with self._lock:
            self._count += 1
            number = self._count
        lines = [f"cd {shlex.quote(str(cwd))} || exit 127"]
        known = {"VMBUS_CACHE": str(CACHE), **(env or {})}
        lines += [f"export {name}={shlex.quote(value)}" for name, value in known.items()]
        lines.append(command if isinstance(command, str) else "exec " + shlex.join(command))
        (self.out / f"{number}.sh").write_text("\n".join(lines) + "\n")
        self._send(f"run {number}")
        return Command(self, number, stream)

    def run(
        self,
        command: str | Sequence[str],
        *,
        timeout: float = 60,
        cwd: str | Path = CHECKOUT,
        env: Mapping[str, str] | None = None,
        stream: BinaryIO | None = None,
    ) -> Done:
        """``spawn`` and wait; a command that runs longer than ``timeout`` seconds is killed (code None)."""
        return self.spawn(command, cwd=cwd, env=env, stream=stream).wait(timeout)

    def _make_place(self) -> None:
        """A directory in the cache, held by a lock; those whose holder was killed are removed."""
        nest = CACHE / "nested"
        nest.mkdir(parents=True, exist_ok=True)
        for old in nest.iterdir():
            with contextlib.suppress(OSError):
                claim = os.open(old / "lock", os.O_RDWR)
                try:
                    fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(old, ignore_errors=True)
                finally:
                    os.close(claim)
        self._place = Path(tempfile.mkdtemp(dir=nest))
        self._claim = os.open(self._place / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
        fcntl.flock(self._claim, fcntl.LOCK_EX)
        self.out.mkdir()

    def _command_line(self, kernel: kernels.Kernel, initrd: Path, port: int) -> list[str]:
        def share(path: str | Path, tag: str, more: str = "") -> list[str]:
            escaped = str(path).replace(",", ",,")
            return [
                "-virtfs",
                f"local,path={escaped},mount_tag={tag},security_model=none,multidevs=remap{more}",
            ]

        # no_timer_check: on a busy L0 the timer's interrupts come too late for the kernel's test of them.
        # numa_balancing: it unmaps pages all the time, on which the emulation loses guests with many vCPUs.
        append = (
            "console=ttyS0 quiet panic=-1 mitigations=off cgroup_no_v1=all random.trust_cpu=on psi=1 "
            "numa_balancing=disable "
            f"no_timer_check lab.modules={kernel.modules} {self._append} "
            f"{'hugepagesz=1G hugepages=1' if self._memory >= MEMORY else ''}"
        )
        return [
            *(self._program or emulator.command()),
            *("-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"),
            *("-M", self._machine, "-accel", "tcg,thread=multi", "-cpu", "max"),
            *("-smp", str(self._cpus), "-m", str(self._memory)),
            *self._nodes(),
            *("-serial", f"file:{self.out.parent / 'console'}"),
            *("-d", "cpu_reset", "-D", str(self.out.parent / "resets")),
            *("-kernel", str(kernel.image), "-initrd", str(initrd), "-append", append),
            *share("/", "root", ",readonly=on"),
            *share(self.out, "out"),
            *("-device", "virtio-rng-pci", "-device", "virtio-serial-pci,max_ports=2"),
            *(
                "-chardev",
                f"socket,id=port,fd={port}",
                "-device",
                "virtserialport,chardev=port,name=lab,nr=1",
            ),
            *self._extra,
        ]

    def _nodes(self) -> list[str]:
        """Two NUMA nodes, the second a small one, with the last CPU where there are several. KSM leaves
        them alone: tests of this host count its pages."""
        last = self._cpus - 1
        places = [f",cpus=0-{last - 1}" if last > 1 else ",cpus=0", f",cpus={last}" if last else ""]
        words = []
        for number, size in enumerate((self._memory - SECOND_NODE, SECOND_NODE)):
            words += ["-object", f"memory-backend-ram,id=ram{number},size={size}M,merge=off"]
            words += ["-numa", f"node,nodeid={number},memdev=ram{number}{places[number]}"]
        return words

    def _send(self, line: str) -> None:
        with self._lock:
            if not self._port:
                raise NestedHostFailed("the nested host is not running")
            try:
                self._port.sendall(line.encode() + b"\n")
            except OSError as error:
                raise self._failure(f"takes no more orders ({error})") from None

    def _receive(self, timeout: float) -> None:
        """Take in what the agent says, waiting at most ``timeout`` seconds for it."""
        assert self._port and self._process
        if not select.select([self._port], [], [], timeout)[0]:
            return
        with self._lock:
            try:
                data = self._port.recv(4096)
            except BlockingIOError:
                return
            except ConnectionError:
                data = b""
            if not data:
                how = self._process.wait(20)
                raise self._failure(f"QEMU has ended by itself, {how}", NestedHostDied)
            *lines, self._pending = (self._pending + data).split(b"\n")
            for line in lines:
                words = line.split()
                if words == [b"ready"]:
                    self._ready = True
                elif len(words) == 3 and words[0] == b"done":
                    self._ended[int(words[1])] = int(words[2])

    def _failure(self, what: str, kind: type[NestedHostFailed] = NestedHostFailed) -> NestedHostFailed:
        lines = [*self._lines("qemu.log"), *self._lines("console")[-30:]]
        resets = self._lines("resets")
        if any("Triple fault" in line for line in resets):
            lines += resets[-60:]
        return kind("\n  ".join([f"nested host: {what}", *lines]))

    def _lines(self, name: str) -> list[str]:
        path = self._place / name if self._place else None
        return path.read_text(errors="replace").splitlines() if path and path.exists() else []


def absent() -> str:
    """Why this machine cannot run a nested host, "" if it can (as far as can be told without booting it)."""
    words = emulator.command()
    if not words:
        return f"no {emulator.PROGRAM}"
    if emulator.major(words) < emulator.LEAST:
        return f"{words[0]} is older than QEMU {emulator.LEAST}"
    try:
        kernels.stock("6.12")
    except kernels.KernelUnavailable as error:
        return str(error)
    return ""


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP end the program through ``finally``, as SIGINT does."""

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, leave)
    yield


def main() -> int:
    """The command line of the module's docstring."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.lab.nested", description="Run something in a nested host."
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb, what in (("run", "run a command"), ("shell-script", "run a bash script")):
        sub = verbs.add_parser(verb, help=what)
        sub.add_argument("--memory", type=int, default=MEMORY, help="MiB (default %(default)s)")
        sub.add_argument("--cpus", type=int, default=CPUS, help="(default %(default)s)")
        sub.add_argument("--timeout", type=float, default=600, help="seconds for the command (default 600)")
        sub.add_argument("--qemu", default="", help="further arguments to QEMU, in one word")
        sub.add_argument("--machine", default="q35", help="QEMU's -M (default q35)")
        sub.add_argument("--append", default="", help="further kernel command line")
        sub.add_argument("--mended", action="store_true", help="in the emulator of tests/lab/mended.py")
        sub.add_argument("--console", action="store_true", help="show L1's kernel console at the end")
        if verb == "run":
            sub.add_argument("command", nargs="+", metavar="CMD")
        else:
            sub.add_argument("file", type=Path)
    options = parser.parse_args()
    command = options.command if options.verb == "run" else options.file.read_text()
    host = NestedHost(
        memory=options.memory,
        cpus=options.cpus,
        qemu=shlex.split(options.qemu),
        append=options.append,
        machine=options.machine,
        program=mended.command() if options.mended else (),
    )
    with _ended_by_signals():
        try:
            begin = time.monotonic()
            host.start()
            print(f"nested host up after {time.monotonic() - begin:.1f} s", file=sys.stderr)
            done = host.run(command, timeout=options.timeout, cwd=os.getcwd(), stream=sys.stdout.buffer)
            if done.code is None:
                print(f"killed after {options.timeout:.0f} s", file=sys.stderr)
            return 124 if done.code is None else done.code
        except (NestedHostFailed, kernels.KernelUnavailable) as error:
            print(error, file=sys.stderr)
            return 125
        finally:
            if options.console:
                print(host.console, file=sys.stderr)
            host.stop()


if __name__ == "__main__":
    sys.exit(main())
