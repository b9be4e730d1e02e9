# SPDX-License-Identifier: Apache-2.0
"""The one line of JSON that a benchmark prints."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Sequence
from typing import Any


def emit(name: str, **figures: Any) -> None:
    """Print the line: name, host, load and figures."""
    host = {
        "kernel": platform.release(),
        "processors": os.cpu_count(),
        "load-1min": round(os.getloadavg()[0], 2),
    }
    print(json.dumps({"benchmark": name, "host": host, **figures}, ensure_ascii=False), flush=True)


def spread(samples: Sequence[float], *, digits: int = 4) -> dict[str, float | int]:
    """How samples are distributed: p50, p99 (the largest below 100 samples), least, how many."""
    ordered = sorted(samples)
    last = min(len(ordered) - 1, round(0.99 * len(ordered)))
    return {
        "p50": round(statistics.median(ordered), digits),
        "p99": round(ordered[last], digits),
        "least": round(ordered[0], digits),
        "samples": len(ordered),
    }
