# SPDX-License-Identifier: Apache-2.0
"""How large an image's file will be: the arithmetic of ``measure``, which must give what QEMU's gives
(qcow2_measure in block/qcow2.c), so that a volume sized by the one holds what the other writes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from vmbus.image import Encryption


def _up(number: int, unit: int) -> int:
    return -(-number // unit) * unit


def fully_allocated(size: int, *, cluster_size: int, refcount_bits: int, extended_l2: bool = False) -> int:
    """Bytes of a qcow2 file with every cluster of a disk of ``size`` bytes allocated (no snapshots)."""
    size = _up(size, cluster_size)
    l2_entry = 16 if extended_l2 else 8
    l2_entries = _up(size // cluster_size, cluster_size // l2_entry)
    l1_entries = _up(l2_entries * l2_entry // cluster_size, cluster_size // 8)
    metadata = cluster_size + l2_entries * l2_entry + l1_entries * 8
    clusters = (metadata + size) // cluster_size
    per_block = cluster_size * 8 // refcount_bits
    blocks = table = 0
    while True:
        before = blocks, table
        blocks = -(-(clusters + blocks + table) // per_block)
        table = -(-blocks // (cluster_size // 8))
        if (blocks, table) == before:
            return metadata + size + (blocks + table) * cluster_size


def required(
    size: int,
    ranges: Iterable[dict[str, Any]] | None,
    *,
    cluster_size: int,
    refcount_bits: int,
    extended_l2: bool = False,
) -> int:
    """The same with only those clusters that hold something.

    ``ranges`` are those of ``Image.map``, None for an empty disk.
    """
    data = 0
    end = 0
    for one in ranges or ():
        if not one["data"] or one["zero"]:
            continue
        first = max(one["start"] // cluster_size * cluster_size, end)
        last = _up(one["start"] + one["length"], cluster_size)
        if last > first:
            data += last - first
            end = last
    whole = fully_allocated(
        size, cluster_size=cluster_size, refcount_bits=refcount_bits, extended_l2=extended_l2
    )
    return whole - _up(size, cluster_size) + data


def luks_header(encrypt: Encryption, cluster_size: int) -> int:
    """Bytes of an encrypted image's LUKS header with its key material, in whole clusters."""
    bits = int((encrypt.cipher or "aes-256").rpartition("-")[2])
    key = bits // 8 * (2 if (encrypt.mode or "xts") == "xts" else 1)
    header = 4096 + 8 * -(-key * 4000 // 4096) * 4096
    return -(-header // cluster_size) * cluster_size
