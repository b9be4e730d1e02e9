# SPDX-License-Identifier: Apache-2.0
"""TOML and flags become one definition, or one error that names the key."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from vmbus.cli import description
from vmbus.cli.description import Flags
from vmbus.wire.definition import Definition, slots
from vmbus.wire.errors import VmbusError

GOOD = """
name = "web"
memory = "512M"
vcpus = 2
on-reset = "end"

[kernel]
path = "vmlinuz"
initrd-path = "initrd.img"
cmdline = "console=ttyS0"

[[disks]]
id = "root"
path = "root.raw"
format = "raw"
serial = "R1"

[[nics]]
id = "lan"
bridge = "br0"
mac = "52:54:00:00:00:01"
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    for name in ("vmlinuz", "initrd.img", "root.raw"):
        (tmp_path / name).write_bytes(bytes(512))
    (tmp_path / "web.toml").write_text(GOOD)
    return tmp_path


def as_written(definition: Definition) -> object:
    """What is not a default, with the keys of D-Bus."""

    def kebab(node: object) -> object:
        if isinstance(node, dict):
            return {key.replace("_", "-"): kebab(value) for key, value in node.items()}
        return [kebab(item) for item in node] if isinstance(node, list) else node

    return kebab(msgspec.to_builtins(definition))


def refused(file: Path | None, flags: Flags) -> VmbusError:
    with pytest.raises(VmbusError) as caught:
        description.build(str(file) if file else None, flags)
    return caught.value


def test_a_file_gives_every_key_and_paths_are_taken_from_its_directory(place: Path) -> None:
    found = description.build(str(place / "web.toml"), Flags())

    assert as_written(found) == {
        "name": "web",
        "memory": 512 << 20,
        "vcpus": 2,
        "machine-type": "vmbus-2",
        "on-reset": "end",
        "kernel": {
            "path": f"{place}/vmlinuz",
            "initrd-path": f"{place}/initrd.img",
            "cmdline": "console=ttyS0",
        },
        "disks": [{"id": "root", "serial": "R1", "layers": [{"format": "raw", "path": f"{place}/root.raw"}]}],
        "nics": [{"id": "lan", "bridge": "br0", "mac": "52:54:00:00:00:01"}],
    }


def test_a_flag_wins_over_the_file(place: Path) -> None:
    found = description.build(str(place / "web.toml"), Flags(name="web2", memory="1G", vcpus=4, rng=False))
    assert (found.name, found.memory, found.vcpus, found.rng) == ("web2", 1 << 30, 4, False)
    assert found.kernel is not None and found.kernel.cmdline == "console=ttyS0"


def test_flags_alone_are_enough(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    found = description.build(
        None,
        Flags(
            name="a",
            memory="64M",
            kernel="vmlinuz",
            disks=["root.raw,format=raw,read-only", "root.raw,format=raw,id=b"],
        ),
    )
    assert [(disk.id, disk.read_only) for disk in found.disks] == [("disk0", True), ("b", False)]
    assert [slot.writable for slot in slots(found)] == [False, False, True]


def test_where_memory_comes_from_and_that_it_stays_there_are_flags(place: Path) -> None:
    found = description.build(str(place / "web.toml"), Flags(memory_nodes=[0, 3], locked=True))
    assert (found.memory_nodes, found.locked) == ([0, 3], True)


def test_a_comma_in_a_path_is_written_twice(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    (place / "a,b=c").write_bytes(bytes(512))
    found = description.build(
        None, Flags(name="a", memory="64M", kernel="vmlinuz", disks=["a,,b=c,format=raw"])
    )
    assert found.disks[0].layers[0].path == f"{place}/a,b=c"


def test_a_missing_mac_is_made_up_locally_administered_and_anew_each_time(place: Path) -> None:
    flags = Flags(nics=["br0"])
    first, second = (description.build(str(place / "web.toml"), flags).nics[0].mac for _ in range(2))
    assert first != second
    assert int(first[:2], 16) & 3 == 2


def test_a_transient_machine_has_every_file_as_an_fd_and_no_path(place: Path) -> None:
    found = description.for_fds(description.build(str(place / "web.toml"), Flags()))
    assert [(slot.name, slot.path) for slot in slots(found)] == [
        ("kernel", None),
        ("initrd", None),
        ("disk/root/0", None),
    ]


@pytest.mark.parametrize(
    ("text", "count"), [("1048576", 1 << 20), ("512M", 512 << 20), ("3g", 3 << 30), ("2GiB", 2 << 30), (7, 7)]
)
def test_sizes_are_bytes_or_carry_a_power_of_1024(text: str | int, count: int) -> None:
    assert description.size(text, argument="memory") == count


@pytest.mark.parametrize(
    ("flags", "argument", "words"),
    [
        (Flags(name="a/b"), "name", "begins with a letter or digit"),
        (Flags(memory="much"), "memory", "K, M, G or T"),
        (Flags(memory="0"), "memory", "0 is not in 4194304"),
        (Flags(memory="4194305"), "memory", "multiple"),
        (Flags(vcpus=0), "vcpus", "not in 1–16"),
        (Flags(vcpus=1000), "vcpus", "not in 1–16"),
        (Flags(cpu_model="Ö"), "cpu-model", "lower-case"),
        (Flags(machine_type="q35"), "machine-type", "vmbus-1"),
        (Flags(disks=["x"]), "disks[0].format", "never guessed"),
        (Flags(disks=["x,format=vdi"]), "disks[0].path", "'vdi'"),
        (Flags(disks=["x,format=raw,format=raw"]), "--disk", "twice"),
        (Flags(disks=["x,size=1"]), "--disk", "'size' is not known"),
        (Flags(disks=["x,queues=many"]), "--disk", "number"),
        (Flags(nics=["br0,mac=AA:00:00:00:00:01"]), "nics[0].mac", "lower-case"),
        (Flags(nics=["br0,id=a", "br1,id=a"]), "nics[1].id", "twice"),
    ],
)
def test_each_mistake_is_refused_with_the_argument_that_it_is_about(
    flags: Flags, argument: str, words: str, place: Path
) -> None:
    error = refused(place / "web.toml", flags)
    assert error.argument == argument
    assert words in error.message


@pytest.mark.parametrize(
    ("old", "new", "argument", "words"),
    [
        ('name = "web"', "", "name", "missing"),
        ("vcpus = 2", "cores = 2", "cores", "no such key"),
        ("vcpus = 2", "cpu_model = 2", "cpu_model", "did you mean cpu-model"),
        ("vcpus = 2", 'vcpus = "two"', "vcpus", "not an integer"),
        ("[kernel]", "[kernel]\nimage = 1", "kernel.image", "no such key"),
        ('path = "vmlinuz"', "", "kernel.path", "missing"),
        ("[[disks]]", "[disks]", "disks", "[[disks]]"),
        ('format = "raw"', "", "disks[0].format", "never guessed"),
        ('serial = "R1"', 'serial = "R1"\nlayers = []', "disks[0].path", "layers"),
        ("vcpus = 2", "vcpus = ", "file", "not TOML"),
    ],
)
def test_a_mistake_in_the_file_is_named(old: str, new: str, argument: str, words: str, place: Path) -> None:
    assert old in GOOD
    (place / "web.toml").write_text(GOOD.replace(old, new, 1))
    error = refused(place / "web.toml", Flags())
    assert (error.argument, words in error.message) == (argument, True), str(error)


def test_a_file_that_is_not_there_is_not_found(place: Path) -> None:
    assert refused(place / "none.toml", Flags()).kind == "NotFound"
