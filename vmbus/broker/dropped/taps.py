# SPDX-License-Identifier: Apache-2.0
"""A tap on an allowed bridge, made by a child that keeps CAP_NET_ADMIN only, and sent straight to the worker.

Its fds keep a tap alive, but whoever holds one can make it persistent: so it is deleted by its index when the
machine has ended. What a guest may say on it, spoofing.py has; how it is marked and swept, links.py.
TUNSETIFF, the bridge's ioctls and the deletion take rtnl, which may be held for long: hence a child. Numbers
from include/uapi/linux/{if_tun,sockios}.h.

Its own address is the guest's with another first byte, as high as it gets: a bridge without an address of its
own takes the lowest of its ports', and if that changed with each machine that comes and goes, the others
would go on speaking to one that nobody has.
"""

import fcntl
import os
import socket
import struct

from vmbus.broker.children import Channel
from vmbus.broker.dropped import links, nft, spoofing
from vmbus.broker.dropped.links import attribute
from vmbus.broker.steps import Step, carry_out, take_back
from vmbus.wire import packet
from vmbus.wire.broker import Tap
from vmbus.wire.errors import VmbusError
from vmbus.wire.inlet import Delivery

_TUNSETIFF = 0x400454CA
_IFF_TAP, _IFF_MULTI_QUEUE, _IFF_NO_PI, _IFF_VNET_HDR = 0x0002, 0x0100, 0x1000, 0x4000
_SIOCBRADDIF = 0x89A2


class _MakeTap:
    """Step: the tap itself, a queue for each of ``fds`` (opened /dev/net/tun)."""

    def __init__(self, name: str, fds: list[int]) -> None:
        self.name, self.fds = name, fds

    def describe(self) -> str:
        return f"tap {self.name} with {len(self.fds)} queue(s)"

    def execute(self) -> None:
        flags = _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR | (_IFF_MULTI_QUEUE if len(self.fds) > 1 else 0)
        for fd in self.fds:
            fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", self.name.encode(), flags))

    def undo(self) -> None:
        for fd in self.fds:  # a tap that is not persistent goes with its last fd
            os.close(fd)


class _Join:
    """Step: mark the tap, bring it up, make it a port of the bridge. The tap's end takes that along."""

    def __init__(self, name: str, bridge: str, mark: str, mac: str) -> None:
        self.name, self.bridge, self.mark, self.mac = name, bridge, mark, mac

    def describe(self) -> str:
        return f"{self.name} a port of bridge {self.bridge}, marked {self.mark}, up"

    def execute(self) -> None:
        index = socket.if_nametoindex(self.name)
        own = attribute(links.ADDRESS, address_of(self.mac))
        links.change(index, links.UP, own + attribute(links.ALIAS, self.mark.encode()))
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            fcntl.ioctl(sock, _SIOCBRADDIF, struct.pack("16si20x", self.bridge.encode(), index))

    def undo(self) -> None:
        pass


def address_of(mac: str) -> bytes:
    """A tap's own address: unicast, locally administered, and never that of its guest."""
    guest = bytes.fromhex(mac.replace(":", ""))
    return bytes([0xFA if guest[0] == 0xFE else 0xFE]) + guest[1:]


def make(request: Tap, name: str, mark: str, channel: Channel) -> None:
    """Kept: the inlet, /dev/net/tun once a queue, and /dev/vhost-net as often or never.

    Reports what was made. Raises VmbusError.
    """
    inlet, *opened = channel.fds
    queues = opened[: request.queues]
    for queue in queues:
        os.set_blocking(queue, False)
    bridge = request.bridge
    if not (links.NET / bridge / "bridge").is_dir():
        raise VmbusError("NotFound", f"there is no bridge '{bridge}' on this host", argument="bridge")
    rules = spoofing.Rules(mark, name, request.mac, request.address, nft.INGRESS)
    steps: list[Step] = [_MakeTap(name, queues), rules, _Join(name, bridge, mark, request.mac)]
    try:
        carry_out(steps)
    except OSError as error:
        message = f"no tap on bridge '{bridge}': {error.strerror}"
        raise VmbusError("Unavailable", message, argument="bridge") from None
    try:
        index = socket.if_nametoindex(name)
        packet.send(socket.socket(fileno=inlet), Delivery(slot=request.slot), opened)
    except OSError as error:
        take_back(steps)
        raise VmbusError("Disconnected", f"the worker does not take the tap: {error.strerror}") from None
    helped = ["vhost-net"] if opened[request.queues :] else []
    channel.report("; ".join([*(step.describe() for step in steps), *helped, f"index {index}"]))
