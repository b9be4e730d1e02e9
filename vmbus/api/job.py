# SPDX-License-Identifier: Apache-2.0
"""org.vmbus1.Job: work that takes time."""

from __future__ import annotations

from typing import Any

from vmbus.api.machine import figures, job_path, machine_path
from vmbus.bus import Variant
from vmbus.service.jobs import Job
from vmbus.service.standard import Caller
from vmbus.wire.contract import error_name


class JobObject:
    """A job on the bus."""

    interface = "org.vmbus1.Job"

    def __init__(self, job: Job) -> None:
        self.job = job
        self.path = job_path(job.number)
        self.owner: int | None = job.owner

    def token(self) -> object:
        """A job is not changed, it ends."""
        return None

    def property(self, name: str) -> Any:
        """A property as a Variant."""
        job = self.job
        match name:
            case "Kind":
                return Variant("s", job.kind)
            case "Owner":
                return Variant("u", job.owner)
            case "Object":
                return Variant("o", job.machine if job.machine.startswith("/") else machine_path(job.machine))
            case "State":
                return Variant("s", job.state)
            case "Progress":
                return Variant("(tt)", list(job.progress))
            case "Result":
                return Variant("a{sv}", figures(dict(job.result)))
            case "Error":
                return Variant("s", error_name(job.error.kind) if job.error else "")
            case "Message":
                return Variant("s", str(job.error or job.note))
        raise KeyError(name)


class JobApi:
    """Its method."""

    async def cancel(self, caller: Caller, item: JobObject) -> None:
        """Cancel."""
        await item.job.cancel()
