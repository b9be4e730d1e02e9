# SPDX-License-Identifier: Apache-2.0
"""`make install DESTDIR=` makes a system that works without the checkout; `make uninstall` takes it away."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.system import ALICE
from tests.local.worker_guest import image
from tests.testbed import installation
from tests.testbed.systemd_host import SystemdHost

pytestmark = [
    pytest.mark.requires("root", "kvm", "systemd-in-namespaces"),
    pytest.mark.long,
    pytest.mark.timeout(1500),
]


@pytest.fixture(scope="module")
def host() -> Iterator[SystemdHost]:
    built = image()
    with SystemdHost(installation.tree()) as made:
        for unit in ("vmbus-broker.service", "vmbusd.service"):
            made.wait_active(unit)
        kernel = Path(f"/proc/{made.pid}/root/srv/kernel")
        kernel.write_bytes(built.read_bytes())
        made.run(["install", "-d", "-o", ALICE, "-m", "0700", f"/srv/vm/{ALICE}"])
        made.run(["install", "-o", ALICE, "-m", "0600", "/srv/kernel", f"/srv/vm/{ALICE}/kernel"])
        yield made


def vmbusctl(host: SystemdHost, *words: str) -> str:
    done = host.run(["vmbusctl", *words], user=ALICE, timeout=60)
    assert done.returncode == 0, f"{done.stderr}\n{host.log[-4000:]}"
    return done.stdout


def test_the_installed_programs_run_a_machine(host: SystemdHost) -> None:
    kernel = f"/srv/vm/{ALICE}/kernel"
    vmbusctl(host, "define", "--name", "one", "--memory", "16M", "--kernel", kernel, "--cmdline", "hello")
    vmbusctl(host, "start", "one")
    vmbusctl(host, "wait", "one", "--state", "stopped", "--timeout", "30")
    found = json.loads(vmbusctl(host, "show", "one", "--json"))
    assert (found["state"], found["state-reason"]) == ("stopped", "guest-poweroff")
    vmbusctl(host, "undefine", "one")


@pytest.mark.parametrize("unit", ["vmbus-broker", "vmbusd"])
def test_a_daemon_runs_from_where_it_was_installed(host: SystemdHost, unit: str) -> None:
    pid = host.show(f"{unit}.service", "MainPID")
    words = host.run(["cat", f"/proc/{pid}/cmdline"]).stdout.split("\0")
    assert words[:3] == ["/usr/lib/vmbus/env/bin/python", "-I", f"/usr/lib/vmbus/env/bin/{unit}"]


def test_vmbus_img_works_without_a_service(host: SystemdHost) -> None:
    done = host.run(["vmbus-img", "create", "-f", "qcow2", "/srv/disk.qcow2", "1M"])
    assert done.returncode == 0, done.stderr
    shown = host.run(["vmbus-img", "info", "--output=json", "/srv/disk.qcow2"])
    assert json.loads(shown.stdout)["virtual-size"] == 1 << 20


def test_uninstalling_leaves_the_configuration_alone(tmp_path: Path) -> None:
    subprocess.run(["cp", "-a", f"{installation.tree()}/.", tmp_path], check=True)
    assert (tmp_path / "usr/bin/vmbusctl").is_symlink()
    installation.make("uninstall", tmp_path)
    left = {
        path.relative_to(tmp_path) for path in tmp_path.rglob("*") if not path.is_dir() or path.is_symlink()
    }
    assert left == {Path("etc/vmbus/broker.toml")}
    assert not list(tmp_path.rglob("usr/**/*vmbus*"))
