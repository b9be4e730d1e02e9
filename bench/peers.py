# SPDX-License-Identifier: Apache-2.0
"""What vmbus is measured beside: libvirtd with QEMU, and libvirt-dbus, in the namespace of a system.

They run as Debian configures them, without systemd: libvirtd as root on its usual socket, libvirt-dbus as
user libvirtdbus on the private bus. Their state directories are fresh file systems in that namespace, so
nothing of the host's own libvirt is read or changed. Changed from the defaults: access to the socket is not
asked for (libvirt's polkit rules are not in that namespace), and QEMU runs as root without a private /dev
(without udev, /dev/kvm is root's alone), which saves libvirt work. What a host lacks (cgroup controllers, a
security driver) libvirt leaves out by itself.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Final

from tests.lab.system import System, as_user

PACKAGES: Final = {
    "libvirtd": "libvirt-daemon-system",
    "virtlogd": "libvirt-daemon",
    "virsh": "libvirt-clients",
    "libvirt-dbus": "libvirt-dbus",
    "qemu-system-x86_64": "qemu-system-x86",
    "gcc": "gcc",
    "fio": "fio",
}
FRESH: Final = ("/etc/libvirt", "/var/lib/libvirt", "/var/log/libvirt", "/var/cache/libvirt")
EMULATOR: Final = "/usr/bin/qemu-system-x86_64"

DOMAIN: Final = """\
<domain type='kvm'>
  <name>{name}</name>
  <memory unit='MiB'>{memory}</memory>
  <vcpu>1</vcpu>
  <os><type arch='x86_64' machine='q35'>hvm</type>{boot}</os>
  <features><acpi/><apic/></features>
  <devices>
    <emulator>{emulator}</emulator>
    <serial type='pty'/>
    <memballoon model='none'/>
  </devices>
</domain>
"""


def install() -> None:
    """Install what is missing, by package name."""
    sbin = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    missing = sorted(
        {package for program, package in PACKAGES.items() if shutil.which(program, path=sbin) is None}
    )
    if missing:
        print(f"bench: installing {' '.join(missing)}, to compare with", file=sys.stderr)
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        subprocess.run(
            ["apt-get", "install", "-y", "-q", "--no-install-recommends", *missing],
            stdout=sys.stderr,
            env=environment,
            check=True,
        )


class Libvirt:
    """libvirtd and libvirt-dbus beside ``system``; a context manager."""

    def __init__(self, system: System) -> None:
        self._system = system
        self._daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Libvirt:
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def virsh(self, *words: str, check: bool = True) -> str:
        """``virsh WORDS`` as root; its output."""
        command = self._system.inside(["virsh", "-q", "-c", "qemu:///system", *words])
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        if check and done.returncode != 0:
            raise RuntimeError(f"virsh {' '.join(words)}: {done.stderr.strip()}")
        return done.stdout.strip()

    def define(self, name: str, *, memory: int = 64, kernel: Path | None = None, cmdline: str = "") -> None:
        """Define a domain of ``memory`` MiB with one vCPU and a serial console, perhaps booting a kernel."""
        file = self._system.place / f"{name}.xml"
        boot = f"<kernel>{kernel}</kernel><cmdline>{cmdline}</cmdline>" if kernel else ""
        file.write_text(DOMAIN.format(name=name, memory=memory, emulator=EMULATOR, boot=boot))
        self.virsh("define", str(file))

    def version(self) -> str:
        """Of the library and of QEMU."""
        text = self.virsh("version")
        return ", ".join(
            line.partition(": ")[2]
            for line in text.splitlines()
            if line.startswith(("Using library", "Running"))
        )

    def processes(self) -> list[int]:
        """The QEMU processes of the domains that run."""
        # driver.pid is libvirtd's own.
        script = "cd /run/libvirt/qemu; for f in *.pid; do [ $f = driver.pid ] || { cat $f; echo; }; done"
        listing = subprocess.run(
            self._system.inside(["sh", "-c", script]), capture_output=True, text=True, check=False
        )
        return [int(word) for word in listing.stdout.split()]

    def daemons(self) -> list[int]:
        """The processes of libvirt itself: virtlogd, libvirtd, libvirt-dbus."""
        return [daemon.pid for daemon in self._daemons]

    def close(self) -> None:
        """End the domains and the daemons."""
        for name in self.virsh("list", "--name", check=False).split():
            self.virsh("destroy", name, check=False)
        for daemon in reversed(self._daemons):
            daemon.terminate()
            daemon.wait(30)
        self._daemons.clear()

    def _start(self) -> None:
        inside = self._system.inside
        configuration = self._system.place / "libvirt-etc"
        shutil.copytree("/etc/libvirt", configuration)
        (configuration / "libvirtd.conf").write_text(
            'auth_unix_rw = "none"\nauth_unix_ro = "none"\nunix_sock_rw_perms = "0777"\n'
        )
        (configuration / "qemu.conf").write_text('user = "root"\ngroup = "root"\nnamespaces = []\n')
        for place in FRESH:
            Path(place).mkdir(parents=True, exist_ok=True)
            subprocess.run(inside(["mount", "-t", "tmpfs", "-o", "mode=0755", "tmpfs", place]), check=True)
        subprocess.run(inside(["cp", "-a", f"{configuration}/.", "/etc/libvirt/"]), check=True)
        subprocess.run(inside(["mkdir", "-p", "/var/lib/libvirt/qemu", "/var/log/libvirt/qemu"]), check=True)
        self._daemon("virtlogd", ["virtlogd"])
        self._wait(["test", "-S", "/run/libvirt/virtlogd-sock"])
        self._daemon("libvirtd", ["libvirtd"])
        self._wait(["test", "-S", "/run/libvirt/libvirt-sock"])
        self.virsh("list")
        # The daemon on the bus; it needs the name's policy, which is its package's own.
        self._daemon("libvirt-dbus", as_user("libvirtdbus", ["libvirt-dbus", "--system"]))
        self._wait(["busctl", "status", "org.libvirt"])

    def _daemon(self, name: str, argv: list[str]) -> None:
        with (self._system.place / "log" / name).open("wb") as log:
            self._daemons.append(
                subprocess.Popen(
                    self._system.inside(argv), stdout=log, stderr=log, env=self._system.environment()
                )
            )

    def _wait(self, command: list[str]) -> None:
        deadline = time.monotonic() + 30
        while subprocess.run(self._system.inside(command), capture_output=True, check=False).returncode:
            if time.monotonic() > deadline:
                raise RuntimeError(f"{' '.join(command)} fails: {self._system.logs()}")
            time.sleep(0.1)
