# SPDX-License-Identifier: Apache-2.0
"""The verbs that attach devices to a machine and detach them, running or not."""

from __future__ import annotations

import argparse
from collections.abc import Awaitable, Callable, Mapping

from vmbus.cli import description, files, output
from vmbus.cli.remote import Remote
from vmbus.wire import dbus_form
from vmbus.wire.definition import Medium, disk_slots
from vmbus.wire.errors import VmbusError

Action = Callable[[Remote, argparse.Namespace], Awaitable[int]]


async def attach_nic(remote: Remote, arguments: argparse.Namespace) -> int:
    """A network interface into a hotplug slot."""
    path = await remote.find(arguments.machine)
    nic = description.one_nic(arguments.nic, await _taken(remote, path))
    slot = await remote.attach_nic(path, nic)
    return _attached(arguments, nic.id, slot, f"nic {nic.id} ({nic.mac})")


async def attach_disk(remote: Remote, arguments: argparse.Namespace) -> int:
    """A disk into a hotplug slot; its files opened by the owner's paths, or here."""
    path = await remote.find(arguments.machine)
    disk = description.one_disk(arguments.disk, await _taken(remote, path))
    wanted = files.of_slots(disk_slots(disk)) if arguments.pass_files else {}
    wanted |= files.secrets(disk_slots(disk), arguments.secrets)
    with files.opened(wanted) as fds:
        sent = description.disk_for_fds(disk) if arguments.pass_files else disk
        slot = await remote.attach_disk(path, sent, fds)
    return _attached(arguments, disk.id, slot, f"disk {disk.id}")


def detach(kind: str) -> Action:
    """``Nic`` or ``Disk``: ask the guest for it, and wait."""

    async def act(remote: Remote, arguments: argparse.Namespace) -> int:
        if not 0 <= arguments.deadline <= 86400:
            raise VmbusError("InvalidArgument", "is 0 to 86400 seconds", argument="--deadline")
        path = await remote.find(arguments.machine)
        job = await remote.detach(path, kind, arguments.id, arguments.deadline)
        await remote.finish(job)
        if arguments.json:
            output.print_json({"done": "detached", "machine": arguments.machine, "id": arguments.id})
        return 0

    return act


async def set_link(remote: Remote, arguments: argparse.Namespace) -> int:
    """The cable of a network interface."""
    path = await remote.find(arguments.machine)
    await remote.set_link(path, arguments.id, up=arguments.link == "up")
    return _changed(arguments, {"link": arguments.link})


async def resize_disk(remote: Remote, arguments: argparse.Namespace) -> int:
    """A disk that grows."""
    size = description.size(arguments.size, argument="SIZE")
    await remote.resize_disk(await remote.find(arguments.machine), arguments.id, size)
    return _changed(arguments, {"size": size})


async def change_media(remote: Remote, arguments: argparse.Namespace) -> int:
    """Another medium for a CD-ROM drive, or none."""
    path = await remote.find(arguments.machine)
    if arguments.medium is None:
        await remote.change_media(path, arguments.id, Medium(), {}, force=arguments.force)
        return _changed(arguments, {"medium": None})
    drive = description.one_medium(arguments.medium, arguments.id)
    wanted = files.of_slots(disk_slots(drive)) if arguments.pass_files else {}
    with files.opened(wanted) as fds:
        sent = description.disk_for_fds(drive) if arguments.pass_files else drive
        medium = Medium(layers=sent.layers, source=sent.source)
        await remote.change_media(path, arguments.id, medium, fds, force=arguments.force)
    return _changed(arguments, {"medium": arguments.medium})


async def _taken(remote: Remote, path: str) -> set[str]:
    """The ids of the machine's devices."""
    known = (await remote.machine(path)).properties.get("Definition")
    if known is None:
        return set()
    definition = dbus_form.parse(known)
    return {disk.id for disk in definition.disks} | {nic.id for nic in definition.nics}


def _changed(arguments: argparse.Namespace, what: Mapping[str, object]) -> int:
    if arguments.json:
        output.print_json({"done": "changed", "machine": arguments.machine, "id": arguments.id, **what})
    return 0


def _attached(arguments: argparse.Namespace, identifier: str, slot: int, what: str) -> int:
    if arguments.json:
        output.print_json({"done": "attached", "machine": arguments.machine, "id": identifier, "slot": slot})
    else:
        print(f"{what} is in slot {slot} of {arguments.machine}")
    return 0
