# SPDX-License-Identifier: Apache-2.0
"""Which image a word of the command line means, and with which passphrases it opens.

As in qemu-img, ``--object secret,id=ID,data=TEXT`` (or ``file=PATH``, and ``format=base64``) makes a
passphrase known under a name, and an image that needs one is named by its options: with ``--image-opts``
as ``driver=qcow2,file.filename=PATH,encrypt.key-secret=ID``, or as ``json:{...}`` with the same keys. The
passphrase of a backing file is ``backing.encrypt.key-secret``, of the next one
``backing.backing.encrypt.key-secret``, and so on. Other options of QEMU's block drivers are refused by name.

Where no format is given it looks at what the file is, as qemu-img does, and warns of what that means for a
raw one that is written to; scripts that handle other people's images should give one.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any, Final, NamedTuple, cast

from vmbus import image
from vmbus.image import DetectZeroes, Encryption, Format, Image, Secret
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
    guessed: bool = False
    """Nobody has stated the format."""


class Cache(NamedTuple):
    """What a cache mode asks for."""

    direct: bool
    """Go round the host's page cache."""
    sync: bool = True
    """Make things durable."""
    through: bool = False
    """Each write is durable before the next."""


CACHES: Final = {
    "none": Cache(direct=True),
    "off": Cache(direct=True),
    "directsync": Cache(direct=True, through=True),
    "writeback": Cache(direct=False),
    "writethrough": Cache(direct=False, through=True),
    "unsafe": Cache(direct=False, sync=False),
}


def cache(mode: str | None, usual: str = "writeback", wrong: str = "Invalid cache option: {}") -> Cache:
    """A cache mode by its name."""
    found = CACHES.get(mode or usual)
    if found is None:
        raise VmbusError("InvalidArgument", wrong.format(mode))
    return found


def of(options: SimpleNamespace, text: str, format: str | None = None) -> Source:
    """The image that an operand of a sub-command means, with the passphrases that its options name."""
    if options.by_options and format is not None:
        raise VmbusError("InvalidArgument", "--image-opts and --format are mutually exclusive")
    return source(text, format, secrets(options.objects), options=options.by_options)


def opened(
    source: Source,
    *,
    write: bool = False,
    share: bool = False,
    cache: Cache = CACHES["writeback"],
    snapshot: str | None = None,
    detect_zeroes: DetectZeroes = "off",
) -> Image:
    """Open an image with its chain. What is wrong with it says which image cannot be opened."""
    if write and share:
        raise VmbusError(
            "InvalidArgument",
            f"Could not open '{source.path}': force-share=on can only be used with read-only images",
        )
    if write and source.guessed and source.format == "raw":
        warn_of_guess(source.path)
    try:
        return image.open(
            source.path, source.format, secrets=source.secrets, read_only=not write, locks=not share,
            guess=True, snapshot=snapshot, direct=cache.direct, sync=cache.sync, detect_zeroes=detect_zeroes,
        )  # fmt: skip
    except VmbusError as error:
        raise VmbusError(error.kind, f"Could not open '{source.path}': {error}") from None
    except OSError as error:
        if error.filename == source.path:
            raise
        raise not_below(source.path, error) from None


def not_below(path: str, error: OSError) -> VmbusError:
    """The image at ``path`` cannot be opened because of a file that it names."""
    message = f"Could not open backing file: Could not open '{error.filename}': {error.strerror}"
    return VmbusError("InvalidArgument", f"Could not open '{path}': {message}")


def warn_of_guess(path: str) -> None:
    """Say what it means that a file is taken for a raw disk because it looks like nothing else."""
    print(
        f"WARNING: Image format was not specified for '{path}' and probing guessed raw.\n"
        "         Automatically detecting the format is dangerous for raw images, write operations on block "
        "0 will be restricted.\n"
        "         Specify the 'raw' format explicitly to remove the restrictions.",
        file=sys.stderr,
    )


def snapshot_id(source: Source, text: str, *, share: bool = False) -> str:
    """The id of the snapshot that ``-l`` means: ``snapshot.id=ID,snapshot.name=NAME`` with one of them or
    both, or an id or else a name."""
    if source.format == "raw":
        raise VmbusError(
            "NotSupported",
            "Failed to load snapshot: Block format 'raw' used by device '' does not support temporarily "
            "loading internal snapshots",
        )
    if text.startswith("snapshot."):
        given = pairs(text)
        wanted = {key.removeprefix("snapshot."): value for key, value in given.items()}
        if not set(wanted) <= {"id", "name"}:
            raise VmbusError("InvalidArgument", f"Invalid parameter '{min(set(given))}'")
    else:
        wanted = {}
    with opened(source, share=share) as one:
        found = one.snapshots()
    if wanted:
        matching = [one for one in found if all(one[key] == value for key, value in wanted.items())]
    else:
        matching = [one for one in found if one["id"] == text] or [
            one for one in found if one["name"] == text
        ]
    if not matching:
        raise VmbusError("InvalidArgument", "Failed to load snapshot: Can't find snapshot")
    return str(matching[0]["id"])


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
        raise VmbusError("InvalidArgument", f"No secret with id '{name}'")
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
        if stated is None:
            return Source(text, image.probe(text), guessed=True)
        if stated not in image.FORMATS:
            raise VmbusError("NotSupported", f"Could not open '{text}': Unknown driver '{stated}'")
        return Source(text, stated)
    path = given.pop("file.filename", None) or given.pop("filename", None)
    if path is None:
        raise VmbusError("InvalidArgument", "the image's options lack file.filename")
    driver = given.pop("driver", stated)
    format = driver or image.probe(path)
    if format not in image.FORMATS:
        raise VmbusError("NotSupported", f"Could not open '{text}': Unknown driver '{format}'")
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
    return Source(path, format, tuple(found), guessed=driver is None)


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
