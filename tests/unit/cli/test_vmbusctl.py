# SPDX-License-Identifier: Apache-2.0
"""The verbs, against a vmbusd of the test's own: what is called, what is printed, how it ends."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.unit.cli.fake_bus import UUID, FakeBus
from vmbus.cli import arguments, commands, connection, main
from vmbus.wire.errors import KINDS, VmbusError


@pytest.fixture
def bus(monkeypatch: pytest.MonkeyPatch) -> FakeBus:
    fake = FakeBus()

    @contextlib.asynccontextmanager
    async def connect(**_options: Any) -> AsyncIterator[FakeBus]:
        yield fake

    monkeypatch.setattr(connection, "connect", connect)
    return fake


def called(bus: FakeBus) -> list[str]:
    return [member for member, _ in bus.calls]


def test_list_shows_a_line_for_each_machine(bus: FakeBus, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["list"]) == 0
    assert capsys.readouterr().out.split()[:5] == ["web", "stopped", "2", "64", "MiB"]


def test_list_leaves_out_other_users_machines_unless_asked(
    bus: FakeBus, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "getuid", lambda: 1000)
    bus.properties = {"Uuid": UUID, "Owner": 1001, "State": "running"}
    main.main(["list", "--names"])
    assert capsys.readouterr().out == ""
    main.main(["list", "--names", "--all"])
    assert capsys.readouterr().out == f"{UUID}\n"


def test_roots_list_is_everybodys(
    bus: FakeBus, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "getuid", lambda: 0)
    bus.properties["Owner"] = 1001
    main.main(["list", "--names"])
    assert capsys.readouterr().out == "web\n"


def test_control_characters_in_what_others_wrote_do_not_reach_the_terminal(
    bus: FakeBus, capsys: pytest.CaptureFixture[str]
) -> None:
    bus.properties["StateDetail"] = "\x1b]0;owned\x07"
    main.main(["show", "web"])
    assert "\x1b" not in capsys.readouterr().out


@pytest.mark.parametrize("where", [["--json", "show", "web"], ["show", "web", "--json"]])
def test_json_is_one_document_wherever_the_option_stands(
    where: list[str], bus: FakeBus, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main(where) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["name"], document["state"], document["uuid"]) == ("web", "stopped", UUID)


@pytest.mark.parametrize(
    ("verb", "method"),
    [
        ("kill", "Kill"),
        ("reset", "Reset"),
        ("pause", "Pause"),
        ("resume", "Resume"),
        ("undefine", "Undefine"),
        ("start", "Start"),
        ("shutdown", "Shutdown"),
    ],
)
def test_each_verb_calls_its_method_on_every_machine_named(verb: str, method: str, bus: FakeBus) -> None:
    assert main.main([verb, "web", UUID]) == 0
    assert called(bus).count(method) == 2


def test_stop_gives_microseconds_and_waits_for_the_job(bus: FakeBus) -> None:
    bus.then["Stop"] = lambda: bus.finish_job("done")
    assert main.main(["stop", "web", "--deadline", "1.5"]) == 0
    assert ("Stop", [1_500_000]) in bus.calls


def test_stop_says_why_the_job_failed(bus: FakeBus, capsys: pytest.CaptureFixture[str]) -> None:
    bus.then["Stop"] = lambda: bus.finish_job(
        "failed", "org.vmbus1.Error.Timeout", "it is stuck in the kernel"
    )
    assert main.main(["stop", "web"]) == 7
    assert capsys.readouterr().err == "vmbusctl: it is stuck in the kernel\n"


@pytest.mark.parametrize(("state", "status"), [("running", 0), ("crashed", 8)])
def test_wait_ends_with_the_state_or_with_the_crash(state: str, status: int, bus: FakeBus) -> None:
    bus.then["Subscribe"] = lambda: bus.change(state, "triple-fault")
    assert main.main(["wait", "web", "--state", "running", "--timeout", "5"]) == status


def test_wait_ends_at_once_when_the_state_is_there_already(bus: FakeBus) -> None:
    assert main.main(["wait", "web", "--timeout", "5"]) == 0


def test_wait_gives_up_after_its_timeout(bus: FakeBus, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["wait", "web", "--state", "running", "--timeout", "0.05"]) == 7
    assert "was not running within 0.05 seconds" in capsys.readouterr().err


def test_wait_ends_when_the_service_leaves_the_bus(bus: FakeBus) -> None:
    bus.then["Subscribe"] = bus.leave
    assert main.main(["wait", "web", "--state", "running"]) == 6


def machine_flags(place: Path, disks: int = 1) -> list[str]:
    (place / "kernel").write_bytes(b"kernel")
    words = ["--name", "try", "--memory", "64M", "--kernel", str(place / "kernel")]
    for number in range(disks):
        (place / f"{number}.raw").write_bytes(bytes(512))
        words += ["--disk", f"{place}/{number}.raw,format=raw"]
    return words


def test_run_passes_the_files_that_it_opened_and_no_path(tmp_path: Path, bus: FakeBus) -> None:
    assert main.main(["run", "--detach", *machine_flags(tmp_path)]) == 0
    body = dict(bus.calls)["CreateTransient"]
    inodes = [(tmp_path / name).stat().st_ino for name in ("kernel", "0.raw")]
    assert bus.files == inodes
    assert list(body[1]) == ["kernel", "disk/disk0/0"]
    assert str(tmp_path) not in repr(body)


def test_17_files_are_refused_before_anything_is_sent(
    tmp_path: Path, bus: FakeBus, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main(["run", "--detach", *machine_flags(tmp_path, disks=16)]) == 2
    assert bus.calls == []
    assert "17 files" in capsys.readouterr().err


def test_16_files_are_sent(tmp_path: Path, bus: FakeBus) -> None:
    assert main.main(["run", "--detach", *machine_flags(tmp_path, disks=15)]) == 0
    assert len(bus.files) == 16


def test_no_file_stays_open_behind_a_refused_run(tmp_path: Path, bus: FakeBus) -> None:
    before = os.listdir("/proc/self/fd")
    bus.errors["CreateTransient"] = VmbusError("QuotaExceeded", "you may have 1 GiB")
    assert main.main(["run", *machine_flags(tmp_path)]) == 4
    assert os.listdir("/proc/self/fd") == before


@pytest.mark.parametrize(
    ("state", "reason", "status"), [("stopped", "guest-poweroff", 0), ("crashed", "triple-fault", 8)]
)
def test_run_shows_the_console_and_ends_as_the_machine_does(
    state: str, reason: str, status: int, tmp_path: Path, bus: FakeBus, capfd: pytest.CaptureFixture[str]
) -> None:
    ours, theirs = socket.socketpair()
    bus.console_end = theirs.detach()

    bus.properties["State"] = "paused"

    def guest() -> None:
        ours.sendall(b"hello from the guest\r\n")
        ours.close()
        bus.change(state, reason)
        bus.remove()

    bus.meanwhile["Resume"] = guest
    assert main.main(["run", *machine_flags(tmp_path)]) == status
    assert "hello from the guest" in capfd.readouterr().out
    assert called(bus).index("OpenConsole") < called(bus).index("Resume")


def test_start_passes_a_file_for_a_slot_that_takes_one(tmp_path: Path, bus: FakeBus) -> None:
    (tmp_path / "k").write_bytes(b"kernel")
    assert main.main(["start", "web", "--file", f"kernel={tmp_path}/k"]) == 0
    assert bus.files == [(tmp_path / "k").stat().st_ino]


def test_start_refuses_a_slot_that_is_not_there(bus: FakeBus, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["start", "web", "--file", "disk/a/0=/dev/null"]) == 2
    assert "these do: kernel" in capsys.readouterr().err


def test_define_shows_the_chain_that_was_resolved(
    tmp_path: Path, bus: FakeBus, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main(["define", *machine_flags(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"disk0:    {tmp_path}/0.raw (raw)",
        f"defined try ({UUID})",
    ]


def test_a_dry_run_needs_no_bus(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["define", "--dry-run", "--json", "--bus-address", "x:", *machine_flags(tmp_path)]) == 0
    assert json.loads(capsys.readouterr().out)["definition"]["name"] == "try"


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_each_error_is_one_line_and_has_a_status(
    kind: str, bus: FakeBus, capsys: pytest.CaptureFixture[str]
) -> None:
    bus.errors["Pause"] = VmbusError(kind, "what was wrong and what would work", argument="x")
    status = main.main(["pause", "web"])
    assert 1 <= status <= 7
    assert capsys.readouterr().err == "vmbusctl: x: what was wrong and what would work\n"


def test_with_json_an_error_is_json_too(bus: FakeBus, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["show", "nobody", "--json"]) == 3
    assert json.loads(capsys.readouterr().err)["error"]["kind"] == "NotFound"


@pytest.mark.parametrize(
    "words", [["start"], ["frobnicate"], ["list", "--al"], ["wait", "web", "--state", "gone"], ["shutdown"]]
)
def test_a_wrong_command_line_is_one_line_and_status_2(
    words: list[str], bus: FakeBus, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = main.main(words)
    except SystemExit as error:
        status = error.code  # type: ignore[assignment]
    assert status == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_shutdown_all_takes_the_running_ones_and_waits(bus: FakeBus) -> None:
    bus.properties["State"] = "running"
    bus.then["Shutdown"] = lambda: bus.change("stopped", "guest-poweroff")
    assert main.main(["shutdown", "--all", "--wait", "5"]) == 0
    assert called(bus).count("Shutdown") == 1


def test_shutdown_gives_up_waiting(bus: FakeBus) -> None:
    bus.properties["State"] = "running"
    assert main.main(["shutdown", "web", "--wait", "0.05"]) == 7


def test_host_tells_what_it_can_do(bus: FakeBus, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["host"]) == 0
    out = capsys.readouterr().out
    assert "kvm: yes" in out and "memory: 8 GiB" in out and "version: 0.1.0" in out


def test_no_verb_is_left_without_an_action() -> None:
    without_a_bus = {"abi"}
    assert {command.name for command in arguments.COMMANDS} == set(commands.ACTIONS) | without_a_bus
