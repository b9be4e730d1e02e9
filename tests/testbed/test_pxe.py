# SPDX-License-Identifier: Apache-2.0
"""A machine with nothing but a network interface boots from the wire: SeaBIOS, iPXE's option ROM, DHCP, TFTP,
HTTP, and Debian's stock kernel; OVMF, DHCP, TFTP, and a loader."""

from __future__ import annotations

import functools
import http.server
import os
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab import efi_loader, initramfs, kernels
from tests.lab.bridge import RULE, bridge, grant
from tests.lab.guest import Console
from tests.lab.system import ALICE, System

pytestmark = [
    pytest.mark.requires("kvm-hardware", "tap", "bridge"),
    pytest.mark.long,
    pytest.mark.timeout(900),
]

BRIDGE = f"vmpx{os.getpid()}"
HOST = "10.97.0.1"
# Without end of line translation: iPXE reads it as it is.
BOOT = f"""\
#!ipxe
echo the script has come over the wire
kernel http://{HOST}:8080/vmlinuz console=ttyS0 quiet panic=-1 mitigations=off initrd=initrd
initrd http://{HOST}:8080/initrd
boot
"""
UEFI = 7
"""What a client of UEFI on x86-64 says that it is (RFC 4578, 2.1, as amended by erratum 4625)."""
GUEST = """\
echo "a kernel has booted: $(uname -r)"
poweroff -f
"""


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def served() -> Iterator[None]:
    """A bridge with an address, and what is given away there: addresses, the script, a kernel, an initrd."""
    kernel = kernels.stock("6.12")
    with bridge(BRIDGE, f"{HOST}/24"), tempfile.TemporaryDirectory() as place:
        (Path(place) / "boot.ipxe").write_text(BOOT)
        efi_loader.program(Path(place) / "boot.efi", "GRUB has come over the wire")
        (Path(place) / "vmlinuz").symlink_to(kernel.image)
        (Path(place) / "initrd").symlink_to(initramfs.guest(GUEST, kernel=kernel, modules=()))
        handler = functools.partial(Quiet, directory=place)
        server = http.server.ThreadingHTTPServer((HOST, 8080), handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        dnsmasq = subprocess.Popen(
            ["dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--port=0", "--user=root",
             f"--interface={BRIDGE}", "--bind-interfaces", "--dhcp-range=10.97.0.10,10.97.0.20",
             f"--dhcp-leasefile={place}/leases", "--enable-tftp", f"--tftp-root={place}",
             f"--dhcp-match=set:uefi,option:client-arch,{UEFI}", "--dhcp-boot=tag:uefi,boot.efi",
             "--dhcp-boot=tag:!uefi,boot.ipxe"],
        )  # fmt: skip
        try:
            yield
        finally:
            dnsmasq.kill()
            dnsmasq.wait()
            server.shutdown()
            server.server_close()


@pytest.mark.usefixtures("served")
@pytest.mark.soak
def test_ipxe_loads_a_script_and_boots_a_kernel_with_it() -> None:
    boots_from_the_wire("bios", "iPXE", "the script has come over the wire", "a kernel has booted: 6.12")


@pytest.mark.usefixtures("served")
@pytest.mark.soak
@pytest.mark.requires("guest-cr8")
def test_ovmf_boots_a_loader_over_the_wire() -> None:
    boots_from_the_wire("uefi", "GRUB has come over the wire")


def boots_from_the_wire(firmware: str, *said: str) -> None:
    """A machine boots by ``firmware``, its console has the texts of ``said``, and it powers off."""
    with System(policy=grant(BRIDGE)) as system:
        system.rule(RULE)

        def ctl(*words: str) -> str:
            done = system.run_as(ALICE, ["vmbusctl", *words])
            assert done.returncode == 0, done.stderr
            return done.stdout

        machine = ["--name", "wire", "--memory", "512M", "--firmware", firmware, "--boot", "network"]
        ctl("define", *machine, "--nic", BRIDGE)
        ctl("start", "wire")
        console = Console(system, ALICE, "wire")
        try:
            for text in said:
                console.wait_for(text, 240)
        finally:
            console.close()
        ctl("wait", "wire", "--timeout", "60")
