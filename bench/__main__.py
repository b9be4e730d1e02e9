# SPDX-License-Identifier: Apache-2.0
"""``python -m bench [NAME ...]``."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from bench import peers

NAMES = (
    "start",
    "memory",
    "merging",
    "list_machines",
    "port_exit",
    "prefault",
    "save",
    "migration",
    "migration_disk",
    "images",
    "encrypted",
    "nbd",
    "net",
    "disk",
    "devices",
    "hundred",
    "attach",
)


def main() -> int:
    """Run each in a process of its own, so that none inherits another's memory or namespaces."""
    chosen = sys.argv[1:] or list(NAMES)
    unknown = [name for name in chosen if name not in NAMES]
    if unknown:
        print(f"bench: no benchmark {unknown[0]!r}; there are {', '.join(NAMES)}", file=sys.stderr)
        return 2
    if os.geteuid() != 0:
        print("bench: needs root: it runs a broker and a libvirtd", file=sys.stderr)
        return 2
    peers.install()
    failed = 0
    for name in chosen:
        done = subprocess.run(
            [sys.executable, "-m", f"bench.{name}"], cwd=Path(__file__).parents[1], check=False
        )
        failed |= done.returncode
    return failed


if __name__ == "__main__":
    sys.exit(main())
