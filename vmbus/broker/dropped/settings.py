# SPDX-License-Identifier: Apache-2.0
"""The host's settings of KSM and its pools of huge pages, changed by a child that is nobody.

It holds the files below /sys that the request names, opened by root (the kernel asks for no right beyond
that), and the record of what was changed: RUN/settings.json, root's, made anew with each boot.

- *A setting of KSM*: what was found at the first change is kept until it is put back.
- *A pool*: how many pages were added. Only these are ever taken away again, so that the administrator's
  stay, whatever they do to the pool meanwhile. A write may be cut short (it is ended at the deadline): the
  record says beforehand how many pages there were, and what came of it is reckoned the next time.

One child at a time, by a lock on the record.
"""

import contextlib
import errno
import fcntl
import os
import re
from pathlib import Path

import msgspec

from vmbus.broker.children import Channel
from vmbus.broker.dropped import policy
from vmbus.wire.errors import VmbusError
from vmbus.wire.memory import Tuned

_SYS = Path("/sys")


class Record(msgspec.Struct):
    """RUN/settings.json. ``pending``: a pool that is being written to, and how many pages it had."""

    found: dict[str, str] = {}
    grown: dict[str, int] = {}
    pending: dict[str, int] = {}


def apply(settings: dict[str, str], text: bytes, channel: Channel) -> None:
    """Write ``settings`` by the policy ``text``; kept: the record, a file for each. Reports a ``Tuned``.

    Raises AccessDenied (broker.toml, or pages that are not ours), InvalidArgument, InUse.
    """
    record, *files = channel.fds
    fcntl.flock(record, fcntl.LOCK_EX)
    host = Host(record, policy.load(text), _SYS)
    for (name, value), fd in zip(settings.items(), files, strict=True):
        (host.set_ksm if "/ksm/" in name else host.set_pool)(name, fd, value)
    values = {name: _read(fd) for name, fd in zip(settings, files, strict=True)}
    channel.report(Tuned(values=values, found=host.record.found, grown=host.record.grown))


class Host:
    """The record, and what may be done."""

    def __init__(self, record: int, granted: policy.Policy, sys: Path) -> None:
        self._fd, self._granted, self._sys = record, granted, sys
        self.record = Record()
        with contextlib.suppress(msgspec.DecodeError):  # empty, or cut short
            self.record = msgspec.json.decode(os.pread(record, 1 << 20, 0), type=Record)
        for name, before in self.record.pending.items():
            with contextlib.suppress(OSError):
                self._count(name, int((sys / name).read_text()) - before)
        self.record.pending = {}

    def set_ksm(self, name: str, fd: int, value: str) -> None:
        """Write one of KSM's settings, or put it back with ""."""
        if not self._granted.ksm.manage:
            message = "broker.toml does not let vmbus change KSM; it takes manage = true in [ksm]"
            raise VmbusError("AccessDenied", message)
        put_back, now = not value, _read(fd)
        if put_back:
            value = self.record.found.get(name, now)
        else:
            self.record.found.setdefault(name, now)
            self._save()
        if value != now:
            _write(fd, value, Path(name).name)
        if put_back:
            self.record.found.pop(name, None)
            self._save()

    def set_pool(self, name: str, fd: int, value: str) -> None:
        """Have ``value`` pages in a pool, or as many as the kernel finds."""
        before, wanted = int(_read(fd)), int(value)
        self._may_have(name, wanted - before)
        self.record.pending = {name: before}
        self._save()
        _write(fd, value, "pages")
        self._count(name, int(_read(fd)) - before)
        self.record.pending = {}
        self._save()

    def _may_have(self, name: str, more: int) -> None:
        if more > 0:
            size = _page_size(name)
            ours = sum(pages * _page_size(pool) for pool, pages in self.record.grown.items())
            limit = policy.size(self._granted.hugepages.grow)
            if ours + more * size > limit:
                message = f"vmbus may add {limit} bytes to the pools in all ([hugepages] grow in broker.toml)"
                raise VmbusError(
                    "AccessDenied", f"{message}; {ours} are added, {more * size} asked for", argument="pages"
                )
            return
        ours = self.record.grown.get(name, 0)
        if -more > ours:
            message = f"{ours} pages of this pool were added by vmbus; the others are the administrator's"
            raise VmbusError("AccessDenied", message, argument="pages")
        idle = self._idle(name)
        if -more > idle:
            message = f"{idle} pages of this pool are neither used nor reserved; stop machines to free more"
            raise VmbusError("InUse", message, argument="pages")

    def _idle(self, name: str) -> int:
        """Pages that can go: reservations are the whole host's, whatever the node."""
        pool = (self._sys / name).parent
        whole = self._sys / "kernel/mm/hugepages" / pool.name
        free, everywhere, reserved = (
            int(path.read_text())
            for path in (pool / "free_hugepages", whole / "free_hugepages", whole / "resv_hugepages")
        )
        return max(0, min(free, everywhere - reserved))

    def _count(self, name: str, more: int) -> None:
        ours = max(0, self.record.grown.get(name, 0) + more)
        self.record.grown = {**self.record.grown, name: ours}
        if not ours:
            del self.record.grown[name]

    def _save(self) -> None:
        data = msgspec.json.encode(self.record)
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, data, 0)


def _page_size(name: str) -> int:
    match = re.search("hugepages-([0-9]+)kB", name)
    assert match is not None, name
    return int(match[1]) << 10


def _read(fd: int) -> str:
    """A file of /sys; of a choice such as "[none] scan-time" the one in brackets."""
    text = os.pread(fd, 4096, 0).decode().strip()
    chosen = re.search(r"\[(\S+)\]", text)
    return chosen[1] if chosen else text


def _write(fd: int, value: str, argument: str) -> None:
    try:
        os.pwrite(fd, f"{value}\n".encode(), 0)
    except OSError as error:
        argument = argument.replace("_", "-")
        if error.errno == errno.EBUSY:
            message = "cannot be changed while pages are merged; separate them first with run=2"
            raise VmbusError("InUse", message, argument=argument) from None
        message = f"the kernel does not take '{value}' ({error.strerror})"
        raise VmbusError("InvalidArgument", message, argument=argument) from None
