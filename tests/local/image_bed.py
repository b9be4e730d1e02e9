# SPDX-License-Identifier: Apache-2.0
"""QEMU's tools and ours on one image."""

from __future__ import annotations

import contextlib
import io
import json
import re
import subprocess
import time
from pathlib import Path
from typing import Any, Final, NamedTuple

from vmbus.cli import img

MIB: Final = 1 << 20
LISTENS: Final = "00010000"  # __SO_ACCEPTCON, include/linux/net.h


def qemu(*words: str | Path, code: int = 0) -> str:
    """Run one of QEMU's tools, which has to end with ``code``. Returns its output."""
    done = subprocess.run([*map(str, words)], capture_output=True, text=True, check=False)
    assert done.returncode == code, f"{words}: {done.stdout}{done.stderr}"
    return done.stdout


def ours(*words: str | Path, code: int = 0) -> None:
    """Run vmbus-img, which has to end with ``code``."""
    assert img.main([str(word) for word in words]) == code


def clean(path: Path) -> None:
    """Neither finds anything wrong."""
    found = json.loads(qemu("qemu-img", "check", "-f", "qcow2", "--output=json", path))
    assert found["check-errors"] == 0 and "corruptions" not in found and "leaks" not in found, found
    ours("check", "-q", path)


def serves(process: subprocess.Popen[Any], path: Path, within: float = 60) -> bool:
    """Wait until ``process`` listens on the socket ``path``, which exists a moment before that; False when it
    has ended. Nobody connects: some servers serve one client only."""
    deadline = time.monotonic() + within
    while process.poll() is None:
        assert time.monotonic() < deadline, f"nobody listens on {path}"
        lines = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()]
        # Ours listens before it gives the socket its name.
        if path.exists() and all(line[3] == LISTENS for line in lines if line[-1] == str(path)):
            return True
        time.sleep(0.01)
    return False


class Ran(NamedTuple):
    """How one of the two ended."""

    code: int
    out: str
    err: str


def theirs(words: list[str]) -> Ran:
    """Run qemu-img."""
    done = subprocess.run(["qemu-img", *words], capture_output=True, check=False)
    return Ran(done.returncode, done.stdout.decode(), done.stderr.decode())


def mine(words: list[str]) -> Ran:
    """Run vmbus-img."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = img.main(words)
    return Ran(code, out.getvalue(), err.getvalue())


def plain(text: str) -> str:
    """A text without what is nobody's doing."""
    text = re.sub(r"(    \(\d+\.\d+/100%\)\r)+", "(progress)", text)
    text = re.sub(r"Run completed in [\d.]+ seconds", "Run completed in N seconds", text)
    text = re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", "DATE", text)
    return text.replace("vmbus-img", "qemu-img")
