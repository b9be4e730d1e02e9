# SPDX-License-Identifier: Apache-2.0
"""``vmbus-img amend``: the key slots of an encrypted image, with qemu-img's options and rules.

| options (``encrypt.`` in front of each) | what happens                                            |
|-----------------------------------------|---------------------------------------------------------|
| ``state=active,new-secret=ID``          | the passphrase goes into the first inactive slot        |
| ``...,keyslot=N``                       | into that one                                           |
| ``...,old-secret=ID``                   | the image is opened with that one, not with the image's |
| ``state=inactive,keyslot=N``            | the slot is erased                                      |
| ``state=inactive,old-secret=ID``        | all slots that the passphrase opens are erased          |

The last active slot is erased, and an active one overwritten, only with ``--force``. Other options than
key slots are refused by name.
"""

from __future__ import annotations

from collections.abc import Sequence

from vmbus import image
from vmbus.cli import img_source
from vmbus.cli.img_source import Secrets, Source
from vmbus.image import Secret
from vmbus.wire.errors import VmbusError


def amend(source: Source, listed: Sequence[str], known: Secrets, *, force: bool) -> None:
    """Change the image as the ``-o`` options say."""
    if source.format == "raw":
        raise VmbusError("NotSupported", "Format driver 'raw' does not support option amendment")
    given = img_source.pairs(",".join(listed))
    if not given:
        raise VmbusError("InvalidArgument", "Must specify options (-o)")
    others = [name for name in given if not name.startswith("encrypt.")]
    if others:
        raise VmbusError("NotSupported", f"amend: the option {min(others)}")
    keys = {name.removeprefix("encrypt."): value for name, value in given.items()}
    _key_slots(source, keys, known, force=force)


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
