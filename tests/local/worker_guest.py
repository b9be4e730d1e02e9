# SPDX-License-Identifier: Apache-2.0
"""A worker with one of the bare-metal guests of tests/guests in it."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from tests.local.worker_process import Service, WorkerProcess
from vmbus.wire.definition import Definition, Disk, Kernel, Layer
from vmbus.wire.worker import Configure, Console, Run

UUID = "6ba7b810-9dad-11d1-80b4-00c04fd430c8"
SOURCES = Path(__file__).parents[1] / "guests"
BUILT = Path(__file__).parents[2] / "build" / "guests"


@cache
def image() -> Path:
    """The guests' ELF file, built if need be."""
    subprocess.run(["make", "-s", "-C", str(SOURCES), f"OUT={BUILT}"], check=True)
    return BUILT / "guest"


class Guest:
    """A worker whose machine is built and stands still; ``start`` lets it go. Requires "kvm"."""

    def __init__(
        self,
        mode: str,
        *,
        vcpus: int = 1,
        memory: int = 16 << 20,
        on_reset: Literal["restart", "end"] = "restart",
        disks: dict[str, tuple[list[Layer], list[Path]]] | None = None,
        rings: int = 2,
        kernel: bytes | None = None,
        restore: int | None = None,
        program: Sequence[str] = ("-m", "vmbus.worker.main"),
        **more: Any,
    ) -> None:
        """``kernel`` replaces the guests' ELF file; ``disks``: each one's layers and files.

        ``restore`` is a saved machine to go on from, -1 for one that comes from elsewhere; ``more`` what
        else its definition says."""
        self.worker = WorkerProcess(kvm="/dev/kvm", rings=rings, program=program)
        try:
            self.service = self.worker.control()
            self.worker.deliver(
                "kernel", os.open(image(), os.O_RDONLY) if kernel is None else _memory_file(kernel)
            )
            for name, (_, paths) in (disks or {}).items():
                for index, path in enumerate(paths):
                    self.worker.deliver_path(f"disk/{name}/{index}", path, writable=index == 0)
            self.console = self.open_console(write=True)
            definition = Definition(
                name="guest",
                memory=memory,
                vcpus=vcpus,
                kernel=Kernel(source="fd", cmdline=mode),
                disks=[
                    Disk(id=name, layers=layers, source="fd") for name, (layers, _) in (disks or {}).items()
                ],
                on_reset=on_reset,
                **more,
            )
            if restore is not None and restore >= 0:
                self.worker.deliver("restore", os.dup(restore))
            self.configured = self.service.do(
                Configure, uuid=UUID, definition=definition, restore=restore is not None
            )
        except BaseException:
            self.worker.close()
            raise

    def open_console(self, *, write: bool = False, service: Service | None = None) -> socket.socket:
        """A console connection of one's own."""
        ours, theirs = socket.socketpair()
        ours.settimeout(10)
        result = (service or self.service).do(Console, theirs.detach(), write=write)
        assert result.error is None, result
        return ours

    def start(self) -> None:
        """Run, and check that it does."""
        assert self.configured.error is None, self.configured
        result = self.service.do(Run)
        assert result.error is None, result

    def said(self, until: bytes, seconds: float = 10) -> bytes:
        """The console's output up to and with ``until``."""
        return read_until(self.console, until, seconds)

    def __enter__(self) -> Guest:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.console.close()
        self.worker.__exit__(kind, error, trace)


def _memory_file(content: bytes) -> int:
    fd = os.memfd_create("kernel")
    os.write(fd, content)
    return fd


def read_until(sock: socket.socket, until: bytes, seconds: float = 10) -> bytes:
    """What comes on a console up to and with ``until``."""
    deadline = time.monotonic() + seconds
    data = b""
    while until not in data:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError(f"{until!r} did not come; {data[-500:]!r} did")
        sock.settimeout(left)
        chunk = sock.recv(1 << 16)
        if not chunk:
            raise ConnectionResetError(f"the console ended after {data[-500:]!r}")
        data += chunk
    return data
