# SPDX-License-Identifier: Apache-2.0
"""The QEMU that the nested host is for guests that write CR8: built from Debian's source, one fault mended.

A guest of the nested host that writes CR8 while an interrupt waits for it (V_IRQ) ends QEMU by an assertion
of its own, ``tcg_handle_interrupt: assertion failed: (bql_locked())``: since 6.2, the emulation of that
instruction under nested SVM raises or withdraws the interrupt without the lock that this takes. OVMF writes
CR8 at the end of each of its interrupt handlers, so it never gets far. No released QEMU has that mended
(looked at: 6.2 to 11.1.3). What is done here:

1. Debian's source package, by name, from the archive that this machine's own packages come from: that of
   the release, which keeps its sources;
2. ``mend``: the lock is taken around the one statement. It is found by what it does, and has to be there
   exactly once, else nothing is built;
3. configured with what the nested host's command line needs and nothing else, and built (4 minutes on two
   cores); the program is kept in the cache, named by QEMU's version and by this file, and nothing else is.

Other nested hosts have the emulator of emulator.py, which is newer. ROMs are those of the installed QEMU.

    python -m tests.lab.mended             # build it, print how it is called
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import re
import shlex
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Final

from setup import ready
from tests.lab.emulator import PROGRAM, RELEASE, EmulatorUnavailable, archive, major, run
from tests.lab.kernels import CACHE

KEYRING: Final = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
ROMS: Final = ("/usr/share/qemu", "/usr/share/seabios")
FAULTY: Final = "target/i386/tcg/system/misc_helper.c"
DEADLINE: Final = 3600

STATEMENT: Final = re.compile(
    r"^( +)if \(ctl_has_irq\(env\)\) \{\n(?:\1 +.*\n|\1\} else \{\n)*\1\}\n", re.MULTILINE
)
LOCK: Final = "bql_lock();"
UNLOCK: Final = "bql_unlock();"

DEVICES: Final = ("Q35", "VIRTIO_PCI", "VIRTIO_9P", "VIRTIO_BLK", "VIRTIO_RNG", "VIRTIO_SERIAL")
OPTIONS: Final = (
    *("--target-list=x86_64-softmmu", "--without-default-features", "--without-default-devices"),
    *("--with-devices-x86_64=vmbus", "--enable-system", "--enable-tcg", "--enable-attr", "--enable-virtfs"),
    *("--enable-coroutine-pool", "--disable-fdt", "--disable-install-blobs", "--disable-debug-info"),
    *("--disable-download", "--python=/usr/bin/python3"),
)


@functools.cache
def command() -> list[str]:
    """The words that start it, to be followed by its arguments; built when the cache has none.

    Raises EmulatorUnavailable.
    """
    made_from = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]
    directory = CACHE / "emulator"
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "mended.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = sorted(directory.glob(f"mended-*-{made_from}"))
        if not found:
            with tempfile.TemporaryDirectory(dir=directory) as place:
                version = _build(Path(place))
                found = [directory / f"mended-{version}-{made_from}"]
                (Path(place) / "made").rename(found[0])
    return _words(found[0])


def mend(source: str) -> str:
    """The text of ``FAULTY`` with the lock taken around the statement. Raises EmulatorUnavailable."""
    places = list(STATEMENT.finditer(source))
    if len(places) != 1:
        raise EmulatorUnavailable(
            f"{FAULTY}: the statement to be mended is there {len(places)} times, not once"
        )
    found, indent = places[0], places[0][1]
    before = source[: found.start()].rstrip()
    if before.endswith(LOCK):
        raise EmulatorUnavailable(f"{FAULTY}: this QEMU takes the lock by itself and needs no mending")
    return f"{source[: found.start()]}{indent}{LOCK}\n{found[0]}{indent}{UNLOCK}\n{source[found.end() :]}"


def _words(made: Path) -> list[str]:
    return [str(made / PROGRAM), *(word for place in ROMS for word in ("-L", place))]


def _build(place: Path) -> str:
    """Leaves the program in ``place``/made; the version of the source package."""
    try:
        ready.packages("emulator")
    except ready.SetupFailed as error:
        raise EmulatorUnavailable(str(error)) from error
    description = _source(place)
    source = place / "source"
    run("dpkg-source", "-x", str(description), str(source), place=place)
    faulty = source / FAULTY
    if not faulty.is_file():
        raise EmulatorUnavailable(f"{description.name} has no {FAULTY}")
    faulty.write_text(mend(faulty.read_text()))
    devices = "".join(f"CONFIG_{name}=y\n" for name in DEVICES)
    (source / "configs/devices/x86_64-softmmu/vmbus.mak").write_text(devices)
    build = source / "build"
    build.mkdir()
    run("../configure", *OPTIONS, place=build, deadline=DEADLINE)
    run("ninja", f"-j{os.cpu_count()}", PROGRAM, place=build, deadline=DEADLINE)
    (place / "made").mkdir()
    shutil.copy(build / PROGRAM, place / "made" / PROGRAM)
    if not major(_words(place / "made")):
        raise EmulatorUnavailable("what was built does not start")
    return description.stem.removeprefix("qemu_")


def _source(place: Path) -> Path:
    """Fetch the source package; its description (.dsc). This machine's own package lists are not touched."""
    sources = place / "sources.list"
    sources.write_text(f"deb-src [signed-by={KEYRING}] {archive()} {RELEASE} main\n")
    for name in ("lists/partial", "cache/archives/partial"):
        (place / name).mkdir(parents=True)
    settings = {
        "Dir::Etc::SourceList": sources,
        "Dir::Etc::SourceParts": "/dev/null",
        "Dir::State::Lists": place / "lists",
        "Dir::Cache": place / "cache",
        "APT::Sandbox::User": "root",
    }
    options = [word for name, value in settings.items() for word in ("-o", f"{name}={value}")]
    run("apt-get", *options, "update", "-q")
    run("apt-get", *options, "source", "-q", "--download-only", "qemu", place=place)
    found = list(place.glob("qemu_*.dsc"))
    if len(found) != 1:
        raise EmulatorUnavailable(f"apt-get source left {len(found)} descriptions")
    return found[0]


def main() -> int:
    """Build it and say how it is called."""
    try:
        words = command()
    except EmulatorUnavailable as error:
        print(error, file=sys.stderr)
        return 1
    print(shlex.join(words), f"# QEMU {major(words)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
