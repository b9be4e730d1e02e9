# SPDX-License-Identifier: Apache-2.0
"""Debian's stock kernels, unpacked beside the checkout and never installed.

Two series are of use: ``6.12`` (bookworm-backports: the nested host and its guests) and ``6.1``
(bookworm: the oldest kernel that vmbus supports, for guests). A version of the metapackage linux-image-amd64
names the package; it is downloaded with ``apt-get download``, unpacked with ``dpkg -x`` and given a
modules.dep, which the package does not carry. A link per series under ``CACHE/kernels`` says that this was
done, so that later runs ask apt nothing.

The cache is ``.cache`` in the checkout, or the directory that VMBUS_CACHE names.

    python -m tests.lab.kernels            # fetch all, print where they are
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

CHECKOUT: Final = Path(__file__).resolve().parents[2]
CACHE: Final = Path(os.environ.get("VMBUS_CACHE") or CHECKOUT / ".cache").absolute()

SERIES: Final = ("6.12", "6.1")


class KernelUnavailable(Exception):
    """The kernel package could not be had; the message says what apt said."""


@dataclass(frozen=True)
class Kernel:
    """An unpacked kernel package."""

    release: str  # as uname -r says
    image: Path  # vmlinuz (a bzImage)
    modules: Path  # the directory that belongs at /lib/modules/RELEASE


def stock(series: str = "6.12") -> Kernel:
    """The stock kernel of ``series``, fetched when the cache has none.

    Raises KernelUnavailable when it has to be fetched and cannot.
    """
    link = CACHE / "kernels" / series
    if not link.exists():
        _fetch(series, link)
    return _describe(link.resolve())


def _describe(tree: Path) -> Kernel:
    [image] = tree.glob("boot/vmlinuz-*")
    release = image.name.removeprefix("vmlinuz-")
    return Kernel(release, image, tree / "lib/modules" / release)


def _fetch(series: str, link: Path) -> None:
    package = _package(series)
    link.parent.mkdir(parents=True, exist_ok=True)
    target = link.parent / package
    with tempfile.TemporaryDirectory(dir=link.parent) as place:
        _command(["apt-get", "-o", "APT::Sandbox::User=root", "download", package], cwd=place)
        [archive] = Path(place).glob("*.deb")
        tree = Path(place) / "tree"
        _command(["dpkg", "-x", str(archive), str(tree)])
        _command(["/sbin/depmod", "-b", str(tree), _describe(tree).release])
        tree.chmod(0o755)
        if target.exists():
            shutil.rmtree(target)
        tree.rename(target)
    fresh = link.with_name(f".{series}.{os.getpid()}")
    fresh.symlink_to(package)
    fresh.rename(link)


def _package(series: str) -> str:
    """The newest package of ``series`` that a version of the metapackage depends on."""
    shown = _command(["apt-cache", "show", "--all-versions", "linux-image-amd64"])
    found = re.search(rf"^Depends: (linux-image-{re.escape(series)}\.\S+)", shown, re.MULTILINE)
    if not found:
        raise KernelUnavailable(
            f"apt knows no linux-image-amd64 of series {series}: make setup adds its source"
        )
    return found.group(1)


def _command(argv: list[str], *, cwd: str | None = None) -> str:
    done = subprocess.run(argv, cwd=cwd, capture_output=True, text=True, check=False, timeout=600)
    if done.returncode:
        raise KernelUnavailable(f"{' '.join(argv)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def main() -> int:
    """Fetch every series and say where it is."""
    for series in SERIES:
        kernel = stock(series)
        print(f"{series}\t{kernel.release}\t{kernel.image}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
