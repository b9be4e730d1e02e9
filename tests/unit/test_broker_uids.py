# SPDX-License-Identifier: Apache-2.0
"""The range of worker uids, and the survey of the host that goes before it."""

# ruff: noqa: PLC0415 (code of vmbus.broker.dropped cannot be imported by root)
from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.unit.broker_nobody import as_nobody
from vmbus.broker.uids import Uids
from vmbus.wire.errors import VmbusError

FIRST = 1_900_000_000


def uids(place: Path, count: int = 4) -> Uids:
    return Uids(FIRST, count, place / "lock", place / "marker")


def test_never_used_ones_come_first_then_the_one_freed_longest_ago(tmp_path: Path) -> None:
    pool = uids(tmp_path)
    assert [pool.take() for _ in range(3)] == [FIRST, FIRST + 1, FIRST + 2]
    pool.free(FIRST + 1)
    pool.free(FIRST)
    assert [pool.take() for _ in range(3)] == [FIRST + 3, FIRST + 1, FIRST]
    with pytest.raises(VmbusError) as caught:
        pool.take()
    assert caught.value.kind == "QuotaExceeded"


def test_a_new_broker_goes_on_where_the_old_one_was(tmp_path: Path) -> None:
    pool = uids(tmp_path)
    assert [pool.take(), pool.take()] == [FIRST, FIRST + 1]
    again = uids(tmp_path)
    again.hold(FIRST + 2)
    assert [again.take(), again.take(), again.take()] == [FIRST + 3, FIRST, FIRST + 1]


@pytest.mark.parametrize("text", ["5", "", "x", "-1", "99999999999999999999"])
def test_a_marker_that_says_nothing_of_this_range_is_no_matter(tmp_path: Path, text: str) -> None:
    (tmp_path / "marker").write_text(text)
    assert uids(tmp_path).take() == FIRST


@pytest.mark.parametrize(
    ("first", "refused"), [(FIRST + 3, True), (FIRST - 3, True), (FIRST + 4, False), (FIRST - 4, False)]
)
def test_ranges_of_two_brokers_must_not_meet(tmp_path: Path, first: int, refused: bool) -> None:
    held = uids(tmp_path)
    code = (
        "import sys; from pathlib import Path; from vmbus.broker.uids import Uids; p = Path(sys.argv[1])\n"
        f"Uids({first}, 4, p / 'lock', p / 'marker-2')"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=False)
    assert ("held by another instance" in done.stderr) is refused
    assert (done.returncode != 0) is refused, done.stderr
    assert held.take() == FIRST


def checked(first: int, etc: Path) -> None:
    from vmbus.broker.dropped import survey

    survey.check_range(range(first, first + 100), etc)


@pytest.mark.parametrize(
    ("table", "line", "refused"),
    [
        ("passwd", "a:x:{}:1:::", True),
        ("group", "a:x:{}:", True),
        ("subuid", "a:{}:1", True),
        ("subgid", "a:{}:1", True),
        ("subuid", "a:100000:{}", True),
        ("subuid", "a:100000:65536", False),
        ("passwd", "broken line", False),
        ("passwd", "a:x:notanumber:1:::", False),
        ("passwd", "a:x:1:{}:::", False),
    ],
)
def test_a_range_that_is_somebody_s_is_refused(tmp_path: Path, table: str, line: str, refused: bool) -> None:
    tmp_path.chmod(0o755)
    for parent in list(tmp_path.parents)[:3]:
        parent.chmod(parent.stat().st_mode | 0o011)
    (tmp_path / table).write_text(f"root:x:0:0\n{line.format(FIRST + 50)}\n")
    if not refused:
        as_nobody(checked, FIRST, tmp_path)
        return
    with pytest.raises(VmbusError) as caught:
        as_nobody(checked, FIRST, tmp_path)
    assert caught.value.kind == "InUse"
    assert str(FIRST) in caught.value.message


def test_a_range_that_this_user_namespace_lacks_is_refused() -> None:
    with pytest.raises(VmbusError) as caught:
        as_nobody(checked, (1 << 32) - 50, Path("/none"))
    assert caught.value.kind == "NotSupported"


def test_the_survey_leaves_broker_and_service_out_of_a_worker_s_root() -> None:
    def image(_: None) -> Any:
        from vmbus.broker.dropped import survey

        return survey.image()

    found = as_nobody(image, None)
    targets = [target for _, target in found.binds]
    assert {"/code/vmbus/__init__.py", "/code/vmbus/wire", "/code/vmbus/worker", "/site"} <= set(targets)
    assert not [target for target in targets if "broker" in target or "service" in target]
    assert all(Path(source).exists() for source, _ in found.binds if source)
    assert found.command[1:3] == ["-I", "-S"]


@pytest.mark.parametrize(("text", "least"), [("UID_MIN\t\t  500\n", 500), ("#UID_MIN 5\n", 1000), ("", 1000)])
def test_the_least_owner_is_login_defs_uid_min(tmp_path: Path, text: str, least: int) -> None:
    def asked(path: Path) -> int:
        from vmbus.broker.dropped import survey

        return survey.uid_min(path)

    tmp_path.chmod(0o755)
    for parent in list(tmp_path.parents)[:3]:
        parent.chmod(parent.stat().st_mode | 0o011)
    (tmp_path / "login.defs").write_text(text)
    assert as_nobody(asked, tmp_path / "login.defs") == least
    assert as_nobody(asked, Path("/none")) == 1000
