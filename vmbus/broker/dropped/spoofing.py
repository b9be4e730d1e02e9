# SPDX-License-Identifier: Apache-2.0
"""What a guest may say of itself: rules at its tap, before the bridge sees a frame (netdev ingress), or at
its macvtap, before that sees it (netdev egress).

A frame must come from the machine's MAC address, without a VLAN's tag, and an ARP packet must say the same
inside. Where the machine's IPv4 address is given, that address alone is spoken of: in ARP (or none, RFC
5227), in IPv4 (or none, with which DHCP begins), and nothing else passes, IPv6 included; but for the reverse
ARP request for its own address with which a machine that goes on from a file says where it is. All else is
dropped.
"""

import socket
import struct

from vmbus.broker.dropped import nft

_LINK, _NETWORK, _TRANSPORT = 0, 1, 2  # bases of a payload expression
_EQUAL, _OTHER = nft.EQUAL, nft.OTHER

Match = tuple[int, int, int, bytes]  # base, offset, whether this or anything else must stand there
_IPV4, _ARP = (_LINK, 12, _EQUAL, b"\x08\x00"), (_LINK, 12, _EQUAL, b"\x08\x06")
_PLAIN = [(_LINK, 12, _OTHER, kind) for kind in (b"\x08\x06", b"\x81\x00", b"\x88\xa8")]
_REVERSE = (_LINK, 12, _EQUAL, b"\x80\x35")
_DHCP = [(_NETWORK, 9, _EQUAL, b"\x11"), (_TRANSPORT, 2, _EQUAL, struct.pack(">H", 67))]


def rules(mac: str, address: str) -> list[list[Match]]:
    """What passes: all matches of one of these. ``address``: IPv4, "" for any."""
    own = bytes.fromhex(mac.replace(":", ""))
    source = (_LINK, 6, _EQUAL, own)
    arp = [source, _ARP, (_NETWORK, 8, _EQUAL, own)]
    if not address:
        return [arp, [source, *_PLAIN]]
    only, none = socket.inet_aton(address), bytes(4)
    said = [[*arp, (_NETWORK, 14, _EQUAL, value)] for value in (only, none)]
    ipv4 = [[source, _IPV4, (_NETWORK, 12, _EQUAL, value)] for value in (only, none)]
    announced = [source, _REVERSE, (_NETWORK, 6, _EQUAL, b"\0\3" + own), (_NETWORK, 18, _EQUAL, own)]
    return [*said, ipv4[0], [*ipv4[1], *_DHCP], announced]


class Rules:
    """Step: the rules of one tap."""

    def __init__(self, mark: str, tap: str, mac: str, address: str, hook: int) -> None:
        self.table, self.tap, self.hook = nft.table_of(mark) + tap, tap, hook
        self.mac, self.address = mac, address

    def describe(self) -> str:
        return f"frames from {self.mac} {self.address or 'with any address'} only, table {self.table}"

    def execute(self) -> None:
        wanted = rules(self.mac, self.address)
        passing = [[*_expressions(matches), nft.verdict(nft.ACCEPT)] for matches in wanted]
        nft.install(nft.NETDEV, self.table, self.hook, self.tap, nft.DROP, passing)

    def undo(self) -> None:
        nft.delete([(nft.NETDEV, self.table)])


def _expressions(matches: list[Match]) -> list[nft.Expression]:
    found = []
    for base, offset, how, value in matches:
        found += [nft.payload(base, offset, len(value)), nft.compare(how, value)]
    return found
