# SPDX-License-Identifier: Apache-2.0
"""Small busybox initramfs archives: for the nested host itself and for stock guests of vmbus.

An archive is written here byte by byte (cpio "newc", Documentation/driver-api/early-userspace/
buffer-format.rst of the kernel), uncompressed: unpacking xz or gzip in a guest costs more than reading it. It
is two archives, one after the other, as the kernel allows: a base (busybox with all its applets, modules
decompressed and listed in the order in which insmod has to take them) and what is special. A base is made
once per kernel and set of modules, so that the nested host finds it made. Files lie under ``CACHE/initrd``,
named by a hash of what they are made from, mode 0644.

    from tests.lab import initramfs, kernels
    initrd = initramfs.guest("mount -t ext4 /dev/vda /mnt; echo hello >/mnt/file; sync; umount /mnt;
    poweroff -f")
"""

from __future__ import annotations

import hashlib
import lzma
import os
import stat
import subprocess
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Final

from tests.lab import kernels
from tests.lab.kernels import CACHE, Kernel

BUSYBOX: Final = Path("/bin/busybox")

GUEST_MODULES: Final = (
    *(
        "virtio_pci",
        "virtio_blk",
        "virtio_rng",
        "virtio_net",
        "crc32c_generic",
        "ext4",
        "button",
        "evdev",
        "virtio_balloon",
    ),
)

LOAD: Final = """\
#!/bin/sh
export PATH=/bin
mkdir -p /proc /sys /dev /mnt /tmp /run
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
while read module; do insmod /modules/$module || echo "insmod $module failed"; done </modules/order
"""

TRAILER: Final = b"TRAILER!!!"


def guest(
    script: str,
    *,
    kernel: Kernel | None = None,
    modules: Iterable[str] = GUEST_MODULES,
    files: Mapping[str, bytes] | None = None,
    preamble: bool = True,
) -> Path:
    """An initrd for a stock guest whose /init runs ``script`` in busybox's sh.

    Before it, unless ``preamble=False``, /proc, /sys and /dev are mounted, /mnt, /tmp and /run made and
    ``modules`` (with what they depend on) of ``kernel`` (default: the stock 6.12) loaded. The script has to
    end the guest (``poweroff -f`` needs ACPI, ``reboot -f`` a reset): when init returns, the kernel panics.
    ``files`` are put in as they are, mode 0755, keyed by path without the leading "/".
    """
    body = (LOAD if preamble else "#!/bin/sh\n") + script.rstrip() + "\n"
    return build({**(files or {}), "init": body.encode()}, kernel or kernels.stock(), modules)


def build(files: Mapping[str, bytes], kernel: Kernel, modules: Iterable[str]) -> Path:
    """An archive of busybox, all its applets, ``files`` (mode 0755), ``modules`` and modules/order."""
    lower = base(kernel, modules)
    special = _cpio(files, {})
    return _cached(lower.name.encode() + special, lambda: lower.read_bytes() + special)


def base(kernel: Kernel, modules: Iterable[str] = GUEST_MODULES) -> Path:
    """The part of an archive that takes long to make."""
    names = sorted(set(modules))
    state = BUSYBOX.stat()
    key = f"base 1 {kernel.release} {names} {state.st_size} {state.st_mtime_ns}"
    return _cached(key.encode(), lambda: _base(kernel, names))


def _base(kernel: Kernel, modules: Iterable[str]) -> bytes:
    contents = {"bin/busybox": BUSYBOX.read_bytes()}
    order: list[str] = []
    for path in with_dependencies(kernel, modules):
        name = path.name.split(".ko", maxsplit=1)[0] + ".ko"
        contents[f"modules/{name}"] = _module(path)
        order.append(name)
    contents["modules/order"] = "".join(f"{name}\n" for name in order).encode()
    return _cpio(contents, {f"bin/{name}": b"busybox" for name in _applets()})


def _cached(key: bytes, make: Callable[[], bytes]) -> Path:
    target = CACHE / "initrd" / f"{hashlib.sha256(key).hexdigest()[:32]}.cpio"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh = target.with_suffix(f".{os.getpid()}")
        fresh.write_bytes(make())
        fresh.chmod(0o644)
        fresh.rename(target)
    return target


def with_dependencies(kernel: Kernel, names: Iterable[str]) -> list[Path]:
    """The files of modules ``names`` in loading order; what is built into the kernel is left out.

    Raises KeyError for a module that the kernel does not have.
    """
    needs: dict[str, tuple[str, list[str]]] = {}
    for line in (kernel.modules / "modules.dep").read_text().splitlines():
        path, _, after = line.partition(":")
        needs[_name(path)] = (path, after.split())
    builtin = {_name(line) for line in (kernel.modules / "modules.builtin").read_text().splitlines()}
    found: dict[str, Path] = {}

    def add(name: str) -> None:
        if name in found or name in builtin:
            return
        path, dependencies = needs[name]
        for dependency in reversed(dependencies):
            add(_name(dependency))
        found[name] = kernel.modules / path

    for name in names:
        add(name.replace("-", "_"))
    return list(found.values())


def _name(path: str) -> str:
    return path.rsplit("/", 1)[-1].split(".ko", maxsplit=1)[0].replace("-", "_")


def _module(path: Path) -> bytes:
    data = path.read_bytes()
    return lzma.decompress(data) if path.suffix == ".xz" else data


def _applets() -> list[str]:
    listed = subprocess.run(
        [BUSYBOX, "--list"], capture_output=True, text=True, check=True, timeout=20
    ).stdout
    return [name for name in listed.split() if name != "busybox"]


def _cpio(files: Mapping[str, bytes], links: Mapping[str, bytes]) -> bytes:
    out = bytearray()
    directories = sorted(
        {str(parent) for path in (*files, *links) for parent in Path(path).parents if str(parent) != "."}
    )
    entries: list[tuple[bytes, int, bytes]] = [(d.encode(), stat.S_IFDIR | 0o755, b"") for d in directories]
    entries += [(path.encode(), stat.S_IFREG | 0o755, data) for path, data in sorted(files.items())]
    entries += [(path.encode(), stat.S_IFLNK | 0o777, to) for path, to in sorted(links.items())]
    entries.append((TRAILER, 0, b""))
    for inode, (name, mode, data) in enumerate(entries, 1):
        fields = (inode, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0)
        out += b"070701" + b"".join(b"%08x" % field for field in fields) + name + b"\0"
        out += b"\0" * (-len(out) % 4) + data
        out += b"\0" * (-len(out) % 4)
    return bytes(out)
