# SPDX-License-Identifier: Apache-2.0
"""Devices alone, driven in process: what one I/O thread serves a second (native/vmm, virtio/speed.rs).

The driver does nothing but offer again what came back, on a processor of its own, 32 chains at a time: reads
of 4 KiB of a file in memory through io_uring, frames of 1,000 bytes to a tap that goes nowhere. Beside each
the limit: the same read, the same write, by one thread that does nothing else.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys

from bench import report
from bench.system import ROOT

ROUNDS = 3


def measure(what: str) -> dict[str, float]:
    """A second's worth of the device, and of the limit."""
    words = [
        "cargo",
        "test",
        "--quiet",
        "--release",
        "--package",
        "vmbus-vmm",
        "--lib",
        f"virtio::speed::{what}",
    ]
    words += ["--", "--ignored", "--nocapture", "--exact"]
    done = subprocess.run(words, cwd=ROOT / "native", capture_output=True, text=True, check=False)
    found = re.search(r"MEASURED (\{.*\})", done.stdout)
    if done.returncode or found is None:
        raise RuntimeError(f"{' '.join(words)}\n{done.stdout}{done.stderr}")
    figures: dict[str, float] = json.loads(found[1])
    return figures


def main() -> None:
    """Run and report. Argument: rounds."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS
    found: dict[str, object] = {}
    for what in ("disk", "network"):
        samples = [measure(what) for _ in range(rounds)]
        device = max(sample["device"] for sample in samples)
        limit = max(sample["limit"] for sample in samples)
        found[f"{what}-a-second"] = round(device)
        found[f"{what}-limit-a-second"] = round(limit)
        found[f"{what}-to-limit"] = round(device / limit, 3)
    report.emit("devices", rounds=rounds, **found)


if __name__ == "__main__":
    main()
