# SPDX-License-Identifier: Apache-2.0
"""`make install` puts files where a system looks for them, and `make uninstall` undoes it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


def make(target: str, place: Path) -> None:
    # The recipe alone: the programs need the core, which is not built for the sake of a unit test.
    done = subprocess.run(
        ["make", "-s", "-f", "install.mk", target, f"DESTDIR={place}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def installed(place: Path) -> set[str]:
    return {str(path.relative_to(place)) for path in place.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("root")
    make("install-files", made)
    return made


@pytest.mark.parametrize(
    "file",
    [
        "etc/vmbus/broker.toml",
        "usr/lib/systemd/system/vmbusd.service",
        "usr/lib/systemd/system/vmbus-broker.service",
        "usr/lib/systemd/system/vmbus-machines.service",
        "usr/lib/systemd/system/vmbus-shutdown.service",
        "usr/lib/sysusers.d/vmbus.conf",
        "usr/lib/tmpfiles.d/vmbus.conf",
        "usr/lib/vmbus/hold-machines",
        "usr/share/bash-completion/completions/vmbusctl",
        "usr/share/dbus-1/interfaces/org.vmbus1.Machine.xml",
        "usr/share/dbus-1/system-services/org.vmbus1.service",
        "usr/share/dbus-1/system.d/org.vmbus1.conf",
        "usr/share/man/man1/vmbusctl.1",
        "usr/share/man/man5/vmbus-machine.5",
        "usr/share/man/man7/vmbus.7",
        "usr/share/man/man8/vmbusd.8",
        "usr/share/polkit-1/actions/org.vmbus1.policy",
        "usr/share/zsh/vendor-completions/_vmbusctl",
    ],
)
def test_it_is_where_it_is_looked_for(file: str, place: Path) -> None:
    assert (place / file).is_file()


def test_every_unit_interface_and_page_is_installed(place: Path) -> None:
    names = {Path(file).name for file in installed(place)}
    for pattern in ("systemd/*.service", "dbus/*", "man/*", "polkit/*"):
        for source in ROOT.glob(pattern):
            assert source.name in names


def test_a_configuration_that_is_there_is_kept(tmp_path: Path) -> None:
    make("install-files", tmp_path)
    (tmp_path / "etc/vmbus/broker.toml").write_text("# mine\n")
    make("install-files", tmp_path)
    assert (tmp_path / "etc/vmbus/broker.toml").read_text() == "# mine\n"


def test_uninstalling_leaves_the_configuration_alone(tmp_path: Path) -> None:
    make("install-files", tmp_path)
    make("uninstall", tmp_path)
    assert installed(tmp_path) == {"etc/vmbus/broker.toml"}
