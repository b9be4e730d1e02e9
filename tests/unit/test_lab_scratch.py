# SPDX-License-Identifier: Apache-2.0
"""Temporary files of a session are in one directory, and a killed session's are removed by the next one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.lab import scratch
from tests.lab.kernels import CHECKOUT

SESSION = """
import sys, tempfile
from pathlib import Path
from tests.lab import scratch
place = scratch.enter(Path(sys.argv[1]))
Path(tempfile.mkdtemp(), "file").write_text("left")
print(place, flush=True)
sys.stdin.read()
scratch.leave()
"""


def session(parent: Path) -> tuple[subprocess.Popen[str], Path]:
    words = [sys.executable, "-c", SESSION, str(parent)]
    process = subprocess.Popen(words, cwd=CHECKOUT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    return process, Path(process.stdout.readline().strip())


def test_it_is_one_directory_and_gone_at_the_end(tmp_path: Path) -> None:
    process, place = session(tmp_path)
    assert [path.read_text() for path in place.glob("*/file")] == ["left"]
    process.communicate("")
    assert list(tmp_path.iterdir()) == []


def test_a_killed_session_s_is_removed_by_the_next_and_a_live_one_s_is_not(tmp_path: Path) -> None:
    killed, left = session(tmp_path)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert left.exists()
    lives, place = session(tmp_path)
    assert not left.exists()
    scratch.sweep(tmp_path)
    assert place.exists()
    lives.communicate("")


def test_what_another_user_made_or_a_link_is_left_alone(tmp_path: Path) -> None:
    other, link = tmp_path / f"{scratch.PREFIX}other", tmp_path / f"{scratch.PREFIX}link"
    other.mkdir(mode=0o755)
    (tmp_path / "aim").mkdir(mode=0o755)
    link.symlink_to(tmp_path / "aim")
    if os.geteuid() == 0:
        os.chown(other, 12345, 12345)
        scratch.sweep(tmp_path)
        assert other.exists()
    scratch.sweep(tmp_path)
    assert link.is_symlink() and (tmp_path / "aim").exists()
