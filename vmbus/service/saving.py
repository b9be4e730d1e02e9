# SPDX-License-Identifier: Apache-2.0
"""Saving machines to files, and going on from them.

A file is passed by a client and goes straight to the worker, which alone reads and writes it. What a start
has more when a machine goes on from one is in ``Resumption``; the rest is as any start's (``starts``).

The file is its caller's, who may be the only one that can find it again; so a save whose caller leaves the
bus is cancelled, and the machine goes on.

While a machine is saved it shows ``paused``, and the worker refuses whatever would change it. Stop and Kill
cancel the save first.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from typing import Final

from vmbus.service.files import PassedFile
from vmbus.service.jobs import Job, Jobs, seen_through
from vmbus.service.machine import Machine
from vmbus.service.memory import gone_over
from vmbus.service.starts import Resumption
from vmbus.service.workers import END_DEADLINE
from vmbus.wire.definition import check_machine_type
from vmbus.wire.errors import VmbusError

SLOT: Final = "file"
"""What errors call the file."""


class Saving:
    """For all machines."""

    def __init__(self, jobs: Jobs) -> None:
        self._jobs = jobs

    def save(self, machine: Machine, sender: str, file: PassedFile, *, keep: bool) -> Job:
        """Write a machine to the empty ``file``, which is taken over; ``keep``: it then goes on, else it ends
        with reason ``saved``."""
        try:
            check_machine_type(machine.definition)
            machine.require("Save", "running", "paused")
            machine.connection()
            machine.require_idle()
            file.check(SLOT, writable=True, regular=True)
        except VmbusError:
            file.close()
            raise
        job = machine.job = self._jobs.start(
            "save",
            machine.owner,
            machine.uuid,
            lambda job: self._save(machine, job, file, keep=keep),
            caller=sender,
        )
        return job

    async def _save(self, machine: Machine, job: Job, file: PassedFile, *, keep: bool) -> None:
        worker = machine.connection()
        try:
            await gone_over(machine, job, worker.save(file.fd, end=not keep), worker.cancel_save, worker)
            job.tell(bytes=os.fstat(file.fd).st_blocks * 512)
            if not keep:
                await until_gone(machine)
        finally:
            file.close()
            machine.job = None


async def until_gone(machine: Machine) -> None:
    """Wait for the end of one that is to end by itself now, and cannot be kept from it any more."""
    with contextlib.suppress(TimeoutError):
        await seen_through(asyncio.wait_for(machine.gone.wait(), END_DEADLINE))


def resumption(file: PassedFile, *, changed_disks: bool) -> Resumption:
    """What ``Lifecycle.start`` needs to go on from ``file``, which is taken over. Raises InvalidArgument."""
    try:
        file.check(SLOT, writable=False, regular=True)
    except VmbusError:
        file.close()
        raise
    return Resumption(file, changed_disks=changed_disks)
