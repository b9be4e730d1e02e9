# SPDX-License-Identifier: Apache-2.0
"""A system under measurement: the tests' harness, with spare workers or a chosen D-Bus library."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.lab import namespace
from tests.lab.system import ALICE, System
from tests.local.worker_guest import image

ROOT = Path(__file__).parents[1]
GENEROUS = """
[quota]
memory = "64G"
vcpus = 256
machines = 2000
"""


class Measured(System):
    """A whole vmbus with room for many machines; the tests' guest is Alice's file ``kernel``."""

    def __init__(self, *, spares: int = 0, library: str = "", hugepages: str = "0", policy: str = "") -> None:
        if not os.environ.get("VMBUS_BENCH_NAMESPACE"):
            namespace.enter()
            os.nice(-15)  # what else runs on the host shall disturb less; peers inherit it too
            os.environ["VMBUS_BENCH_NAMESPACE"] = "entered"
        super().__init__(policy=f'{GENEROUS}hugepages = "{hugepages}"\n{policy}')
        self._spares = spares
        self._library = library

    def __enter__(self) -> Measured:
        super().__enter__()
        return self

    def start(self) -> None:
        """Start everything, then give Alice the guest."""
        super().start()
        account = pwd.getpwnam(ALICE)
        self.kernel = self.files(ALICE) / "kernel"
        shutil.copyfile(image(), self.kernel)
        os.chown(self.kernel, account.pw_uid, account.pw_gid)

    def environment(self, user: str = "root") -> dict[str, str]:
        """The harness's, with the D-Bus library."""
        chosen = {"VMBUS_DBUS_LIBRARY": self._library} if self._library else {}
        return {**super().environment(user), **chosen}

    def _broker(self) -> list[str]:
        return [*super()._broker(), "--spares", str(self._spares)] if self._spares else super()._broker()

    def client(self, user: str, module: str, *words: str, timeout: float = 600) -> str:
        """The output of ``python -m MODULE WORDS`` as ``user``, who may be root."""
        argv = [sys.executable, "-m", module, *words]
        if user != "root":
            environment = {"PYTHONPATH": str(ROOT)}
            done = self.run_as(user, argv, env=environment, timeout=timeout)
            out, code, err = done.stdout, done.returncode, done.stderr
        else:
            out, code, err = self._as_root(argv, timeout)
        if code != 0:
            raise RuntimeError(f"{module} {' '.join(words)}: {err}\n{self.logs()}")
        return out

    def _as_root(self, argv: Sequence[str], timeout: float) -> tuple[str, int, str]:
        done = subprocess.run(
            self.inside(argv),
            cwd=ROOT,
            env=self.environment(),
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        return done.stdout, done.returncode, done.stderr
