# SPDX-License-Identifier: Apache-2.0
"""The rules of nftables that belong to an instance: tables that are named for it."""

from __future__ import annotations

import shutil
import subprocess


def of(instance: str) -> list[str]:
    """Family and name of each."""
    if shutil.which("nft") is None:
        return []
    done = subprocess.run(["nft", "list", "tables"], check=False, capture_output=True, text=True)
    words = [line.split() for line in done.stdout.splitlines()]
    begins = f"vmbus.{instance.replace('-', '/')}."
    return sorted(f"{family} {name}" for _, family, name in words if name.startswith(begins))


def delete(instance: str) -> None:
    """What a broker that was ended before its machines could not take away."""
    for table in of(instance):
        subprocess.run(["nft", f"delete table {table}"], check=True)
