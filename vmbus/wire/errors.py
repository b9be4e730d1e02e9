# SPDX-License-Identifier: Apache-2.0
"""Named errors: the one exception that crosses every boundary of vmbus.

A kind maps one to one to the D-Bus error name ``org.vmbus1.Error.<Kind>``. Handlers raise
``VmbusError``; exactly one place a protocol turns it into a reply.
"""

from __future__ import annotations

from typing import Final

KINDS: Final = frozenset(
    {
        "InvalidArgument",  # the argument is malformed, out of range or contradicts another
        "NotFound",  # no such machine, job, file or bridge
        "AlreadyExists",  # the name is taken by the same owner
        "AccessDenied",  # the caller, the owner or the broker's policy may not
        "NotAuthorized",  # polkit said no
        "QuotaExceeded",  # broker.toml's limit for this owner
        "InUse",  # an image or a slot that somebody else holds
        "InvalidState",  # the machine is not in a state in which this can be done
        "ImageInvalid",  # a disk image or kernel that is not what it is said to be
        "BackingChanged",  # the header names another backing file than the definition
        "NotSupported",  # this host, this CPU or this version cannot do it
        "Changed",  # the object changed while polkit was asked
        "Timeout",  # a deadline passed
        "Disconnected",  # the other side went away before it answered
        "Unavailable",  # polkitd, the broker or the kernel feature is not there
        "Restricted",  # the worker is older than this service can drive
        "Cancelled",  # the job was cancelled
        "Internal",  # a bug of ours; the log has the details
    }
)


class VmbusError(Exception):
    """An error with a kind, the argument it is about ("" if none) and a sentence for people.

    The sentence says what was wrong and what would work.
    """

    def __init__(self, kind: str, message: str, *, argument: str = "") -> None:
        assert kind in KINDS, kind
        super().__init__(message)
        self.kind = kind
        self.message = message
        self.argument = argument

    def __str__(self) -> str:
        return f"{self.argument}: {self.message}" if self.argument else self.message
