# SPDX-License-Identifier: Apache-2.0
"""What a helper with the host's network may not reach: the host itself.

passt asks the kernel to connect to whatever address the guest has written, 127.0.0.1 and 0.0.0.0 among them,
and then speaks from within the host. So what a process with the helper's uid sends is dropped where it would
go out by a loopback interface: all addresses of the host are reached by that, its loopback's and the others.
"""

import struct

from vmbus.broker.children import Channel
from vmbus.broker.dropped import nft
from vmbus.wire.errors import VmbusError

_META_OIFTYPE, _META_SKUID = 9, 10
_ARPHRD_LOOPBACK = 772


def fence(uid: int, mark: str, channel: Channel) -> None:
    """Reports what was done. Raises Unavailable without nftables: then there is no such network."""
    rule = [
        *(nft.meta(_META_SKUID), nft.compare(nft.EQUAL, struct.pack("I", uid))),
        *(nft.meta(_META_OIFTYPE), nft.compare(nft.EQUAL, struct.pack("H", _ARPHRD_LOOPBACK))),
        nft.verdict(nft.DROP),
    ]
    table = nft.table_of(mark)
    try:
        nft.install(nft.INET, table, nft.OUTPUT, "", nft.ACCEPT, [rule])
    except OSError as error:
        message = f"the host's own addresses cannot be fenced off ({error.strerror}); nftables is needed"
        raise VmbusError("Unavailable", message) from None
    channel.report(f"nothing of uid {uid} reaches this host itself, table {table}")
