# SPDX-License-Identifier: Apache-2.0
"""All machines: by UUID, by owner and name, and as stored.

Paths on the bus are by UUID; UUIDs are made here. Names are unique among an owner's machines, transient ones
included. What the list for a caller holds is kept ready, since ListMachines is called all the time.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Final

from vmbus.service import durable
from vmbus.service.machine import Last, Machine, Run, Stored, boot_id
from vmbus.wire.definition import Definition
from vmbus.wire.errors import VmbusError

log = logging.getLogger("vmbus.registry")

UUID: Final = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


class Registry:
    """``state`` is STATE/machines, ``run`` RUN/service; both exist, mode 0700."""

    def __init__(self, state: Path, run: Path) -> None:
        self._state = state
        self._run = run
        self._machines: dict[str, Machine] = {}
        self._named: dict[tuple[int, str], Machine] = {}
        self._order = 0
        self.on_added: Callable[[Machine], None] = lambda machine: None
        self.on_removed: Callable[[Machine], None] = lambda machine: None
        self.forget_files: list[Callable[[str], None]] = []
        """Each takes away what lies elsewhere for the machine with this UUID."""

    def load(self) -> None:
        """Read everything that was stored. Machines with a run record may still have a worker: they show
        ``stopping`` with the flag ``disconnected`` until the broker has said so."""
        for file in sorted(self._state.glob("*.json")):
            if (stored := durable.read(file, Stored)) and stored.uuid == file.stem:
                self._take_stored(stored)
        for directory in sorted(self._run.iterdir()):
            if UUID.fullmatch(directory.name) and (run := durable.read(directory / "run.json", Run)):
                self._take_run(run)

    def _take_stored(self, stored: Stored) -> None:
        last = stored.last
        if last.state == "running":
            reason = "worker-lost" if last.boot == boot_id() else "host-restarted"
            last = Last("crashed", reason, "", last.since)
        machine = Machine(
            stored.uuid,
            stored.owner,
            stored.meant,
            persistent=True,
            generation=stored.generation,
            order=stored.order,
            last=last,
            firmware=stored.firmware,
        )
        self._add(machine)

    def _take_run(self, run: Run) -> None:
        machine = self._machines.get(run.uuid)
        if machine is None:
            if run.persistent:
                log.error(
                    "%s ran, but its definition is no longer stored; it is shown as transient", run.uuid
                )
            machine = Machine(
                run.uuid,
                run.owner,
                run.meant,
                persistent=False,
                generation=run.generation,
                order=run.order,
                firmware=run.firmware,
            )
            self._add(machine)
        machine.run = run
        machine.gone.clear()
        machine.set_state("stopping", "recovery", "vmbusd was restarted and is asking for the worker")
        machine.set_flag("disconnected", on=True)

    # -- finding

    def get(self, uuid: str) -> Machine | None:
        """The machine with this UUID."""
        return self._machines.get(uuid)

    def find(self, uid: int, name: str) -> Machine:
        """By the owner's name for it, or by anybody's UUID. Raises NotFound."""
        machine = self._named.get((uid, name)) or self._machines.get(name)
        if machine is None:
            raise VmbusError(
                "NotFound",
                f"you have no machine named {name!r}, and it is no machine's UUID",
                argument="name",
            )
        return machine

    def all(self) -> list[Machine]:
        """Every machine, in the order of definition."""
        return sorted(self._machines.values(), key=lambda machine: machine.order)

    def of(self, uid: int) -> Iterable[Machine]:
        """The machines of an owner, in the order of definition."""
        return (machine for machine in self.all() if machine.owner == uid)

    # -- changing

    def check_name(self, owner: int, name: str) -> None:
        """Raise AlreadyExists if the owner has a machine of that name."""
        if (owner, name) in self._named:
            raise VmbusError(
                "AlreadyExists",
                f"you have a machine named {name!r} already; choose another name",
                argument="name",
            )

    def create(
        self, uuid: str, owner: int, definition: Definition, firmware: Mapping[str, str], *, persistent: bool
    ) -> Machine:
        """Add a machine, and store it if it is persistent. Raises AlreadyExists, Internal."""
        self.check_name(owner, definition.name)
        machine = Machine(
            uuid, owner, definition, persistent=persistent, order=self._order + 1, firmware=firmware
        )
        self.store(machine)
        self._add(machine)
        return machine

    def store(self, machine: Machine) -> None:
        """Write the machine down, if it is persistent."""
        if machine.persistent:
            try:
                durable.write(self._state / f"{machine.uuid}.json", machine.stored())
            except OSError as error:
                raise VmbusError("Internal", f"the definition cannot be stored: {error.strerror}") from None

    def remove(self, machine: Machine) -> None:
        """Forget it, stored file included."""
        if self._machines.pop(machine.uuid, None) is None:
            return
        key = (machine.owner, machine.definition.name)
        if self._named.get(key) is machine:
            del self._named[key]
        if machine.persistent:
            durable.remove(self._state / f"{machine.uuid}.json")
        for forget in self.forget_files:
            forget(machine.uuid)
        self.on_removed(machine)

    def _add(self, machine: Machine) -> None:
        key = (machine.owner, machine.definition.name)
        if key in self._named:  # only files that were written by hand can do this
            log.error(
                "%s: its owner has another machine named %s; it is found by UUID only", machine.uuid, key[1]
            )
        self._named.setdefault(key, machine)
        self._machines[machine.uuid] = machine
        self._order = max(self._order, machine.order)
        self.on_added(machine)

    # -- the run directory

    def run_directory(self, uuid: str) -> Path:
        """RUN/service/UUID."""
        return self._run / uuid

    def write_run(self, machine: Machine, run: Run) -> None:
        """Write down what is known of the run."""
        directory = self.run_directory(machine.uuid)
        try:
            directory.mkdir(mode=0o700, exist_ok=True)
            durable.write(directory / "run.json", run)
        except OSError as error:
            raise VmbusError("Internal", f"the run directory cannot be written: {error.strerror}") from None
        machine.run = run

    def remove_run(self, machine: Machine) -> None:
        """The run is over, and confirmed to be."""
        machine.run = None
        durable.remove(self.run_directory(machine.uuid))
