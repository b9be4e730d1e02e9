# SPDX-License-Identifier: Apache-2.0
"""Debian's SELinux policy with vmbus's module in it, made beside the checkout and never installed.

The package selinux-policy-default is downloaded and unpacked, and its modules, ours and a small one for the
nested host are linked into a store of their own (20 s, once for each state of selinux/). What comes out is
an archive of /etc/selinux.

    python -m tests.lab.selinux            # make it, print where it is
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

from tests.lab.kernels import CACHE, CHECKOUT

PACKAGE: Final = "selinux-policy-default"
DEVEL: Final = Path("/usr/share/selinux/devel/Makefile")
CONFIG: Final = "SELINUX=permissive\nSELINUXTYPE=default\n"

# The nested host's agent and what it starts are kernel_t, which nothing is to stop: it plays the
# administrator. Its shares have no labels. A shell as init_t starts daemons as systemd would. A worker that
# the agent starts, to see what is denied to it, could not even use its own program's descriptor otherwise.
BED: Final = """\
(typepermissive kernel_t)
(allow unlabeled_t unlabeled_t (filesystem (associate)))
(allow init_t shell_exec_t (file (entrypoint)))
(allow vmbus_worker_t kernel_t (fd (use)))
"""


class PolicyUnavailable(Exception):
    """The policy could not be made; the message says what failed."""


def policy() -> Path:
    """A tar archive of etc/selinux, with the policy compiled. Raises PolicyUnavailable."""
    place = CACHE / "selinux"
    place.mkdir(parents=True, exist_ok=True)
    sources = sorted((CHECKOUT / "selinux").glob("vmbus.*"))
    parts = [Path(__file__).read_bytes(), *(source.read_bytes() for source in sources)]
    made = place / f"{hashlib.sha256(bytes(1).join(parts)).hexdigest()[:32]}.tar"
    if not made.exists():
        with tempfile.TemporaryDirectory(dir=place) as scratch:
            _make(Path(scratch), sources, package(place), made)
    return made


def package(place: Path) -> Path:
    """The unpacked package, fetched when the cache has none."""
    tree = place / PACKAGE
    if not tree.exists():
        with tempfile.TemporaryDirectory(dir=place) as scratch:
            _command(["apt-get", "-o", "APT::Sandbox::User=root", "download", PACKAGE], cwd=scratch)
            [archive] = Path(scratch).glob("*.deb")
            _command(["dpkg", "-x", str(archive), f"{scratch}/tree"])
            os.rename(f"{scratch}/tree", tree)
    return tree


def _make(scratch: Path, sources: list[Path], tree: Path, made: Path) -> None:
    build, root = scratch / "build", scratch / "root"
    build.mkdir()
    for source in sources:
        shutil.copy(source, build)
    _command(["make", "-f", str(DEVEL), "vmbus.pp"], cwd=str(build))
    if not (build / "vmbus.pp").exists():
        raise PolicyUnavailable("vmbus.pp was not made")
    (build / "bed.cil").write_text(BED)
    shutil.copytree(tree / "etc", root / "etc")
    (root / "etc/selinux/config").write_text(CONFIG)
    (root / "var/lib/selinux/default").mkdir(parents=True)
    modules = tree / "usr/share/selinux/default"
    words = ["semodule", "-p", str(root), "-s", "default", "-n", "-X", "100"]
    for name in (modules / ".modules").read_text().split():
        words += ["-i", str(modules / f"{name}.pp.bz2")]
    _command([*words, "-i", str(build / "vmbus.pp"), "-i", str(build / "bed.cil")])
    _command(["tar", "-C", str(root), "-cf", str(scratch / "made.tar"), "etc/selinux"])
    (scratch / "made.tar").rename(made)


def _command(argv: list[str], *, cwd: str | None = None) -> None:
    done = subprocess.run(argv, cwd=cwd, capture_output=True, text=True, check=False, timeout=900)
    if done.returncode:
        raise PolicyUnavailable(f"{argv[0]}: {done.stderr.strip()[-3000:] or done.stdout.strip()[-3000:]}")


if __name__ == "__main__":
    print(policy())
    sys.exit(0)
