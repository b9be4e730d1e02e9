# SPDX-License-Identifier: Apache-2.0
"""Which image a word of the command line means, and with which passphrases it opens.

As in qemu-img, ``--object secret,id=ID,data=TEXT`` (or ``file=PATH``, and ``format=base64``) makes a
passphrase known under a name, and an image that needs one is named by its options: with ``--image-opts``
as ``driver=qcow2,file.filename=PATH,encrypt.key-secret=ID``, or as ``json:{...}`` with the same keys. The
passphrase of a backing file is ``backing.encrypt.key-secret``, of the next one
``backing.backing.encrypt.key-secret``, and so on. Other options of QEMU's block drivers are refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple, cast

from vmbus import image
from vmbus.image import Encryption, Format, Secret
from vmbus.wire.errors import VmbusError

Secrets = Mapping[str, Secret]

_KEY: Final = "encrypt.key-secret"
# Their values change nothing: they say what is so anyhow.
_IDLE: Final = {"file.driver": "file", "encrypt.format": "luks"}


class Source(NamedTuple):
    """An image to open."""

    path: str
    format: Format
    secrets: tuple[Secret | None, ...] = ()


def secrets(listed: Sequence[str]) -> dict[str, Secret]:
    """The passphrases of ``--object`` options, by their ids."""
    found: dict[str, Secret] = {}
    for text in listed:
        kind, _, rest = text.partition(",")
        options = pairs(rest)
        if kind != "secret":
            raise VmbusError("NotSupported", f"--object {kind}: only secret is known")
        name = options.pop("id", "")
        raw = options.pop("data", None)
        path = options.pop("file", None)
        coding = options.pop("format", "raw")
        if options:
            raise VmbusError("NotSupported", f"--object secret: the option {min(options)}")
        if not name or (raw is None) == (path is None) or coding not in {"raw", "base64"}:
            raise VmbusError(
                "InvalidArgument", "--object secret,id=ID,data=TEXT or file=PATH[,format=raw|base64]"
            )
        if raw is not None:
            data = raw.encode()
        else:
            with open(cast(str, path), "rb") as file:
                data = file.read()
        if coding == "base64":
            import base64  # noqa: PLC0415

            try:
                data = base64.b64decode(data, validate=raw is not None)
            except ValueError:
                raise VmbusError("InvalidArgument", f"secret {name} is not base64") from None
        found[name] = Secret(data)
    return found


def pairs(text: str) -> dict[str, str]:
    """``a=b,c=d`` as a dictionary; a comma within a value is written twice."""
    found: dict[str, str] = {}
    for pair in text.replace(",,", "\0").split(",") if text else []:
        name, equals, value = pair.replace("\0", ",").partition("=")
        if not equals:
            raise VmbusError("InvalidArgument", f"'{pair}' is not of the form NAME=VALUE")
        found[name] = value
    return found


def secret(known: Secrets, name: str) -> Secret:
    """The passphrase with this id."""
    if name not in known:
        raise VmbusError("InvalidArgument", f"No secret with id '{name}': give it with --object secret")
    return known[name]


def secret_chain(names: Sequence[str], known: Secrets) -> tuple[Secret | None, ...]:
    """The passphrases of a chain's layers, by their ids; an empty one for a layer without."""
    return tuple(secret(known, name) if name else None for name in names)


def encryption(given: dict[str, str], known: Secrets) -> Encryption:
    """The ``encrypt.*`` options of a new image, without their prefix."""
    left = dict(given)
    match left.pop("format", ""):
        case "luks":
            pass
        case "aes":
            raise VmbusError("NotSupported", "encrypt.format=aes: it is only read; encrypt.format=luks")
        case other:
            raise VmbusError("InvalidArgument", f"encrypt.format is luks, not '{other}'")
    if "key-secret" not in left:
        raise VmbusError("InvalidArgument", "Parameter 'encrypt.key-secret' is required for cipher")
    made = Encryption(
        secret(known, left.pop("key-secret")),
        cipher=left.pop("cipher-alg", None),
        mode=left.pop("cipher-mode", None),
        ivgen=left.pop("ivgen-alg", None),
        ivgen_hash=left.pop("ivgen-hash-alg", None),
        hash=left.pop("hash-alg", None),
        iter_time=milliseconds(left.pop("iter-time", "2000")),
    )
    if left:
        raise VmbusError("InvalidArgument", f"Invalid parameter 'encrypt.{min(left)}'")
    return made


def milliseconds(text: str) -> int:
    """``encrypt.iter-time``: 1 to 600,000."""
    if not text.isdecimal() or not 0 < int(text) <= 600_000:
        raise VmbusError("InvalidArgument", "encrypt.iter-time is 1 to 600000 milliseconds")
    return int(text)


def source(text: str, stated: str | None, known: Secrets, *, options: bool = False) -> Source:
    """The image that ``text`` means: a path, ``json:{...}``, or options if ``options`` is set."""
    if text.startswith("json:"):
        try:
            given = flat(json.loads(text.removeprefix("json:")))
        except (json.JSONDecodeError, TypeError):
            raise VmbusError("InvalidArgument", "Could not parse the JSON options") from None
    elif options:
        given = pairs(text)
    else:
        return Source(text, cast(Format, stated) if stated else image.probe(text))
    path = given.pop("file.filename", None) or given.pop("filename", None)
    if path is None:
        raise VmbusError("InvalidArgument", "the image's options lack file.filename")
    format = given.pop("driver", stated) or image.probe(path)
    if format not in image.FORMATS:
        raise VmbusError("InvalidArgument", f"Unknown driver '{format}'")
    found: list[Secret | None] = []
    for name, value in sorted(given.items()):
        depth, rest = 0, name
        while rest.startswith("backing."):
            depth, rest = depth + 1, rest.removeprefix("backing.")
        if rest == _KEY and depth < image.MAX_LAYERS:
            found += [None] * (depth + 1 - len(found))
            found[depth] = secret(known, value)
        elif _IDLE.get(rest) != value:
            raise VmbusError("NotSupported", f"the image option {name}={value}")
    return Source(path, format, tuple(found))


def flat(given: Any, prefix: str = "") -> dict[str, str]:
    """Nested objects as one, with dots in the names. TypeError for anything but objects and strings."""
    if not isinstance(given, dict):
        raise TypeError(prefix)
    found: dict[str, str] = {}
    for name, value in given.items():
        if isinstance(value, str):
            found[prefix + name] = value
        else:
            found |= flat(value, f"{prefix}{name}.")
    return found
