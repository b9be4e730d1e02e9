# SPDX-License-Identifier: Apache-2.0
"""The options of -o for a new image: which there are, what they are worth, what ``-o help`` lists.

One table for both formats, in the order in which QEMU names them when it says what it makes
(qcow2_create_opts in block/qcow2.c, raw_create_opts in block/file-posix.c).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, Literal, NamedTuple

from vmbus import image
from vmbus.cli import img_size, img_source
from vmbus.cli.img_source import Secrets
from vmbus.wire.errors import VmbusError

Kind = Literal["str", "bool", "num", "size"]
SHOWN: Final[dict[Kind, str]] = {"str": "str", "bool": "bool (on/off)", "num": "num", "size": "size"}


class Setting(NamedTuple):
    """An option: its kind, what it is when nobody says, and what it does."""

    name: str
    kind: Kind
    help: str
    usual: str | None = None


QCOW2: Final = (
    Setting("encryption", "bool", "Encrypt the image with format 'aes'. (Not made; encrypt.format=luks)"),
    Setting("encrypt.format", "str", "Encrypt the image: 'luks'"),
    Setting("encrypt.key-secret", "str", "ID of secret providing the LUKS passphrase"),
    Setting("encrypt.cipher-alg", "str", "Name of encryption cipher algorithm"),
    Setting("encrypt.cipher-mode", "str", "Name of encryption cipher mode"),
    Setting("encrypt.ivgen-alg", "str", "Name of IV generator algorithm"),
    Setting("encrypt.ivgen-hash-alg", "str", "Name of IV generator hash algorithm"),
    Setting("encrypt.hash-alg", "str", "Name of encryption hash algorithm"),
    Setting("encrypt.iter-time", "num", "Time to spend in PBKDF in milliseconds"),
    Setting("cluster_size", "size", "qcow2 cluster size", "65536"),
    Setting("extended_l2", "bool", "Extended L2 tables", "off"),
    Setting("preallocation", "str", "Preallocation mode (allowed values: off, metadata, falloc, full)"),
    Setting("compression_type", "str", "Compression method used for image cluster compression", "zlib"),
    Setting("size", "size", "Virtual disk size"),
    Setting("compat", "str", "Compatibility level (v2 [0.10] or v3 [1.1])"),
    Setting("backing_file", "str", "File name of a base image"),
    Setting("backing_fmt", "str", "Image format of the base image"),
    Setting("data_file", "str", "File name of an external data file"),
    Setting("data_file_raw", "bool", "The external data file must stay valid as a raw image"),
    Setting("lazy_refcounts", "bool", "Postpone refcount updates", "off"),
    Setting("refcount_bits", "num", "Width of a reference count entry in bits", "16"),
    Setting("nocow", "bool", "Turn off copy-on-write (not done)"),
    Setting("extent_size_hint", "size", "Extent size hint for the image file (not done)"),
)
RAW: Final = (
    Setting("size", "size", "Virtual disk size"),
    Setting("preallocation", "str", "Preallocation mode (allowed values: off, falloc, full)"),
    Setting("nocow", "bool", "Turn off copy-on-write (not done)"),
    Setting("extent_size_hint", "size", "Extent size hint for the image file (not done)"),
)
TABLES: Final = {"qcow2": QCOW2, "raw": RAW}
AMENDED: Final = (
    Setting("backing_file", "str", "File name of a base image"),
    Setting("backing_fmt", "str", "Image format of the base image"),
    Setting("compat", "str", "Compatibility level (v2 [0.10] or v3 [1.1])"),
    Setting("data_file", "str", "File name of an external data file"),
    Setting("data_file_raw", "bool", "The external data file must stay valid as a raw image"),
    Setting("encrypt.iter-time", "num", "Time to spend in PBKDF in milliseconds"),
    Setting("encrypt.keyslot", "num", "Select a single keyslot to modify explicitly"),
    Setting("encrypt.new-secret", "str", "New secret to set in the matching keyslots. Empty string to erase"),
    Setting("encrypt.old-secret", "str", "Select all keyslots that match this password"),
    Setting("encrypt.state", "str", "Select new state of affected keyslots (active/inactive)"),
    Setting("lazy_refcounts", "bool", "Postpone refcount updates"),
    Setting("refcount_bits", "num", "Width of a reference count entry in bits"),
    Setting("size", "size", "Virtual disk size"),
)


def wants_help(listed: Iterable[str]) -> bool:
    """Whether -o asks for the list."""
    return any(word in {"help", "?"} for text in listed for word in text.split(","))


def listing(title: str, settings: Iterable[Setting]) -> str:
    """What ``-o help`` shows."""
    lines = [title]
    for one in sorted(settings, key=lambda one: one.name):
        lines.append(f"  {f'{one.name}=<{SHOWN[one.kind]}>':22} - {one.help}")
    return "\n".join(lines)


def known_format(format: str) -> str:
    """A format that images can be made of."""
    if format not in TABLES:
        raise VmbusError("NotSupported", f"Unknown file format '{format}'")
    return format


def given(format: str, listed: Sequence[str]) -> dict[str, str | int]:
    """The -o options of a new image, each of its kind."""
    return read(TABLES[known_format(format)], listed)


def read(table: Sequence[Setting], listed: Sequence[str]) -> dict[str, str | int]:
    """The options that ``table`` knows, each of its kind."""
    kinds = {one.name: one.kind for one in table}
    found: dict[str, str | int] = {}
    for name, text in img_source.pairs(",".join(listed)).items():
        kind = kinds.get(name)
        if kind is None:
            raise VmbusError("InvalidArgument", f"Invalid parameter '{name}'")
        if kind == "size":
            found[name] = img_size.parameter(name, text)
        elif kind == "num":
            if not text.isdecimal():
                raise VmbusError("InvalidArgument", f"Parameter '{name}' expects a number")
            found[name] = int(text)
        else:
            if kind == "bool" and text not in {"on", "off"}:
                raise VmbusError("InvalidArgument", f"Parameter '{name}' expects 'on' or 'off'")
            found[name] = text
    return found


def described(format: str, settings: Mapping[str, str | int]) -> str:
    """The options of a new image with what is usual for the others, as qemu-img says what it makes."""
    pairs = []
    for one in TABLES[format]:
        value = settings.get(one.name, one.usual)
        if value is not None:
            doubled = value.replace(",", ",,") if isinstance(value, str) and one.kind == "str" else value
            pairs.append(f"{one.name}={doubled}")
    return " ".join(pairs)


def arguments(settings: Mapping[str, str | int], known: Secrets) -> dict[str, Any]:
    """Settings as arguments of ``image.create``, but for size and backing file."""
    made: dict[str, Any] = {}
    encrypt: dict[str, str] = {}
    for name, value in settings.items():
        if name.startswith("encrypt."):
            encrypt[name.removeprefix("encrypt.")] = str(value)
        elif name in _ARGUMENTS:
            key, of = _ARGUMENTS[name]
            made[key] = of(value)
        elif name not in {"size", "backing_file", "backing_fmt"}:
            _refuse(name, value)
    if encrypt:
        made["encrypt"] = img_source.encryption(encrypt, known)
    return made


def _refuse(name: str, value: str | int) -> None:
    if value == "off" and name in {"encryption", "nocow"}:
        return
    reason = ": the old AES is only read" if name == "encryption" else ""
    raise VmbusError("NotSupported", f"option {name}={value}{reason}")


def _version(value: object) -> int:
    version = {"0.10": 2, "v2": 2, "1.1": 3, "v3": 3}.get(str(value))
    if version is None:
        raise VmbusError("InvalidArgument", f"Parameter 'version' does not accept value '{value}'")
    return version


def _word(name: str, *words: str) -> Callable[[object], object]:
    def check(value: object) -> object:
        if value not in words:
            raise VmbusError("InvalidArgument", f"Parameter '{name}' does not accept value '{value}'")
        return value

    return check


def _on(value: object) -> object:
    return value == "on"


def _same(value: object) -> object:
    return value


_ARGUMENTS: Final[dict[str, tuple[str, Callable[[Any], object]]]] = {
    "cluster_size": ("cluster_size", _same),
    "preallocation": ("preallocation", _word("preallocation", *image.PREALLOCATIONS)),
    "extended_l2": ("extended_l2", _on),
    "compression_type": ("compression", _word("compression-type", "zlib", "zstd")),
    "compat": ("version", _version),
    "data_file": ("data_file", _same),
    "data_file_raw": ("data_raw", _on),
    "lazy_refcounts": ("lazy_refcounts", _on),
    "refcount_bits": ("refcount_bits", _same),
}
