# SPDX-License-Identifier: Apache-2.0
"""A tap on an allowed bridge, made by a child as root and sent straight to the worker.

Its fds keep a tap alive, but whoever holds one can make it persistent: so it is deleted by its index when the
machine has ended. It carries a mark (ifalias ``vmbus:INSTANCE:UUID``), and only what carries the instance's
mark is ever swept. TUNSETIFF, the bridge's ioctls and the deletion take rtnl, which may be held for long:
hence a child. Numbers from include/uapi/linux/{if_tun,if,sockios,rtnetlink,netlink}.h.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from pathlib import Path
from typing import Final

import msgspec

from vmbus.broker.children import Channel
from vmbus.broker.steps import carry_out, take_back
from vmbus.wire import packet
from vmbus.wire.errors import VmbusError
from vmbus.wire.inlet import Delivery

_TUNSETIFF: Final = 0x400454CA
_IFF_TAP, _IFF_NO_PI, _IFF_MULTI_QUEUE, _IFF_VNET_HDR = 0x0002, 0x1000, 0x0100, 0x4000
_SIOCBRADDIF: Final = 0x89A2
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 0x1
_RTM_DELLINK, _NLM_F_REQUEST, _NLM_F_ACK, _NLMSG_ERROR = 17, 1, 4, 2

NET: Final = Path("/sys/class/net")


class Made(msgspec.Struct, frozen=True):
    """The child's report."""

    name: str
    index: int


class Wanted(msgspec.Struct, frozen=True):
    """A tap to be made: ``mark`` goes into its ifalias."""

    name: str
    bridge: str
    queues: int
    mark: str


class _MakeTap:
    """Step: the tap itself, one fd a queue."""

    def __init__(self, name: str, queues: int) -> None:
        self.name, self.queues = name, queues
        self.fds: list[int] = []

    def describe(self) -> str:
        return f"tap {self.name} with {self.queues} queue(s)"

    def execute(self) -> None:
        flags = _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR | (_IFF_MULTI_QUEUE if self.queues > 1 else 0)
        try:
            for _ in range(self.queues):
                self.fds.append(os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK))
                fcntl.ioctl(self.fds[-1], _TUNSETIFF, struct.pack("16sH22x", self.name.encode(), flags))
        except OSError:
            self.undo()
            raise

    def undo(self) -> None:
        for fd in self.fds:  # a tap that is not persistent goes with its last fd
            os.close(fd)
        self.fds.clear()


class _Join:
    """Step: mark it, make it a port of the bridge, and bring it up. The tap's end takes it out again."""

    def __init__(self, name: str, bridge: str, mark: str) -> None:
        self.name, self.bridge, self.mark = name, bridge, mark

    def describe(self) -> str:
        return f"{self.name} a port of bridge {self.bridge}, marked {self.mark}, up"

    def execute(self) -> None:
        (NET / self.name / "ifalias").write_text(self.mark)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            index = socket.if_nametoindex(self.name)
            fcntl.ioctl(sock, _SIOCBRADDIF, struct.pack("16si20x", self.bridge.encode(), index))
            request = struct.pack("16sH22x", self.name.encode(), 0)
            (flags,) = struct.unpack_from("H", fcntl.ioctl(sock, _SIOCGIFFLAGS, request), 16)
            fcntl.ioctl(sock, _SIOCSIFFLAGS, struct.pack("16sH22x", self.name.encode(), flags | _IFF_UP))

    def undo(self) -> None:
        pass


def make(wanted: Wanted, slot: str, channel: Channel) -> None:
    """The child's whole work; the inlet is its one kept descriptor. Reports ``Made``. Raises VmbusError."""
    name, bridge = wanted.name, wanted.bridge
    if not (NET / bridge / "bridge").is_dir():
        raise VmbusError("NotFound", f"there is no bridge '{bridge}' on this host", argument="bridge")
    tap, join = _MakeTap(name, wanted.queues), _Join(name, bridge, wanted.mark)
    try:
        carry_out([tap, join])
    except OSError as error:
        message = f"no tap on bridge '{bridge}': {error.strerror}"
        raise VmbusError("Unavailable", message, argument="bridge") from None
    try:
        index = socket.if_nametoindex(name)
        packet.send(socket.socket(fileno=channel.fds[0]), Delivery(slot=slot), tap.fds)
    except OSError as error:
        take_back([tap, join])
        raise VmbusError("Disconnected", f"the worker does not take the tap: {error.strerror}") from None
    channel.report(Made(name, index))


def left_over(instance: str, uuids: set[str] | None) -> list[int]:
    """Indexes of interfaces that carry this instance's mark; with ``uuids``, those of other machines only."""
    found = []
    for entry in NET.iterdir() if NET.is_dir() else ():
        try:
            mark = (entry / "ifalias").read_text().strip().split(":")
            index = int((entry / "ifindex").read_text())
        except (OSError, ValueError):
            continue
        if mark[:2] == ["vmbus", instance] and len(mark) == 3 and (uuids is None or mark[2] not in uuids):
            found.append(index)
    return found


def mark_of(instance: str, uuid: str) -> str:
    """What the taps of machine ``uuid`` carry in ifalias."""
    return f"vmbus:{instance}:{uuid}"


def delete(instance: str, keep: set[str], channel: Channel) -> None:
    """The child that sweeps: this instance's taps whose machine is not in ``keep``. Reports how many."""
    gone = 0
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as netlink:
        for index in left_over(instance, keep):
            body = struct.pack("BxHiII", socket.AF_UNSPEC, 0, index, 0, 0)
            head = struct.pack("IHHII", 16 + len(body), _RTM_DELLINK, _NLM_F_REQUEST | _NLM_F_ACK, index, 0)
            netlink.send(head + body)
            answer = netlink.recv(4096)
            kind, error = struct.unpack_from("H", answer, 4)[0], struct.unpack_from("i", answer, 16)[0]
            gone += kind == _NLMSG_ERROR and error == 0
    channel.report(gone)
