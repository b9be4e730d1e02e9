# SPDX-License-Identifier: Apache-2.0
"""An open image: its content, its snapshots and bitmaps, and what is done between two of them."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Self, cast

from vmbus._native import ffi, lib
from vmbus.image.core import Report, call, file, perform, secret_pipe
from vmbus.image.kinds import DetectZeroes, Format, Preallocation
from vmbus.image.layers import Layer, chain
from vmbus.image.secret import Secret
from vmbus.wire.errors import VmbusError

if TYPE_CHECKING:
    import socket
    from threading import Event
    from types import TracebackType

_DISCARD, _ZERO, _ZERO_UNMAP = 0, 1, 2


class Image:
    """An open, locked image with its chain. A context manager; ``close`` makes everything durable."""

    def __init__(
        self,
        layers: list[Layer],
        *,
        read_only: bool = False,
        locks: bool = True,
        snapshot: str | None = None,
        cache: int | None = None,
        direct: bool = False,
        sync: bool = True,
        detect_zeroes: DetectZeroes = "off",
    ) -> None:
        """Open ``layers``, active one first; see ``open`` for the usual way."""
        self.layers = layers
        self._handle: Any = ffi.NULL
        with contextlib.ExitStack() as stack:
            described = []
            for depth, layer in enumerate(layers):
                flags = os.O_RDONLY if read_only or depth > 0 else os.O_RDWR
                flags |= os.O_DIRECT if direct else 0
                one: dict[str, Any] = {"format": layer.format, "fd": file(stack, layer.path, flags)}
                # A layer whose backing file is left out is opened alone.
                one["backing_name"] = layer.backing_name
                if layer.data_path is not None:
                    one["data_fd"] = file(stack, layer.data_path, flags)
                    one["data_name"] = layer.data_name
                if layer.secret is not None:
                    one["secret_fd"] = secret_pipe(stack, layer.secret)
                described.append(one)
            request = {
                "layers": described,
                "read_only": read_only,
                "locks": locks,
                "sync": sync,
                "snapshot": snapshot,
                "cache": cache,
                "detect_zeroes": detect_zeroes,
            }
            text = json.dumps(request).encode()
            out = ffi.new("struct VmbusImage **")
            call(lib.vmbus_image_open(text, len(text), out))
            self._handle = out[0]

    def close(self) -> None:
        """Make everything durable and give up the locks."""
        if self._handle != ffi.NULL:
            handle, self._handle = self._handle, ffi.NULL
            call(lib.vmbus_image_close(handle))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def size(self) -> int:
        """The disk's size."""
        return int(lib.vmbus_image_size(self._open()))

    def read(self, offset: int, length: int) -> bytes:
        """``length`` bytes from ``offset``."""
        data = ffi.new("uint8_t[]", length)
        call(lib.vmbus_image_read(self._open(), offset, data, length))
        return bytes(ffi.buffer(data, length))

    def write(self, offset: int, data: bytes) -> None:
        """Write ``data`` at ``offset``. Durable after ``flush``."""
        call(lib.vmbus_image_write(self._open(), offset, ffi.from_buffer("uint8_t[]", data), len(data)))

    def flush(self) -> None:
        """Make all writes durable."""
        call(lib.vmbus_image_flush(self._open()))

    def discard(self, offset: int, length: int) -> None:
        """The range is not needed any more; it reads as zeros or as before."""
        call(lib.vmbus_image_range(self._open(), _DISCARD, offset, length))

    def write_zeroes(self, offset: int, length: int, *, unmap: bool = True) -> None:
        """Let the range read as zeros; with ``unmap`` its space is given back."""
        call(lib.vmbus_image_range(self._open(), _ZERO_UNMAP if unmap else _ZERO, offset, length))

    def resize(self, size: int, *, shrink: bool = False, preallocation: Preallocation = "off") -> None:
        """Change the disk's size. Shrinking loses data and must be asked for. What a growing disk gains is
        preallocated as asked; if that fails it has not grown."""
        self._perform({"op": "resize", "size": size, "shrink": shrink, "preallocation": preallocation})

    def amend(
        self,
        *,
        version: int | None = None,
        lazy_refcounts: bool | None = None,
        data_file: str | None = None,
        data_raw: bool | None = None,
    ) -> None:
        """Change options of a qcow2 image; None leaves one as it is.

        Version 2 holds no zero clusters, bitmaps, external data, subclusters or zstd: the first two are
        expanded and removed, the others refused.
        """
        self._perform(
            {
                "op": "amend-options",
                "version": version,
                "lazy_refcounts": lazy_refcounts,
                "data_name": data_file,
                "data_raw": data_raw,
            }
        )

    def commit_into(self, target: Image, depth: int, *, rate: int = 0, report: Report | None = None) -> None:
        """Let ``target``, layer ``depth`` of this image's chain with those below it, hold all that the layers
        above it do. It grows if it is shorter. ``rate`` is the most bytes of the disk a second."""
        self._perform({"op": "commit-into", "depth": depth, "rate": rate}, other=target, report=report)

    def rebase(self, new: Image | None, *, compress: bool = False, report: Report | None = None) -> None:
        """Hold what reads otherwise in ``new`` (zeros, for None) than below this image now; then
        ``set_backing`` may name that one."""
        self._perform({"op": "rebase", "compress": compress}, other=new, report=report)

    def empty(self) -> None:
        """Hold nothing any more: everything reads as in the backing file."""
        self._perform({"op": "empty"})

    def map(self, start: int = 0, end: int | None = None) -> Iterator[dict[str, Any]]:
        """Where the disk's ranges come from, as ``qemu-img map --output=json`` has it."""
        end = self.size if end is None else end
        while start < end:
            ranges = cast(list[dict[str, Any]], self._perform({"op": "map", "start": start, "end": end}))
            if not ranges:
                return
            yield from ranges
            start = ranges[-1]["start"] + ranges[-1]["length"]

    def snapshots(self) -> list[dict[str, Any]]:
        """The internal snapshots, with qemu-img's keys."""
        return cast(list[dict[str, Any]], self._perform({"op": "snapshot-list"}))

    def snapshot(self, name: str) -> dict[str, Any]:
        """Take an internal snapshot."""
        return cast(dict[str, Any], self._perform({"op": "snapshot-create", "name": name}))

    def apply_snapshot(self, name: str) -> None:
        """Go back to a snapshot, by id or name."""
        self._perform({"op": "snapshot-apply", "name": name})

    def delete_snapshot(self, name: str) -> None:
        """Delete a snapshot, by id or name."""
        self._perform({"op": "snapshot-delete", "name": name})

    def bitmaps(self) -> list[dict[str, Any]]:
        """The persistent bitmaps, with qemu-img's keys: ``name``, ``granularity``, ``flags``."""
        return cast(list[dict[str, Any]], self._perform({"op": "bitmap-list"}))

    def add_bitmap(self, name: str, *, granularity: int | None = None, enabled: bool = True) -> None:
        """Add an empty bitmap with a bit for each ``granularity`` bytes (512 to 2 GiB, a power of two).

        While it is enabled, writes are recorded in it. No request may be under way, as for all changes to
        bitmaps.
        """
        self._perform({"op": "bitmap-add", "name": name, "granularity": granularity, "enabled": enabled})

    def remove_bitmap(self, name: str) -> None:
        """Remove a bitmap, consistent or not."""
        self._perform({"op": "bitmap-remove", "name": name})

    def clear_bitmap(self, name: str) -> None:
        """Let a bitmap say that nothing was written."""
        self._perform({"op": "bitmap-clear", "name": name})

    def enable_bitmap(self, name: str, *, enabled: bool = True) -> None:
        """Record writes in a bitmap from now on, or no more."""
        self._perform({"op": "bitmap-enable", "name": name, "enabled": enabled})

    def merge_bitmap(self, name: str, source: str, *, other: Image | None = None) -> None:
        """Add to ``name`` what the bitmap ``source`` says, of this image or an other one of the same size."""
        self._perform({"op": "bitmap-merge", "name": name, "source": source}, other=other)

    def dirty_ranges(self, name: str, start: int = 0, end: int | None = None) -> Iterator[tuple[int, int]]:
        """Start and length of the ranges that a bitmap has as written."""
        end = self.size if end is None else end
        while start < end:
            request = {"op": "bitmap-ranges", "name": name, "start": start, "end": end}
            found = cast(dict[str, Any], self._perform(request))
            yield from ((at, length) for at, length in found["ranges"])
            start = found["next"]

    def copy_to(
        self,
        target: Image,
        *,
        compress: bool = False,
        sparse: int = 4096,
        target_is_zero: bool = True,
        above: int | None = None,
        threads: int | None = None,
        salvage: bool = False,
        rate: int = 0,
        shift: int = 0,
        report: Report | None = None,
    ) -> int:
        """Let ``target`` hold what this image holds, or with ``above`` what its first layers have.

        The first byte goes to byte ``shift`` of the target. With ``salvage`` sectors that cannot be read
        become zeros; gives how many bytes did. ``rate`` is the most bytes of the disk a second, 0 for no
        limit.
        """
        request = {
            "op": "copy",
            "compress": compress,
            "sparse": sparse,
            "target_is_zero": target_is_zero,
            "above": above,
            "threads": threads,
            "salvage": salvage,
            "rate": rate,
            "shift": shift,
        }
        return cast(int, self._perform(request, other=target, report=report))

    def first_difference(self, other: Image, *, report: Report | None = None) -> int | None:
        """The first byte in which two disks differ, within the shorter one; None if none does."""
        return cast("int | None", self._perform({"op": "compare"}, other=other, report=report))

    def first_nonzero(self, start: int, end: int) -> int | None:
        """The first byte of a range that is not zero; None if all are."""
        return cast("int | None", self._perform({"op": "first-nonzero", "start": start, "end": end}))

    def bench(
        self,
        *,
        count: int = 75000,
        depth: int = 64,
        size: int = 4096,
        offset: int = 0,
        step: int = 0,
        random: bool = False,
        write: bool = False,
        pattern: int = 0,
        fua: bool = False,
        flush_interval: int = 0,
    ) -> float:
        """Put a load on the disk, as ``qemu-img bench`` does; gives the seconds that it took."""
        request = {
            "op": "bench",
            "count": count,
            "depth": depth,
            "size": size,
            "offset": offset,
            "step": step,
            "random": random,
            "write": write,
            "pattern": pattern,
            "fua": fua,
            "flush_interval": flush_interval,
        }
        return cast(float, self._perform(request))

    def serve(
        self,
        listener: socket.socket,
        *,
        export: str = "",
        persistent: bool = False,
        connections: int = 16,
        bitmaps: Sequence[str] = (),
        stop: Event | None = None,
    ) -> None:
        """Serve the disk over NBD on a listening unix socket, with bitmaps as qemu:dirty-bitmap contexts.

        Returns when ``stop`` is set, or, unless ``persistent``, when the last client has left. Other
        threads may use the image meanwhile.
        """
        request = {
            "op": "serve",
            "fd": listener.fileno(),
            "export": export,
            "persistent": persistent,
            "connections": connections,
            "bitmaps": list(bitmaps),
        }
        from threading import Thread  # noqa: PLC0415 (vmbus-img is started often, and seldom serves)

        shared = ffi.new("uint64_t[3]")
        failed: list[BaseException] = []

        def body() -> None:
            try:
                perform(request, self._open(), shared=shared)
            except BaseException as error:  # handed to the caller's thread
                failed.append(error)

        thread = Thread(target=body)
        thread.start()
        try:
            while thread.is_alive():
                thread.join(0.1)
                if stop is not None and stop.is_set():
                    shared[2] = 1
        finally:
            shared[2] = 1
            thread.join()
        for error in failed:
            raise error

    def _open(self) -> Any:
        if self._handle == ffi.NULL:
            raise VmbusError("InvalidState", "the image is closed")
        return self._handle

    def _perform(
        self, request: dict[str, Any], *, other: Image | None = None, report: Report | None = None
    ) -> object:
        return perform(request, self._open(), ffi.NULL if other is None else other._open(), report=report)


def open(
    path: str,
    format: Format,
    *,
    read_only: bool = False,
    locks: bool = True,
    snapshot: str | None = None,
    guess: bool = False,
    direct: bool = False,
    sync: bool = True,
    secrets: Sequence[Secret | None] = (),
    detect_zeroes: DetectZeroes = "off",
) -> Image:
    """Open an image with the chain that its headers name.

    ``snapshot`` shows the disk as it was then (read-only). ``guess`` looks at backing files whose format
    is not stated. ``secrets`` are the passphrases of encrypted layers, active one first. ``direct`` goes
    round the host's page cache. Without ``sync`` nothing is made durable: for an image that is of no use
    unless it gets finished. ``detect_zeroes`` says what becomes of writes whose bytes are all zeros: they are
    written, or the range is zeroed by its mapping, with ``unmap`` giving its space back.
    """
    layers = chain(path, format, lock=locks, guess=guess, secrets=secrets)
    return Image(
        layers,
        read_only=read_only,
        locks=locks,
        snapshot=snapshot,
        direct=direct,
        sync=sync,
        detect_zeroes=detect_zeroes,
    )
