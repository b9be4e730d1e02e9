# SPDX-License-Identifier: Apache-2.0
"""A program for UEFI that says something on the serial port and powers off, alone or on a CD that UEFI boots.

It is GRUB with a configuration of its own in it. The CD is the least that UEFI boots: a volume descriptor, a
boot record that points at a catalog with one entry for UEFI, an empty directory, and a FAT file system with
the program where a removable medium has it.

Sources: ECMA-119, 8.4 and 9.1; "El Torito" Bootable CD-ROM Format Specification 1.0; UEFI 2.10, 13.3.2.1.
"""

from __future__ import annotations

import struct
import subprocess
from pathlib import Path
from typing import Final

BLOCK: Final = 2048
SECTOR: Final = 512
MODULES: Final = ("serial", "terminal", "echo", "halt")
CONFIG: Final = """\
serial --unit=0 --speed=115200
terminal_output serial
echo "{text}"
halt
"""
FAT: Final = 2880 * 1024
PLATFORM_EFI: Final = 0xEF

DESCRIPTOR, RECORD, TERMINATOR, CATALOG, PATHS, DIRECTORY, IMAGE = 16, 17, 18, 19, 20, 22, 23
"""Blocks."""


def program(target: Path, text: str) -> Path:
    """Make it at ``target``; it says ``text``."""
    config = target.with_suffix(".cfg")
    config.write_text(CONFIG.format(text=text))
    _run("grub-mkimage", "-O", "x86_64-efi", "-o", target, "-p", "/boot/grub", "-c", config, *MODULES)
    return target


def cd(target: Path, loader: Path) -> Path:
    """Make a CD at ``target`` that boots ``loader``."""
    fat = target.with_suffix(".fat")
    with fat.open("wb") as file:
        file.truncate(FAT)
    _run("mkfs.vfat", fat)
    _run("mmd", "-i", fat, "::/EFI", "::/EFI/BOOT")
    _run("mcopy", "-i", fat, loader, "::/EFI/BOOT/BOOTX64.EFI")

    whole = bytearray(IMAGE * BLOCK) + fat.read_bytes()
    for block, content in {
        DESCRIPTOR: _descriptor(len(whole) // BLOCK),
        RECORD: struct.pack("<B5sB32s32sI", 0, b"CD001", 1, b"EL TORITO SPECIFICATION", b"", CATALOG),
        TERMINATOR: b"\xffCD001\x01",
        CATALOG: _catalog(),
        PATHS: struct.pack("<BBIHBx", 1, 0, DIRECTORY, 1, 0),
        PATHS + 1: struct.pack(">BBIHBx", 1, 0, DIRECTORY, 1, 0),
        DIRECTORY: _directory(b"\0") + _directory(b"\1"),
    }.items():
        whole[block * BLOCK : block * BLOCK + len(content)] = content
    target.write_bytes(whole)
    return target


def _descriptor(blocks: int) -> bytes:
    head = struct.pack("<B5sBx32s32s8x", 1, b"CD001", 1, b" " * 32, b"VMBUS".ljust(32))
    sizes = _both(blocks) + bytes(32) + _both16(1) + _both16(1) + _both16(BLOCK) + _both(10)
    tables = struct.pack("<II", PATHS, 0) + struct.pack(">II", PATHS + 1, 0)
    found = head + sizes + tables + _directory(b"\0")
    return found.ljust(881, b" ") + b"\x01"


def _directory(name: bytes) -> bytes:
    date = bytes([126, 1, 1, 0, 0, 0, 0])
    body = _both(DIRECTORY) + _both(BLOCK) + date + bytes([2, 0, 0]) + _both16(1)
    return bytes([34, 0]) + body + bytes([1]) + name


def _catalog() -> bytes:
    """The sum of the first entry's words is 0."""
    first = bytearray(struct.pack("<BBxx24sHBB", 1, PLATFORM_EFI, b"vmbus", 0, 0x55, 0xAA))
    struct.pack_into("<H", first, 28, -sum(struct.unpack("<16H", first)) & 0xFFFF)
    return bytes(first) + struct.pack("<BBHBxHI", 0x88, 0, 0, 0, FAT // SECTOR, IMAGE)


def _both(number: int) -> bytes:
    return struct.pack("<I", number) + struct.pack(">I", number)


def _both16(number: int) -> bytes:
    return struct.pack("<H", number) + struct.pack(">H", number)


def _run(*argv: str | Path) -> None:
    subprocess.run(argv, check=True, capture_output=True, timeout=60)
