# SPDX-License-Identifier: Apache-2.0
"""A D-Bus client that costs next to nothing, so that what is timed is the service and the bus.

Arguments: bus socket, destination, path, interface, member, signature of the arguments ("" or "u"), calls,
calls under way at once. The call is put together once and sent again and again with another serial; of a
reply only its length and its kind are read. Prints JSON: seconds in all, and each call's own (only when one
is under way at a time).

Layout of messages: D-Bus specification, "Message Format"; numbers are little-endian.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import sys
import time

SERIAL = 8  # offset of the serial in a message
METHOD_RETURN, ERROR = 2, 3


def field(code: int, signature: str, value: str) -> bytes:
    """One header field, without the padding behind it."""
    head = bytes([code, 1]) + signature.encode() + b"\0"
    raw = value.encode()
    if signature == "g":
        return head + bytes([len(raw)]) + raw + b"\0"
    return head + struct.pack("<I", len(raw)) + raw + b"\0"


def message(destination: str, path: str, interface: str, member: str, signature: str) -> bytearray:
    """A method call; a "u" argument is 0."""
    fields = bytearray()
    for code, kind, value in (
        (1, "o", path),
        (2, "s", interface),
        (3, "s", member),
        (6, "s", destination),
        (8, "g", signature),
    ):
        if value:
            fields += bytes(-len(fields) % 8) + field(code, kind, value)
    body = struct.pack("<I", 0) if signature == "u" else b""
    head = struct.pack("<cBBBIII", b"l", 1, 0, 1, len(body), 1, len(fields))
    return bytearray(head + fields + bytes(-(len(head) + len(fields)) % 8) + body)


class Connection:
    """A connection that sends what it is given and reads the replies' kinds."""

    def __init__(self, place: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(place)
        self._socket.sendall(b"\0AUTH EXTERNAL " + str(os.getuid()).encode().hex().encode() + b"\r\n")
        answer = self._socket.recv(4096)
        assert answer.startswith(b"OK"), answer
        self._socket.sendall(b"BEGIN\r\n")
        self._buffer = bytearray()
        bus = "org.freedesktop.DBus"
        self.send(message(bus, "/org/freedesktop/DBus", bus, "Hello", ""))
        self.replies(1)

    def send(self, data: bytes | bytearray) -> None:
        """Send as it is."""
        self._socket.sendall(data)

    def replies(self, least: int) -> int:
        """Read until there are ``least`` replies; how many there were. Signals are passed over."""
        count = 0
        while True:
            while (length := self._length()) is not None:
                kind = self._buffer[1]
                if kind == ERROR:
                    raise SystemExit(f"an error came back: {bytes(self._buffer[:length])!r}")
                count += kind == METHOD_RETURN
                del self._buffer[:length]
            if count >= least:
                return count
            data = self._socket.recv(1 << 20)
            if not data:
                raise SystemExit("the bus has hung up")
            self._buffer += data

    def _length(self) -> int | None:
        """Of the first message in the buffer, None if it is not there whole."""
        if len(self._buffer) < 16:
            return None
        (body,) = struct.unpack_from("<I", self._buffer, 4)
        (fields,) = struct.unpack_from("<I", self._buffer, 12)
        length = 16 + fields + (-fields % 8) + body
        return length if len(self._buffer) >= length else None


def main() -> None:
    """See the module's note."""
    place, destination, path, interface, member, signature = sys.argv[1:7]
    calls, at_once = int(sys.argv[7]), int(sys.argv[8])
    connection = Connection(place)
    call = message(destination, path, interface, member, signature)
    serial, done, under_way, single = 2, 0, 0, []
    begin = time.perf_counter()
    while done < calls:
        burst = bytearray()
        while under_way < at_once and done + under_way < calls:
            struct.pack_into("<I", call, SERIAL, serial)
            burst += call
            serial, under_way = serial + 1, under_way + 1
        sent = time.perf_counter()
        connection.send(burst)
        count = connection.replies(1)
        if at_once == 1:
            single.append(time.perf_counter() - sent)
        done, under_way = done + count, under_way - count
    print(json.dumps({"seconds": time.perf_counter() - begin, "single": single}))


main()
