# SPDX-License-Identifier: Apache-2.0
"""An interface of this host's with a cable to its other end, and a system whose broker.toml grants it."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from typing import Final

from tests.lab.system import ALICE, System

RULE: Final = """\
polkit.addRule(function(action, subject) {
    if (action.id == "org.vmbus1.interface.use") return polkit.Result.YES;
});
"""
"""polkit's word for whoever puts an interface into a definition."""


def grant(name: str) -> str:
    """What broker.toml says for alice to use it."""
    return f'[interfaces.{name}]\nusers = ["{ALICE}"]\n'


@contextlib.contextmanager
def cable(near: str, far: str, address: str = "") -> Iterator[None]:
    """A veth pair that is up; ``address`` is the host's at the far end, if it has one there."""
    link = ["ip", "link"]
    subprocess.run([*link, "add", near, "type", "veth", "peer", "name", far], check=True)
    try:
        if address:
            subprocess.run(["ip", "address", "add", address, "dev", far], check=True)
        for name in (near, far):
            subprocess.run([*link, "set", name, "up"], check=True)
        yield
    finally:
        subprocess.run([*link, "del", near], check=True)


@contextlib.contextmanager
def granted(near: str, far: str, address: str = "", *, rule: str = RULE) -> Iterator[System]:
    """A whole system and that cable, whose near end alice may use as far as polkit's ``rule`` lets her."""
    with cable(near, far, address), System(policy=grant(near)) as whole:
        if rule:
            whole.rule(rule)
        yield whole
