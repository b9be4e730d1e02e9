# SPDX-License-Identifier: Apache-2.0
"""What a helper with the host's network may not reach: the host itself.

passt asks the kernel to connect to whatever address the guest has written, 127.0.0.1 and 0.0.0.0 among them,
and then speaks from within the host. So what a process with the helper's uid sends is dropped where it would
go out by a loopback interface: all addresses of the host are reached by that, its loopback's and the others.

What answers is let through, so that the host reaches a port of the guest's that is forwarded: a TCP segment
with ACK belongs to a connection, and the helper can have begun none, since its first segment would have no
ACK. UDP has nothing to tell an answer by. A port that is to be forwarded is tried here first: passt would
just end.

A guest that may reach the host does so by its gateway's address, which passt makes the loopback's: then there
is no fence.
"""

import errno
import os
import re
import socket
import struct

from vmbus.broker.children import Channel
from vmbus.broker.dropped import nft
from vmbus.wire.errors import VmbusError

_META_OIFTYPE, _META_SKUID, _META_L4PROTO = 9, 10, 16
_ARPHRD_LOOPBACK = 772
_TRANSPORT, _FLAGS, _ACK = 2, 13, 0x10
NO_HOST = "--no-map-gw"
"""Of a command line: the gateway's address is not the host's loopback."""
_FORWARD = re.compile(r"-([tu])([0-9.]+)/([0-9]+):[0-9]+")


def fence(uid: int, mark: str, command: list[str], channel: Channel) -> None:
    """Reports what was done. Raises Unavailable without nftables: then there is no such network.

    Raises InUse, AccessDenied, InvalidArgument for a port that ``command`` cannot have to forward.
    """
    for option in command:
        if forward := _FORWARD.fullmatch(option):
            _try(*forward.groups())
    if NO_HOST not in command:
        channel.report(f"uid {uid} reaches this host itself")
        return
    to_itself = [
        *(nft.meta(_META_SKUID), nft.compare(nft.EQUAL, struct.pack("I", uid))),
        *(nft.meta(_META_OIFTYPE), nft.compare(nft.EQUAL, struct.pack("H", _ARPHRD_LOOPBACK))),
    ]
    answer = [
        *(nft.meta(_META_L4PROTO), nft.compare(nft.EQUAL, bytes([socket.IPPROTO_TCP]))),
        *(nft.payload(_TRANSPORT, _FLAGS, 1), nft.mask(bytes([_ACK])), nft.compare(nft.EQUAL, bytes([_ACK]))),
    ]
    rules = [[*to_itself, *answer, nft.verdict(nft.ACCEPT)], [*to_itself, nft.verdict(nft.DROP)]]
    table = nft.table_of(mark)
    try:
        nft.install(nft.INET, table, nft.OUTPUT, "", nft.ACCEPT, rules)
    except OSError as error:
        message = f"the host's own addresses cannot be fenced off ({error.strerror}); nftables is needed"
        raise VmbusError("Unavailable", message) from None
    channel.report(f"nothing of uid {uid} reaches this host itself, table {table}")


def _try(protocol: str, address: str, port: str) -> None:
    kind = socket.SOCK_STREAM if protocol == "t" else socket.SOCK_DGRAM
    with socket.socket(type=kind) as sock:
        # As passt does: what lingers of an earlier connection does not hold the port.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, int(protocol == "t"))
        try:
            sock.bind((address, int(port)))
        except (OSError, OverflowError) as error:
            number = getattr(error, "errno", None) or 0
            kinds = {errno.EADDRINUSE: "InUse", errno.EACCES: "AccessDenied"}
            why = os.strerror(number) if number else "is no port"
            message = f"port {port} of {address} cannot be forwarded: {why}"
            raise VmbusError(kinds.get(number, "InvalidArgument"), message, argument="forwards") from None
