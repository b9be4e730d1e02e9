# SPDX-License-Identifier: Apache-2.0
"""A machine of the core in this very process, through the C ABI and without worker, broker or bus.

For tests of the core with stock kernels; nothing is confined. Every wait has a deadline.
"""

from __future__ import annotations

import json
import os
import select
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from vmbus._native import ffi, lib
from vmbus.wire.errors import VmbusError
from vmbus.worker import core

PATIENCE: Final = 90.0
KINDS: Final = {1: "done", 2: "failed", 3: "running", 4: "paused", 5: "reset", 6: "ended"}


class CoreMachine:
    """Built, not yet running. ``disks`` are raw files, ``overlays`` qcow2 files on a raw one each, ``cds``
    media, which firmware tries before the disks.

    ``firmware`` instead of ``kernel`` and ``initrd`` is the path of its code; ``variables`` may belong to it.
    Raises VmbusError as the core does.
    """

    def __init__(
        self,
        kernel: Path | None = None,
        initrd: Path | None = None,
        cmdline: str = "",
        *,
        firmware: Path | None = None,
        variables: Path | None = None,
        cds: Sequence[Path] = (),
        overlays: Sequence[tuple[Path, Path]] = (),
        vcpus: int = 1,
        memory_mib: int = 384,
        cpu_model: str = "host",
        disks: Sequence[Path] = (),
        on_reset: str = "restart",
        patience: float = PATIENCE,
    ) -> None:
        self._patience = patience
        self._console, console = socket.socketpair()
        console.setblocking(False)
        self.printed = b""
        self.seen: list[str] = []
        self._reason = self._end = ""
        self._ids = 0
        config: dict[str, Any] = {
            "machine_type": "vmbus-2",
            "uuid": "6ba7b811-9dad-11d1-80b4-00c04fd430c8",
            "vcpus": vcpus,
            "memory": memory_mib << 20,
            "cpu_model": cpu_model,
            "kvm_fd": os.open("/dev/kvm", os.O_RDWR),
            "console_fd": console.detach(),
            "disks": [
                {"id": f"disk{index}", "layers": [{"fd": os.open(path, os.O_RDWR), "format": "raw"}]}
                for index, path in enumerate(disks)
            ],
            "rng": True,
            "on_reset": on_reset,
        }
        config |= _beginning(kernel, initrd, cmdline, firmware, variables)
        for index, path in enumerate(cds):
            layer = {"fd": os.open(path, os.O_RDONLY), "format": "raw"}
            drive = {"id": f"cd{index}", "bus": "scsi", "cdrom": True, "read_only": True, "layers": [layer]}
            config["disks"].insert(index, drive)
        for top, base in overlays:
            layers = [
                {"fd": os.open(top, os.O_RDWR), "format": "qcow2", "backing_name": str(base)},
                {"fd": os.open(base, os.O_RDONLY), "format": "raw"},
            ]
            config["disks"].append({"id": f"disk{len(config['disks'])}", "layers": layers})
        if firmware:
            config["firmware"]["boot"] = [f"disk/{disk['id']}" for disk in config["disks"]]
        encoded = json.dumps(config).encode()
        out = ffi.new("VmbusMachine **")
        core.call(lib.vmbus_machine_new(encoded, len(encoded), out))
        self._machine = out[0]

    def __enter__(self) -> CoreMachine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        lib.vmbus_machine_free(self._machine)
        self._console.close()

    def ask(self, operation: str, argument: int = 0) -> None:
        """Make a request; its answer comes among the events."""
        self._ids += 1
        core.call(lib.vmbus_machine_request(self._machine, core.OPERATIONS[operation], argument, self._ids))

    def say(self, line: str) -> None:
        """Type a line on the console."""
        self._console.sendall(f"{line}\n".encode())

    def until(self, text: str) -> str:
        """All that was printed, once ``text`` was."""
        self._pump(lambda: text.encode() in self.printed or "ended" in self.seen)
        assert text.encode() in self.printed, self._state()
        return self.printed.decode(errors="replace")

    def end(self) -> str:
        """The reason of the end, once it has come."""
        self._pump(lambda: "ended" in self.seen)
        return self._reason

    def _state(self) -> str:
        return f"events {self.seen} {self._end}, printed: {self.printed.decode(errors='replace')}"

    def _pump(self, done: Any) -> None:
        event_fd = core.call(lib.vmbus_machine_event_fd(self._machine))
        deadline = time.monotonic() + self._patience
        while not done():
            left = deadline - time.monotonic()
            assert left > 0, self._state()
            ready, _, _ = select.select([self._console.fileno(), event_fd], [], [], left)
            if self._console.fileno() in ready:
                self.printed += self._console.recv(65536)
            if event_fd in ready:
                self._take_events()

    def _take_events(self) -> None:
        event = ffi.new("VmbusEvent *")
        while core.call(lib.vmbus_machine_next_event(self._machine, event)):
            kind, text = KINDS[event.kind], ffi.string(event.json).decode()
            if kind == "failed":
                error = json.loads(text)
                raise VmbusError(error["kind"], error["message"], argument=error["argument"])
            if kind == "ended":
                self._reason, self._end = (told := json.loads(text))["reason"], str(told)
            if kind != "done":
                self.seen.append(kind)


def _beginning(
    kernel: Path | None, initrd: Path | None, cmdline: str, firmware: Path | None, variables: Path | None
) -> dict[str, Any]:
    if firmware:
        found: dict[str, Any] = {"code_fd": os.open(firmware, os.O_RDONLY)}
        if variables:
            found["variables_fd"] = os.open(variables, os.O_RDWR)
        return {"firmware": found}
    assert kernel and initrd
    return {
        "kernel": {
            "fd": os.open(kernel, os.O_RDONLY),
            "initrd_fd": os.open(initrd, os.O_RDONLY),
            "cmdline": f"console=ttyS0 quiet panic=-1 {cmdline}",
        }
    }
