# SPDX-License-Identifier: Apache-2.0
"""vmbusd: the composition root. Everything is made here, in order, and held together until the end.

It runs as an unprivileged user without any capability. It prints ``ready`` on stderr when it serves its
name (and tells systemd, where asked). SIGTERM and SIGINT end it; machines go on, and are found again at the
next start. It also ends, with status 1, when the bus goes away: there is nobody left to serve, and a
supervisor starts it again.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import pwd
import resource
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Final

from vmbus.bus import LIBRARY, Bus, BusLost, RemoteError
from vmbus.service import config, descriptors
from vmbus.service.broker_client import BrokerClient
from vmbus.service.changes import Changes
from vmbus.service.claims import Claims
from vmbus.service.credentials import Credentials
from vmbus.service.definitions import Definitions
from vmbus.service.dispatcher import Dispatcher
from vmbus.service.exports import Exports, Subscribers
from vmbus.service.files import Files
from vmbus.service.firmware import Firmware
from vmbus.service.handover import Handover
from vmbus.service.host_memory import read_pressure
from vmbus.service.hotplug import Hotplug
from vmbus.service.hugepages import HugePages
from vmbus.service.jobs import Jobs
from vmbus.service.ksm import Ksm
from vmbus.service.lifecycle import Lifecycle
from vmbus.service.memory import Memory
from vmbus.service.migration import Migration
from vmbus.service.owned import Owned
from vmbus.service.parked import Parked
from vmbus.service.polkit import Polkit
from vmbus.service.pressure import PressurePolicy
from vmbus.service.registry import Registry
from vmbus.service.saving import Saving
from vmbus.service.snapshot_store import Store
from vmbus.service.snapshots import Snapshots
from vmbus.service.starts import Starts
from vmbus.service.templates import Templates
from vmbus.service.tuner import Tuner
from vmbus.service.vsock import Vsock
from vmbus.service.workers import Workers
from vmbus.wire import contract
from vmbus.wire.errors import VmbusError

log = logging.getLogger("vmbus.main")

MOST_FILES: Final = 65536
FIRST_BROKER: Final = 3.0
"""Seconds that the start waits for the broker, so that machines are shown as they are from the first call
on."""


def arguments(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="vmbusd", description="virtual machines on D-Bus, as org.vmbus1")
    parser.add_argument("--instance", default="system", help="name of this instance (default: system)")
    parser.add_argument("--run-dir", type=Path, help="default: /run/vmbus/INSTANCE")
    parser.add_argument("--state-dir", type=Path, help="default: /var/lib/vmbus/INSTANCE")
    parser.add_argument("--config", type=Path, default=Path("/etc/vmbus/vmbusd.toml"))
    parser.add_argument("--bus-address", help="default: the system bus")
    parser.add_argument(
        "--firmware-root",
        type=Path,
        default=Path("/"),
        help="where firmware packages are installed (default: /)",
    )
    parser.add_argument("--bus-name", default="org.vmbus1", help="default: org.vmbus1")
    found = parser.parse_args(argv)
    found.run_dir = found.run_dir or Path("/run/vmbus") / found.instance
    found.state_dir = found.state_dir or Path("/var/lib/vmbus") / found.instance
    return found


async def serve(options: argparse.Namespace) -> int:
    """Serve until a signal comes or the bus goes; the exit status."""
    interfaces = contract.load()
    wanted = config.load(options.config)
    machines, run = options.state_dir / "machines", options.run_dir / "service"
    notes = options.state_dir / "owned"
    for directory in (machines, notes, run):
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)

    bus = await Bus.connect(options.bus_address)
    credentials = Credentials(bus)
    actions = set().union(*(interface.actions() for interface in interfaces.values()))
    polkit = Polkit(bus, credentials, actions, pwd.getpwuid(os.getuid()).pw_name)
    subscribers = Subscribers(credentials, polkit)
    exports = Exports(bus, interfaces, subscribers)

    registry, claims, jobs, parked = Registry(machines, run), Claims(run), Jobs(), Parked()
    found_machines = asyncio.Event()

    async def recover() -> None:
        await workers.recover()
        found_machines.set()
        hugepages.connected()
        ksm.connected()

    broker = BrokerClient(
        options.run_dir / "broker" / "socket",
        on_connected=recover,
        on_ended=lambda message: workers.ended(message),  # noqa: PLW0108 (made below),
    )
    owned = Owned(notes, broker)
    firmware = Firmware(options.state_dir, options.firmware_root)
    firmware.named = lambda: [(machine.uuid, machine.firmware) for machine in registry.all()]
    registry.forget_files.append(firmware.forget)
    snapshot_store = Store(options.state_dir)
    registry.forget_files.append(snapshot_store.forget)
    handover = Handover(broker, claims, firmware)
    workers = Workers(registry, broker, owned, claims, handover.networks)
    starts = Starts(registry, broker, jobs, handover, workers)
    lifecycle = Lifecycle(registry, broker, jobs, workers)
    hotplug = Hotplug(registry, broker, claims, jobs, handover)
    workers.on_detached = hotplug.detached
    definitions = Definitions(registry, broker, owned, firmware)
    snapshots = Snapshots(
        snapshot_store, registry, jobs, starts, lifecycle, quota=wanted.snapshots.most << 20
    )
    templates = Templates(options.state_dir, jobs, starts, hotplug, quota=wanted.snapshots.most << 20)
    templates.used, snapshots.others = snapshots.used, templates.taken
    memory = Memory(jobs)
    workers.on_found = memory.found
    hugepages = HugePages(registry, broker, jobs, wanted.hugepages.persistent)
    workers.on_finished.append(hugepages.machine_ended)
    ksm = Ksm(registry, broker, wanted.ksm)
    starts.admit_to_merging = ksm.admit
    tuner = Tuner(ksm, broker, wanted.ksm.tuner)
    ksm.on_offered = tuner.wake
    workers.on_finished.append(lambda machine: tuner.wake())
    dispatcher = _on_the_bus(
        options.instance,
        bus,
        interfaces,
        exports,
        subscribers,
        credentials,
        polkit,
        registry,
        workers,
        starts,
        lifecycle,
        hotplug,
        Changes(hotplug, broker, claims, handover),
        definitions,
        jobs,
        parked,
        memory,
        snapshots,
        templates,
        broker,
        hugepages,
        ksm,
        tuner,
    )
    registry.load()
    firmware.load()
    templates.load()
    snapshot_store.load(machine.uuid for machine in registry.all())
    owned.load({machine.uuid for machine in registry.all()})
    descriptors.begin()

    def on_signal(message: object) -> None:
        credentials.feed(message)  # type: ignore[arg-type]
        polkit.feed(message)  # type: ignore[arg-type]

    bus.on_signal = on_signal
    bus.discard = dispatcher.discard
    bus.close_sent = descriptors.close_all
    await credentials.begin()
    await polkit.begin()

    tasks = [asyncio.ensure_future(broker.run())]
    tuning = asyncio.ensure_future(tuner.run())
    if wanted.pressure.on:
        tasks.append(asyncio.ensure_future(_pressure(wanted.pressure, memory, registry).run()))
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(found_machines.wait(), FIRST_BROKER)
    bus.on_call = dispatcher.on_call
    await bus.request_name(options.bus_name)
    _say_ready(options)
    status = await _until_told(bus)
    tuning.cancel()
    await ksm.ending()
    for task in tasks:
        task.cancel()
    broker.close()
    with contextlib.suppress(BusLost):
        await bus.close()
    return status


def _pressure(wanted: config.Pressure, memory: Memory, registry: Registry) -> PressurePolicy:
    source = Path(wanted.source)
    return PressurePolicy(
        memory,
        registry.all,
        lambda: read_pressure(source),
        low=wanted.low,
        high=wanted.high,
        step=wanted.step,
        interval=wanted.interval,
    )


def _on_the_bus(
    instance: str,
    bus: Bus,
    interfaces: dict[str, contract.Interface],
    exports: Exports,
    subscribers: Subscribers,
    credentials: Credentials,
    polkit: Polkit,
    registry: Registry,
    workers: Workers,
    starts: Starts,
    lifecycle: Lifecycle,
    hotplug: Hotplug,
    changes: Changes,
    definitions: Definitions,
    jobs: Jobs,
    parked: Parked,
    memory: Memory,
    snapshots: Snapshots,
    templates: Templates,
    broker: BrokerClient,
    hugepages: HugePages,
    ksm: Ksm,
    tuner: Tuner,
) -> Dispatcher:
    # The one place below which api is imported: api depends on service, never the other way.
    from vmbus.api.host import HostApi, HostObject  # noqa: PLC0415
    from vmbus.api.hugepages import HugePagesApi, PoolObject  # noqa: PLC0415
    from vmbus.api.job import JobApi  # noqa: PLC0415
    from vmbus.api.ksm import KsmApi, KsmObject  # noqa: PLC0415
    from vmbus.api.machine import MachineApi  # noqa: PLC0415
    from vmbus.api.manager import ManagerApi, ManagerObject  # noqa: PLC0415
    from vmbus.api.publish import Publisher  # noqa: PLC0415

    manager = ManagerApi(registry, definitions, starts, workers, subscribers, templates)
    saving, migration = Saving(jobs), Migration(jobs, starts)
    handlers = {
        "org.vmbus1.Manager": manager,
        "org.vmbus1.Machine": MachineApi(
            starts,
            lifecycle,
            hotplug,
            changes,
            definitions,
            parked,
            memory,
            saving,
            migration,
            snapshots,
            Vsock(),
            templates,
        ),
        "org.vmbus1.Job": JobApi(),
        "org.vmbus1.Host": HostApi(broker, polkit),
        "org.vmbus1.HugePages": HugePagesApi(hugepages),
        "org.vmbus1.Ksm": KsmApi(ksm),
    }
    Publisher(exports, registry, workers, jobs, parked, manager)
    exports.add(ManagerObject(instance))
    exports.add(HostObject())
    exports.add(KsmObject(ksm, tuner))
    for pool in hugepages.pools:
        exports.add(PoolObject(pool))
    credentials.on_left += [parked.sender_left, manager.sender_left, jobs.sender_left]
    return Dispatcher(bus, interfaces, handlers, exports, credentials, polkit, Files())


async def _until_told(bus: Bus) -> int:
    loop = asyncio.get_running_loop()
    told = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, told.set)
    waits = {asyncio.ensure_future(told.wait()), asyncio.ensure_future(bus.wait_lost())}
    await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    for wait in waits:
        wait.cancel()
    if told.is_set():
        log.info("ending; machines go on")
        return 0
    log.error("the bus is gone")
    return 1


def _say_ready(options: argparse.Namespace) -> None:
    log.info("instance %s serves %s with %s", options.instance, options.bus_name, LIBRARY)
    log.info("ready")
    address = os.environ.get("NOTIFY_SOCKET")
    if address:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as notify:
            notify.connect("\0" + address[1:] if address.startswith("@") else address)
            notify.send(b"READY=1")


class _OneLine(logging.Formatter):
    """One line an entry, with the time; what others sent cannot forge one. Tracebacks are indented."""

    def format(self, record: logging.LogRecord) -> str:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created))
        lines = f"{stamp} {super().format(record)}".split("\n")
        clean = ("".join(c if c.isprintable() else repr(c)[1:-1] for c in line) for line in lines)
        return "\n    ".join(clean)


def main(argv: list[str] | None = None) -> int:
    """The program."""
    options = arguments(sys.argv[1:] if argv is None else argv)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_OneLine())
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    os.umask(0o077)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, MOST_FILES), hard))
    try:
        status = asyncio.run(serve(options))
    except (VmbusError, BusLost, RemoteError, contract.ContractError, OSError) as error:
        print(f"vmbusd: {error}", file=sys.stderr)
        status = 1
    # Threads that hang in close() must not keep the interpreter from ending.
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
