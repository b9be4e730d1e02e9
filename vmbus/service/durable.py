# SPDX-License-Identifier: Apache-2.0
"""One file, written so that after a crash it is the old one or the new one, never half of either."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from pathlib import Path
from typing import TypeVar

import msgspec

log = logging.getLogger("vmbus.durable")

T = TypeVar("T")


def write(path: Path, value: object) -> None:
    """Replace ``path`` (mode 0600) by ``value`` as JSON."""
    write_bytes(path, msgspec.json.format(msgspec.json.encode(value)) + b"\n", mode=0o600)


def write_bytes(path: Path, content: bytes, *, mode: int) -> None:
    """Replace ``path`` by ``content``: temporary file, fsync, rename, fsync of the directory."""
    temporary = path.with_name(f".{path.name}.new")
    with contextlib.suppress(FileNotFoundError):  # a crash may have left one that cannot be written
        temporary.unlink()
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        with open(fd, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    sync_directory(path.parent)


def read(path: Path, kind: type[T]) -> T | None:
    """The value, or None when there is no such file or it is not one of ours (which is logged)."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.MsgspecError) as error:
        log.error("%s is passed over: %s", path, error)
        return None


def touch(path: Path) -> None:
    """An empty file (mode 0600), durably; it may be there. Raises OSError."""
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))
    sync_directory(path.parent)


def remove(path: Path) -> None:
    """Remove a file or a directory with all in it, durably; it need not exist."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """What was created, renamed or removed in it is so after a crash. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
