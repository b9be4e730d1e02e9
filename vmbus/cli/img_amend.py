# SPDX-License-Identifier: Apache-2.0
"""``vmbus-img amend``: compat, lazy_refcounts, refcount_bits, size, data_file and data_file_raw, and the key
slots of an encrypted image, with qemu-img's options and rules.

The order is qemu-img's: up to a newer version first, then the rest, down to an older one last. Each step is
whole in itself; what was done stays when a later one is refused.

| options (``encrypt.`` in front of each) | what happens                                            |
|-----------------------------------------|---------------------------------------------------------|
| ``state=active,new-secret=ID``          | the passphrase goes into the first inactive slot        |
| ``...,keyslot=N``                       | into that one                                           |
| ``...,old-secret=ID``                   | the image is opened with that one, not with the image's |
| ``state=inactive,keyslot=N``            | the slot is erased                                      |
| ``state=inactive,old-secret=ID``        | all slots that the passphrase opens are erased          |

The last active slot is erased, and an active one overwritten, only with ``--force``.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Final

from vmbus import image
from vmbus.cli import img_options, img_settings, img_size, img_source
from vmbus.cli.img_progress import progress
from vmbus.cli.img_source import Secrets, Source
from vmbus.image import Secret
from vmbus.wire.errors import VmbusError

CREATION: Final = frozenset(
    {"cluster_size", "preallocation", "extended_l2", "compression_type", "encryption"}
)
VERSIONS: Final = {"0.10": 2, "v2": 2, "1.1": 3, "v3": 3}


def run(options: SimpleNamespace) -> int:
    """Change the image as the ``-o`` options say."""
    img_source.cache(options.cache_t)
    listed = options.options
    if img_settings.wants_help(listed) and options.format is not None and not options.words:
        print(_listing(options.format))
        return 0
    if not listed:
        raise img_options.UsageError("Must specify options (-o)", "amend")
    if len(options.words) != 1:
        raise VmbusError("InvalidArgument", "Expecting one image file name")
    [text] = options.words
    known = img_source.secrets(options.objects)
    source = img_source.of(options, text, options.format)
    if source.format == "raw":
        if source.guessed:
            img_source.warn_of_guess(text)
        raise VmbusError("NotSupported", "Format driver 'raw' does not support option amendment")
    if img_settings.wants_help(listed):
        print(_listing(source.format))
        return 0
    given = img_source.pairs(",".join(listed))
    with progress(options) as report:
        others = {name: value for name, value in given.items() if not name.startswith("encrypt.")}
        _options(source, others)
        report(50, 100)
        keys = {name.removeprefix("encrypt."): value for name, value in given.items() if name not in others}
        if keys:
            _key_slots(source, keys, known, force=options.force)
        report(100, 100)
    return 0


def _listing(format: str) -> str:
    if format == "raw":
        raise VmbusError("NotSupported", "Format driver 'raw' does not support option amendment")
    img_settings.known_format(format)
    return img_settings.listing(f"Amend options for '{format}':", img_settings.AMENDED)


def _options(source: Source, given: dict[str, str]) -> None:
    def flag(name: str) -> bool | None:
        value = given.get(name)
        if value not in {None, "on", "off"}:
            raise VmbusError("InvalidArgument", f"Parameter '{name}' expects 'on' or 'off'")
        return None if value is None else value == "on"

    for name in given:
        if name in CREATION:
            message = f"Invalid parameter '{name}'\nThis option is only supported for image creation"
            raise VmbusError("InvalidArgument", message)
        if name in {"backing_file", "backing_fmt"}:
            message = "Cannot amend the backing file\nYou can use 'vmbus-img rebase' instead."
            raise VmbusError("InvalidArgument", message)
        if name not in {"compat", "lazy_refcounts", "refcount_bits", "size", "data_file", "data_file_raw"}:
            raise VmbusError("InvalidArgument", f"Invalid parameter '{name}'")
    version = VERSIONS.get(given["compat"]) if "compat" in given else None
    if "compat" in given and version is None:
        raise VmbusError("InvalidArgument", f"Unknown compatibility level {given['compat']}")
    lazy, raw = flag("lazy_refcounts"), flag("data_file_raw")
    length = img_size.parameter("size", given["size"]) if "size" in given else None
    bits = given.get("refcount_bits")
    if bits is not None and (not bits.isdecimal() or int(bits) not in {1, 2, 4, 8, 16, 32, 64}):
        message = "Refcount width must be a power of two and may not exceed 64 bits"
        raise VmbusError("InvalidArgument", message)
    target = version or _version(source)
    if target == 2 and lazy:
        raise VmbusError(
            "InvalidArgument",
            "Lazy refcounts only supported with compatibility level 1.1 and above "
            "(use compat=1.1 or greater)",
        )
    if target == 2 and bits not in {None, "16"}:
        raise VmbusError(
            "InvalidArgument",
            "Refcount widths other than 16 bits require compatibility level 1.1 or above "
            "(use compat=1.1 or greater)",
        )
    path, format, secrets = source.path, source.format, source.secrets
    if version == 3:
        with image.open(path, format, secrets=secrets, guess=True) as disk:
            disk.amend(version=3)
    if bits is not None and _version(source) == 3:
        image.set_refcount_bits(path, int(bits))
    with image.open(path, format, secrets=secrets, guess=True) as disk:
        if given.keys() & {"lazy_refcounts", "data_file", "data_file_raw"}:
            disk.amend(lazy_refcounts=lazy, data_file=given.get("data_file"), data_raw=raw)
        if length is not None:
            disk.resize(length, shrink=True)
        if version == 2:
            disk.amend(version=2)


def _version(source: Source) -> int:
    return int(image.info(source.path, source.format)["qcow2"]["version"])


def _key_slots(source: Source, given: dict[str, str], known: Secrets, *, force: bool) -> None:
    slot = _slot(given.pop("keyslot", None))
    state = given.pop("state", None)
    old, new = (_named(given.pop(name, None), known) for name in ("old-secret", "new-secret"))
    time = given.pop("iter-time", None)
    if given.pop("format", "luks") != "luks" or given:
        raise VmbusError("InvalidArgument", f"Invalid parameter 'encrypt.{min(given, default='format')}'")
    secret = source.secrets[0] if source.secrets else None
    match state:
        case "active":
            if new is None:
                raise VmbusError("InvalidArgument", "'encrypt.new-secret' is required to activate a keyslot")
            secret = old or secret
            milliseconds = 2000 if time is None else img_source.milliseconds(time)
            image.add_key(source.path, _needed(secret), new, slot=slot, iter_time=milliseconds, force=force)
        case "inactive":
            if new is not None or time is not None:
                unwanted = "new-secret" if new is not None else "iter-time"
                raise VmbusError(
                    "InvalidArgument", f"'encrypt.{unwanted}' must not be given when erasing keyslots"
                )
            if slot is None and old is None:
                raise VmbusError(
                    "InvalidArgument",
                    "To erase keyslot(s), either explicit keyslot index or the password currently contained "
                    "in them must be given",
                )
            image.erase_key(source.path, _needed(secret or old), slot=slot, old=old, force=force)
        case _:
            raise VmbusError("InvalidArgument", "'encrypt.state' is active or inactive")


def _slot(text: str | None) -> int | None:
    if text is None:
        return None
    if not text.isdecimal() or int(text) > 7:
        raise VmbusError("InvalidArgument", f"Invalid keyslot {text}: they are 0 to 7")
    return int(text)


def _named(name: str | None, known: Secrets) -> Secret | None:
    return None if name is None else img_source.secret(known, name)


def _needed(secret: Secret | None) -> Secret:
    if secret is None:
        raise VmbusError("InvalidArgument", "Parameter 'encrypt.key-secret' is required for cipher")
    return secret
