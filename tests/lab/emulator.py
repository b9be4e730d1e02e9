# SPDX-License-Identifier: Apache-2.0
"""The QEMU that the nested host is: newer than Debian 12's, unpacked beside the checkout and never installed.

QEMU 10.0.2 (bookworm-backports) emulates nested SVM with a fault that comes every few minutes: an L2 goes
on with the page tables of L1, or L1 with those of L2, which ends in a guest that does one page fault for
ever, or in a triple fault of L1. So the package comes from the backports of Debian 13, with the libraries
that it was linked with; mmdebstrap puts all of them into a directory (6 s, 150 MB), and the dynamic linker
there starts it. Where that cannot be had, the installed QEMU is taken.

    python -m tests.lab.emulator           # unpack it, print how it is called
"""

from __future__ import annotations

import fcntl
import functools
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

from tests.lab.kernels import CACHE

RELEASE: Final = "trixie"
SUITE: Final = f"{RELEASE}-backports"
PACKAGE: Final = "qemu-system-x86"
PROGRAM: Final = "qemu-system-x86_64"
LEAST: Final = 10
"""The major version from which on a nested host works at all."""
UNNEEDED: Final = ("usr/share/doc", "usr/share/locale", "usr/share/man", "var/lib/apt", "var/cache")


class EmulatorUnavailable(Exception):
    """The package could not be had; the message says what apt or mmdebstrap said."""


@functools.cache
def command() -> list[str]:
    """The words that start the newest QEMU there is, to be followed by its arguments; [] if there is none."""
    try:
        return _inside(_tree())
    except EmulatorUnavailable as error:
        print(f"{error}\nthe nested host runs in the QEMU that is installed", file=sys.stderr)
    installed = shutil.which(PROGRAM)
    return [installed] if installed else []


def major(words: list[str]) -> int:
    """The major version of the QEMU that ``words`` start; 0 if they start none."""
    shown = subprocess.run(
        [*words, "--version"], capture_output=True, text=True, check=False, timeout=60
    ).stdout.split()
    number = shown[3].split(".")[0] if len(shown) > 3 else ""
    return int(number) if number.isdigit() else 0


def _inside(tree: Path) -> list[str]:
    shares = [word for name in ("qemu", "seabios") for word in ("-L", str(tree / "usr/share" / name))]
    libraries = tree / "usr/lib/x86_64-linux-gnu"
    linker = tree / "usr/lib64/ld-linux-x86-64.so.2"
    return [str(linker), "--library-path", str(libraries), str(tree / "usr/bin" / PROGRAM), *shares]


def _tree() -> Path:
    """The directory, made when the cache has none."""
    directory = CACHE / "emulator"
    target = directory / SUITE
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            with tempfile.TemporaryDirectory(dir=directory) as place:
                _unpack(Path(place) / "tree").rename(target)
    return target


def _unpack(tree: Path) -> Path:
    mirror = archive()
    run(
        *("mmdebstrap", "--quiet", "--mode=root", "--variant=extract", "--architectures=amd64"),
        *("--aptopt=APT::Install-Recommends false", f"--aptopt=APT::Default-Release {SUITE}"),
        *(f"--include={PACKAGE}", RELEASE, str(tree)),
        *(f"deb {mirror} {suite} main" for suite in (RELEASE, SUITE)),
    )
    for name in UNNEEDED:
        shutil.rmtree(tree / name, ignore_errors=True)
    if not major(_inside(tree)):
        raise EmulatorUnavailable(f"{PACKAGE} of {SUITE} does not start here")
    tree.chmod(0o755)
    return tree


def archive() -> str:
    """Where this machine gets its own Debian packages from; every release is there. Raises
    EmulatorUnavailable."""
    shown = run(
        *("apt-get", "indextargets", "--format", "$(REPO_URI) $(LABEL)"),
        *("Created-By: Packages", "Origin: Debian", "Component: main"),
    )
    found = [line.split()[0] for line in shown.splitlines() if line.split()[1:] == ["Debian"]]
    if not found:
        raise EmulatorUnavailable("apt has no source of Debian's packages")
    return found[0]


def run(*words: str, place: Path | None = None, deadline: float = 600) -> str:
    """What a command says; ``place`` is its directory. Raises EmulatorUnavailable unless its code is 0."""
    try:
        done = subprocess.run(words, cwd=place, capture_output=True, text=True, check=False, timeout=deadline)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EmulatorUnavailable(str(error)) from error
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip())[-2000:]
        raise EmulatorUnavailable(f"{shlex.join(words[:1])}: {said}")
    return done.stdout


def main() -> int:
    """Unpack it and say how it is called."""
    words = command()
    print(shlex.join(words), f"# QEMU {major(words)}" if words else "none")
    return 0 if words else 1


if __name__ == "__main__":
    sys.exit(main())
