# SPDX-License-Identifier: Apache-2.0
"""Snapshots of machines: memory, devices and disks of one moment, all of them or none.

Memory goes to a file of the service's (``snapshot_store``), what is on the disks into internal snapshots of
theirs; the machine's worker does both while the machine stands still (native/vmm/src/snapshots.rs). Each
step is written down before it is done, so that after a crash of anything at any moment it is finished or
undone:

| operation | written down first | done | written down then |
|---|---|---|---|
| create | ``drop`` its internal snapshots | memory, then each disk's | the snapshot, and ``drop`` no more |
| revert | ``undo`` by the snapshots aside | the disks go back | it is current; ``drop`` those aside |
| delete | it is gone; ``drop`` its internal snapshots | memory goes, and they | ``drop`` no more |

A create belongs to the machine, not to its caller: who leaves the bus finds it later. A revert ends the
machine that runs, and starts it where it was: it has to be as it was then, devices, memory and processors,
since they are part of what the guest knows. A stopped machine is started, without a step of its guest, to
delete what its disks hold.

The tree: a snapshot's parent is what was current when it was made. One that is deleted leaves its children
to its parent.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Mapping
from typing import Any, Final

import msgspec

from vmbus.service.files import PassedFile
from vmbus.service.handover import close_all
from vmbus.service.jobs import Job, Jobs
from vmbus.service.lifecycle import Lifecycle
from vmbus.service.machine import Machine, now
from vmbus.service.memory import gone_over
from vmbus.service.registry import Registry
from vmbus.service.snapshot_store import Index, Snapshot, Store, internal, new_identifier
from vmbus.service.starts import Resumption, Starts
from vmbus.wire.definition import check_machine_type
from vmbus.wire.errors import VmbusError

MOST: Final = 64
"""Snapshots of a machine."""
NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,62}")
"""Of a snapshot, or a template."""
_ENDED: Final = ("stopped", "crashed")
_ALIVE: Final = ("running", "paused")


class Snapshots:
    """For all machines. ``quota``: bytes that the memory of one owner's snapshots may take."""

    def __init__(
        self,
        store: Store,
        registry: Registry,
        jobs: Jobs,
        starts: Starts,
        lifecycle: Lifecycle,
        *,
        quota: int,
    ) -> None:
        self._store = store
        self._registry = registry
        self._jobs = jobs
        self._starts = starts
        self._lifecycle = lifecycle
        self._quota = quota
        starts.tidy = self.tidy
        self.others: Callable[[int], int] = lambda owner: 0
        """Bytes of an owner's that count with snapshots to the quota."""

    def list(self, machine: Machine) -> list[dict[str, Any]]:
        """In the order in which they were made."""
        index = self._store.of(machine.uuid)
        names = {snapshot.id: snapshot.name for snapshot in index.snapshots}
        return [
            {
                "name": snapshot.name,
                "created": snapshot.created,
                "parent": names.get(snapshot.parent, ""),
                "current": snapshot.id == index.current,
                "memory": snapshot.memory,
            }
            for snapshot in index.snapshots
        ]

    def used(self, owner: int) -> int:
        """Bytes that the memory of an owner's snapshots takes."""
        return self._store.used(machine.uuid for machine in self._registry.of(owner))

    # -- create

    def create(self, machine: Machine, name: str) -> Job:
        """Raises InvalidArgument, AlreadyExists, QuotaExceeded, NotSupported, InvalidState."""
        machine.require("CreateSnapshot", *_ALIVE)
        self._check_kept(machine)
        if not NAME.fullmatch(name):
            text = (
                "1 to 63 letters, digits, dots, dashes, plus signs and underscores, of which the first is a "
            )
            raise VmbusError(
                "InvalidArgument", f"{name!r} is no name: {text}letter or digit", argument="name"
            )
        index = self._store.of(machine.uuid)
        if any(snapshot.name == name for snapshot in index.snapshots):
            raise VmbusError("AlreadyExists", f"the machine has a snapshot '{name}'", argument="name")
        if len(index.snapshots) >= MOST:
            raise VmbusError("QuotaExceeded", f"the machine has {MOST} snapshots; delete one")
        used = self.used(machine.owner) + self.others(machine.owner)
        if used + machine.definition.memory > self._quota:
            text = f"your snapshots and templates take {used} bytes, and this one could take "
            text += f"{machine.definition.memory}; {self._quota} are allowed (vmbusd.toml): delete some"
            raise VmbusError("QuotaExceeded", text)
        check_machine_type(machine.definition)
        machine.connection()
        machine.require_idle()
        job = machine.job = self._jobs.start(
            "snapshot", machine.owner, machine.uuid, self._create(machine, name, new_identifier())
        )
        return job

    async def _create(self, machine: Machine, name: str, identifier: str) -> None:
        uuid, disks = machine.uuid, internal(identifier)
        try:
            index = self._store.of(uuid)
            self._store.put(uuid, _with(index, drop=[*index.drop, disks]))
            file = self._store.create_memory(uuid, identifier)
            try:
                await self._take(machine, file.fd, disks)
                size = os.fstat(file.fd).st_blocks * 512
            finally:
                file.close()
            if machine.job is not None:
                machine.job.tell(bytes=size)
            self._store.settle_memory(uuid)
            index = self._store.of(uuid)
            snapshot = Snapshot(identifier, name, now(), index.current, size)
            self._store.put(
                uuid,
                msgspec.structs.replace(
                    index,
                    snapshots=[*index.snapshots, snapshot],
                    current=identifier,
                    drop=[other for other in index.drop if other != disks],
                ),
            )
        except BaseException:
            self._store.remove_memory(uuid, identifier)
            with contextlib.suppress(VmbusError):  # else at the next start
                await self._tidy(machine)
            raise
        finally:
            machine.job = None

    async def _take(self, machine: Machine, fd: int, name: str) -> None:
        worker = machine.connection()
        await gone_over(machine, machine.job, worker.snapshot(fd, name), worker.cancel_save, worker)

    # -- revert

    async def revert(
        self, machine: Machine, name: str, files: Mapping[str, PassedFile], *, paused: bool
    ) -> None:
        """Returns when the machine goes on from there. Takes over ``files``. Raises NotFound, and what Stop
        and Restore raise; nothing has changed then, but that the machine has ended."""
        memory = None
        try:
            machine.require("RevertToSnapshot", *_ENDED, *_ALIVE)
            self._check_kept(machine)
            machine.require_idle()
            snapshot = self._store.of(machine.uuid).find(name)
            memory = self._store.open_memory(machine.uuid, snapshot.id)
            if machine.alive:
                await self._lifecycle.stop(machine, 0).wait()
            machine.require("RevertToSnapshot", *_ENDED)
            aside = internal(new_identifier())
            index = self._store.of(machine.uuid)
            self._store.put(machine.uuid, _with(index, undo=[*index.undo, aside]))
        except BaseException:
            close_all(files)
            if memory is not None:
                memory.close()
            raise

        def there() -> None:
            self._gone_back(machine, snapshot, aside)

        saved = Resumption(memory, revert_to=internal(snapshot.id), aside=aside, on_restored=there)
        await self._starts.start(machine, dict(files), paused=paused, saved=saved)

    def _gone_back(self, machine: Machine, snapshot: Snapshot, aside: str) -> None:
        """The disks are what they were, and the guest has not run yet."""
        index = self._store.of(machine.uuid)
        undo = [other for other in index.undo if other != aside]
        done = msgspec.structs.replace(index, current=snapshot.id, undo=undo, drop=[*index.drop, aside])
        self._store.put(machine.uuid, done)

    # -- delete

    def delete(self, machine: Machine, name: str, files: Mapping[str, PassedFile]) -> Job:
        """Takes over ``files``, which a stopped machine needs to be started. Raises NotFound,
        InvalidState."""
        try:
            machine.require("DeleteSnapshot", *_ENDED, *_ALIVE)
            machine.require_idle()
            gone = self._store.of(machine.uuid).find(name)
        except VmbusError:
            close_all(files)
            raise
        work = self._delete(machine, gone, files)
        job = self._jobs.start("delete-snapshot", machine.owner, machine.uuid, work)
        if machine.alive:
            machine.job = job
        return job

    async def _delete(self, machine: Machine, gone: Snapshot, files: Mapping[str, PassedFile]) -> None:
        alive = machine.alive
        try:
            self._store.put(machine.uuid, without(self._store.of(machine.uuid), gone))
            self._store.remove_memory(machine.uuid, gone.id)
            if alive:
                await self._tidy(machine)
        except BaseException:
            close_all(files)
            raise
        finally:
            if alive:
                machine.job = None
        if alive:
            close_all(files)
            return
        await self._starts.start(machine, dict(files), paused=True)
        await self._lifecycle.stop(machine, 0).wait()

    # -- what is left

    async def tidy(self, machine: Machine) -> None:
        """A start's step, once the machine is built and again once it is restored: its disks hold nothing
        that was broken off."""
        await self._tidy(machine)

    async def _tidy(self, machine: Machine) -> None:
        index = self._store.of(machine.uuid)
        if not (index.undo or index.drop):
            return
        await machine.connection().tidy(undo=index.undo, drop=index.drop)
        later = self._store.of(machine.uuid)
        self._store.put(
            machine.uuid,
            _with(
                later,
                undo=[name for name in later.undo if name not in index.undo],
                drop=[name for name in later.drop if name not in index.drop],
            ),
        )

    def _check_kept(self, machine: Machine) -> None:
        if not machine.persistent:
            text = "a transient machine has no snapshots, since it is gone when it ends; define it"
            raise VmbusError("NotSupported", text)


def without(index: Index, gone: Snapshot) -> Index:
    """The index without a snapshot: its children are its parent's, and its disks' part is to be dropped."""
    kept = [
        msgspec.structs.replace(other, parent=gone.parent) if other.parent == gone.id else other
        for other in index.snapshots
        if other.id != gone.id
    ]
    current = gone.parent if index.current == gone.id else index.current
    drop = [*index.drop, internal(gone.id)]
    return msgspec.structs.replace(index, snapshots=kept, current=current, drop=drop)


def _with(index: Index, *, undo: list[str] | None = None, drop: list[str] | None = None) -> Index:
    return msgspec.structs.replace(
        index,
        undo=index.undo if undo is None else undo,
        drop=index.drop if drop is None else drop,
    )
