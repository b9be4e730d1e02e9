# SPDX-License-Identifier: Apache-2.0
"""``vmbusctl memory`` and ``set-memory``, against a vmbusd of the test's own."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.unit.cli.fake_bus import FakeBus
from tests.unit.cli.test_vmbusctl import bus  # noqa: F401 (a fixture)
from vmbus.cli import main
from vmbus.wire.errors import VmbusError

MIB = 1 << 20


@pytest.fixture
def running(bus: FakeBus) -> FakeBus:  # noqa: F811
    bus.change("running")
    return bus


def test_a_look_is_a_line_for_the_host_and_one_for_each_machine(
    running: FakeBus, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main(["memory"]) == 0
    host, line = capsys.readouterr().out.splitlines()
    assert host == "host: total 8 GiB, available 6 GiB, pressure 1.5 %"
    assert line.split()[0] == "web"
    cells = " ".join(line.split()[1:])
    assert cells == "64 MiB 64 MiB 48 MiB 32 MiB 0 B 20 MiB 16 MiB 0 B 0 B 7 MiB"


def test_a_machine_that_stands_still_is_not_looked_at(
    bus: FakeBus,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main.main(["memory"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1
    assert "GetMemory" in [member for member, _ in bus.calls]


def test_a_machine_that_ends_meanwhile_is_left_out(
    running: FakeBus, capsys: pytest.CaptureFixture[str]
) -> None:
    def end() -> None:
        raise VmbusError("InvalidState", "it has ended")

    running.meanwhile["GetMemory"] = lambda: None if running.memory.pop("size", None) is None else end()
    assert main.main(["memory"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_each_look_is_a_document(running: FakeBus, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["memory", "web", "--json", "--count", "3", "--interval", "0.01"]) == 0
    looks = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(looks) == 3
    assert looks[0]["machines"]["web"]["saved"] == 16 * MIB
    assert looks[0]["host"]["available"] == 6 << 30
    assert looks[0]["at"] < looks[2]["at"]


@pytest.mark.parametrize("interval", ["0", "-1", "nan", "inf"])
def test_looks_that_do_not_end_or_never_begin_are_refused(running: FakeBus, interval: str) -> None:
    assert main.main(["memory", "--watch", "--interval", interval]) == 2
    assert running.calls == []


def test_without_matplotlib_a_drawing_is_refused_before_anything_is_recorded(
    running: FakeBus,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main.main(["memory", "--plot", str(tmp_path / "m.svg")]) == 6
    assert "install python3-matplotlib" in capsys.readouterr().err
    assert running.calls == []


def test_where_nothing_can_be_written_nothing_is_recorded(
    running: FakeBus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib", reason="the extra plot is not installed")
    assert main.main(["memory", "--plot", str(tmp_path / "none" / "m.svg")]) == 4
    assert main.main(["memory", "--plot", str(tmp_path / "m.png")]) == 2
    assert running.calls == []


def test_a_drawing_names_the_machines_and_what_is_saved(running: FakeBus, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra plot is not installed")
    place = tmp_path / "memory.svg"
    words = ["memory", "--plot", str(place), "--for", "0.2", "--interval", "0.05"]
    assert main.main(words) == 0
    text = place.read_text()
    assert text.rstrip().endswith("</svg>")
    for label in ("web", "saved", "ballooned", "overhead"):
        assert f"<!-- {label} -->" in text, label


def test_a_target_is_a_size(running: FakeBus, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["set-memory", "web", "32M"]) == 0
    assert ("SetMemoryTarget", [32 * MIB]) in running.calls
    assert main.main(["set-memory", "web", "much"]) == 2
    assert "SIZE" in capsys.readouterr().err


def test_waiting_ends_when_the_guest_is_there(running: FakeBus) -> None:
    running.meanwhile["GetMemory"] = lambda: running.memory.update(ballooned=32 * MIB)
    assert main.main(["set-memory", "web", "32M", "--wait", "5"]) == 0


def test_waiting_for_a_guest_that_does_not_heed_ends_too(
    running: FakeBus, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main(["set-memory", "web", "32M", "--wait", "0.2"]) == 7
    assert "the guest has 64 MiB after 0.2 seconds" in capsys.readouterr().err
