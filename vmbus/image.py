# SPDX-License-Identifier: Apache-2.0
"""Disk images: the qcow2 engine of the native core, for scripts, tests and vmbus-img.

Example::

    from vmbus import image

    image.create("disk.qcow2", size=10 << 30)
    with image.open("disk.qcow2", "qcow2") as disk:
        disk.write(0, b"hello")
        disk.snapshot("before")
    print(image.info("disk.qcow2", "qcow2"))

An image is opened *by the caller's rights*: the names of backing and data files are followed here, in
Python, relative to the directory of the image that holds them; the core opens nothing. Formats are
stated, never guessed. Errors are VmbusError with the kinds of ``vmbus.wire.errors``, OSError where a
file cannot be opened. An open image is locked as QEMU locks it. All sizes and offsets are bytes.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, Self, cast

from vmbus._native import ffi, lib
from vmbus.wire.errors import KINDS, VmbusError

if TYPE_CHECKING:
    import socket
    from threading import Event
    from types import TracebackType

Format = Literal["qcow2", "raw"]
FORMATS: Final[tuple[Format, ...]] = ("qcow2", "raw")
DetectZeroes = Literal["off", "on", "unmap"]
DETECT_ZEROES: Final[tuple[DetectZeroes, ...]] = ("off", "on", "unmap")
Preallocation = Literal["off", "metadata", "falloc", "full"]
PREALLOCATIONS: Final[tuple[Preallocation, ...]] = ("off", "metadata", "falloc", "full")
MAX_LAYERS: Final = 200
_DISCARD, _ZERO, _ZERO_UNMAP = 0, 1, 2

Report = Callable[[int, int], None]


class Secret:
    """A passphrase: 1 to 4,096 bytes, never shown. It goes to the core through a pipe, never as text."""

    def __init__(self, passphrase: bytes | str) -> None:
        self._bytes = passphrase.encode() if isinstance(passphrase, str) else bytes(passphrase)
        if not 1 <= len(self._bytes) <= 4096:
            raise VmbusError("InvalidArgument", "a passphrase has 1 to 4,096 bytes")

    def __repr__(self) -> str:
        return "Secret(…)"

    def pipe(self) -> int:
        """The reading end of a pipe that holds the passphrase; the caller closes it."""
        reading, writing = os.pipe()
        # A pipe takes 4,096 bytes without anybody reading (pipe(7)).
        os.write(writing, self._bytes)
        os.close(writing)
        return reading


class Encryption(NamedTuple):
    """How a new image is encrypted with LUKS; the names are QEMU's (aes-256, xts, plain64, sha256)."""

    secret: Secret
    cipher: str | None = None
    mode: str | None = None
    ivgen: str | None = None
    ivgen_hash: str | None = None
    hash: str | None = None
    iter_time: int = 2000
    """Milliseconds that opening shall take here."""


class Layer(NamedTuple):
    """One file of a chain, as its overlay names it."""

    path: str
    format: Format
    backing_name: str | None = None
    data_name: str | None = None
    data_path: str | None = None
    secret: Secret | None = None


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
        request["fd"] = _file(stack, path, os.O_RDWR | os.O_CREAT)
        if data_file is not None:
            data_path = beside(path, data_file)
            request["data_fd"] = _file(stack, data_path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        if encrypt is not None:
            described = {name: value for name, value in encrypt._asdict().items() if name != "secret"}
            request["encrypt"] = described | {"secret_fd": _secret(stack, encrypt.secret)}
        _perform(request)


def info(path: str, format: Format, *, lock: bool = True, snapshots: bool = True) -> dict[str, Any]:
    """What an image says of itself: ``virtual-size``, ``actual-size``, and for qcow2 ``qcow2``, with its
    snapshots unless they are not asked for."""
    with contextlib.ExitStack() as stack:
        fd = _file(stack, path, os.O_RDONLY)
        request = {"op": "info", "fd": fd, "format": format, "lock": lock, "snapshots": snapshots}
        return cast(dict[str, Any], _perform(request))


def probe(path: str) -> Format:
    """What a file looks like. For people; a program that trusts this can be told anything by a raw disk."""
    with contextlib.ExitStack() as stack:
        return cast(Format, _perform({"op": "probe", "fd": _file(stack, path, os.O_RDONLY)}))


def check(
    path: str,
    *,
    repair: Literal["none", "leaks", "all"] = "none",
    lock: bool = True,
    memory: int | None = None,
) -> dict[str, Any]:
    """Check a qcow2 image, and repair it as asked. The keys are qemu-img's, and ``messages``.

    About ``memory`` bytes are held at most (default 64 MiB, at least 29 MiB); with less, the tables of a
    large image are read more often.
    """
    with contextlib.ExitStack() as stack:
        fd = _file(stack, path, os.O_RDONLY if repair == "none" else os.O_RDWR)
        request = {"op": "check", "fd": fd, "repair": repair, "lock": lock, "memory": memory}
        return cast(dict[str, Any], _perform(request))


def set_backing(path: str, backing_name: str | None, backing_format: Format | None) -> None:
    """Let a qcow2 header name another backing file; the content is the caller's affair."""
    with contextlib.ExitStack() as stack:
        fd = _file(stack, path, os.O_RDWR)
        _perform(
            {"op": "set-backing", "fd": fd, "backing_name": backing_name, "backing_format": backing_format}
        )


def add_key(
    path: str,
    secret: Secret,
    new: Secret,
    *,
    slot: int | None = None,
    iter_time: int = 2000,
    force: bool = False,
) -> None:
    """Put a passphrase into a key slot of a LUKS image: ``slot``, or the first inactive one.

    With ``force`` an active slot is overwritten. ``iter_time`` is in milliseconds. A power cut
    leaves all slots as they were, or the new one active.
    """
    _amend(path, secret, {"change": "add", "slot": slot, "iter_time": iter_time, "force": force}, new=new)


def erase_key(
    path: str, secret: Secret, *, slot: int | None = None, old: Secret | None = None, force: bool = False
) -> None:
    """Erase a key slot of a LUKS image, or all that the passphrase ``old`` opens.

    The last active one is erased only with ``force``: then the content is lost for ever.
    """
    _amend(path, secret, {"change": "erase", "slot": slot, "force": force}, old=old)


def _amend(
    path: str,
    secret: Secret,
    request: dict[str, Any],
    *,
    new: Secret | None = None,
    old: Secret | None = None,
) -> None:
    with contextlib.ExitStack() as stack:
        request |= {"op": "amend-keys", "fd": _file(stack, path, os.O_RDWR)}
        for key, one in (("secret_fd", secret), ("new_secret_fd", new), ("old_secret_fd", old)):
            if one is not None:
                request[key] = _secret(stack, one)
        _perform(request)


def set_refcount_bits(path: str, bits: int) -> None:
    """Count the clusters of a qcow2 image of version 3 with another width: 1 to 64 bits, a power of two."""
    with contextlib.ExitStack() as stack:
        _perform({"op": "set-refcount-bits", "fd": _file(stack, path, os.O_RDWR), "bits": bits})


def beside(path: str, name: str) -> str:
    """The file that a header of the image at ``path`` names: relative to that image's directory."""
    return os.path.join(os.path.dirname(path), name.removeprefix("file:"))


def chain(
    path: str,
    format: Format,
    *,
    backing: bool = True,
    lock: bool = True,
    guess: bool = False,
    secrets: Sequence[Secret | None] = (),
) -> list[Layer]:
    """The whole chain of an image, active layer first; ``secrets`` are the layers' passphrases.

    A backing file whose format its overlay does not state is refused, unless ``guess``. Raises
    VmbusError ImageInvalid for a chain that loops or is deeper than MAX_LAYERS.
    """
    layers: list[Layer] = []
    while True:
        if len(layers) == MAX_LAYERS:
            raise VmbusError("ImageInvalid", f"the chain is deeper than {MAX_LAYERS}, or a loop")
        header = info(path, format, lock=lock, snapshots=False).get("qcow2") or {}
        data_name = header.get("data-name")
        data_path = None if data_name is None else beside(path, data_name)
        name = header.get("backing-name")
        secret = secrets[len(layers)] if len(layers) < len(secrets) else None
        layers.append(Layer(path, format, name, data_name, data_path, secret))
        if name is None or not backing:
            return layers
        stated = header.get("backing-format")
        path = beside(path, name)
        if stated is None and guess:
            stated = probe(path)
        if stated not in FORMATS:
            said = "no format" if stated is None else f"format '{stated}'"
            raise VmbusError("NotSupported", f"{layers[-1].path} states {said} for its backing file {name}")
        format = cast(Format, stated)


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
                one: dict[str, Any] = {"format": layer.format, "fd": _file(stack, layer.path, flags)}
                # A layer whose backing file is left out is opened alone.
                one["backing_name"] = layer.backing_name
                if layer.data_path is not None:
                    one["data_fd"] = _file(stack, layer.data_path, flags)
                    one["data_name"] = layer.data_name
                if layer.secret is not None:
                    one["secret_fd"] = _secret(stack, layer.secret)
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
            _call(lib.vmbus_image_open(text, len(text), out))
            self._handle = out[0]

    def close(self) -> None:
        """Make everything durable and give up the locks."""
        if self._handle != ffi.NULL:
            handle, self._handle = self._handle, ffi.NULL
            _call(lib.vmbus_image_close(handle))

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
        _call(lib.vmbus_image_read(self._open(), offset, data, length))
        return bytes(ffi.buffer(data, length))

    def write(self, offset: int, data: bytes) -> None:
        """Write ``data`` at ``offset``. Durable after ``flush``."""
        _call(lib.vmbus_image_write(self._open(), offset, ffi.from_buffer("uint8_t[]", data), len(data)))

    def flush(self) -> None:
        """Make all writes durable."""
        _call(lib.vmbus_image_flush(self._open()))

    def discard(self, offset: int, length: int) -> None:
        """The range is not needed any more; it reads as zeros or as before."""
        _call(lib.vmbus_image_range(self._open(), _DISCARD, offset, length))

    def write_zeroes(self, offset: int, length: int, *, unmap: bool = True) -> None:
        """Let the range read as zeros; with ``unmap`` its space is given back."""
        _call(lib.vmbus_image_range(self._open(), _ZERO_UNMAP if unmap else _ZERO, offset, length))

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
                _perform(request, self._open(), shared=shared)
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
        return _perform(request, self._open(), ffi.NULL if other is None else other._open(), report=report)


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


def _create_raw(path: str, size: int, preallocation: str) -> None:
    with contextlib.ExitStack() as stack:
        fd = _file(stack, path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
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


def _file(stack: contextlib.ExitStack, path: str, flags: int) -> int:
    fd = os.open(path, flags | os.O_CLOEXEC, 0o644)
    stack.callback(os.close, fd)
    return fd


def _secret(stack: contextlib.ExitStack, secret: Secret) -> int:
    fd = secret.pipe()
    stack.callback(os.close, fd)
    return fd


@contextlib.contextmanager
def _reporting(report: Report) -> Iterator[Any]:
    """Words for the core to count in, from which ``report`` is called ten times a second and at the end."""
    from threading import Event, Thread  # noqa: PLC0415 (vmbus-img is started often, and seldom reports)

    progress = ffi.new("uint64_t[3]")
    ended = Event()

    def watch() -> None:
        while not ended.wait(0.1):
            report(int(progress[0]), int(progress[1]))

    watcher = Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield progress
    finally:
        ended.set()
        watcher.join()
    report(1, 1)


def _perform(
    request: dict[str, Any],
    image: Any = ffi.NULL,
    other: Any = ffi.NULL,
    *,
    report: Report | None = None,
    shared: Any = ffi.NULL,
) -> object:
    text = json.dumps(request).encode()
    out = ffi.new("char **")
    with contextlib.ExitStack() as stack:
        if report is not None:
            shared = stack.enter_context(_reporting(report))
        _call(lib.vmbus_image_call(image, other, text, len(text), shared, out))
    result = ffi.string(out[0])
    lib.vmbus_image_free_text(out[0])
    return cast(object, json.loads(result))


def _call(result: int) -> None:
    if result < 0:
        error = json.loads(ffi.string(lib.vmbus_error()))
        kind = error["kind"] if error["kind"] in KINDS else "Internal"
        raise VmbusError(kind, error["message"], argument=error["argument"])
