# SPDX-License-Identifier: Apache-2.0
"""Named ports, through the whole system: the guest, bare metal in mode ``ports``, answers what comes."""

from __future__ import annotations

import json
import os
import subprocess

import pytest

from tests.lab.guest import Console
from tests.lab.system import ALICE, BOB, System
from tests.local.broker_bed import wait_until
from tests.local.ctl_bed import ctl, nothing_is_left, refused, system

__all__ = ["nothing_is_left", "system"]
pytestmark = [pytest.mark.requires("root", "kvm"), pytest.mark.long]

NAME = "ports"


def started(system: System, mode: str = "ports") -> Console:
    kernel = str(system.files(ALICE) / "guest")
    words = ["--memory", "16M", "--kernel", kernel, "--cmdline", mode]
    for port in ("agent", "org.vmbus.test"):
        words += ["--port", port]
    ctl(system, "define", "--name", NAME, *words)
    ctl(system, "start", NAME)
    return Console(system, ALICE, NAME, "--read-only")


class Port:
    """``vmbusctl port`` in the background."""

    def __init__(self, system: System, name: str, *words: str) -> None:
        self._process = system.popen(
            ALICE,
            ["vmbusctl", "port", NAME, name, *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self._heard = b""

    def say(self, words: bytes) -> None:
        """Write."""
        assert self._process.stdin
        self._process.stdin.write(words)
        self._process.stdin.flush()

    def hear(self, words: bytes) -> None:
        """Read until these have come."""
        assert self._process.stdout
        while words not in self._heard:
            part = os.read(self._process.stdout.fileno(), 4096)
            assert part, self._heard
            self._heard += part

    def close(self) -> None:
        """Leave."""
        self._process.terminate()
        self._process.communicate(timeout=20)


def test_words_go_both_ways_and_history_is_kept(system: System) -> None:
    console = started(system)
    console.wait_for("ports: 0 is agent", 20)
    console.wait_for("ports: 1 is org.vmbus.test", 20)
    agent, test = Port(system, "agent"), Port(system, "org.vmbus.test")
    agent.say(b"one")
    agent.hear(b"heard one")
    test.say(b"two")
    test.hear(b"heard two")
    # Many may read, one may write.
    assert "somebody else writes" in refused(system, "port", NAME, "agent")
    reader = Port(system, "agent", "--read-only")
    reader.hear(b"heard one")
    agent.say(b"three")
    reader.hear(b"heard three")
    for port in (agent, test, reader):
        port.close()
    # It goes on without the service, and with the next one.
    system.service.kill()
    system.service.start()
    wait_until(lambda: json.loads(ctl(system, "show", NAME, "--json"))["state"] == "running")
    again = Port(system, "agent")
    again.hear(b"heard three")
    again.say(b"four")
    again.hear(b"heard four")
    again.close()
    stats = json.loads(ctl(system, "show", NAME, "--stats", "--json"))["stats"]
    assert stats["devices"]["ports"]["ports"]["agent"]["to-guest"] == len("onethreefour")
    console.close()


def test_what_is_not_there_or_somebody_elses_is_refused(system: System) -> None:
    console = started(system)
    assert "there is agent, org.vmbus.test" in refused(system, "port", NAME, "none")
    uuid = json.loads(ctl(system, "show", NAME, "--json"))["uuid"]
    assert "console-any" in refused(system, "port", uuid, "agent", user=BOB)
    ctl(system, "kill", NAME)
    assert "running" in refused(system, "port", NAME, "agent")
    console.close()


def test_a_name_that_is_there_twice_is_refused(system: System) -> None:
    kernel = str(system.files(ALICE) / "guest")
    words = ["--memory", "16M", "--kernel", kernel, "--port", "a", "--port", "a"]
    assert "there twice" in refused(system, "define", "--name", NAME, *words)


def test_a_driver_that_breaks_the_rules_resets_its_own_device(system: System) -> None:
    console = started(system, "ports-hostile")
    console.wait_for("and then it works: answered", 60)
    for line in (
        "half a message: reset",
        "a message to be written: reset",
        "room for half a message: reset",
        "words to be written: reset",
        "words from nowhere: reset",
        "a loop: reset",
        "a port that is not there: answered",
    ):
        assert f"ports-hostile: {line}" in console.text, line
    console.close()
