# SPDX-License-Identifier: Apache-2.0
"""What the broker has to know of its host before it serves: asked once, at start, by a child that is nobody.

The parts of a worker's root: the interpreter, its standard library, the directories of its shared libraries,
site-packages, and of vmbus only ``wire``, ``worker`` and ``_native``, so that a worker cannot even read the
code of the broker. Whether the range of worker uids is nobody else's. The least uid of an ordinary user.
Whether SELinux knows the workers' label. The commands of the helpers that are installed.
"""

import os
import re
import sys
from pathlib import Path

import msgspec

import vmbus
from vmbus.broker.children import Channel
from vmbus.broker.dropped import fence, policy
from vmbus.broker.policy import Survey
from vmbus.broker.root import Image
from vmbus.wire.errors import VmbusError

_LOADER = "/lib64/ld-linux-x86-64.so.2"  # System V ABI, AMD64 supplement
_LABEL = "system_u:system_r:vmbus_{}_t:s0:c{},c{}"
_PARTS = ("__init__.py", "wire", "worker", "_native")
# A guest reaches nothing of the host's own: its loopback is no gateway's address. No port is forwarded,
# unless a Spawn names some. With passt-host the gateway is the host.
_PASST = ["/usr/bin/passt", "--foreground", "--quiet", "--stderr", "--fd", "3", "--mtu", "1500"]
_HELPERS = {"passt": [*_PASST, fence.NO_HOST], "passt-host": _PASST}
# Column of the first id, and of the number of ids (0: one).
_TABLES = {"passwd": (2, 0), "group": (2, 0), "subuid": (1, 2), "subgid": (1, 2)}


def report(text: bytes, channel: Channel) -> None:
    """Reports a ``Survey``. Raises InvalidArgument; InUse, NotSupported if the uid range is not ours."""
    granted = policy.load(text)
    workers = granted.workers
    check_range(range(workers.uid_first, workers.uid_first + workers.uid_count), Path("/etc"))
    found = Survey(
        image=image(),
        label=label(),
        uid_first=workers.uid_first,
        uid_count=workers.uid_count,
        uid_min=granted.owners.uid_min or uid_min(Path("/etc/login.defs")),
        overhead=policy.size(workers.overhead),
        fuse=granted.open.fuse,
        helpers={kind: command for kind, command in _HELPERS.items() if os.access(command[0], os.X_OK)},
    )
    channel.report(found)


def image() -> Image:
    """What this very interpreter needs, as a worker's root has it."""
    python = os.path.realpath(sys.executable)
    stdlib = os.path.realpath(os.path.dirname(os.__file__))
    site = os.path.dirname(os.path.dirname(os.path.realpath(msgspec.__file__)))
    package = os.path.dirname(os.path.realpath(vmbus.__file__))
    same = [python, stdlib, *_library_directories(outside=[stdlib, site, package])]
    if os.path.exists("/etc/ld.so.cache"):
        same.append("/etc/ld.so.cache")
    binds = [(path, path) for path in same] + [(site, "/site")]
    if os.path.isdir(f"{site}/vmbus"):  # a wheel installs all of vmbus there: an empty directory covers it
        binds.append(("", "/site/vmbus"))
    parts = [part for part in _PARTS if os.path.exists(f"{package}/{part}")]
    binds += [(f"{package}/{part}", f"/code/vmbus/{part}") for part in parts]
    links = [(_LOADER, os.path.realpath(_LOADER))]
    if os.path.islink("/lib"):
        links.append(("/lib", os.readlink("/lib")))
    path = ["/code", stdlib, f"{stdlib}/lib-dynload", "/site"]
    start = f"import sys; sys.path[:] = {path!r}; from vmbus.worker.main import main; sys.exit(main())"
    return Image(binds=binds, links=links, command=[python, "-I", "-S", "-X", "utf8", "-c", start])


def _library_directories(outside: list[str]) -> list[str]:
    """The directories of the shared libraries that this very interpreter has mapped."""
    found = {os.path.dirname(os.path.realpath(_LOADER))}
    for line in Path("/proc/self/maps").read_text(errors="surrogateescape").splitlines():
        name = f"/{line.partition('/')[2]}"
        if ".so" in name and not any(name.startswith(f"{other}/") for other in outside):
            found.add(os.path.dirname(name))
    return sorted(found)


def label() -> str:
    """The SELinux label of workers and helpers, with places; "" if SELinux is off or lacks it."""
    try:
        with open("/sys/fs/selinux/context", "w", encoding="ascii", buffering=1) as context:
            context.write(_LABEL.format("helper", 0, 512))  # EINVAL: the loaded policy does not know it
    except OSError:
        return ""
    return _LABEL


def uid_min(login_defs: Path) -> int:
    """UID_MIN of login.defs, 1000 without one."""
    try:
        match = re.search(r"^UID_MIN\s+([0-9]+)", login_defs.read_text(), re.MULTILINE)
    except OSError:
        match = None
    return int(match[1]) if match else 1000


def check_range(wanted: range, etc: Path) -> None:
    """Raises InUse if a user, a group or a subordinate range meets ``wanted``.

    NotSupported if this user namespace does not have all of it.
    """
    for name, (first, many) in _TABLES.items():
        path = etc / name
        for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
            try:
                fields = line.split(":")
                taken = range(int(fields[first]), int(fields[first]) + (int(fields[many]) if many else 1))
            except (IndexError, ValueError):
                continue
            if taken.start < wanted.stop and wanted.start < taken.stop:
                message = f"{path} has '{line}' within {wanted.start}+{len(wanted)}; name another range"
                raise VmbusError("InUse", message, argument="workers.uid_first")
    for kind in ("uid", "gid"):
        text = Path(f"/proc/self/{kind}_map").read_text()
        mapped = [[int(number) for number in line.split()] for line in text.splitlines()]
        if not any(start <= wanted.start and wanted.stop <= start + count for start, _, count in mapped):
            message = f"{wanted.start}+{len(wanted)} does not lie in this user namespace's {kind}_map"
            raise VmbusError("NotSupported", message, argument="workers.uid_first")
