# SPDX-License-Identifier: Apache-2.0
"""vmbusctl migrate: two vmbusd, a pair of sockets between them, and two jobs that are watched.

| step | when it fails |
|---|---|
| images are made for disks that are copied (``copies``) | they go again, if the machine there does |
| the machine is defined there, with its UUID, unless it is | the same |
| the one there receives | it is undefined again, if it was defined here |
| the one here sends | the other job ends with the connection; undefined again |
| both jobs are done | the error is that of the side which knows why |

Interrupted, both are cancelled, unless that comes too late. If a vmbusd goes away meanwhile, the workers have
the rest between them, and the other side says what came of it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import socket
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from typing import Any, Final

import msgspec

from vmbus.cli import copies, description, files, output
from vmbus.cli.remote import Outcome, Remote
from vmbus.wire import dbus_form
from vmbus.wire.definition import Definition, Disk, slots
from vmbus.wire.errors import VmbusError

_VAGUE: Final = frozenset({"Disconnected", "Cancelled", "ImageInvalid"})
"""What one side says when it is the other that knows why."""


async def migrate(remote: Remote, arguments: argparse.Namespace) -> int:
    """Machine.Receive there, Machine.Migrate here."""
    bandwidth = description.size(arguments.bandwidth, argument="--bandwidth") if arguments.bandwidth else 0
    path = await remote.find(arguments.machine)
    machine = await remote.machine(path)
    if "Definition" not in machine.properties:
        raise VmbusError("NotAuthorized", "its definition is its owner's", argument="MACHINE")
    definition = dbus_form.parse(machine.properties["Definition"])
    passed, paths = _files(definition, arguments.files)
    copied = copies.wanted(definition, arguments.copied)
    disks = {
        "copy": [f"disk/{one.disk.id}" for one in copied],
        "separate": [f"disk/{_separate(definition, name).id}" for name in arguments.separate],
    }
    async with contextlib.AsyncExitStack() as stack:
        there = await stack.enter_async_context(_other(arguments))
        images = stack.enter_context(copies.made(copied))
        changed = _with_disks(_with_paths(definition, paths), images.disks)
        passed |= files.secrets(slots(changed), arguments.secrets)
        fds = stack.enter_context(files.opened(passed))
        moved = "--file" if paths else "--copy-disk" if images.disks else ""
        target = await stack.enter_async_context(
            _defined(there, str(machine.properties["Uuid"]), changed, moved=moved, stays=images.keep)
        )
        pace = {"downtime": arguments.downtime, "bandwidth": bandwidth}
        outcome = await _move(remote, path, there, target, fds, disks, pace, paused=arguments.paused)
    if arguments.undefine_source:
        await remote.act(path, "Undefine")
    _report(arguments, outcome.result)
    return 0


@contextlib.asynccontextmanager
async def _other(arguments: argparse.Namespace) -> AsyncIterator[Remote]:
    """The vmbusd that the machine goes to."""
    from vmbus.cli.connection import connect  # noqa: PLC0415 (slow to import; see main)

    async with connect(
        address=arguments.to,
        name=arguments.to_name or arguments.bus_name,
        interactive=not arguments.no_ask,
        autostart=not arguments.no_autostart,
    ) as connection:
        yield Remote(connection)


@contextlib.asynccontextmanager
async def _defined(
    there: Remote, uuid: str, definition: Definition, *, moved: str, stays: Callable[[], None]
) -> AsyncIterator[str]:
    """The machine there; if it was made for this, it goes again when this fails. ``moved``: the option that
    says that it has other paths, if one does. ``stays``: called when it does not go, as one that runs does
    not."""
    try:
        path = await there.find(uuid)
    except VmbusError as error:
        if error.kind != "NotFound":
            raise
    else:
        if moved:
            text = "the machine is defined there, with paths of its own; undefine it there, or leave this out"
            raise VmbusError("AlreadyExists", text, argument=moved)
        yield path
        return
    defining = asyncio.ensure_future(there.define_as(uuid, definition))
    try:
        yield await asyncio.shield(defining)
    except BaseException:
        with contextlib.suppress(VmbusError):
            path = await defining
            try:
                await there.act(path, "Undefine")
            except BaseException:
                stays()
                raise
        raise


async def _move(
    here: Remote,
    path: str,
    there: Remote,
    target: str,
    fds: Mapping[str, int],
    disks: Mapping[str, list[str]],
    pace: Mapping[str, int],
    *,
    paused: bool,
) -> Outcome:
    """What the job here has found, when the machine runs there. ``disks``: Receive's options ``copy`` and
    ``separate``."""
    ours, theirs = socket.socketpair()
    begun: list[tuple[Remote, asyncio.Future[str]]] = []
    try:
        receive = asyncio.ensure_future(there.receive(target, theirs.fileno(), fds, disks, paused=paused))
        begun.append((there, receive))
        jobs = [(there, await asyncio.shield(receive))]
        migrate = asyncio.ensure_future(here.migrate(path, ours.fileno(), disks["copy"], pace))
        begun.append((here, migrate))
        jobs.append((here, await asyncio.shield(migrate)))
        ours.close()  # each side sees the other's end when nobody else has a copy
        theirs.close()
        await here.hear(jobs[1][1], _show)
        return await _ended(jobs)
    except BaseException:
        done = await _taken_back(begun)
        if done is None:
            raise
        return done
    finally:
        ours.close()
        theirs.close()
        _show({})


async def _taken_back(begun: list[tuple[Remote, asyncio.Future[str]]]) -> Outcome | None:
    """Cancel the jobs that were begun, or are just being begun; what was found, if that came too late."""
    jobs = []
    for remote, call in reversed(begun):
        with contextlib.suppress(VmbusError):
            jobs.append((remote, await call))
            await remote.cancel(jobs[-1][1])
    try:
        return await _ended(jobs[::-1]) if len(jobs) == 2 else None
    except VmbusError:
        return None


async def _ended(jobs: list[tuple[Remote, str]]) -> Outcome:
    """The sender's outcome when both jobs are done. Raises what the side says that knows why."""
    waiting = [asyncio.ensure_future(remote.finish(job)) for remote, job in jobs]
    try:
        received, sent = await asyncio.gather(*waiting, return_exceptions=True)
    finally:
        for one in waiting:
            one.cancel()
    for found in (received, sent):
        if isinstance(found, BaseException) and not isinstance(found, VmbusError):
            raise found
    if isinstance(sent, Outcome):
        return sent  # it says so only when the machine runs there, whatever became of the vmbusd there
    if isinstance(received, Outcome):
        return Outcome()  # it runs there, and the vmbusd here has left
    assert isinstance(received, VmbusError)
    assert isinstance(sent, VmbusError)
    if received.kind in _VAGUE:
        raise sent
    raise VmbusError(received.kind, f"the other side: {received.message}", argument=received.argument)


def _show(result: Mapping[str, Any]) -> None:
    """How far it is, for a person who waits; nothing takes it away."""
    if not sys.stderr.isatty():
        return
    line = ""
    if "remaining" in result:
        line = f"round {result.get('round', 0)}: {output.size(result['remaining'])} of memory left, "
        if result.get("disk-total"):
            line += f"{output.size(result.get('disk-remaining', 0))} of disks, "
        line += f"{output.size(result.get('throughput', 0))}/s"
        if result.get("slowed"):
            line += f", the guest slowed by {result['slowed']:.0f} %"
    sys.stderr.write(f"\r\x1b[K{line}")
    sys.stderr.flush()


def _report(arguments: argparse.Namespace, result: Mapping[str, Any]) -> None:
    if arguments.json:
        output.print_json({**result, "machine": arguments.machine, "state": "migrated"})
        return
    text = f"{arguments.machine} runs there"
    if "downtime" in result:
        text += f": it stood still for {result['downtime']:.0f} ms; {output.size(result.get('sent', 0))} in "
        text += f"{result.get('rounds', 0)} rounds, {output.size(result.get('throughput', 0))}/s"
        if result.get("disk-sent"):
            text += f", {output.size(result['disk-sent'])} of disks"
    print(output.printable(text))


# -- files


def _files(
    definition: Definition, assignments: list[str]
) -> tuple[dict[str, tuple[str, bool]], dict[str, str]]:
    """SLOT=PATH words: those for slots that take an fd, for ``files.opened``, and paths that are others
    there."""
    by_path = {slot.name for slot in slots(definition) if slot.path is not None}
    split = [(word, word.partition("=")) for word in assignments]
    moved = {name: path for _, (name, equals, path) in split if equals and path and name in by_path}
    for name, path in moved.items():
        if not path.startswith("/"):
            raise VmbusError("InvalidArgument", f"{path!r} is no absolute path", argument=name)
    return files.given(definition, [word for word, (name, _, _) in split if name not in moved]), moved


def _separate(definition: Definition, name: str) -> Disk:
    return copies.writable(definition, name, argument="--separate-disk")


def _with_disks(definition: Definition, others: Mapping[str, Disk]) -> Definition:
    """The definition with other disks, by their ids."""
    return msgspec.structs.replace(definition, disks=[others.get(disk.id, disk) for disk in definition.disks])


def _with_paths(definition: Definition, paths: Mapping[str, str]) -> Definition:
    """The definition with other paths in some slots."""
    if not paths:
        return definition
    kernel = definition.kernel
    if kernel is not None:
        changed = dict(_changes(paths, (("kernel", "path"), ("initrd", "initrd_path"))))
        kernel = msgspec.structs.replace(kernel, **changed)
    disks = [_disk_with_paths(disk, paths) for disk in definition.disks]
    return msgspec.structs.replace(definition, kernel=kernel, disks=disks)


def _disk_with_paths(disk: Disk, paths: Mapping[str, str]) -> Disk:
    layers = []
    for index, layer in enumerate(disk.layers):
        name = f"disk/{disk.id}/{index}"
        changed = dict(_changes(paths, ((name, "path"), (f"{name}/data", "data_path"))))
        layers.append(msgspec.structs.replace(layer, **changed))
    return msgspec.structs.replace(disk, layers=layers)


def _changes(paths: Mapping[str, str], fields: tuple[tuple[str, str], ...]) -> Iterator[tuple[str, Any]]:
    return ((field, paths[slot]) for slot, field in fields if slot in paths)
