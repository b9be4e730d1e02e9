# SPDX-License-Identifier: Apache-2.0
"""A nested host under SELinux, enforcing, with vmbus installed, labelled by its own contexts and at work.

A nested host of its own is booted with SELinux. Its root has no labels (9p passes none), so /usr, /etc and
/var are mounted anew, each from a share whose files all have the type that most of them have on a Debian,
with a tmpfs above, in which what matters is relabelled; /usr/lib/vmbus is an ext4 image of what ``make
install`` made, and all of it gets its labels from vmbus.fc by restorecon. Then ``setenforce 1``, and the
bus, polkitd, broker and vmbusd are started by a shell in init's domain, without new privileges, as by their
units.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Final

from tests.lab import initramfs, kernels, selinux
from tests.lab.nested import SHARE, Done, NestedHost
from tests.testbed import installation

SHARES: Final = {
    "usr": ("/usr", "usr_t"),
    "lib": ("/usr/lib", "lib_t"),
    "bin": ("/usr/bin", "bin_t"),
    "sbin": ("/usr/sbin", "bin_t"),
    "etc": ("/etc", "etc_t"),
    "var": ("/var", "var_t"),
}

# What the scripts below share.
WORDS: Final = """\
A=/var/lib/vmbus/images/vmbus-alice
as() { user=$1; shift; setpriv --reuid $user --regid $user --clear-groups --inh-caps=-all -- "$@"; }
daemon() { # NAME USER COMMAND…: as init starts it
    name=$1; shift
    as "$1" setpriv --no-new-privs runcon system_u:system_r:init_t:s0 \\
        sh -c 'shift; exec </dev/null; "$@" 2>&1 | cat' sh "$@" >/run/lab/$name.log 2>&1 &
}
ctl() { as vmbus-alice runcon unconfined_u:unconfined_r:unconfined_t:s0-s0:c0.c1023 \\
    /usr/lib/vmbus/env/bin/vmbusctl "$@"; }
workers() { # wait for so many, with their imports done: that takes longer here than the service waits
    until [ $(pgrep -xc python3...) -ge $1 ] && [ $(pgrep -xc vmbus-broker) = 1 ]; do sleep 0.2; done
}
wait_for() { # FILE TEXT
    deadline=$(($(cut -d. -f1 /proc/uptime) + 300))
    until grep -q "$2" $1 2>/dev/null; do
        if [ $(cut -d. -f1 /proc/uptime) -gt $deadline ]; then
            echo "no '$2' in $1:"; cat $1; dmesg | grep avc: | tail -40; exit 1
        fi
        sleep 0.2
    done
}
"""

PREPARE: Final = """\
set -e
modprobe -a virtio_blk ext4
tar -C / -xf /out/policy.tar
load_policy -i
over() { # NAME PLACE TYPE
    o=/run/lab/over/$1 label=system_u:object_r:$3:s0
    mkdir -p $o/low $o/up $o/work
    chcon $label $o/up
    mount -t 9p -o ro,cache=loose,%(share)s,context=$label lab-$1 $o/low
    mount -t overlay -o lowerdir=$o/low,upperdir=$o/up,workdir=$o/work $1 $2
}
mkdir /run/lab/over
mount -t tmpfs -o mode=755 lab /run/lab/over
%(overs)s
mkdir -p /usr/lib/vmbus /lib/modules/$(uname -r)
mount --bind $(sed 's/.*lab.modules=\\([^ ]*\\).*/\\1/' /proc/cmdline) /lib/modules/$(uname -r)
tar -C / -xf /out/policy.tar
mount /dev/vda /usr/lib/vmbus
tar -C / -xf /out/files.tar
chcon system_u:object_r:root_t:s0 /
chcon -h system_u:object_r:lib_t:s0 /lib /lib64 /usr/lib64 /usr/lib64/ld-linux-x86-64.so.2
chcon -h system_u:object_r:bin_t:s0 /bin /sbin
cp /out/broker.toml /etc/vmbus/
mkdir -p /run/dbus /run/vmbus/system /var/lib/vmbus-broker/system $A
install -d -o vmbus -m 700 /var/lib/vmbus/system /run/vmbus/system/service
cp /out/kernel /out/initrd /out/disk.qcow2 $A/
chown -R vmbus-alice $A; chmod 700 $A; chmod 600 $A/*
install -m 600 /out/disk.qcow2 /var/lib/vmbus/images/root.qcow2
install -m 644 /out/attack.py /usr/lib/vmbus/attack.py
restorecon -RF /usr/lib/vmbus /etc/vmbus /etc/dbus-1/system.d /run/vmbus /run/dbus /dev /usr/lib/polkit-1 \\
    /var/lib/vmbus /var/lib/vmbus-broker /usr/share/polkit-1/actions
restorecon -F /run /var/run /var/lib /usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2 /etc/ld.so.cache \\
    /etc/passwd /etc/group /etc/shadow /usr/bin/dbus-daemon /usr/bin/bash /usr/bin/dash
mkdir /sys/fs/cgroup/vmbus
echo 0 >/proc/sys/kernel/printk_ratelimit
setenforce 1
dmesg -C
"""

# Passt wants a way out; this one leads nowhere.
START: Final = """\
ip tuntap add mode tap name out0 && ip addr add 192.0.2.2/24 dev out0 && ip link set out0 up
ip route add default via 192.0.2.1
daemon bus root dbus-daemon --system --nofork --nopidfile --nosyslog
for i in $(seq 100); do [ -e /run/dbus/system_bus_socket ] && break; sleep 0.1; done
daemon polkit root /usr/lib/polkit-1/polkitd
daemon broker root /usr/lib/vmbus/env/bin/vmbus-broker --cgroup /sys/fs/cgroup/vmbus --spares 1
wait_for /run/lab/broker.log ready
daemon vmbusd vmbus /usr/lib/vmbus/env/bin/vmbusd
wait_for /run/lab/vmbusd.log ready
M="--memory 128M --kernel $A/kernel --initrd $A/initrd --cmdline console=ttyS0"
ctl define --name web $M --disk $A/disk.qcow2,format=qcow2 --nic kind=user || exit 1
workers 1
ctl start web || { cat /run/lab/broker.log /run/lab/vmbusd.log; exit 1; }
ctl console web --read-only </dev/null >/run/lab/console.log 2>&1 &
wait_for /run/lab/console.log unmounted
cat /run/lab/console.log
"""

# Killed, the service finds its machine again; a machine of passed files; the ends of both.
GO_ON: Final = """\
kill -KILL $(pgrep -x vmbusd)
while pgrep -x vmbusd >/dev/null; do sleep 0.1; done
daemon vmbusd vmbus /usr/lib/vmbus/env/bin/vmbusd
wait_for /run/lab/vmbusd.log ready
workers 2
ctl run --detach --name passed --memory 128M --kernel $A/kernel --initrd $A/initrd || exit 1
ctl list
ctl show web --stats --json >/run/lab/stats || exit 1
ctl stop passed --deadline 0 && ctl stop web --deadline 0 && ctl undefine web
"""

GRANTS: Final = """\
[[open.grant]]
users = ["*"]
prefixes = ["/var/lib/vmbus/images/{user}"]

[user-network]
users = ["*"]
"""

GUEST: Final = """\
mount -t ext4 /dev/vda /mnt || echo "cannot mount"
echo "the disk says $(cat /mnt/hello)"
echo "written" >/mnt/reply
umount /mnt && echo "unmounted"
while :; do sleep 1; done
"""


class SelinuxHost:
    """See the module's note. A context manager."""

    def __init__(self, attack: Path) -> None:
        """``attack``: a program for /usr/lib/vmbus/attack.py."""
        self._attack = attack
        self._scratch = tempfile.TemporaryDirectory(prefix="vmbus-selinux-")
        place = Path(self._scratch.name)
        self._image = place / "vmbus.img"
        tree = installation.tree()
        self._image.touch()
        _command("truncate", "-s", "128M", self._image)
        _command("mke2fs", "-q", "-t", "ext4", "-d", tree / "usr/lib/vmbus", self._image)
        _command("tar", "-C", tree, "--exclude=./usr/lib/vmbus", "-cf", place / "files.tar", "./etc", "./usr")
        (place / "broker.toml").write_text(GRANTS)
        (place / "disk").mkdir()
        (place / "disk/hello").write_text("hello\n")
        _command("truncate", "-s", "32M", place / "raw")
        _command("mke2fs", "-q", "-t", "ext4", "-d", place / "disk", place / "raw")
        _command("qemu-img", "convert", "-f", "raw", "-O", "qcow2", place / "raw", place / "disk.qcow2")
        arguments = ["-drive", f"file={self._image},if=virtio,format=raw,snapshot=on"]
        for name, (path, _) in SHARES.items():
            share = f"local,path={path},mount_tag=lab-{name},security_model=none,multidevs=remap,readonly=on"
            arguments += ["-virtfs", share]
        self._host = NestedHost(append="security=selinux selinux=1 enforcing=0", qemu=arguments)

    def __enter__(self) -> SelinuxHost:
        place = Path(self._scratch.name)
        kernel, policy = kernels.stock("6.12"), selinux.policy()
        try:
            self._host.start()
            for source, name in (
                (policy, "policy.tar"),
                (place / "files.tar", "files.tar"),
                (place / "disk.qcow2", "disk.qcow2"),
                (kernel.image, "kernel"),
                (initramfs.guest(GUEST, kernel=kernel), "initrd"),
                (self._attack, "attack.py"),
                (place / "broker.toml", "broker.toml"),
            ):
                shutil.copy(source, self._host.out / name)
            overs = "\n".join(f"over {name} {path} {kind}" for name, (path, kind) in SHARES.items())
            self._must(PREPARE % {"overs": overs, "share": SHARE})
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._host.stop()
        self._scratch.cleanup()

    def run(self, script: str) -> Done:
        """A bash script, as the administrator, with ``WORDS``."""
        return self._host.run(WORDS + script, timeout=900)

    def start(self) -> str:
        """Bus, polkitd, broker, vmbusd, and a user's machine; what its console said."""
        return self._must(START)

    def go_on(self) -> str:
        """The service is killed and started again, a machine of passed files runs; what is listed then."""
        return self._must(GO_ON)

    def labels(self, program: str) -> list[tuple[int, int, str]]:
        """pid, uid and label of each process of that name."""
        lines = self._must(f"ps -C {program} -o pid=,uid=,label=; :").splitlines()
        return [(int(pid), int(uid), label) for pid, uid, label in (line.split() for line in lines)]

    def denials(self) -> list[str]:
        """What the kernel has denied since the programs were started."""
        return [line for line in self._must("dmesg").splitlines() if "avc:  denied" in line]

    def _must(self, script: str) -> str:
        done = self.run(script)
        assert done.code == 0, f"{done.code}:\n{done.output[-6000:]}"
        return done.output


def _command(*words: str | Path) -> None:
    subprocess.run(list(map(str, words)), check=True, capture_output=True, timeout=120)
