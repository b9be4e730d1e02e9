# SPDX-License-Identifier: Apache-2.0
"""A way out of the host for user networking, and somebody out there.

passt takes addresses and routes from the interface with the default route. Where the host has none (a nested
host, a machine without a network) the near end of a veth pair plays it. The far end is in a namespace of its
own, with a TCP server that greets whoever connects.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
from collections.abc import Iterator
from typing import Final

OUTSIDE: Final = "198.51.100.1"
"""The address of the server."""
PORT: Final = 7080
_numbers = itertools.count()
_SERVER: Final = f"""
import socket
with socket.create_server(("{OUTSIDE}", {PORT})) as server:
    print("ready", flush=True)
    while True:
        with server.accept()[0] as connection:
            connection.sendall(b"welcome\\n")
"""


def _ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


@contextlib.contextmanager
def uplink() -> Iterator[str]:
    """There is a default route, and a server at OUTSIDE, meanwhile; the name of the namespace out there."""
    # Names of their own: what goes with a namespace goes a little later.
    number = next(_numbers)
    near, far, space = (f"vmb{letter}{os.getpid()}.{number}" for letter in "uvw")
    _ip("netns", "add", space)
    try:
        _ip("link", "add", near, "type", "veth", "peer", "name", far, "netns", space)
        _ip("address", "add", "198.51.100.2/24", "dev", near)
        _ip("link", "set", near, "up")
        _ip("-n", space, "address", "add", f"{OUTSIDE}/24", "dev", far)
        _ip("-n", space, "link", "set", far, "up")
        if not _ip("-4", "route", "show", "default"):
            _ip("route", "add", "default", "via", OUTSIDE)
        inside = ["ip", "netns", "exec", space, "python3", "-c", _SERVER]
        with subprocess.Popen(inside, stdout=subprocess.PIPE) as server:
            assert server.stdout and server.stdout.readline() == b"ready\n"
            try:
                yield space
            finally:
                server.kill()
    finally:
        _ip("netns", "del", space)  # the pair goes with its far end
