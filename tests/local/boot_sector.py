# SPDX-License-Identifier: Apache-2.0
"""A boot sector that says something on the serial port and powers off: all of a BIOS's job, on any KVM."""

from __future__ import annotations

CODE = bytes.fromhex(
    "fa"  # cli: SeaBIOS writes to the port from its timer
    "31c08ed8"  # xor ax, ax; mov ds, ax
    "be1d7c"  # mov si, text
    "baf803"  # mov dx, 0x3f8
    "ac84c07403"  # next: lodsb; test al, al; jz end
    "eeebf8"  # out dx, al; jmp next
    "ba0406b80020"  # end: mov dx, 0x604; mov ax, 0x2000 (S5)
    "ef"  # out dx, ax
    "f4ebfd"  # halt: hlt; jmp halt
)


def disk(text: str, size: int = 1 << 20) -> bytes:
    """A raw image that boots and says ``text``."""
    sector = (CODE + text.encode() + b"\0").ljust(510, b"\0") + b"\x55\xaa"
    return sector.ljust(size, b"\0")
