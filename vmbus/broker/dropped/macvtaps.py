# SPDX-License-Identifier: Apache-2.0
"""A macvtap on an allowed interface, by two children that keep CAP_NET_ADMIN: made by one, handed over by the
other.

The kernel makes a character device /dev/tapN for interface number N, which is root's: so the first child
makes the interface and says its number, and the second begins with that device opened, once a queue. Unlike
a tap it stays when its last descriptor is closed, and is deleted by its mark when the machine has ended or
its slot is empty (links.py).

What holds of a guest: it is sent what is for its own MAC address, and what is for a group; frames for others
do not get there, whatever the guest does, since the interface is never promiscuous. (All groups, because
the guest's own list does not reach the interface, and IPv6 finds its neighbours by groups.) What the guest
sends passes the same rules as on a bridge, at the interface's egress, before the mode decides where it
goes: without them macvlan takes any source address. Sources: drivers/net/{macvlan,tap}.c; numbers from
include/uapi/linux/{if_tun,if_link}.h.
"""

import errno
import fcntl
import os
import socket
import stat
import struct
from typing import Final

from vmbus.broker.children import Channel
from vmbus.broker.dropped import links, nft, spoofing
from vmbus.broker.dropped.links import attribute
from vmbus.broker.steps import Step, carry_out, take_back
from vmbus.wire import packet
from vmbus.wire.broker import Tap
from vmbus.wire.errors import VmbusError
from vmbus.wire.inlet import Delivery

MODES: Final = {"private": 1, "vepa": 2, "bridge": 4}
MTU: Final = 1500  # the guest's
_MACVLAN_MODE = 1
_TUNSETIFF = 0x400454CA
_FLAGS = 0x0002 | 0x0100 | 0x1000 | 0x4000  # IFF_TAP, IFF_MULTI_QUEUE, IFF_NO_PI, IFF_VNET_HDR


class _MakeLink:
    """Step: the interface, marked, and down."""

    def __init__(self, name: str, mark: str, request: Tap) -> None:
        self.name, self.mark, self.request = name, mark, request

    def describe(self) -> str:
        return f"macvtap {self.name} on {self.request.interface}, mode {self.request.mode}"

    def execute(self) -> None:
        parent = socket.if_nametoindex(self.request.interface)
        mtu = min(MTU, int((links.NET / self.request.interface / "mtu").read_text()))
        mode = attribute(_MACVLAN_MODE, struct.pack("I", MODES[self.request.mode]))
        info = attribute(links.INFO_KIND, b"macvtap") + attribute(links.INFO_DATA, mode)
        links.create(
            attribute(links.NAME, self.name.encode() + b"\0")
            + attribute(links.LINK, struct.pack("I", parent))
            + attribute(links.ADDRESS, bytes.fromhex(self.request.mac.replace(":", "")))
            + attribute(links.MTU, struct.pack("I", mtu))
            + attribute(links.INFO, info)
        )
        links.change(socket.if_nametoindex(self.name), 0, attribute(links.ALIAS, self.mark.encode()))

    def undo(self) -> None:
        links.delete(socket.if_nametoindex(self.name))


class _BringUp:
    """Step: it hears and is heard. From here on its MAC address is taken on that interface."""

    def __init__(self, name: str, request: Tap) -> None:
        self.name, self.request = name, request

    def describe(self) -> str:
        return f"{self.name} up, with all groups"

    def execute(self) -> None:
        try:
            links.change(socket.if_nametoindex(self.name), links.UP | links.ALLMULTI, b"")
        except OSError as error:
            if error.errno not in {errno.EBUSY, errno.EADDRINUSE}:
                raise
            message = f"{self.request.mac} is another's on interface '{self.request.interface}'"
            raise VmbusError("InUse", message, argument="mac") from None

    def undo(self) -> None:
        pass


def _steps(request: Tap, name: str, mark: str) -> list[Step]:
    """What ``prepare`` carries out, and ``make`` tells of, or takes back."""
    rules = spoofing.Rules(mark, name, request.mac, request.address, nft.EGRESS)
    return [_MakeLink(name, mark, request), rules, _BringUp(name, request)]


def prepare(request: Tap, name: str, mark: str, channel: Channel) -> None:
    """Make it, with its rules. Reports its number. Raises VmbusError."""
    interface = request.interface
    if not (links.NET / interface).is_dir():
        raise VmbusError(
            "NotFound", f"there is no interface '{interface}' on this host", argument="interface"
        )
    links.remove([], [mark])  # of a slot whose end was not told
    try:
        carry_out(_steps(request, name, mark))
        index = socket.if_nametoindex(name)
    except OSError as error:
        hint = "; a port of a bridge or a bond takes none" if error.errno == errno.EBUSY else ""
        message = f"no macvtap on interface '{interface}': {error.strerror}{hint}"
        raise VmbusError("Unavailable", message, argument="interface") from None
    channel.report(index)


def make(request: Tap, name: str, mark: str, channel: Channel) -> None:
    """Kept: the inlet, the interface's device once a queue, and /dev/vhost-net as often or never. Reports
    what was made."""
    inlet, *opened = channel.fds
    queues = opened[: request.queues]
    made = _steps(request, name, mark)
    try:
        for queue in queues:
            if not stat.S_ISCHR(os.fstat(queue).st_mode):
                raise OSError(errno.ENOTTY, "its device is none")
            os.set_blocking(queue, False)
            fcntl.ioctl(queue, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _FLAGS))
        packet.send(socket.socket(fileno=inlet), Delivery(slot=request.slot), opened)
    except OSError as error:
        take_back(made)
        raise VmbusError("Disconnected", f"the macvtap is not handed over: {error.strerror}") from None
    helped = ["vhost-net"] if opened[request.queues :] else []
    channel.report("; ".join([*(step.describe() for step in made), f"{len(queues)} queue(s)", *helped]))
