# SPDX-License-Identifier: Apache-2.0
"""QEMU's tools and ours on one image."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Final

from vmbus.cli import img

MIB: Final = 1 << 20


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
