# SPDX-License-Identifier: Apache-2.0
"""Templates: saved machines that others begin as, at once.

| file | what |
|---|---|
| STATE/templates/index.json | whose each is, and its name |
| STATE/templates/ID | what Machine.Save wrote, copied once; mode 0400, and fs-verity if there is that |

A clone's memory is that file, mapped copy-on-write by the clone's worker (native/vmm/src/save/mapped.rs),
so the guest goes on before it is read. That is why it is copied: nobody but vmbus may write to it or
shorten it. Nothing in it is looked at here; each clone's worker checks all but the memory, and one that is
damaged is refused there.

A clone is a machine of its own that was defined like the one that was saved: the same devices with the same
MAC addresses, memory of kind mergeable. Its disks have to hold what that one's did (copies, or overlays).
Since it is one of several with one address, the cables of its interfaces on bridges are pulled, and its
definition says so: whoever has made it another (or is alone with that address) plugs them in (SetLink). Its
generation ID is new. Templates are their owner's, for the owner's machines.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

import msgspec

from vmbus.service import descriptors, durable
from vmbus.service.aside import aside
from vmbus.service.files import OwnFile, PassedFile
from vmbus.service.handover import close_all
from vmbus.service.hotplug import Hotplug
from vmbus.service.jobs import Job, Jobs
from vmbus.service.machine import Machine, now
from vmbus.service.snapshot_store import new_identifier
from vmbus.service.snapshots import NAME
from vmbus.service.starts import Resumption, Starts
from vmbus.wire.definition import is_tapped
from vmbus.wire.errors import VmbusError

log = logging.getLogger("vmbus.templates")

MOST: Final = 256
"""Templates of an owner."""
_PIECE: Final = 64 << 20  # bytes that are copied at a time, between which a job can be cancelled
_ENABLE_VERITY: Final = 0x40806685  # linux/fsverity.h, FS_IOC_ENABLE_VERITY
_SHA256, _BLOCK = 1, 4096


class Template(msgspec.Struct, frozen=True):
    """One. ``size``: bytes that it takes; ``created``: microseconds since 1970; ``verity``: the kernel checks
    each page of it."""

    id: str
    owner: int
    name: str
    size: int
    created: int
    verity: bool = False


class Templates:
    """Of one service. ``used``: bytes that an owner's snapshots take, which count with templates to
    ``quota``."""

    def __init__(self, state: Path, jobs: Jobs, starts: Starts, hotplug: Hotplug, *, quota: int) -> None:
        self._root = state / "templates"
        self._root.mkdir(mode=0o700, exist_ok=True)
        self._jobs = jobs
        self._starts = starts
        self._hotplug = hotplug
        self._quota = quota
        self._all: list[Template] = []
        self._coming: dict[str, Template] = {}  # being copied; ``size`` is what they may take
        self.used: Callable[[int], int] = lambda owner: 0

    def load(self) -> None:
        """At start: what is there, and nothing half made."""
        self._all = durable.read(self._root / "index.json", list[Template]) or []
        wanted = {"index.json", *(template.id for template in self._all)}
        for file in self._root.iterdir():
            if file.name not in wanted:
                durable.remove(file)

    def of(self, owner: int) -> list[Template]:
        """Whose they are, in the order in which they were made."""
        return [template for template in self._all if template.owner == owner]

    def taken(self, owner: int) -> int:
        """Bytes that an owner's templates take, those that are being made with them."""
        return sum(template.size for template in self._known(owner))

    def _known(self, owner: int) -> list[Template]:
        """Those that are being made with the others."""
        return [*self.of(owner), *(one for one in self._coming.values() if one.owner == owner)]

    def find(self, owner: int, name: str) -> Template:
        """Raises NotFound."""
        for template in self.of(owner):
            if template.name == name:
                return template
        raise VmbusError("NotFound", f"there is no template '{name}'", argument="template")

    # -- making and removing

    def make(self, owner: int, name: str, file: PassedFile, where: str) -> Job:
        """Copy a saved machine, which is taken over; ``where`` is the job's object. Raises InvalidArgument,
        AlreadyExists, QuotaExceeded."""
        try:
            if not NAME.fullmatch(name):
                raise VmbusError("InvalidArgument", f"{name!r} is no name of a template", argument="name")
            self._check_free(owner, name)
            file.check("file", writable=False, regular=True)
            template = Template(new_identifier(), owner, name, os.fstat(file.fd).st_blocks * 512, now())
            self._check_quota(template)
        except VmbusError:
            file.close()
            raise
        self._coming[template.id] = template
        return self._jobs.start("import-template", owner, where, lambda job: self._make(job, template, file))

    def _check_free(self, owner: int, name: str) -> None:
        if any(template.name == name for template in self._known(owner)):
            raise VmbusError("AlreadyExists", f"you have a template '{name}'", argument="name")

    def _check_quota(self, template: Template) -> None:
        used = self.taken(template.owner) + self.used(template.owner)
        if len(self._known(template.owner)) < MOST and used + template.size <= self._quota:
            return
        text = (
            f"your templates and snapshots take {used} bytes, and this one {template.size}; {self._quota} are"
        )
        raise VmbusError("QuotaExceeded", f"{text} allowed (vmbusd.toml), and {MOST} templates: delete some")

    async def _make(self, job: Job, template: Template, file: PassedFile) -> None:
        path = self._root / template.id
        target = -1
        try:
            target = descriptors.keep(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
            size = os.fstat(file.fd).st_size
            os.ftruncate(target, size)
            for begin in range(0, size, _PIECE):
                job.tell((begin, size))
                await aside(_copy, file.fd, target, begin, min(begin + _PIECE, size))
            await aside(os.fsync, target)
            blocks = os.fstat(target).st_blocks * 512
            os.fchmod(target, 0o400)
            descriptors.close(target)
            target = -1
            verity = _protect(path)
            made = msgspec.structs.replace(template, size=blocks, created=now(), verity=verity)
            del self._coming[template.id]
            self._check_quota(made)  # whoever has the file may have filled its holes meanwhile
            self._put([*self._all, made])
            job.tell((size, size), bytes=blocks)
        except BaseException as error:
            with contextlib.suppress(OSError):
                durable.remove(path)
            if isinstance(error, OSError):
                text = f"the file cannot be copied: {error.strerror}"
                raise VmbusError("Unavailable", text, argument="file") from None
            raise
        finally:
            self._coming.pop(template.id, None)
            if target >= 0:
                descriptors.close(target)
            file.close()

    def remove(self, owner: int, name: str) -> None:
        """Forget it; clones that run keep it until they end. Raises NotFound."""
        gone = self.find(owner, name)
        self._put([template for template in self._all if template != gone])
        durable.remove(self._root / gone.id)

    def _put(self, templates: list[Template]) -> None:
        durable.write(self._root / "index.json", templates)
        self._all = templates

    # -- clones

    async def clone(
        self, machine: Machine, name: str, files: Mapping[str, PassedFile], *, paused: bool
    ) -> None:
        """Start a machine as a template. Takes over ``files``. Raises NotFound, NotSupported (memory that is
        not mergeable, or locked), and what Restore raises."""
        try:
            machine.require("Clone", "stopped", "crashed")
            definition = machine.definition
            if definition.memory_kind != "mergeable" or definition.locked:
                text = "a clone has the template's memory, copied when it is written to: it is of kind "
                text += "mergeable, and not locked"
                raise VmbusError("NotSupported", text, argument="memory-kind")
            template = self.find(machine.owner, name)
            nics = [
                msgspec.structs.replace(nic, carrier=False) if is_tapped(nic) else nic
                for nic in definition.nics
            ]
            if nics != definition.nics:
                self._hotplug.store(machine, msgspec.structs.replace(definition, nics=nics))
            file = self._open(template)
        except BaseException:
            close_all(files)
            raise
        saved = Resumption(file, changed_disks=True, clone=True)
        try:
            await self._starts.start(machine, dict(files), paused=paused, saved=saved)
        except BaseException:
            if nics != definition.nics:  # it is no clone, so its cables are as they were
                with contextlib.suppress(VmbusError):
                    self._hotplug.store(machine, definition)
            raise

    def _open(self, template: Template) -> OwnFile:
        path = self._root / template.id
        try:
            return OwnFile(descriptors.keep(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)))
        except OSError as error:
            text = f"the template cannot be opened: {error.strerror}; delete it"
            raise VmbusError("NotFound", text, argument="template") from None


def _copy(source: int, target: int, begin: int, end: int) -> None:
    """What a file has between two places; holes stay holes."""
    at = begin
    while at < end:
        try:
            data = os.lseek(source, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but a hole
                return
            raise
        if data >= end:
            return
        at = max(data, begin)
        stop = min(os.lseek(source, at, os.SEEK_HOLE), end)
        while at < stop:
            piece = os.pread(source, min(1 << 20, stop - at), at)
            if not piece:
                raise OSError(errno.EIO, "it was cut off while it was copied")
            view = memoryview(piece)
            while view:
                written = os.pwrite(target, view, at)
                at, view = at + written, view[written:]


def _protect(path: Path) -> bool:
    """Have the kernel check each page against a hash, if the file system can; whether it does."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, _ENABLE_VERITY, struct.pack("<IIII112x", 1, _SHA256, _BLOCK, 0))
    except OSError as error:
        log.info("no fs-verity for %s: %s", path, error.strerror)
        return False
    finally:
        os.close(fd)
    return True
