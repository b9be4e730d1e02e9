# SPDX-License-Identifier: Apache-2.0
"""/etc/vmbus/vmbusd.toml: what the administrator wants of the host's memory; without it nothing is changed.

broker.toml says what vmbus may do; this file says what it shall do by itself within that. An unknown key is
refused, and vmbusd does not start.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from vmbus.wire.definition import PAGE_SIZES
from vmbus.wire.errors import VmbusError


class _Strict(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True, rename="kebab"):
    pass


class Persistent(_Strict, frozen=True, kw_only=True):
    """``[[hugepages.persistent]]``: a pool that has at least so many pages while vmbusd runs."""

    page_size: Literal["2M", "1G"] = "2M"
    node: Annotated[int, Meta(ge=0, le=9999)] = 0
    pages: Annotated[int, Meta(ge=0, le=1 << 24)]

    @property
    def bytes_of_a_page(self) -> int:
        """2 MiB or 1 GiB."""
        return PAGE_SIZES[self.page_size]


class HugePages(_Strict, frozen=True, kw_only=True):
    """``[hugepages]``."""

    persistent: list[Persistent] = []


class Pressure(_Strict, frozen=True, kw_only=True):
    """``[pressure]``: share memory out among machines while the host is short of it (service/pressure.py)."""

    on: bool = False
    source: Annotated[str, Meta(pattern="^/")] = "/proc/pressure/memory"  # or memory.pressure of a cgroup
    low: Annotated[float, Meta(ge=0, le=100)] = 1.0  # per cent: up to this, memory is given back
    high: Annotated[float, Meta(gt=0, le=100)] = 10.0  # from this on, memory is taken
    step: Annotated[float, Meta(gt=0, le=0.5)] = 0.05  # of the machines' memory, in one round
    interval: Annotated[float, Meta(ge=0.1, le=3600)] = 5.0  # seconds between two rounds

    def __post_init__(self) -> None:
        if self.low >= self.high:
            raise ValueError(f"[pressure] low, {self.low}, is not below high, {self.high}")


class Domain(_Strict, frozen=True, kw_only=True):
    """``[[ksm.domain]]``: owners whose machines may merge with each other."""

    name: Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$")]
    users: list[str]


class TunerConfig(_Strict, frozen=True, kw_only=True):
    """``[ksm.tuner]``: whether vmbusd decides when and how fast pages are looked at."""

    on: bool = False
    most_cpu: Annotated[int, Meta(ge=1, le=100)] = 20  # per cent of one CPU, for ksmd
    advisor: bool = True  # use the kernel's own where there is one
    scan_time: Annotated[int, Meta(ge=1, le=86400)] = 60  # seconds: what the advisor aims at for a full scan
    fast_pages: Annotated[int, Meta(ge=1, le=1_000_000)] = 8000  # a time, while saving grows
    slow_pages: Annotated[int, Meta(ge=1, le=1_000_000)] = 100  # when nothing more merges


class KsmConfig(_Strict, frozen=True, kw_only=True):
    """``[ksm]``: settings that are in force while vmbusd runs, the merge domains, the tuner."""

    settings: dict[str, int | str] = {}
    domain: list[Domain] = []
    tuner: TunerConfig = TunerConfig()


class SnapshotsConfig(_Strict, frozen=True, kw_only=True):
    """``[snapshots]``: of machines, and templates."""

    most: Annotated[int, Meta(ge=0, le=1 << 24)] = 16384  # MiB that one owner's may take, without disks


class Config(_Strict, frozen=True, kw_only=True):
    """The whole file."""

    hugepages: HugePages = HugePages()
    pressure: Pressure = Pressure()
    ksm: KsmConfig = KsmConfig()
    snapshots: SnapshotsConfig = SnapshotsConfig()


def load(path: Path) -> Config:
    """Read the file; no file is an empty one. Raises InvalidArgument that names the place and the mistake."""
    try:
        return msgspec.convert(tomllib.loads(path.read_text()), Config)
    except FileNotFoundError:
        return Config()
    except (msgspec.ValidationError, ValueError) as error:  # ValueError: not TOML, not UTF-8
        raise VmbusError("InvalidArgument", f"{path}: {error}") from None
