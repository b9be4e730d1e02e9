# SPDX-License-Identifier: Apache-2.0
"""A stock Debian guest of a system under test, driven by its owner with vmbusctl and nothing else.

    guest = StockGuest(system, "web", script="…; poweroff -f", vcpus=2)
    guest.make_disk(); guest.define(); guest.start()
    guest.console.wait_for("login:", 60)
    guest.wait_stopped(); guest.check_disk()

The guest's kernel is Debian's; its /init is ``script`` in busybox's sh, with the disk at /dev/vda (ext4)
not yet mounted (tests/lab/initramfs.py). Waits are in seconds of a machine with hardware KVM, and
multiplied in the nested host.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

from tests.lab import initramfs, kernels
from tests.lab.kernels import Kernel
from tests.lab.system import ALICE, SLOW, System

DEFINITION: Final = """\
name = "{name}"
memory = "{memory}M"
vcpus = {vcpus}

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


class GuestFailed(Exception):
    """A guest or a vmbusctl did not do what it should; the message has output and console."""


class Console:
    """``vmbusctl console`` in the background: history first, then what comes; input too unless read-only."""

    def __init__(
        self,
        system: System,
        user: str,
        name: str,
        *words: str,
        verb: str = "console",
        show: Callable[[str], None] | None = None,
    ) -> None:
        self._process = system.popen(
            user,
            ["vmbusctl", verb, name, *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self._raw = b""
        self._changed = threading.Condition()
        self._closed = False
        self._show = show
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def text(self) -> str:
        """All that has come."""
        with self._changed:
            return self._lines()

    def wait_for(self, pattern: str, timeout: float) -> re.Match[str]:
        """Wait until ``pattern`` is in the text. Raises GuestFailed."""
        deadline = time.monotonic() + timeout * SLOW
        with self._changed:
            while not (found := re.search(pattern, self._lines())):
                left = deadline - time.monotonic()
                if left <= 0 or self._closed:
                    why = "the console was closed" if self._closed else f"{timeout * SLOW:.0f} s have passed"
                    raise GuestFailed(f"no {pattern!r}: {why}\n{self._lines()[-4000:]}{self._complaint()}")
                self._changed.wait(left)
            return found

    def send(self, line: str) -> None:
        """Type a line."""
        assert self._process.stdin
        self._process.stdin.write(line.encode() + b"\n")
        self._process.stdin.flush()

    def wait_closed(self, timeout: float) -> None:
        """Wait until the machine's side has ended. Raises subprocess.TimeoutExpired."""
        self._process.wait(timeout * SLOW)
        self._reader.join(timeout * SLOW)

    def close(self) -> None:
        """Leave it."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(10 * SLOW)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._reader.join(5)
        for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
            if stream:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()

    def _lines(self) -> str:
        return self._raw.decode(errors="replace").replace("\r\n", "\n")

    def _read(self) -> None:
        assert self._process.stdout
        shown = 0
        while data := os.read(self._process.stdout.fileno(), 65536):
            with self._changed:
                self._raw += data
                text = self._lines()
                self._changed.notify_all()
            whole = text.rfind("\n") + 1
            if self._show and whole > shown:
                for line in text[shown:whole].splitlines():
                    self._show(line)
                shown = whole
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _complaint(self) -> str:
        if self._process.poll() is None or not self._process.stderr:
            return ""
        return self._process.stderr.read().decode(errors="replace")


class StockGuest:
    """One machine of ``user``. ``memory`` is in MiB; ``files`` go into the initrd; ``bridge`` gives it a nic
    there, if polkit lets the user. ``modules`` are loaded beside the usual ones."""

    def __init__(
        self,
        system: System,
        name: str,
        *,
        script: str,
        vcpus: int = 1,
        memory: int = 256,
        user: str = ALICE,
        kernel: Kernel | None = None,
        files: Mapping[str, bytes] | None = None,
        bridge: str = "",
        modules: Iterable[str] = (),
    ) -> None:
        self.system = system
        self.name = name
        self.user = user
        self.kernel = kernel or kernels.stock("6.12")
        wanted = (*initramfs.GUEST_MODULES, *modules)
        self.initrd = initramfs.guest(script, kernel=self.kernel, files=files, modules=wanted)
        self.vcpus = vcpus
        self.memory = memory
        self.bridge = bridge
        self.disk = system.files(user) / f"{name}.qcow2"
        self.uuid = ""
        self._console: Console | None = None

    @property
    def console(self) -> Console:
        """The console opened last."""
        assert self._console, "no console was opened"
        return self._console

    def make_disk(self, size: str = "64M") -> str:
        """The user makes an image: qcow2, ext4, mode 0600. Returns its line of ls."""
        return self.shell(f"""set -e; umask 077; truncate -s {size} {self.name}.raw
            /sbin/mkfs.ext4 -q {self.name}.raw
            qemu-img convert -f raw -O qcow2 {self.name}.raw {self.disk}
            rm {self.name}.raw; ls -l {self.disk}""")

    def define(self, *words: str) -> str:
        """``vmbusctl define``, from a TOML file and further words. Returns what it says."""
        text = DEFINITION.format(
            name=self.name,
            memory=self.memory,
            vcpus=self.vcpus,
            kernel=self.kernel.image,
            initrd=self.initrd,
            disk=self.disk,
        )
        self.shell(f"cat >{self.name}.toml", stdin=text)
        nic = ["--nic", self.bridge] if self.bridge else []
        said = self.ctl("define", f"{self.name}.toml", *nic, *words)
        self.uuid = self.show()["uuid"]
        return said

    def start(self, *, console: bool = True, show: Callable[[str], None] | None = None) -> str:
        """``vmbusctl start``, and a console unless told otherwise. Returns what it says."""
        said = self.ctl("start", self.name, timeout=60)
        if console:
            self.open_console(show=show)
        return said

    def start_at_console(self) -> None:
        """``vmbusctl start --console``, in the background: the console is there before the guest's first
        instruction. Where processors are few a guest with many can be through before another program begins.
        """
        self.leave_console()
        self._console = Console(self.system, self.user, self.name, "--console", verb="start")

    def open_console(self, *words: str, show: Callable[[str], None] | None = None) -> Console:
        """Another ``vmbusctl console``; the one before is left."""
        self.leave_console()
        self._console = Console(self.system, self.user, self.name, *words, show=show)
        return self._console

    def leave_console(self) -> None:
        """Leave the console, if there is one."""
        if self._console:
            self._console.close()

    def show(self) -> dict[str, Any]:
        """``vmbusctl show --json``."""
        found: dict[str, Any] = json.loads(self.ctl("show", self.name, "--json"))
        return found

    def wait_for(self, pattern: str, timeout: float) -> None:
        """Wait until ``pattern`` is on the console. Raises GuestFailed, with what became of the machine."""
        try:
            self.console.wait_for(pattern, timeout)
        except GuestFailed as error:
            raise GuestFailed(f"{error}\n{self.show()}\n{self.system.logs()}") from None

    def wait_stopped(self, timeout: float = 60) -> dict[str, Any]:
        """Wait until it is stopped (or crashed); what ``show`` says then."""
        limit = str(timeout * SLOW)
        self.ctl("wait", self.name, "--state", "stopped", "--timeout", limit, timeout=timeout + 10)
        self.leave_console()
        return self.show()

    def check_disk(self) -> str:
        """``qemu-img check``. Raises GuestFailed for anything but "no errors"."""
        said = self.shell(f"qemu-img check {self.disk}")
        if "No errors were found" not in said:
            raise GuestFailed(said)
        return said

    def read_back(self, path: str) -> str:
        """A file of the ext4 in the image, read without the guest."""
        return self.shell(f"""qemu-img convert -f qcow2 -O raw {self.disk} {self.name}.back
            /sbin/debugfs -R 'cat {path}' {self.name}.back 2>/dev/null; rm {self.name}.back""")

    def ctl(self, *words: str, timeout: float = 30) -> str:
        """``vmbusctl WORDS`` as the owner; its output. Raises GuestFailed."""
        return self._succeeded(self.system.vmbusctl(self.user, *words, timeout=timeout))

    def shell(self, script: str, *, stdin: str = "") -> str:
        """A script as the owner, in the owner's directory; its output. Raises GuestFailed."""
        return self._succeeded(self.system.run_as(self.user, ["sh", "-c", script], stdin=stdin, timeout=60))

    def _succeeded(self, done: subprocess.CompletedProcess[str]) -> str:
        if done.returncode:
            words = " ".join(str(word) for word in done.args)
            console = f"\nconsole:\n{self._console.text[-3000:]}" if self._console else ""
            raise GuestFailed(f"{words}: exit code {done.returncode}\n{done.stdout}{done.stderr}{console}")
        return done.stdout

    def __enter__(self) -> StockGuest:
        return self

    def __exit__(self, *_: object) -> None:
        self.leave_console()
