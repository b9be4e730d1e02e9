# SPDX-License-Identifier: Apache-2.0
"""Network interfaces of machines: made, marked and taken away, spoken to rtnetlink directly.

Each carries a mark (ifalias ``vmbus:INSTANCE:UUID:UID;SLOT;``), and only what carries the instance's mark is
ever swept. Whoever does this holds CAP_NET_ADMIN, so it loads nothing that is large. Numbers from
include/uapi/linux/{if,if_link,rtnetlink,netlink}.h.
"""

import os
import socket
import struct
from pathlib import Path

from vmbus.broker.children import Channel
from vmbus.broker.dropped import nft

NET = Path("/sys/class/net")
UP, ALLMULTI = 0x1, 0x200  # interface flags
ADDRESS, NAME, MTU, LINK, ALIAS, INFO = 1, 3, 4, 5, 20, 18  # attributes of a link
INFO_KIND, INFO_DATA = 1, 2
_NEWLINK, _DELLINK = 16, 17
_REQUEST, _ACK, _EXCL, _CREATE = 1, 4, 0x200, 0x400


def attribute(kind: int, value: bytes) -> bytes:
    """One attribute, padded."""
    return struct.pack("HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def create(attributes: bytes) -> None:
    """A new interface. Raises OSError."""
    _ask(_NEWLINK, _CREATE | _EXCL, 0, 0, attributes)


def change(index: int, flags: int, attributes: bytes) -> None:
    """Set flags and attributes of one. Raises OSError."""
    _ask(_NEWLINK, 0, index, flags, attributes)


def delete(index: int) -> None:
    """Take one away; that it has gone is fine, and so is that it does not go: a sweep tries again."""
    try:
        _ask(_DELLINK, 0, index, 0, b"")
    except OSError:
        return


def sweep(keep: list[str], prefixes: list[str], uids: range, channel: Channel) -> None:
    """``remove``, as a child's whole work. Reports how many interfaces."""
    channel.report(remove(keep, prefixes, uids))


def remove(keep: list[str], prefixes: list[str], uids: range = range(0)) -> int:
    """Delete what has a mark that begins with one of ``prefixes`` and with none of ``keep``: taps, macvtaps,
    and rules. Also a macvtap named for one of ``uids`` that was never marked, since whoever made it was
    killed between the two. How many interfaces."""
    gone = 0
    for entry in NET.iterdir() if NET.is_dir() else ():
        try:
            mark = (entry / "ifalias").read_text().strip()
            index = int((entry / "ifindex").read_text())
        except (OSError, ValueError):
            continue
        stays = (entry / "macvtap").exists()
        ours = mark.startswith(tuple(prefixes)) and not mark.startswith(tuple(keep))
        unmarked = stays and not mark and _uid_in(entry.name) in uids
        if (ours and (stays or (entry / "tun_flags").exists())) or unmarked:
            delete(index)
            gone += 1
    begins = tuple(nft.table_of(prefix) for prefix in prefixes)
    kept = tuple(nft.table_of(mark) for mark in keep)
    nft.delete(
        (family, name)
        for family, name in nft.tables()
        if name.startswith(begins) and not name.startswith(kept)
    )
    return gone


def _uid_in(name: str) -> int:
    """The uid in the name of a machine's interface (requests.py); -1 if there is none."""
    try:
        return int(name[2:10], 16) if name.startswith("vt") else -1
    except ValueError:
        return -1


def _ask(kind: int, flags: int, index: int, up: int, attributes: bytes) -> None:
    """One request, acknowledged."""
    body = struct.pack("BxHiII", socket.AF_UNSPEC, 0, index, up, up) + attributes
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as sock:
        sock.send(struct.pack("IHHII", 16 + len(body), kind, _REQUEST | _ACK | flags, 1, 0) + body)
        (negative,) = struct.unpack_from("i", sock.recv(4096), 16)
    if negative:
        raise OSError(-negative, os.strerror(-negative))
