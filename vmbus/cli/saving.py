# SPDX-License-Identifier: Apache-2.0
"""vmbusctl save and restore: the file is opened here, as the caller.

A file gets its name when the machine is in it: until then it has none (O_TMPFILE), or, where a file system
has no such files, one that begins with a dot. So whatever happens, no half of a machine is left under the
name.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import errno
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from vmbus.cli import files, output
from vmbus.cli.remote import Outcome, Remote
from vmbus.wire.errors import VmbusError


async def save(remote: Remote, arguments: argparse.Namespace) -> int:
    """Machine.Save, until it is done; interrupted, it is cancelled, unless that comes too late."""
    path = await remote.find(arguments.machine)
    with _new(Path(arguments.to)) as (fd, keep_it):
        begun = asyncio.ensure_future(remote.save(path, fd, keep=arguments.keep))
        try:
            outcome = await remote.finish(await asyncio.shield(begun))
        except asyncio.CancelledError:
            done = await _done_all_the_same(remote, await begun)
            if done is None:
                raise
            outcome = done
        keep_it()
    return _done(arguments, "saved", outcome.result)


async def _done_all_the_same(remote: Remote, job: str) -> Outcome | None:
    """Cancel a job; what it says if it was done before."""
    with contextlib.suppress(VmbusError):
        await remote.cancel(job)
    try:
        return await remote.finish(job)
    except VmbusError:
        return None


async def restore(remote: Remote, arguments: argparse.Namespace) -> int:
    """Machine.Restore."""
    path = await remote.find(arguments.machine)
    wanted = await files.asked_for(remote, path, arguments)
    with _saved(arguments.source) as fd, files.opened(wanted) as fds:
        await remote.restore(path, fd, fds, paused=arguments.paused, changed_disks=arguments.changed_disks)
    return _done(arguments, "restored")


def _done(arguments: argparse.Namespace, what: str, result: Mapping[str, Any] | None = None) -> int:
    if arguments.json:
        output.print_json({**(result or {}), "machine": arguments.machine, "state": what})
    return 0


@contextlib.contextmanager
def _new(target: Path) -> Iterator[tuple[int, Callable[[], None]]]:
    """A new file without its name, and what gives it that. Raises AlreadyExists, AccessDenied, NotFound."""
    if target.exists() or target.is_symlink():
        raise VmbusError("AlreadyExists", f"{target} exists; choose another name", argument="FILE")
    hidden = target.with_name(f".{target.name}.{os.getpid()}")
    named = False
    try:
        try:
            fd = os.open(target.parent, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR):
                raise
            fd = os.open(hidden, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
            named = True
    except OSError as error:
        kind = "NotFound" if error.errno == errno.ENOENT else "AccessDenied"
        raise VmbusError(kind, f"{target.parent}: {error.strerror}", argument="FILE") from None

    def keep_it() -> None:
        source = str(hidden) if named else f"/proc/self/fd/{fd}"
        try:
            # Only with a directory does Python call linkat(), which follows the link in /proc.
            directory = os.open(target.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.link(source, target, src_dir_fd=directory, follow_symlinks=True)
            finally:
                os.close(directory)
        except OSError as error:
            raise VmbusError(
                "AlreadyExists", f"{target} cannot be named: {error.strerror}", argument="FILE"
            ) from None

    try:
        yield fd, keep_it
    finally:
        os.close(fd)
        if named:
            hidden.unlink(missing_ok=True)


@contextlib.contextmanager
def _saved(source: str) -> Iterator[int]:
    """A saved machine, for writing, too, if the caller may: so that it can be marked as used."""
    try:
        try:
            fd = os.open(source, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EROFS, errno.EPERM):
                raise
            fd = os.open(source, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise VmbusError("NotFound", f"{source} does not exist", argument="FILE") from None
    except OSError as error:
        raise VmbusError("AccessDenied", f"{source}: {error.strerror}", argument="FILE") from None
    try:
        yield fd
    finally:
        os.close(fd)
