# SPDX-License-Identifier: Apache-2.0
"""Making an image."""

from __future__ import annotations

import contextlib
import os
import stat
from typing import Literal

from vmbus.image.core import file, perform, secret_pipe
from vmbus.image.kinds import Format, Preallocation
from vmbus.image.layers import beside
from vmbus.image.secret import Encryption
from vmbus.wire.errors import VmbusError


def create(
    path: str,
    format: Format = "qcow2",
    *,
    size: int,
    cluster_size: int = 65536,
    version: int = 3,
    refcount_bits: int = 16,
    lazy_refcounts: bool = False,
    extended_l2: bool = False,
    compression: Literal["zlib", "zstd"] = "zlib",
    backing_name: str | None = None,
    backing_format: Format | None = None,
    data_file: str | None = None,
    data_raw: bool = False,
    preallocation: Preallocation = "off",
    encrypt: Encryption | None = None,
) -> None:
    """Make an image of ``size`` bytes at ``path``; what was there is gone.

    ``backing_name`` goes into the header as it is, and the backing file is not looked at. ``data_file``
    names an external data file, which is made too. Raises VmbusError InvalidArgument for options that
    contradict each other.
    """
    request = {
        "op": "create",
        "size": size,
        "cluster_size": cluster_size,
        "version": version,
        "refcount_bits": refcount_bits,
        "lazy_refcounts": lazy_refcounts,
        "extended_l2": extended_l2,
        "zstd": compression == "zstd",
        "backing_name": backing_name,
        "backing_format": backing_format,
        "data_name": data_file,
        "data_raw": data_raw,
        "preallocation": preallocation,
    }
    with contextlib.ExitStack() as stack:
        if format == "raw":
            if encrypt is not None:
                raise VmbusError("InvalidArgument", "a raw image is not encrypted")
            _create_raw(path, size, preallocation)
            return
        request["fd"] = file(stack, path, os.O_RDWR | os.O_CREAT)
        if data_file is not None:
            data_path = beside(path, data_file)
            request["data_fd"] = file(stack, data_path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        if encrypt is not None:
            described = {name: value for name, value in encrypt._asdict().items() if name != "secret"}
            request["encrypt"] = described | {"secret_fd": secret_pipe(stack, encrypt.secret)}
        perform(request)


def _create_raw(path: str, size: int, preallocation: str) -> None:
    with contextlib.ExitStack() as stack:
        fd = file(stack, path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        size = -(-size // 512) * 512  # whole sectors, as QEMU makes them
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            _claim_device(fd, size, preallocation)
            return
        os.ftruncate(fd, size)
        if preallocation in {"falloc", "full"} and size:
            os.posix_fallocate(fd, 0, size)
        if preallocation == "full":
            zeros = bytes(1 << 20)
            for start in range(0, size, len(zeros)):
                os.pwrite(fd, zeros[: size - start], start)


def _claim_device(fd: int, size: int, preallocation: str) -> None:
    """A disk has its size; the raw image on it is its beginning. What it held must not look like a format."""
    if preallocation not in {"off", "metadata"}:
        message = f"Preallocation mode '{preallocation}' unsupported for this non-regular file"
        raise VmbusError("NotSupported", message)
    if size > os.lseek(fd, 0, os.SEEK_END):
        raise VmbusError("InvalidArgument", "Cannot grow device files")
    os.pwrite(fd, bytes(min(size, 512)), 0)
