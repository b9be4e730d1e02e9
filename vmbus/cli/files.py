# SPDX-License-Identifier: Apache-2.0
"""Opening the files of a machine's slots here, as the caller, to pass them on.

Each is opened as its slot will be used: for writing only where the guest may write. The lot is counted
before anything is opened, since a bus drops the sender of more than 16.

A passphrase goes the same way: from a file as it is, or from standard input (``-``, without the newline
at its end) through a memfd. It is kept no longer than that, and only the machine's worker sees it.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Final

from vmbus.cli.remote import Remote
from vmbus.wire import dbus_form
from vmbus.wire.definition import Definition, Slot, slots
from vmbus.wire.errors import VmbusError

MAX_SECRET: Final = 4096
MAX_FDS: Final = 16  # a system bus drops the sender of more, without a reply


@contextlib.contextmanager
def opened(wanted: Mapping[str, tuple[str, bool]]) -> Iterator[dict[str, int]]:
    """Fds by slot, for paths and "writable" by slot; closed at the end. Raises VmbusError."""
    if len(wanted) > MAX_FDS:
        raise VmbusError(
            "InvalidArgument",
            f"{len(wanted)} files, and a bus takes at most {MAX_FDS} in one message. Define the machine and "
            f"start it, so that its files are opened by path, or shorten its chains with 'qemu-img commit'",
            argument="files",
        )
    with contextlib.ExitStack() as stack:
        fds: dict[str, int] = {}
        for slot, (path, writable) in wanted.items():
            typed = path == "-" and slot.endswith("/secret")
            fds[slot] = _typed() if typed else _open(slot, path, writable=writable)
            stack.callback(os.close, fds[slot])
        yield fds


def all_of(definition: Definition) -> dict[str, tuple[str, bool]]:
    """What ``opened`` needs for every slot of a definition; VmbusError where a path is missing."""
    return of_slots(slots(definition))


def of_slots(all_slots: Iterable[Slot]) -> dict[str, tuple[str, bool]]:
    """The same for some slots."""
    wanted: dict[str, tuple[str, bool]] = {}
    for slot in all_slots:
        if slot.kind == "secret":
            continue
        if slot.path is None:
            raise VmbusError("InvalidArgument", f"the path for {slot.name} is missing", argument=slot.name)
        wanted[slot.name] = (slot.path, slot.writable)
    return wanted


def given(definition: Definition, assignments: list[str]) -> dict[str, tuple[str, bool]]:
    """What ``opened`` needs for SLOT=PATH words; they must be slots of ``definition`` that take an fd."""
    by_fd = {slot.name: slot for slot in slots(definition) if slot.path is None and slot.kind != "secret"}
    wanted: dict[str, tuple[str, bool]] = {}
    for word in assignments:
        name, equals, path = word.partition("=")
        if not equals or not path:
            raise VmbusError("InvalidArgument", f"{word!r} is not SLOT=PATH", argument="--file")
        if name not in by_fd:
            known = ", ".join(sorted(by_fd)) or 'none; declare it with source = "fd"'
            raise VmbusError(
                "InvalidArgument", f"{name!r} takes no file; these do: {known}", argument="--file"
            )
        wanted[name] = (path, by_fd[name].writable)
    return wanted


async def asked_for(remote: Remote, path: str, arguments: argparse.Namespace) -> dict[str, tuple[str, bool]]:
    """What ``opened`` needs for ``--file`` and ``--secret`` of a machine that is defined; without either its
    definition is not asked for."""
    if not arguments.files and not arguments.secrets:
        return {}
    known = dbus_form.parse((await remote.machine(path)).properties.get("Definition", {}))
    return given(known, arguments.files) | secrets(slots(known), arguments.secrets)


def secrets(all_slots: Iterable[Slot], assignments: list[str]) -> dict[str, tuple[str, bool]]:
    """What ``opened`` needs for SLOT=PATH words of ``--secret``; each slot is that of an encrypted image."""
    known = {slot.name for slot in all_slots if slot.kind == "secret"}
    wanted: dict[str, tuple[str, bool]] = {}
    for word in assignments:
        name, equals, path = word.partition("=")
        if not equals or not path:
            raise VmbusError("InvalidArgument", f"{word!r} is not SLOT=PATH or SLOT=-", argument="--secret")
        name = name if name.endswith("/secret") else f"{name}/secret"
        if name not in known:
            there_are = ", ".join(sorted(known)) or "none: no image is encrypted"
            raise VmbusError(
                "InvalidArgument", f"{name!r} takes no passphrase; these do: {there_are}", argument="--secret"
            )
        wanted[name] = (path, False)
    if missing := known - set(wanted):
        raise VmbusError(
            "InvalidArgument",
            f"the passphrase for {min(missing)} is missing: --secret SLOT=PATH, or SLOT=- for standard input",
            argument="--secret",
        )
    return wanted


def _typed() -> int:
    """Standard input to its end in a memfd."""
    text = sys.stdin.buffer.read(MAX_SECRET + 2).removesuffix(b"\n")
    fd = os.memfd_create("passphrase", os.MFD_CLOEXEC)
    os.write(fd, text)
    return fd


def _open(slot: str, path: str, *, writable: bool) -> int:
    try:
        # O_NONBLOCK: a FIFO in the place of a file must not hang us. Who gets the file shares this flag,
        # and io_uring heeds it: off again.
        fd = os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC | os.O_NONBLOCK)
        os.set_blocking(fd, True)
        return fd
    except FileNotFoundError:
        raise VmbusError("NotFound", f"{path} does not exist", argument=slot) from None
    except PermissionError:
        how = "written" if writable else "read"
        raise VmbusError("AccessDenied", f"{path} cannot be {how} by you", argument=slot) from None
    except OSError as error:
        raise VmbusError("InvalidArgument", f"{path}: {error.strerror}", argument=slot) from None
