# SPDX-License-Identifier: Apache-2.0
"""What is done with an image that is not open: looking at its header, checking it, changing what it says."""

from __future__ import annotations

import contextlib
import os
from typing import Any, Literal, cast

from vmbus.image.core import file, perform, secret_pipe
from vmbus.image.kinds import Format
from vmbus.image.secret import Secret


def info(path: str, format: Format, *, lock: bool = True, snapshots: bool = True) -> dict[str, Any]:
    """What an image says of itself: ``virtual-size``, ``actual-size``, and for qcow2 ``qcow2``, with its
    snapshots unless they are not asked for."""
    with contextlib.ExitStack() as stack:
        fd = file(stack, path, os.O_RDONLY)
        request = {"op": "info", "fd": fd, "format": format, "lock": lock, "snapshots": snapshots}
        return cast(dict[str, Any], perform(request))


def probe(path: str) -> Format:
    """What a file looks like. For people; a program that trusts this can be told anything by a raw disk."""
    with contextlib.ExitStack() as stack:
        return cast(Format, perform({"op": "probe", "fd": file(stack, path, os.O_RDONLY)}))


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
        fd = file(stack, path, os.O_RDONLY if repair == "none" else os.O_RDWR)
        request = {"op": "check", "fd": fd, "repair": repair, "lock": lock, "memory": memory}
        return cast(dict[str, Any], perform(request))


def set_backing(path: str, backing_name: str | None, backing_format: Format | None) -> None:
    """Let a qcow2 header name another backing file; the content is the caller's affair."""
    with contextlib.ExitStack() as stack:
        fd = file(stack, path, os.O_RDWR)
        perform(
            {"op": "set-backing", "fd": fd, "backing_name": backing_name, "backing_format": backing_format}
        )


def set_refcount_bits(path: str, bits: int) -> None:
    """Count the clusters of a qcow2 image of version 3 with another width: 1 to 64 bits, a power of two."""
    with contextlib.ExitStack() as stack:
        perform({"op": "set-refcount-bits", "fd": file(stack, path, os.O_RDWR), "bits": bits})


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
        request |= {"op": "amend-keys", "fd": file(stack, path, os.O_RDWR)}
        for key, one in (("secret_fd", secret), ("new_secret_fd", new), ("old_secret_fd", old)):
            if one is not None:
                request[key] = secret_pipe(stack, one)
        perform(request)
