# SPDX-License-Identifier: Apache-2.0
"""Rules of nftables, spoken to the kernel directly: who does this holds one capability and executes nothing.

Whatever rules there are for one tap or helper are a table of their own, whose name is the mark of its
machine (in letters that nft takes), so that a sweep finds them when what they were for has gone. ``flush
ruleset`` takes them away, as it does everybody's. Sources: linux/netfilter/{nfnetlink,nf_tables}.h, nft
--debug=netlink.
"""

import os
import socket
import struct
from collections.abc import Iterable, Iterator

INET, NETDEV = 1, 5  # families
INGRESS, EGRESS, OUTPUT = 0, 1, 3  # hooks, the first two of NETDEV and the last of INET
DROP, ACCEPT = 0, 1
EQUAL, OTHER = 0, 1
_NETLINK_NETFILTER = 12
_BATCH_BEGIN, _BATCH_END = 16, 17
_NEWTABLE, _GETTABLE, _DELTABLE, _NEWCHAIN, _NEWRULE = (10 << 8 | number for number in (0, 1, 2, 3, 6))
_REQUEST, _ACK, _DUMP, _CREATE, _APPEND = 1, 4, 0x300, 0x400, 0x800
_ERROR, _DONE = 2, 3
_NESTED = 0x8000

Expression = tuple[str, bytes]


def table_of(mark: str) -> str:
    """What the name of a table begins with that has this mark, or a mark that begins so."""
    return mark.translate(str.maketrans(":-;+", "./._"))


def payload(base: int, offset: int, length: int) -> Expression:
    """Load bytes of the packet."""
    fields = [(1, 1), (2, base), (3, offset), (4, length)]
    return "payload", b"".join(_attribute(kind, _be32(number)) for kind, number in fields)


def meta(key: int) -> Expression:
    """Load what the kernel knows of the packet (NFT_META_*)."""
    return "meta", _attribute(1, _be32(1)) + _attribute(2, _be32(key))


def mask(bits: bytes) -> Expression:
    """Of what was loaded keep these bits."""
    data = _attribute(4 | _NESTED, _attribute(1, bits)) + _attribute(
        5 | _NESTED, _attribute(1, bytes(len(bits)))
    )
    numbers = [(1, 1), (2, 1), (3, len(bits))]
    return "bitwise", b"".join(_attribute(kind, _be32(number)) for kind, number in numbers) + data


def compare(how: int, value: bytes) -> Expression:
    """Go on if what was loaded is ``value``, or (OTHER) is not."""
    data = _attribute(3 | _NESTED, _attribute(1, value))
    return "cmp", _attribute(1, _be32(1)) + _attribute(2, _be32(how)) + data


def verdict(code: int) -> Expression:
    """The end of a rule."""
    data = _attribute(2 | _NESTED, _attribute(1, _be32(code)))
    return "immediate", _attribute(1, _be32(0)) + _attribute(2 | _NESTED, data)


def install(
    family: int, table: str, hook: int, device: str, policy: int, rules: Iterable[list[Expression]]
) -> None:
    """Make a table with one chain at ``hook`` (of ``device``, "" for none), and rules. Raises OSError."""
    where = _attribute(1, _be32(hook)) + _attribute(2, _be32(0)) + (_string(3, device) if device else b"")
    chain = _string(1, table) + _string(3, "all") + _attribute(4 | _NESTED, where)
    chain += _attribute(5, _be32(policy)) + _string(7, "filter")
    messages = [(_NEWTABLE, _CREATE, _string(1, table)), (_NEWCHAIN, _CREATE, chain)]
    for rule in rules:
        parts = [_string(1, name) + _attribute(2 | _NESTED, data) for name, data in rule]
        body = b"".join(_attribute(1 | _NESTED, part) for part in parts)
        whole = _string(1, table) + _string(2, "all") + _attribute(4 | _NESTED, body)
        messages.append((_NEWRULE, _CREATE | _APPEND, whole))
    _transact(family, messages)


def delete(tables: Iterable[tuple[int, str]]) -> None:
    """Delete tables (family, name), each with all in it. Raises OSError."""
    for family, name in tables:
        _transact(family, [(_DELTABLE, 0, _string(1, name))])


def tables() -> list[tuple[int, str]]:
    """Family and name of all tables; [] on a kernel without nftables."""
    found = []
    try:
        with _open() as sock:
            sock.send(_message(_GETTABLE, _REQUEST | _DUMP, b"", 0))
            for kind, body in _answers(sock):
                if kind == _NEWTABLE:
                    found.append((body[0], _name_in(body[4:])))
    except OSError:
        return []
    return found


def _be32(value: int) -> bytes:
    return struct.pack(">I", value)


def _string(kind: int, text: str) -> bytes:
    return _attribute(kind, text.encode() + b"\0")


def _attribute(kind: int, data: bytes) -> bytes:
    return struct.pack("HH", 4 + len(data), kind) + data + bytes(-len(data) % 4)


def _message(kind: int, flags: int, body: bytes, family: int, resource: int = 0, number: int = 1) -> bytes:
    whole = struct.pack("BBH", family, 0, socket.htons(resource)) + body
    return struct.pack("IHHII", 16 + len(whole), kind, flags, number, 0) + whole


def _open() -> socket.socket:
    sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER)
    sock.settimeout(5)
    return sock


def _answers(sock: socket.socket) -> Iterator[tuple[int, bytes]]:
    """Kind and body of each message until the dump is done."""
    while True:
        data = sock.recv(1 << 16)
        while data:
            length, kind = struct.unpack_from("IH", data)
            if kind == _DONE:
                return
            if kind == _ERROR:
                _check(data)
            yield kind, data[16:length]
            data = data[(length + 3) & ~3 :]


def _name_in(attributes: bytes) -> str:
    """The string of attribute 1."""
    while len(attributes) >= 4:
        length, kind = struct.unpack_from("HH", attributes)
        if kind == 1:
            return attributes[4:length].rstrip(b"\0").decode(errors="replace")
        attributes = attributes[(length + 3) & ~3 :] if length else b""
    return ""


def _check(data: bytes) -> None:
    (negative,) = struct.unpack_from("i", data, 16)
    if negative:
        raise OSError(-negative, f"nftables: {os.strerror(-negative)}")


def _transact(family: int, messages: list[tuple[int, int, bytes]]) -> None:
    """One batch: all or nothing. Raises OSError with the first error."""
    batch = _message(_BATCH_BEGIN, _REQUEST, b"", 0, 10)
    for number, (kind, flags, body) in enumerate(messages, 2):
        batch += _message(kind, _REQUEST | _ACK | flags, body, family, 0, number)
    batch += _message(_BATCH_END, _REQUEST, b"", 0, 10)
    with _open() as sock:
        sock.send(batch)
        for _ in messages:
            answer = sock.recv(1 << 16)
            while answer:
                (length,) = struct.unpack_from("I", answer)
                _check(answer)
                answer = answer[(length + 3) & ~3 :]
