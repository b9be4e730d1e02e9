# SPDX-License-Identifier: Apache-2.0
"""Each worker in a cgroup v2 of its own, under a directory that systemd delegated (DESIGN rule 8).

Limits: memory.max is the guest's memory and an overhead, the whole group is killed on out-of-memory, pids.max
bounds threads, cpu.weight follows the vCPUs. Without a delegated cgroup v2 with memory and pids controllers
the rlimits of ``limits`` are all there is, and the broker's hello says so.
"""

from __future__ import annotations

import os
import resource
from pathlib import Path
from typing import Final

PIDS: Final = 512
_ADDRESS_SPACE: Final = 2 << 30  # the interpreter, allocator arenas, rings
_ADDRESS_SPACE_VCPU: Final = 128 << 20  # a thread's stack and its malloc arena
_WEIGHT_MOST: Final = 10000
_DEFAULT: Final = Path("/sys/fs/cgroup/system.slice/vmbus-machines.service")


class Cgroups:
    """The delegated directory, if there is one; ``note`` says what is missing ("" for nothing)."""

    def __init__(self, base: Path | None) -> None:
        self.base: Path | None = base or _DEFAULT
        self.note = self._why_not(self.base)
        if self.note:
            self.base = None

    def _why_not(self, base: Path) -> str:
        without = "machines are limited by rlimits only"
        try:
            present = set((base / "cgroup.controllers").read_text().split())
        except OSError:
            return f"{base} is not a delegated cgroup v2: {without}"
        if not {"memory", "pids"} <= present:
            return f"{base} lacks the memory or pids controller: {without}"
        try:
            for name in sorted(present & {"memory", "pids", "cpu", "io"}):
                (base / "cgroup.subtree_control").write_text(f"+{name}")
        except OSError as error:
            return f"controllers cannot be enabled in {base} ({error.strerror}): {without}"
        return ""


class WorkerCgroup:
    """Step: the cgroup of one worker."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def describe(self) -> str:
        return f"cgroup {self.path}"

    def execute(self) -> None:
        self.path.mkdir(exist_ok=True)

    def undo(self) -> None:
        """Raises OSError (EBUSY) while a process is in it."""
        if self.path.exists():
            self.path.rmdir()

    def limit(self, memory: int, vcpus: int) -> None:
        """``memory``: bytes for the whole worker."""
        self._write("memory.max", str(memory))
        self._write("memory.oom.group", "1")
        self._write("pids.max", str(PIDS))
        self._write("cpu.weight", str(min(100 * vcpus, _WEIGHT_MOST)))
        self._write("io.weight", "default 100")

    def kill(self) -> None:
        """End whatever is in it."""
        self._write("cgroup.kill", "1")

    def _write(self, name: str, value: str) -> None:
        try:
            fd = os.open(self.path / name, os.O_WRONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return  # a controller that this host does not delegate
        try:
            os.write(fd, value.encode())
        finally:
            os.close(fd)


def limits(memory: int, vcpus: int, *, address_space: bool) -> dict[int, int]:
    """The rlimits of a worker whose guest has ``memory`` bytes; ``address_space``: nothing else bounds it."""
    bounds = {
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NOFILE: 1024,
        resource.RLIMIT_NPROC: PIDS,
        resource.RLIMIT_MEMLOCK: 1 << 20,
        resource.RLIMIT_MSGQUEUE: 0,
        resource.RLIMIT_RTPRIO: 0,
    }
    if address_space:
        bounds[resource.RLIMIT_AS] = memory + _ADDRESS_SPACE + vcpus * _ADDRESS_SPACE_VCPU
    return bounds


def apply_limits(pid: int, bounds: dict[int, int]) -> None:
    """Set soft and hard limits of process ``pid``, never above what it may have now."""
    for which, bound in bounds.items():
        _, hard = resource.prlimit(pid, which)
        lower = bound if hard == resource.RLIM_INFINITY else min(bound, hard)
        resource.prlimit(pid, which, (lower, lower))
