# SPDX-License-Identifier: Apache-2.0
"""Whether a path lies beneath a directory that broker.toml grants; nothing is looked at."""

from vmbus.broker.children import Channel
from vmbus.broker.policy import Rights
from vmbus.wire.errors import VmbusError


def check(rights: Rights, wanted: list[str], channel: Channel) -> None:
    """A child's work: whether all of these are granted. Reports how many there are."""
    channel.report(len([split(rights, path) for path in wanted]))


def split(rights: Rights, path: str) -> tuple[str, str]:
    """Split ``path`` into a granted prefix (the longest that fits) and the rest.

    Raises InvalidArgument for "." and "..", AccessDenied for a path that no grant covers.
    """
    parts = [part for part in path.split("/") if part]
    if not path.startswith("/") or "\0" in path or not {".", ".."}.isdisjoint(parts):
        raise VmbusError("InvalidArgument", f"'{path}' is not absolute without . and ..", argument="path")
    for prefix in sorted(rights.prefixes, key=len, reverse=True):
        head = [part for part in prefix.split("/") if part]
        if ".." not in head and parts[: len(head)] == head and len(parts) > len(head):
            return "/" + "/".join(head), "/".join(parts[len(head) :])
    places = ", ".join(rights.prefixes) or "nothing"
    message = f"'{path}' is in no directory granted to {rights.name} by [open] of broker.toml ({places})"
    raise VmbusError("AccessDenied", message, argument="path")
