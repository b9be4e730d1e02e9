# SPDX-License-Identifier: Apache-2.0
"""Shows on the bus what happens in the service: objects that come and go, properties that change, signals."""

from __future__ import annotations

from vmbus.api.job import JobObject
from vmbus.api.machine import MachineObject, job_path, machine_path
from vmbus.api.manager import ManagerApi
from vmbus.bus import ERROR_PREFIX
from vmbus.service.exports import Exports
from vmbus.service.jobs import Job, Jobs
from vmbus.service.machine import Machine
from vmbus.service.parked import Parked
from vmbus.service.registry import Registry
from vmbus.service.workers import Workers


class Publisher:
    """Sets itself as the observer of all parts."""

    def __init__(
        self,
        exports: Exports,
        registry: Registry,
        workers: Workers,
        jobs: Jobs,
        parked: Parked,
        manager: ManagerApi,
    ) -> None:
        self._exports = exports
        self._parked = parked
        self._manager = manager
        registry.on_added = self._machine_added
        registry.on_removed = self._machine_removed
        workers.on_console = lambda machine: self._emit(machine, "ConsoleActivity")
        workers.on_reset = lambda machine: self._emit(machine, "GuestReset")
        jobs.on_added = lambda job: exports.add(JobObject(job))
        jobs.on_told = lambda job: self._job_changed(job, "Progress", "Result")
        jobs.on_finished = self._job_finished
        jobs.on_removed = lambda job: exports.remove(job_path(job.number))

    def _machine_added(self, machine: Machine) -> None:
        machine.on_change = self._machine_changed
        self._manager.machines_changed()
        self._exports.add(MachineObject(machine))

    def _machine_removed(self, machine: Machine) -> None:
        self._manager.machines_changed()
        self._parked.machine_removed(machine)
        self._exports.remove(machine_path(machine.uuid))

    def _machine_changed(self, machine: Machine, old: str, names: tuple[str, ...]) -> None:
        item = self._exports.get(machine_path(machine.uuid))
        if isinstance(item, MachineObject):
            item.forget(names)
            self._exports.changed(item, names)
            if machine.state != old:
                self._exports.emit(item, "StateChanged", old, machine.state)

    def _emit(self, machine: Machine, signal: str) -> None:
        item = self._exports.get(machine_path(machine.uuid))
        if item is not None:
            self._exports.emit(item, signal)

    def _job_changed(self, job: Job, *names: str) -> None:
        item = self._exports.get(job_path(job.number))
        if item is not None:
            self._exports.changed(item, names)

    def _job_finished(self, job: Job) -> None:
        self._job_changed(job, "Progress", "Result", "State", "Error", "Message")
        item = self._exports.get(job_path(job.number))
        if item is not None:
            error = f"{ERROR_PREFIX}{job.error.kind}" if job.error else ""
            self._exports.emit(item, "Finished", job.state, error, str(job.error or job.note))
