# SPDX-License-Identifier: Apache-2.0
"""/dev/kvm, opened for a worker that makes the virtual machine in its own process.

A VM fd made here would be of no use to it: KVM ties a VM to the memory of the process that made it.
"""

import os

from vmbus.wire.errors import VmbusError


def open_kvm() -> int:
    """An fd of /dev/kvm, close-on-exec, the caller's. Raises Unavailable."""
    try:
        return os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        hint = "load kvm-intel or kvm-amd, and switch virtualization on in the firmware"
        raise VmbusError("Unavailable", f"/dev/kvm cannot be opened ({error.strerror}); {hint}") from None
