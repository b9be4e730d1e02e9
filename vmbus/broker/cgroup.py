# SPDX-License-Identifier: Apache-2.0
"""Each worker in a cgroup v2 of its own, under a directory that systemd delegated.

memory.max is the guest's memory and an overhead, and all of a group is killed on out-of-memory; pids.max
bounds threads; cpu.weight follows the vCPUs. Without a delegated cgroup v2 with memory and pids controllers
the rlimits of ``limits`` are all there is, and the broker's hello says so.
"""

import resource
from pathlib import Path

PIDS = 512
DEFAULT = Path("/sys/fs/cgroup/system.slice/vmbus-machines.service")
_ADDRESS_SPACE = 2 << 30  # the interpreter, allocator arenas, rings
_ADDRESS_SPACE_VCPU = 128 << 20  # a thread's stack and its malloc arena
_WEIGHT_MOST = 10000


def delegated(base: Path) -> list[str]:
    """Enable the controllers in ``base``; [] if it can be used, else a sentence that says what is missing."""
    try:
        present = {"memory", "pids", "cpu", "io"} & set((base / "cgroup.controllers").read_text().split())
        for name in sorted(present):
            (base / "cgroup.subtree_control").write_text(f"+{name}")
        why = "" if {"memory", "pids"} <= present else "lacks the memory or pids controller"
    except OSError as error:
        why = f"is not a delegated cgroup v2 ({error.strerror})"
    return [f"{base} {why}: machines are limited by rlimits only"] if why else []


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
        if (self.path / name).exists():  # a host may delegate fewer controllers
            (self.path / name).write_text(value)


def limits(memory: int, vcpus: int, locked: int = 0) -> dict[int, int]:
    """The rlimits of a worker; RLIMIT_AS if ``memory`` (bytes, for all of it) is not 0, ``locked`` bytes."""
    bounds = dict.fromkeys((resource.RLIMIT_CORE, resource.RLIMIT_MSGQUEUE, resource.RLIMIT_RTPRIO), 0)
    bounds[resource.RLIMIT_MEMLOCK] = locked or 1 << 20
    bounds |= {resource.RLIMIT_NOFILE: 1024, resource.RLIMIT_NPROC: PIDS}
    if memory:
        bounds[resource.RLIMIT_AS] = memory + _ADDRESS_SPACE + vcpus * _ADDRESS_SPACE_VCPU
    return bounds


def apply_limits(pid: int, bounds: dict[int, int]) -> None:
    """Set soft and hard limits of process ``pid`` (0: this one), never above what it may have now."""
    for which, bound in bounds.items():
        _, hard = resource.prlimit(pid, which)
        lower = bound if hard == resource.RLIM_INFINITY else min(bound, hard)
        resource.prlimit(pid, which, (lower, lower))
