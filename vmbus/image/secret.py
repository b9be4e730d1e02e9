# SPDX-License-Identifier: Apache-2.0
"""Passphrases of encrypted images, and how a new one is encrypted."""

from __future__ import annotations

import os
from typing import NamedTuple

from vmbus.wire.errors import VmbusError


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
