# SPDX-License-Identifier: Apache-2.0
"""The bus policy and the activation file, held against a real dbus-daemon."""

from __future__ import annotations

import configparser
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
CONF = ROOT / "dbus/org.vmbus1.conf"

OURS_WITH = """<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <type>system</type>
  <listen>unix:path={place}/bus</listen>
  <auth>EXTERNAL</auth>
  <policy context="default">
    <allow user="*"/>
    <deny own="*"/>
    <deny send_type="method_call"/>
    <allow send_type="signal"/>
    <allow send_requested_reply="true" send_type="method_return"/>
    <allow send_requested_reply="true" send_type="error"/>
    <allow receive_type="method_call"/>
    <allow receive_type="method_return"/>
    <allow receive_type="error"/>
    <allow receive_type="signal"/>
    <allow send_destination="org.freedesktop.DBus"/>
  </policy>
  {ours}
</busconfig>
"""


@pytest.fixture
def bus() -> Iterator[str]:
    """A bus with the system bus's defaults and our policy, where ``nobody`` plays the service's user."""
    place = Path(tempfile.mkdtemp())
    place.chmod(0o755)
    ours = CONF.read_text()
    ours = ours[ours.index("<busconfig>") + len("<busconfig>") : ours.index("</busconfig>")]
    config = place / "bus.conf"
    config.write_text(OURS_WITH.format(place=place, ours=ours.replace('user="vmbus"', 'user="nobody"')))
    daemon = subprocess.Popen(
        ["dbus-daemon", f"--config-file={config}", "--nofork", "--print-address=1"],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert daemon.stdout is not None
    try:
        yield daemon.stdout.readline().strip()
    finally:
        daemon.terminate()
        daemon.wait(10)
        shutil.rmtree(place)


def request_name(bus: str, user: str) -> str:
    """What the bus says to ``user`` who wants to be org.vmbus1."""
    found = subprocess.run(
        [
            "dbus-send",
            f"--bus={bus}",
            "--print-reply=literal",
            "--dest=org.freedesktop.DBus",
            "/org/freedesktop/DBus",
            "org.freedesktop.DBus.RequestName",
            "string:org.vmbus1",
            "uint32:4",
        ],
        user=user,
        group=pwd.getpwnam(user).pw_gid,
        extra_groups=[],
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    return found.stdout.strip() or found.stderr.strip()


@pytest.mark.requires("root")
def test_the_service_user_gets_the_name(bus: str) -> None:
    assert request_name(bus, "nobody") == "uint32 1"


@pytest.mark.requires("root")
def test_another_user_does_not_get_the_name(bus: str) -> None:
    assert "AccessDenied" in request_name(bus, "daemon")


@pytest.mark.requires("root")
def test_root_does_not_get_the_name_by_being_root(bus: str) -> None:
    assert "AccessDenied" in request_name(bus, "root")


def test_activation_starts_the_same_program_as_the_unit() -> None:
    activation = configparser.ConfigParser()
    activation.read(ROOT / "dbus/org.vmbus1.service")
    section = activation["D-BUS Service"]
    unit = (ROOT / "systemd/vmbusd.service").read_text().replace("\\\n", " ")
    (start,) = [
        line.removeprefix("ExecStart=") for line in unit.splitlines() if line.startswith("ExecStart=")
    ]
    assert section["Exec"].split() == start.split()
    assert section["User"] == "vmbus"
    assert section["SystemdService"] == "vmbusd.service"
