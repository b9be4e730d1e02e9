# SPDX-License-Identifier: Apache-2.0
"""A host that systemd runs, with vmbus installed: systemd as pid 1 of namespaces, on an overlay of ``/``.

    with SystemdHost() as host:
        host.run(["systemctl", "is-active", "vmbusd"]).stdout

``make install-files`` has been run into the overlay, and the units are started by systemd as they are: with
their sandbox, their cgroups, their order, their users and directories made by sysusers and tmpfiles. In the
place of the installed environment stands a link to the checkout's; or everything is what ``make install`` put
into a DESTDIR, and the checkout is out of sight. What is written goes into a tmpfs.

systemd believes to be in a container, and does without udev, logind and the like. Needs root, cgroup v2 and
overlayfs.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final

from tests.lab.kernels import CHECKOUT
from tests.lab.system import SLOW

UNITS: Final = ("vmbus-machines", "vmbus-broker", "vmbusd", "vmbus-shutdown")

# Below: WORK is a fresh directory, CHECKOUT this tree, CGROUP a cgroup v2 directory of our own.
BOOT: Final = """\
set -e
mount -t tmpfs -o mode=0755 tmpfs "$WORK"
mkdir "$WORK/up" "$WORK/work" "$WORK/root"
mount -t overlay -o lowerdir=/,upperdir="$WORK/up",workdir="$WORK/work" overlay "$WORK/root"
root="$WORK/root"
mount -t proc proc "$root/proc"
mount -t sysfs sysfs "$root/sys"
mount -t cgroup2 cgroup2 "$root/sys/fs/cgroup"
mount -t tmpfs -o mode=0755 tmpfs "$root/dev"
for node in null zero full random urandom tty kvm net/tun; do
    [ -e "/dev/$node" ] || continue
    mkdir -p "$(dirname "$root/dev/$node")"
    touch "$root/dev/$node"
    mount --bind "/dev/$node" "$root/dev/$node"
done
mkdir "$root/dev/pts" "$root/dev/shm"
mount -t devpts -o newinstance,ptmxmode=0666,mode=620 devpts "$root/dev/pts"
mount -t tmpfs -o mode=1777 tmpfs "$root/dev/shm"
ln -s pts/ptmx "$root/dev/ptmx"
ln -s /proc/self/fd "$root/dev/fd"
touch "$root/dev/console"
mount --bind "$CONSOLE" "$root/dev/console"
mount -t tmpfs -o mode=0755 tmpfs "$root/run"
mount -t tmpfs -o mode=1777 tmpfs "$root/tmp"
mkdir -p "$root$CHECKOUT"
mount -t tmpfs -o mode=0755 tmpfs "$root/etc/systemd/system"
if [ "$INSTALLED" ]; then
    cp -a "$INSTALLED/." "$root/"
    mount -t tmpfs tmpfs "$root$CHECKOUT"
else
    # The checkout, where the overlay hides it, and the way to it for users that could not go there.
    mount --bind "$CHECKOUT" "$root$CHECKOUT"
    place="$CHECKOUT"
    while [ "$place" != / ]; do
        place=$(dirname "$place")
        chmod o+x "$root$place"
    done
    mkdir -p "$root/usr/lib/vmbus"
    ln -s "$VENV" "$root/usr/lib/vmbus/env"
    make -s -C "$CHECKOUT" -f install.mk install-files DESTDIR="$root"
fi
cp "$GRANTS" "$root/etc/vmbus/broker.toml"
for unit in $MASKED; do ln -s /dev/null "$root/etc/systemd/system/$unit"; done
cat >"$root/etc/systemd/system/lab.target" <<EOF
[Unit]
Wants=dbus.socket vmbus-machines.service vmbus-broker.service vmbusd.service vmbus-shutdown.service
EOF
for unit in $VISIBLE; do
    extra="$root/etc/systemd/system/$unit.service.d"
    mkdir "$extra"
    printf '[Service]\\nProtectHome=no\\nPrivateTmp=no\\n' >"$extra/checkout.conf"
done
cd "$root"
mkdir -p old
pivot_root . old
umount -l /old
mount --make-rshared / # systemd does so, but not in a container
exec env -i container=lab PATH=/usr/sbin:/usr/bin:/sbin:/bin /lib/systemd/systemd --system \\
    --unit=lab.target --log-target=console --show-status=no
"""
MASKED: Final = (
    "systemd-udevd.service",
    "systemd-udev-trigger.service",
    "systemd-udevd-kernel.socket",
    "systemd-udevd-control.socket",
    "systemd-timesyncd.service",
    "systemd-logind.service",
    "systemd-modules-load.service",
    "systemd-random-seed.service",
    "systemd-update-utmp.service",
    "systemd-remount-fs.service",
    "systemd-firstboot.service",
    "dev-hugepages.mount",
    "dev-mqueue.mount",
    "sys-kernel-debug.mount",
    "sys-kernel-tracing.mount",
    "sys-kernel-config.mount",
    "sys-fs-fuse-connections.mount",
    "local-fs.target",
    "swap.target",
)
GRANTS: Final = """\
[[open.grant]]
users = ["*"]
prefixes = ["{home}", "/srv/vm"]
"""


class SystemdHostFailed(Exception):
    """systemd did not come up; the message has what it said."""


class SystemdHost:
    """See the module's note. A context manager."""

    def __init__(self, installed: Path | None = None) -> None:
        """``installed``: a DESTDIR of ``make install``; None: the checkout's programs."""
        self._installed = installed
        self._place = Path(tempfile.mkdtemp(prefix="vmbus-systemd-"))
        self._process: subprocess.Popen[bytes] | None = None
        self._cgroup: Path | None = None

    def __enter__(self) -> SystemdHost:
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

    @property
    def pid(self) -> int:
        """systemd's, as seen from outside."""
        assert self._process
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        return int(children[0])

    @property
    def log(self) -> str:
        """What systemd and the units' daemons have written."""
        return (self._place / "log").read_text(errors="replace")

    def run(
        self,
        command: Sequence[str | Path],
        *,
        user: str = "root",
        env: Mapping[str, str] | None = None,
        timeout: float = 30,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in the host."""
        words = ["nsenter", f"--target={self.pid}", "--mount", "--pid", "--cgroup", "--uts", "--"]
        if user != "root":
            words += ["setpriv", "--reuid", user, "--regid", user, "--clear-groups", "--"]
        return subprocess.run(
            [*words, *map(str, command)],
            env={"PATH": "/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8", **(env or {})},
            cwd="/",
            capture_output=True,
            text=True,
            timeout=timeout * SLOW,
            check=False,
        )

    def show(self, unit: str, name: str) -> str:
        """A property of a unit."""
        return self.run(["systemctl", "show", "-P", name, unit]).stdout.strip()

    def wait_active(self, unit: str) -> None:
        """Wait until a unit runs. Raises SystemdHostFailed."""
        deadline = time.monotonic() + 30 * SLOW
        while (state := self.show(unit, "ActiveState")) != "active":
            if state == "failed" or time.monotonic() > deadline:
                status = self.run(["systemctl", "status", "--no-pager", "--full", unit]).stdout
                raise SystemdHostFailed(f"{unit} is {state}:\n{status}\n{self.log[-6000:]}")
            time.sleep(0.2)

    def close(self) -> None:
        """End everything in it."""
        if self._process:
            self._process.kill()  # unshare's --kill-child takes pid 1 of the namespace along
            self._process.wait(20)
            self._process = None
        if self._cgroup:
            deadline = time.monotonic() + 10
            while self._cgroup.exists() and time.monotonic() < deadline:
                _remove_cgroups(self._cgroup)
                time.sleep(0.1)
        subprocess.run(["rm", "-rf", "--one-file-system", self._place], check=False)

    def _start(self) -> None:
        (self._place / "grants.toml").write_text(GRANTS)
        (self._place / "root").mkdir()
        self._cgroup = cgroup_v2() / self._place.name
        self._cgroup.mkdir()
        hidden = str(CHECKOUT).startswith(("/root", "/home", "/run/user", "/tmp", "/var/tmp"))
        environment = {
            "PATH": os.environ["PATH"],
            "WORK": str(self._place / "root"),
            "CHECKOUT": str(CHECKOUT),
            "VENV": str(Path(sys.executable).parents[1]),
            "CONSOLE": str(self._place / "log"),
            "GRANTS": str(self._place / "grants.toml"),
            "MASKED": " ".join(MASKED),
            "VISIBLE": " ".join(UNITS) if hidden and not self._installed else "",
            "INSTALLED": str(self._installed or ""),
        }
        # systemd alone may be in the cgroup that is its root: with another process there it could enable no
        # controller. 0 is who writes.
        inner = f'echo 0 >{self._cgroup}/cgroup.procs && exec unshare --cgroup bash -c "$BOOT"'
        enter = ["unshare", "--mount", "--pid", "--uts", "--net", "--ipc", "--fork", "--kill-child"]
        enter += ["--propagation", "private", "bash", "-c", inner]
        with (self._place / "log").open("wb") as log:
            self._process = subprocess.Popen(
                enter,
                env={**environment, "BOOT": BOOT},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + 60 * SLOW
        while self._process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.3)
            try:
                if self.run(["systemctl", "is-active", "lab.target"]).stdout.strip() == "active":
                    return
            except (OSError, IndexError, subprocess.TimeoutExpired):
                continue
        raise SystemdHostFailed(f"systemd is not up:\n{self.log[-6000:]}")


def cgroup_v2() -> Path:
    """Where cgroup v2 is mounted. Raises SystemdHostFailed."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, place, kind, *_ = line.split()
        if kind == "cgroup2":
            return Path(place)
    raise SystemdHostFailed("cgroup v2 is not mounted")


def _remove_cgroups(top: Path) -> None:
    for inner in [*sorted(top.rglob("*"), reverse=True), top]:
        if inner.is_dir():
            try:
                inner.rmdir()
            except OSError:
                return
