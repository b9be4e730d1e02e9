# SPDX-License-Identifier: Apache-2.0
"""The stage of one system under test: a process that holds its mount namespace and cleans up after it.

In the namespace the machine's files are replaced by those of the checkout, at the paths where an
administrator would have installed them: bus policy, polkit actions and rules. /run is empty but for
/run/dbus; nothing is activated by the bus, so what is absent stays absent.

Started by tests/lab/system.py with one line of JSON on stdin; says ``ready``; at the end of stdin (its
starter has closed it, or was killed) it kills every process that is in its namespace or has one of the
instance's worker uids, removes the instance's cgroups and directory, and exits.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tests.lab import namespace
from tests.lab.kernels import CHECKOUT

PATIENCE = 20.0


def dress(place: Path) -> None:
    """Lay the checkout's files over the machine's, in this mount namespace."""
    dbus = _copies(place / "stage/bus-policy", CHECKOUT.glob("dbus/*.conf"))
    actions = Path("/usr/share/polkit-1/actions")
    every = [*actions.glob("*.policy"), *CHECKOUT.glob("polkit/*.policy")]
    policy = _copies(place / "stage/actions", every)
    vendor = Path("/usr/share/polkit-1/rules.d")
    defaults = _copies(place / "stage/vendor-rules", vendor.glob("50-default.rules"))
    nothing = _copies(place / "stage/nothing", [])
    namespace.mount("tmpfs", "/run", kind="tmpfs", data="mode=0755")
    Path("/run/dbus").mkdir()
    for source, target in (
        (place / "bus", Path("/run/dbus")),
        (dbus, Path("/etc/dbus-1/system.d")),
        (nothing, Path("/usr/share/dbus-1/system-services")),
        (policy, actions),
        (defaults, vendor),
        (place / "rules", Path("/etc/polkit-1/rules.d")),
    ):
        namespace.bind(source, target)


def _copies(target: Path, files: Iterator[Path] | list[Path]) -> Path:
    target.mkdir(parents=True)
    for file in files:
        shutil.copy(file, target)
        (target / file.name).chmod(0o644)
    return target


def inhabitants(uids: range, stage: str) -> Iterator[int]:
    """Processes with a uid of ``uids`` or in the mount namespace ``stage`` ("": none); not this one."""
    for entry in os.listdir("/proc"):
        if not entry.isdigit() or int(entry) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            if os.stat(f"/proc/{entry}").st_uid in uids or os.readlink(f"/proc/{entry}/ns/mnt") == stage:
                yield int(entry)


def clear(uids: range, stage: str = "") -> None:
    """Kill the inhabitants until there are none."""
    deadline = time.monotonic() + PATIENCE
    while (left := list(inhabitants(uids, stage))) and time.monotonic() < deadline:
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def remove(place: Path, cgroup: Path | None) -> None:
    """Remove the instance's directory and cgroups."""
    if cgroup and cgroup.is_dir():
        for inner in [*sorted(cgroup.rglob("*"), reverse=True), cgroup]:
            if inner.is_dir():
                with contextlib.suppress(OSError):
                    inner.rmdir()
    shutil.rmtree(place, ignore_errors=True)


def main() -> int:
    """See the module's note."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    orders = json.loads(sys.stdin.readline())
    place, uids = Path(orders["place"]), range(*orders["uids"])
    cgroup = Path(orders["cgroup"]) if orders["cgroup"] else None
    clear(uids)  # of a predecessor that had these uids and was killed together with its stage
    before = os.readlink("/proc/self/ns/mnt")
    namespace.enter()
    stage = os.readlink("/proc/self/ns/mnt")
    assert stage != before, "this is not a namespace of our own"
    dress(place)
    print("ready", flush=True)
    sys.stdin.read()
    clear(uids, stage)
    remove(place, cgroup)
    return 0


if __name__ == "__main__":
    sys.exit(main())
