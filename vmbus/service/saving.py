# SPDX-License-Identifier: Apache-2.0
"""Saving machines to files, and going on from them.

A file is passed by a client and goes straight to the worker, which alone reads and writes it. What a start
has more when a machine goes on from one is in ``Resumption``; the rest is as any start's (``lifecycle``).

While a machine is saved it shows ``paused``, and the worker refuses whatever would change it. Stop and Kill
cancel the save first.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Final

from vmbus.service.files import PassedFile
from vmbus.service.jobs import Job, Jobs
from vmbus.service.lifecycle import END_DEADLINE, Resumption
from vmbus.service.machine import Machine
from vmbus.service.memory import watched
from vmbus.wire.errors import VmbusError

SLOT: Final = "file"
"""What errors call the file."""


class Saving:
    """For all machines."""

    def __init__(self, jobs: Jobs) -> None:
        self._jobs = jobs

    def save(self, machine: Machine, file: PassedFile, *, keep: bool) -> Job:
        """Write a machine to the empty ``file``, which is taken over; ``keep``: it then goes on, else it ends
        with reason ``saved``."""
        try:
            machine.require("Save", "running", "paused")
            machine.connection()
            if machine.job is not None or machine.changing:
                raise VmbusError("InvalidState", "something else is done with the machine; wait for its job")
            file.check(SLOT, writable=True, regular=True)
        except VmbusError:
            file.close()
            raise
        job = self._jobs.start("save", machine.owner, machine.uuid, self._save(machine, file, keep=keep))
        machine.job = job
        return job

    async def _save(self, machine: Machine, file: PassedFile, *, keep: bool) -> None:
        worker = machine.connection()
        try:
            await watched(
                machine, machine.job, worker.save(file.fd, end=not keep), worker.cancel_save, worker
            )
            if not keep:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(machine.gone.wait(), END_DEADLINE)
        finally:
            file.close()
            machine.job = None


def resumption(file: PassedFile, *, changed_disks: bool) -> Resumption:
    """What ``Lifecycle.start`` needs to go on from ``file``, which is taken over. Raises InvalidArgument."""
    try:
        file.check(SLOT, writable=False, regular=True)
    except VmbusError:
        file.close()
        raise
    return Resumption(file, changed_disks=changed_disks)
