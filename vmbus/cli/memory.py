# SPDX-License-Identifier: Apache-2.0
"""``vmbusctl memory``: what machines have, what they cost and what is saved, once, again and again, or drawn.

Figures come from Machine.GetMemory and Host.GetMemory; a machine that ends meanwhile is left out from then
on. Drawing needs matplotlib (the extra ``plot``), which is looked for before anything is recorded.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib
import itertools
import math
import os
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from vmbus.cli import output
from vmbus.cli.remote import Machine, Remote
from vmbus.wire.errors import VmbusError

COLUMNS: Final = (
    "size",
    "target",
    "resident",
    "pss",
    "huge",
    "merged",
    "saved",
    "ballooned",
    "swapped",
    "overhead",
)
_GONE: Final = frozenset({"InvalidState", "NotFound", "Disconnected", "NotAuthorized"})
_HOST: Final = ("total", "available", "swap-total", "swap-free", "huge", "ksm-saved")
_CLEAR: Final = "\x1b[H\x1b[2J"


@dataclass(frozen=True)
class Sample:
    """One look: seconds since 1970, the host's figures, and each machine's by its name."""

    at: float
    host: Mapping[str, Any]
    machines: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


async def memory(remote: Remote, arguments: argparse.Namespace) -> int:
    """One look, or many; or a drawing of many."""
    if arguments.interval <= 0 or not math.isfinite(arguments.interval):
        raise VmbusError("InvalidArgument", "is more than 0 seconds", argument="--interval")
    if arguments.plot is not None:
        pyplot = _pyplot()
        _writable(arguments.plot)
        looks = max(2, round(arguments.duration / arguments.interval) + 1)
        samples = [sample async for sample in _watched(remote, arguments, looks)]
        draw(pyplot, samples, arguments.plot)
        if arguments.json:
            output.print_json({"plot": arguments.plot, "looks": len(samples)})
        return 0
    looks = arguments.count or (0 if arguments.watch else 1)
    async for sample in _watched(remote, arguments, looks):
        if arguments.json:
            output.print_json({"at": sample.at, "host": sample.host, "machines": sample.machines})
        else:
            _show(sample, clear=looks != 1 and sys.stdout.isatty())
        sys.stdout.flush()
    return 0


async def set_memory(remote: Remote, arguments: argparse.Namespace) -> int:
    """Machine.SetMemoryTarget, and wait for the guest if asked."""
    from vmbus.cli import description  # noqa: PLC0415

    target = description.size(arguments.size, argument="SIZE")
    path = await remote.find(arguments.machine)
    await remote.set_memory_target(path, target)
    deadline = time.monotonic() + (arguments.wait or 0)
    while arguments.wait is not None and (found := await remote.memory(path))["ballooned"] != (
        found["size"] - target
    ):
        if time.monotonic() > deadline:
            has = output.size(found["size"] - found["ballooned"])
            raise VmbusError("Timeout", f"the guest has {has} after {arguments.wait:g} seconds")
        await asyncio.sleep(0.1)
    if arguments.json:
        output.print_json({"machine": arguments.machine, "target": target})
    return 0


async def prefault(remote: Remote, arguments: argparse.Namespace) -> int:
    """Machine.Prefault, until it is done; interrupted, it is cancelled."""
    await until_done(remote, await remote.prefault(await remote.find(arguments.machine)))
    if arguments.json:
        output.print_json({"machine": arguments.machine, "done": "touched"})
    return 0


async def until_done(remote: Remote, job: str) -> None:
    """Wait for a job; interrupted, it is cancelled."""
    try:
        await remote.finish(job)
    except asyncio.CancelledError:
        with contextlib.suppress(VmbusError):
            await remote.cancel(job)
        raise


async def _watched(remote: Remote, arguments: argparse.Namespace, looks: int) -> AsyncIterator[Sample]:
    """So many looks, for ever if 0, an interval apart whatever a look takes."""
    begin = time.monotonic()
    for number in itertools.count(1):
        yield await _look(remote, arguments)
        if number == looks:
            return
        await asyncio.sleep(max(0.0, begin + number * arguments.interval - time.monotonic()))


async def _look(remote: Remote, arguments: argparse.Namespace) -> Sample:
    shown = [one for one in await remote.machines(everyone=True) if one.state in ("running", "paused")]
    if arguments.machines:
        paths = {await remote.find(name): name for name in arguments.machines}
        shown = [one for one in shown if one.path in paths]
    figures = await asyncio.gather(*(_figures(remote, machine) for machine in shown))
    pairs = zip(shown, figures, strict=True)
    machines = {_name(machine, shown): found for machine, found in pairs if found is not None}
    return Sample(time.time(), await remote.host_memory(), machines)


async def _figures(remote: Remote, machine: Machine) -> Mapping[str, Any] | None:
    if "Name" not in machine.properties:  # another user's, which may not be looked at
        return None
    try:
        return await remote.memory(machine.path)
    except VmbusError as error:
        if error.kind in _GONE:
            return None
        raise


def _name(machine: Machine, among: Sequence[Machine]) -> str:
    """Its name; its UUID where two owners have one of that name."""
    alike = [other for other in among if other.name == machine.name]
    return machine.name if len(alike) == 1 else str(machine.properties["Uuid"])


def _show(sample: Sample, *, clear: bool) -> None:
    if clear:
        sys.stdout.write(_CLEAR)
    host = [(key, output.size(sample.host[key])) for key in _HOST if key in sample.host]
    if "pressure-some" in sample.host:
        host.append(("pressure", f"{sample.host['pressure-some']:.1f} %"))
    print("host: " + ", ".join(f"{name} {value}" for name, value in host))
    rows = [
        (name, *(_cell(figures, column) for column in COLUMNS)) for name, figures in sample.machines.items()
    ]
    if len(rows) > 1:
        rows.append(("all", *(output.size(total(sample, column)) for column in COLUMNS)))
    if rows:
        output.print_table(("MACHINE", *(column.upper() for column in COLUMNS)), rows)


def _cell(figures: Mapping[str, Any], column: str) -> str:
    return output.size(figures[column]) if column in figures else "-"


def total(sample: Sample, column: str) -> int:
    """Of all machines, in bytes."""
    return sum(int(figures.get(column, 0)) for figures in sample.machines.values())


def _pyplot() -> Any:
    """matplotlib's pyplot, without a display."""
    try:
        matplotlib = importlib.import_module("matplotlib")
        matplotlib.use("svg")
        return importlib.import_module("matplotlib.pyplot")
    except ImportError:
        raise VmbusError(
            "Unavailable",
            "matplotlib is not installed; install python3-matplotlib, or vmbus with its extra plot",
            argument="--plot",
        ) from None


def _writable(path: str) -> None:
    """Find out before an hour of recording, not after it."""
    directory = os.path.dirname(os.path.abspath(path))
    if not path.endswith(".svg"):
        raise VmbusError("InvalidArgument", "is a file whose name ends with .svg", argument="--plot")
    if not os.access(directory, os.W_OK):
        raise VmbusError("AccessDenied", f"nothing can be written in {directory}", argument="--plot")


def draw(pyplot: Any, samples: Sequence[Sample], path: str) -> None:
    """The machines' memory over time, stacked, and what is saved and given back below; into ``path``."""
    begin = samples[0].at
    times = [sample.at - begin for sample in samples]
    names = sorted({name for sample in samples for name in sample.machines})
    mib = 1 << 20
    areas = [[sample.machines.get(name, {}).get("pss", 0) / mib for sample in samples] for name in names]
    figure, (above, below) = pyplot.subplots(2, 1, sharex=True, figsize=(10, 7))
    if names:
        above.stackplot(times, areas, labels=[output.printable(name) for name in names], alpha=0.7)
    overhead = [total(sample, "overhead") / mib for sample in samples]
    sizes = [total(sample, "size") / mib for sample in samples]
    above.plot(times, sizes, color="black", linestyle=":", label="size of all")
    above.set_ylabel("guests' memory on the host, MiB")
    above.legend(loc="upper left", fontsize="small")
    for column in ("saved", "ballooned", "huge"):
        below.plot(times, [total(sample, column) / mib for sample in samples], label=column)
    below.plot(times, overhead, label="overhead")
    below.set_ylabel("MiB, of all machines")
    below.set_xlabel(f"seconds since {time.strftime('%Y-%m-%d %H:%M:%S %z', time.localtime(begin))}")
    below.legend(loc="upper left", fontsize="small")
    figure.tight_layout()
    with contextlib.ExitStack() as stack:
        stack.callback(pyplot.close, figure)
        try:
            figure.savefig(path, format="svg")
        except OSError as error:
            raise VmbusError("AccessDenied", f"{path}: {error.strerror}", argument="--plot") from None
