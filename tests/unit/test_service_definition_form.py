# SPDX-License-Identifier: Apache-2.0
"""The D-Bus form of a definition: what is taken, what is refused and how the refusal reads."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from vmbus.wire import dbus_form
from vmbus.wire.broker import Spawn
from vmbus.wire.definition import (
    Definition,
    Disk,
    Kernel,
    Layer,
    Nic,
    boot_order,
    brought,
    grants,
    memory_floor,
    passt_options,
    slots,
)
from vmbus.wire.errors import VmbusError

LEAST: dict[str, Any] = {"name": "one", "memory": 64 << 20, "kernel": {"path": "/boot/vmlinuz"}}
DISK = {"id": "root", "layers": [{"format": "qcow2", "path": "/images/root.qcow2"}]}


def refusal(**changes: Any) -> VmbusError:
    with pytest.raises(VmbusError) as caught:
        dbus_form.parse({**LEAST, **changes})
    assert caught.value.kind == "InvalidArgument"
    return caught.value


def test_the_least_definition_gets_the_defaults() -> None:
    definition = dbus_form.parse(LEAST)
    assert definition == Definition(name="one", memory=64 << 20, kernel=Kernel(path="/boot/vmlinuz"))
    assert definition.vcpus == 1


def test_what_is_built_is_parsed_to_the_same() -> None:
    definition = Definition(
        name="full",
        memory=1 << 30,
        kernel=Kernel(path="/k", initrd_path="/i", cmdline="console=ttyS0"),
        vcpus=4,
        memory_kind="shareable",
        disks=[
            Disk(
                id="root",
                layers=[
                    Layer(format="qcow2", path="/a", backing_name="b.qcow2"),
                    Layer(format="qcow2", path="/b", data_name="b.raw", data_path="/b.raw"),
                ],
                serial="S1",
                queues=2,
            )
        ],
        nics=[Nic(id="net", mac="52:54:00:00:00:01", bridge="br0")],
        rng=False,
        balloon=False,
        prefault=True,
        memory_nodes=[0, 1],
        memory_minimum=1 << 29,
        on_reset="end",
    )
    assert dbus_form.parse(dbus_form.plain(definition)) == definition


def test_signatures_are_those_of_the_documentation() -> None:
    form = dbus_form.build(dbus_form.parse({**LEAST, "disks": [DISK]}))
    signatures = {key: signature for key, (signature, _) in form.items()}
    assert signatures["memory"] == "t"
    assert signatures["vcpus"] == "u"
    assert signatures["kernel"] == "a{sv}"
    assert signatures["disks"] == "aa{sv}"
    assert signatures["rng"] == "b"
    assert signatures["memory-minimum"] == "t"


@pytest.mark.parametrize("vcpus", [0, 17, 1000])
def test_a_number_of_vcpus_that_cannot_be_names_the_range(vcpus: int) -> None:
    assert str(refusal(vcpus=vcpus)) == f"vcpus: {vcpus} is not in 1–16"


@pytest.mark.parametrize("memory", [0, -1, 3 << 20, (510 << 30) + (1 << 20), 1 << 43])
def test_memory_out_of_range_is_refused(memory: int) -> None:
    assert str(refusal(memory=memory)) == f"memory: {memory} is not in {4 << 20}–{510 << 30}"


def test_memory_that_is_no_multiple_of_a_mebibyte_is_refused() -> None:
    assert "not a multiple of 1048576" in str(refusal(memory=(64 << 20) + 1))


@pytest.mark.parametrize("name", ["", "a/b", "../x", "-x", "a b", "a\n", "x" * 64, "a\0b"])
def test_a_name_that_cannot_be_is_refused(name: str) -> None:
    assert refusal(name=name).argument == "name"


def test_an_unknown_key_is_refused_with_what_it_may_have_meant() -> None:
    assert str(refusal(vcpu=2)) == "vcpu: there is no such key; did you mean vcpus?"


def test_an_unknown_key_inside_a_disk_is_named_with_its_place() -> None:
    assert refusal(disks=[{**DISK, "read_only": True}]).argument == "disks[0].read_only"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("memory", "64M"),
        ("memory", True),
        ("vcpus", 1.0),
        ("rng", 1),
        ("disks", {}),
        ("kernel", "/boot/vmlinuz"),
    ],
)
def test_a_value_of_another_type_is_refused(key: str, value: Any) -> None:
    assert refusal(**{key: value}).argument == key


@pytest.mark.parametrize("missing", ["name", "memory", "kernel"])
def test_what_is_required_is_named_when_it_is_missing(missing: str) -> None:
    with pytest.raises(VmbusError) as caught:
        dbus_form.parse({key: value for key, value in LEAST.items() if key != missing})
    assert caught.value.argument == missing


@pytest.mark.parametrize(
    ("disk", "argument"),
    [
        ({"id": "root", "layers": []}, "disks[0].layers"),
        ({"id": "Root", "layers": DISK["layers"]}, "disks[0].id"),
        ({"id": "root", "layers": [{"format": "vmdk", "path": "/a"}]}, "disks[0].layers[0].format"),
        ({"id": "root", "layers": [{"format": "qcow2"}]}, "disks[0].layers[0].path"),
        ({"id": "root", "layers": [{"format": "qcow2", "path": "a"}]}, "disks[0].layers[0].path"),
        (
            {"id": "root", "layers": [{"format": "qcow2", "path": "/a", "backing-name": "b"}]},
            "disks[0].layers",
        ),
        (
            {"id": "root", "layers": [{"format": "qcow2", "path": "/a"}, {"format": "raw", "path": "/b"}]},
            "disks[0].layers[0].backing-name",
        ),
        (
            {"id": "root", "layers": [{"format": "raw", "path": "/a", "data-name": "b", "data-path": "/b"}]},
            "disks[0].layers[0].format",
        ),
        (
            {"id": "root", "layers": [{"format": "qcow2", "path": "/a", "data-name": "b"}]},
            "disks[0].layers[0].data-path",
        ),
        ({"id": "root", "source": "fd", "layers": DISK["layers"]}, "disks[0].layers[0].path"),
    ],
)
def test_a_disk_that_contradicts_itself_is_refused(disk: dict[str, Any], argument: str) -> None:
    assert refusal(disks=[disk]).argument == argument


def test_two_devices_of_one_name_are_refused() -> None:
    assert refusal(disks=[DISK, DISK]).argument == "disks[1].id"


def test_a_group_mac_address_is_refused() -> None:
    nic = {"id": "net", "mac": "53:54:00:00:00:01", "bridge": "br0"}
    assert refusal(nics=[nic]).argument == "nics[0].mac"


def test_a_kernel_by_fd_has_no_path() -> None:
    assert refusal(kernel={"source": "fd", "path": "/k"}).argument == "kernel.source"
    kernel = dbus_form.parse({**LEAST, "kernel": {"source": "fd"}}).kernel
    assert kernel is not None and kernel.path is None


def test_a_machine_boots_a_kernel_or_firmware() -> None:
    without = {key: value for key, value in LEAST.items() if key != "kernel"}
    with pytest.raises(VmbusError, match="so is firmware") as caught:
        dbus_form.parse(without)
    assert caught.value.argument == "kernel"
    for key, value in {"firmware": "bios", "boot": ["disk"], "boot-menu": True}.items():
        assert refusal(**{key: value}).argument == key
    definition = dbus_form.parse({**without, "firmware": "uefi"})
    assert [slot.name for slot in slots(definition)] == []


def test_the_boot_order_is_classes_and_ids() -> None:
    disks = [{**DISK, "id": "cd", "cdrom": True}, {**DISK, "id": "root"}, {**DISK, "id": "data"}]
    nics = [{"id": "lan", "mac": "52:54:00:00:00:01", "bridge": "br0"}]
    least = {key: value for key, value in LEAST.items() if key != "kernel"}
    machine = {**least, "firmware": "bios", "disks": disks, "nics": nics}

    def order(*boot: str) -> list[str]:
        return boot_order(dbus_form.parse({**machine, "boot": list(boot)}))

    assert order() == ["disk/root", "disk/data", "disk/cd", "nic/lan"]
    assert order("network", "data", "disk") == ["nic/lan", "disk/data", "disk/root"]
    for boot, argument in ((["tape"], "boot[0]"), (["disk", "disk"], "boot[1]")):
        with pytest.raises(VmbusError) as caught:
            dbus_form.parse({**machine, "boot": boot})
        assert caught.value.argument == argument


def test_a_cd_rom_is_not_written() -> None:
    definition = dbus_form.parse({**LEAST, "disks": [{**DISK, "cdrom": True}]})
    assert [slot.writable for slot in slots(definition)] == [False, False]


def test_a_floor_above_the_ceiling_is_refused() -> None:
    minimum = LEAST["memory"] + (1 << 20)
    assert refusal(**{"memory-minimum": minimum}).argument == "memory-minimum"


def test_a_machine_is_never_asked_for_more_than_three_quarters_of_its_memory_unless_it_says_so() -> None:
    assert memory_floor(dbus_form.parse({**LEAST, "memory": 512 << 20})) == 128 << 20
    assert memory_floor(dbus_form.parse({**LEAST, "memory": 8 << 20})) == 4 << 20
    asked = {**LEAST, "memory": 512 << 20, "memory-minimum": 32 << 20}
    assert memory_floor(dbus_form.parse(asked)) == 32 << 20


def test_a_reserved_cid_is_none_of_a_guests() -> None:
    assert dbus_form.parse({**LEAST, "vsock": 3}).vsock == 3
    for cid in (1, 2):
        error = refusal(vsock=cid)
        assert error.argument == "vsock"
        assert "from 3 on" in error.message
    assert refusal(vsock=(1 << 32) - 1).argument == "vsock"


@pytest.mark.parametrize(
    ("forwards", "argument", "words"),
    [
        (["tcp:22"], "nics[0].forwards[0]", "a forward is tcp or udp"),
        (["sctp:8022:22"], "nics[0].forwards[0]", "a forward is tcp or udp"),
        (["tcp:80:80"], "nics[0].forwards[0]", "below 1024"),
        (["tcp:65536:80"], "nics[0].forwards[0]", "above 65535"),
        (["tcp:8000:65536"], "nics[0].forwards[0]", "above 65535"),
        (["tcp:1.2.3.400:8000:80"], "nics[0].forwards[0]", "not an IPv4 address"),
        (["udp:8053:53"], "nics[0].forwards[0]", "udp names an address"),
        (["udp:127.0.0.1:8053:53"], "nics[0].forwards[0]", "udp names an address"),
        (["tcp:8000:80", "tcp:0.0.0.0:8000:81"], "nics[0].forwards[1]", "twice"),
    ],
)
def test_a_forward_that_cannot_be_is_refused(forwards: list[str], argument: str, words: str) -> None:
    nic = {"id": "net", "mac": "52:54:00:00:00:01", "kind": "user", "forwards": forwards}
    error = refusal(nics=[nic])
    assert error.argument == argument
    assert words in error.message


def test_forwards_are_options_of_passt() -> None:
    forwards = ["tcp:8022:22", "tcp:0.0.0.0:8080:80", "udp:192.0.2.1:5353:53"]
    nic = {"id": "net", "mac": "52:54:00:00:00:01", "kind": "user", "forwards": forwards}
    options = passt_options(dbus_form.parse({**LEAST, "nics": [nic]}).nics[0])
    assert options == ["-t127.0.0.1/8022:22", "-t0.0.0.0/8080:80", "-u192.0.2.1/5353:53"]
    spawn = {"op": "spawn", "id": 1, "uuid": "6ba7b810-9dad-11d1-80b4-00c04fd430c8", "options": options}
    assert msgspec.convert(spawn, Spawn).options == options
    for option in ("-t8022:22", "--map-gw", "-t127.0.0.1/8022:22 -u1.1.1.1/1025:1"):
        with pytest.raises(msgspec.ValidationError):
            msgspec.convert({**spawn, "options": [option]}, Spawn)
    error = refusal(nics=[{**nic, "kind": "isolated", "network": "lan"}])
    assert error.argument == "nics[0].forwards"


def test_a_guest_that_reaches_its_host_takes_a_grant_of_its_own() -> None:
    nic = {"id": "net", "mac": "52:54:00:00:00:01", "kind": "user", "reach-host": True}
    definition = dbus_form.parse({**LEAST, "nics": [nic]})
    assert grants(definition.nics) == ["user-network-host"]
    assert brought(definition.nics) == {"user-network"}
    assert refusal(nics=[{**nic, "kind": "isolated", "network": "lan"}]).argument == "nics[0].reach-host"
