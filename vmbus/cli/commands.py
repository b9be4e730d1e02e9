# SPDX-License-Identifier: Apache-2.0
"""What each verb of vmbusctl does. A verb raises VmbusError, or returns the exit status."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import pwd
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final

from vmbus.cli import (
    chain,
    console,
    description,
    devices,
    files,
    host_memory,
    memory,
    migration,
    output,
    saving,
    snapshots,
    templates,
    vsock,
)
from vmbus.cli.remote import ENDED, Machine, Moment, Remote
from vmbus.wire import dbus_form
from vmbus.wire.definition import Definition, slots
from vmbus.wire.errors import VmbusError

CRASHED: Final = 8  # exit status: the machine ended otherwise than was asked
TIMED_OUT: Final = 7

Action = Callable[[Remote, argparse.Namespace], Awaitable[int]]


async def define(remote: Remote, arguments: argparse.Namespace) -> int:
    """Resolve, show, store."""
    definition = description.build(arguments.file, _flags(arguments))
    path = await remote.define(definition)
    uuid = _uuid(path)
    if arguments.json:
        output.print_json({"uuid": uuid, "path": path, "definition": dbus_form.plain(definition)})
        return 0
    _show_chains(definition)
    print(f"defined {definition.name} ({uuid})")
    return 0


def dry_run(arguments: argparse.Namespace) -> int:
    """Resolve and show, without a bus."""
    definition = description.build(arguments.file, _flags(arguments))
    if arguments.json:
        output.print_json({"definition": dbus_form.plain(definition)})
    else:
        _show_chains(definition)
        output.print_fields(_flat(dbus_form.plain(definition)))
    return 0


def abi_dump(arguments: argparse.Namespace) -> int:
    """What a guest of this definition sees, without a bus."""
    # The core is loaded for this alone.
    from vmbus import abi  # noqa: PLC0415

    definition = description.build(arguments.file, _flags(arguments))
    sys.stdout.write(abi.canonical(abi.describe(definition, arguments.uuid or abi.NOBODY)))
    return 0


async def run(remote: Remote, arguments: argparse.Namespace) -> int:
    """A transient machine on files opened here, with its console."""
    definition = description.build(arguments.file, _flags(arguments))
    wanted = files.all_of(definition) | files.secrets(slots(definition), arguments.secrets)
    with files.opened(wanted) as fds:
        path = await remote.create_transient(
            description.for_fds(definition), fds, paused=not arguments.detach
        )
    if arguments.detach:
        if arguments.json:
            output.print_json({"uuid": _uuid(path), "path": path})
        else:
            print(f"running {definition.name} ({_uuid(path)})")
        return 0
    try:
        async with remote.watch(path) as watch:
            with await remote.console(path, write=True, steal=False) as channel:
                await remote.act(path, "Resume")
                ending = _attach(channel, definition.name)
            if ending != "closed":
                return 0
            return _ended(await watch.until(lambda moment: moment.state in ENDED), definition.name, arguments)
    except VmbusError:
        # Paused and without a console it would be of no use to anybody.
        with contextlib.suppress(VmbusError):
            if (await remote.machine(path)).state == "paused":
                await remote.act(path, "Kill")
        raise


async def list_machines(remote: Remote, arguments: argparse.Namespace) -> int:
    """A line a machine."""
    machines = await remote.machines(everyone=arguments.all)
    if arguments.json:
        output.print_json([_document(machine) for machine in machines])
    elif arguments.names:
        for machine in machines:
            print(output.printable(machine.name))
    else:
        output.print_table(("NAME", "STATE", "VCPUS", "MEMORY", "OWNER", "UUID"), map(_row, machines))
    return 0


async def show(remote: Remote, arguments: argparse.Namespace) -> int:
    """All that may be known of a machine."""
    path = await remote.find(arguments.machine)
    machine = await remote.machine(path)
    document = _document(machine)
    if arguments.stats:
        document["stats"] = await remote.stats(path)
    if arguments.json:
        output.print_json(document)
        return 0
    since = document.get("state-since")
    if since:
        document["state-since"] = time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(since / 1e6))
    document["owner"] = _user(document["owner"])
    output.print_fields(_flat(document))
    return 0


async def start(remote: Remote, arguments: argparse.Namespace) -> int:
    """Start each, in order."""
    if (arguments.files or arguments.secrets or arguments.console) and len(arguments.machines) > 1:
        raise VmbusError(
            "InvalidArgument", "name one machine only, for --file, --secret and --console", argument="MACHINE"
        )
    for name in arguments.machines:
        path = await remote.find(name)
        with files.opened(await files.asked_for(remote, path, arguments)) as fds:
            await remote.start(path, fds, paused=arguments.paused or arguments.console)
        if arguments.console:
            with await remote.console(path, write=True, steal=False) as channel:
                if not arguments.paused:
                    await remote.act(path, "Resume")
                _attach(channel, name)
    return _done(arguments, "started")


async def stop(remote: Remote, arguments: argparse.Namespace) -> int:
    """Stop all at once, then wait for each."""
    if not 0 <= arguments.deadline <= 86400:
        raise VmbusError("InvalidArgument", "is 0 to 86400 seconds", argument="--deadline")
    jobs = [await remote.stop(await remote.find(name), arguments.deadline) for name in arguments.machines]
    if arguments.no_wait:
        return _done(arguments, "stopping")
    for job in jobs:
        await remote.finish(job)
    return _done(arguments, "stopped")


async def shutdown(remote: Remote, arguments: argparse.Namespace) -> int:
    """Press the power buttons, and wait if asked."""
    if bool(arguments.machines) == arguments.all:
        raise VmbusError("InvalidArgument", "name machines, or say --all", argument="MACHINE")
    if arguments.all:
        known = await remote.machines(everyone=True)
        paths = [
            machine.path for machine in known if machine.state == "running" and "Name" in machine.properties
        ]
        arguments.machines = [machine.name for machine in known if machine.path in paths]
    else:
        paths = [await remote.find(name) for name in arguments.machines]
    async with contextlib.AsyncExitStack() as stack:
        watches = [await stack.enter_async_context(remote.watch(path)) for path in paths]
        for path in paths:
            await remote.act(path, "Shutdown")
        if arguments.wait is not None:
            stopped = asyncio.gather(
                *(watch.until(lambda moment: moment.state in ENDED) for watch in watches)
            )
            try:
                await asyncio.wait_for(stopped, arguments.wait)
            except TimeoutError:
                raise VmbusError(
                    "Timeout", f"some have not stopped within {arguments.wait:g} seconds"
                ) from None
    return _done(arguments, "shut down" if arguments.wait is not None else "asked to shut down")


def simple(method: str, done: str) -> Action:
    """A verb that is one method without arguments, on each machine in order."""

    async def act(remote: Remote, arguments: argparse.Namespace) -> int:
        for name in arguments.machines:
            await remote.act(await remote.find(name), method)
        return _done(arguments, done)

    return act


async def open_console(remote: Remote, arguments: argparse.Namespace) -> int:
    """Attach until ^] or the machine's end."""
    path = await remote.find(arguments.machine)
    with await remote.console(path, write=not arguments.read_only, steal=arguments.steal) as channel:
        _attach(channel, arguments.machine)
    return 0


async def open_port(remote: Remote, arguments: argparse.Namespace) -> int:
    """The same on a named port."""
    path = await remote.find(arguments.machine)
    write = not arguments.read_only
    with await remote.port(path, arguments.port, write=write, steal=arguments.steal) as channel:
        _attach(channel, arguments.machine)
    return 0


async def wait(remote: Remote, arguments: argparse.Namespace) -> int:
    """Wait for a state."""
    path = await remote.find(arguments.machine)
    async with remote.watch(path) as watch:
        reached = watch.until(lambda moment: moment.state in (arguments.state, "crashed"))
        try:
            moment = await asyncio.wait_for(reached, arguments.timeout)
        except TimeoutError:
            raise VmbusError(
                "Timeout",
                f"{arguments.machine} was not {arguments.state} within {arguments.timeout:g} seconds",
            ) from None
    if moment.state == arguments.state:
        if arguments.json:
            output.print_json({"state": moment.state, "reason": moment.reason, "detail": moment.detail})
        return 0
    return _ended(moment, arguments.machine, arguments)


async def host(remote: Remote, arguments: argparse.Namespace) -> int:
    """What the host can do, and which vmbusd answers."""
    found = dict(await remote.capabilities())
    if arguments.json:
        output.print_json(found)
        return 0
    if "memory" in found:
        found["memory"] = output.size(found["memory"])
    output.print_fields(_flat(found))
    return 0


ACTIONS: Final[Mapping[str, Action]] = {
    "hugepages": host_memory.hugepages,
    "ksm": host_memory.ksm,
    "define": define,
    "run": run,
    "list": list_machines,
    "show": show,
    "start": start,
    "stop": stop,
    "shutdown": shutdown,
    "kill": simple("Kill", "killed"),
    "reset": simple("Reset", "reset"),
    "pause": simple("Pause", "paused"),
    "resume": simple("Resume", "resumed"),
    "save": saving.save,
    "restore": saving.restore,
    "migrate": migration.migrate,
    "snapshot": snapshots.snapshot,
    "template": templates.template,
    "clone": templates.clone,
    "attach-nic": devices.attach_nic,
    "detach-nic": devices.detach("Nic"),
    "attach-disk": devices.attach_disk,
    "detach-disk": devices.detach("Disk"),
    "set-link": devices.set_link,
    "resize-disk": devices.resize_disk,
    "change-media": devices.change_media,
    "console": open_console,
    "port": open_port,
    "vsock": vsock.vsock,
    "wait": wait,
    "undefine": simple("Undefine", "undefined"),
    "memory": memory.memory,
    "set-memory": memory.set_memory,
    "prefault": memory.prefault,
    "host": host,
}


def _attach(channel: socket.socket, name: str) -> console.Ending:
    if sys.stdin.isatty():
        output.warn(f"console of {name}; leave with ^]")
    return console.attach(channel)


def _ended(moment: Moment, name: str, arguments: argparse.Namespace) -> int:
    """Report how a machine ended; the exit status."""
    if arguments.json:
        output.print_json({"state": moment.state, "reason": moment.reason, "detail": moment.detail})
    if moment.state != "crashed":
        return 0
    why = ": ".join(part for part in (moment.reason, moment.detail) if part) or "the reason is not known"
    output.warn(f"{name} crashed: {why}")
    return CRASHED


def _done(arguments: argparse.Namespace, what: str) -> int:
    if arguments.json:
        output.print_json({"done": what, "machines": arguments.machines})
    return 0


def _flags(arguments: argparse.Namespace) -> description.Flags:
    return description.Flags(
        name=arguments.name,
        memory=arguments.memory,
        vcpus=arguments.vcpus,
        kernel=arguments.kernel,
        initrd=arguments.initrd,
        cmdline=arguments.cmdline,
        firmware=arguments.firmware,
        boot=arguments.boot,
        boot_menu=True if arguments.boot_menu else None,
        cpu_model=arguments.cpu_model,
        ports=arguments.ports,
        watchdog=arguments.watchdog,
        vsock=arguments.vsock,
        machine_type=arguments.machine_type,
        memory_kind=arguments.memory_kind,
        page_size=arguments.page_size,
        memory_minimum=arguments.memory_minimum,
        memory_nodes=arguments.memory_node,
        locked=True if arguments.locked else None,
        prefault=True if arguments.prefault else None,
        balloon=False if arguments.no_balloon else None,
        on_reset=arguments.on_reset,
        rng=False if arguments.no_rng else None,
        disks=arguments.disk,
        nics=arguments.nic,
    )


def _show_chains(definition: Definition) -> None:
    for disk in definition.disks:
        for index, line in enumerate(chain.describe(disk.layers)):
            print(f"{f'{disk.id}:' if index == 0 else '':<10}{output.printable(line)}")


def _document(machine: Machine) -> dict[str, Any]:
    """A machine as JSON: its properties, named as in a definition."""
    names = {_hyphened(key): value for key, value in machine.properties.items()}
    return {**names, "path": machine.path}


def _hyphened(name: str) -> str:
    """``StateReason`` as ``state-reason``."""
    return "".join(f"-{c.lower()}" if c.isupper() else c for c in name).lstrip("-")


def _row(machine: Machine) -> Sequence[object]:
    definition = machine.properties.get("Definition", {})
    return (
        machine.properties.get("Name", "-"),
        machine.state,
        definition.get("vcpus", "-"),
        output.size(definition["memory"]) if "memory" in definition else "-",
        _user(machine.properties["Owner"]),
        machine.properties["Uuid"],
    )


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _uuid(path: str) -> str:
    return path.rpartition("/")[2].replace("_", "-")


def _flat(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, object]]:
    """Nested tables as ``a.b`` and ``a[0].b`` lines."""
    lines: list[tuple[str, object]] = []
    for key, value in tree.items():
        lines.extend(_flat_value(f"{prefix}{key}", value))
    return lines


def _flat_value(name: str, value: Any) -> list[tuple[str, object]]:
    if isinstance(value, dict):
        return _flat(value, f"{name}.")
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        return [line for index, item in enumerate(value) for line in _flat_value(f"{name}[{index}]", item)]
    if isinstance(value, list):
        return [(name, ", ".join(map(str, value)))]
    if isinstance(value, bool):
        return [(name, "yes" if value else "no")]
    return [(name, value)]
