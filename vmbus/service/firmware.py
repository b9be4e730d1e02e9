# SPDX-License-Identifier: Apache-2.0
"""Firmware of machines: copied when a machine is defined, kept as long as one names it.

| file | what |
|---|---|
| STATE/firmware/SHA256 | firmware, an option ROM or a template of variables, by its hash, mode 0400 |
| STATE/variables/UUID | the variables of a machine that boots by UEFI; its guest writes them |

The sources are the distribution's packages. A machine records the hashes when it is defined, and every
start gives its worker those very files: an upgraded package changes new machines alone. A stored file that no
machine names is removed when the last one goes, and at start; so are variables of machines that are no more.

Both directories are the service's. Workers get descriptors, code and ROMs for reading only.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final

from vmbus.service import durable
from vmbus.service.aside import aside
from vmbus.wire.definition import FIRMWARE_CODE, FIRMWARE_NIC_ROM, FIRMWARE_VARIABLES, Definition
from vmbus.wire.errors import VmbusError

log = logging.getLogger("vmbus.firmware")

Hashes = Mapping[str, str]
"""Slot → SHA-256 of the file that the machine was defined with; for variables, of their template."""

LARGEST: Final = 8 << 20
"""Bytes of a firmware file; the machine has room for as many."""

_NIC_ROM: Final = (FIRMWARE_NIC_ROM, "usr/lib/ipxe/qemu/efi-virtio.rom", "ipxe-qemu")
_SOURCES: Final = {
    "bios": [(FIRMWARE_CODE, "usr/share/seabios/bios-256k.bin", "seabios")],
    "uefi": [
        (FIRMWARE_CODE, "usr/share/OVMF/OVMF_CODE_4M.fd", "ovmf"),
        (FIRMWARE_VARIABLES, "usr/share/OVMF/OVMF_VARS_4M.fd", "ovmf"),
    ],
}
"""Slot, path below the root, Debian package."""


class Firmware:
    """``state`` is STATE, ``root`` where the packages' files lie; for tests, elsewhere than /."""

    def __init__(self, state: Path, root: Path) -> None:
        self._store = state / "firmware"
        self._variables = state / "variables"
        self._root = root
        self._being_defined = 0
        """Machines whose files nobody names yet: nothing is swept meanwhile."""
        self.named: Callable[[], Iterable[tuple[str, Hashes]]] = lambda: ()
        """All machines' UUIDs and hashes: the registry's."""
        for directory in (self._store, self._variables):
            directory.mkdir(mode=0o700, exist_ok=True)

    @contextlib.asynccontextmanager
    async def taken(self, uuid: str, definition: Definition) -> AsyncIterator[dict[str, str]]:
        """The hashes of what a new machine boots by. The files are in the store while this lasts, and then as
        long as the machine names them.

        Raises Unavailable when a package is missing. Left by an exception, nothing of the machine's own is
        left.
        """
        if definition.firmware == "none":
            yield {}
            return
        self._being_defined += 1
        try:
            hashes = await aside(self._take, definition)
            if template := hashes.get(FIRMWARE_VARIABLES):
                await aside(self._make_variables, uuid, template)
            yield hashes
        except BaseException:
            durable.remove(self._variables / uuid)
            raise
        finally:
            self._being_defined -= 1
            self.sweep()

    def _take(self, definition: Definition) -> dict[str, str]:
        hashes = {}
        for slot, path, package in _sources(definition):
            content = _read(self._root / path, package)
            digest = hashlib.sha256(content).hexdigest()
            target = self._store / digest
            if not target.exists():
                try:
                    durable.write_bytes(target, content, mode=0o400)
                except OSError as error:
                    raise _internal(error) from None
            hashes[slot] = digest
        return hashes

    def _make_variables(self, uuid: str, template: str) -> None:
        try:
            content = (self._store / template).read_bytes()
            durable.write_bytes(self._variables / uuid, content, mode=0o600)
        except OSError as error:
            raise _internal(error) from None

    def opened(self, uuid: str, hashes: Hashes) -> Iterator[tuple[str, int]]:
        """Each slot with a descriptor, which is closed when the next is asked for. Raises NotFound."""
        for slot, digest in hashes.items():
            if slot == FIRMWARE_VARIABLES:
                path, mode = self._variables / uuid, os.O_RDWR
            else:
                path, mode = self._store / digest, os.O_RDONLY
            try:
                fd = os.open(path, mode | os.O_CLOEXEC | os.O_NOFOLLOW)
            except OSError as error:
                raise VmbusError(
                    "NotFound",
                    f"{path} cannot be opened: {error.strerror}; define the machine anew",
                    argument=slot,
                ) from None
            try:
                yield slot, fd
            finally:
                os.close(fd)

    def forget(self, uuid: str) -> None:
        """The machine is no more."""
        if (self._variables / uuid).exists():
            durable.remove(self._variables / uuid)
        self.sweep()

    def sweep(self) -> None:
        """Remove what no machine names."""
        if self._being_defined:
            return
        files = list(self._store.iterdir())
        if not files:
            return
        wanted = {digest for _, hashes in self.named() for digest in hashes.values()}
        for file in files:
            if file.name not in wanted and not file.name.startswith("."):
                durable.remove(file)

    def load(self) -> None:
        """At start: also the variables of machines that are no more, and what a crash left half written."""
        uuids = {uuid for uuid, _ in self.named()}
        for file in self._variables.iterdir():
            if file.name not in uuids:
                log.info("variables of %s, which is no more, are removed", file.name)
                durable.remove(file)
        for file in self._store.glob(".*"):
            durable.remove(file)
        self.sweep()


def _sources(definition: Definition) -> Iterator[tuple[str, str, str]]:
    if definition.firmware != "none":
        yield from _SOURCES[definition.firmware]
        yield _NIC_ROM  # also for interfaces that come later


def _read(path: Path, package: str) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST + 1)
    except OSError as error:
        raise VmbusError(
            "Unavailable", f"{path}: {error.strerror}; install the package {package}", argument="firmware"
        ) from None
    if not 0 < len(content) <= LARGEST:
        raise VmbusError(
            "Unavailable", f"{path} is empty or larger than {LARGEST} bytes", argument="firmware"
        )
    return content


def _internal(error: OSError) -> VmbusError:
    return VmbusError("Internal", f"the firmware cannot be stored: {error.strerror}")
