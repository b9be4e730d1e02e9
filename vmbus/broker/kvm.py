# SPDX-License-Identifier: Apache-2.0
"""/dev/kvm, opened for a worker that makes the virtual machine in its own process.

A VM fd made here would be of no use to it: KVM ties a VM to the memory of the process that made it.
"""

import fcntl
import os

from vmbus.wire.errors import VmbusError

_KVM_GET_API_VERSION, _API_VERSION = 0xAE00, 12  # include/uapi/linux/kvm.h


def open_kvm() -> int:
    """An fd of /dev/kvm, close-on-exec, the caller's. Raises Unavailable."""
    try:
        fd = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        hint = "load kvm-intel or kvm-amd, and switch virtualization on in the firmware"
        raise VmbusError("Unavailable", f"/dev/kvm cannot be opened ({error.strerror}); {hint}") from None
    version = fcntl.ioctl(fd, _KVM_GET_API_VERSION)
    if version != _API_VERSION:
        os.close(fd)
        raise VmbusError("Unavailable", f"/dev/kvm speaks API version {version}, not {_API_VERSION}")
    return fd
