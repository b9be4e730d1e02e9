# SPDX-License-Identifier: Apache-2.0
"""A bridge of this host, and a system whose broker.toml grants it to alice."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from typing import Final

from tests.lab.system import ALICE, System

RULE: Final = """\
polkit.addRule(function(action, subject) {
    if (action.id == "org.vmbus1.bridge.use") return polkit.Result.YES;
});
"""
"""polkit's word for whoever puts a bridge into a definition."""


def grant(name: str) -> str:
    """What broker.toml says for alice to use it."""
    return f'[bridges.{name}]\nusers = ["{ALICE}"]\n'


@contextlib.contextmanager
def bridge(name: str, address: str = "") -> Iterator[None]:
    """A bridge that is up; ``address`` (``10.99.0.1/30``) is the host's there, if it has one."""
    link = ["ip", "link"]
    subprocess.run([*link, "add", name, "type", "bridge"], check=True)
    try:
        if address:
            subprocess.run(["ip", "address", "add", address, "dev", name], check=True)
        subprocess.run([*link, "set", name, "up"], check=True)
        yield
    finally:
        subprocess.run([*link, "del", name], check=True)


@contextlib.contextmanager
def granted(name: str, address: str = "", *, rule: str = RULE) -> Iterator[System]:
    """A whole system and that bridge, which alice may use as far as polkit's ``rule`` lets her."""
    with bridge(name, address), System(policy=grant(name)) as whole:
        if rule:
            whole.rule(rule)
        yield whole
