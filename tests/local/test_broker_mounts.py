# SPDX-License-Identifier: Apache-2.0
"""hugetlbfs for other programs: mounted where broker.toml wants it, with pages of its own, and taken away."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.hugepages import Pool, enlarged
from tests.local.broker_bed import ALICE, BOB, MIB, Bed, new_uuid, wait_until
from vmbus.wire import broker as wire

pytestmark = pytest.mark.requires("root", "kvm", "hugepages")

PAGE = 2 * MIB
SETTING = "kernel/mm/hugepages/hugepages-2048kB/nr_hugepages"

# As user argv[1]: maps argv[3] bytes of a file in the directory argv[2]; prints an errno, 0 for success.
PROGRAM = """
import mmap, os, sys
os.setgroups([]); os.setgid(int(sys.argv[1])); os.setuid(int(sys.argv[1]))
try:
    with open(sys.argv[2] + "/file", "w+b") as file:
        os.unlink(file.name)
        os.ftruncate(file.fileno(), int(sys.argv[3]))
        memory = mmap.mmap(file.fileno(), int(sys.argv[3]))
        memory[0] = memory[-1] = 1
    print(0)
except OSError as error:
    print(error.errno)
"""


class Host:
    """A mount namespace that is not the broker's own, as the host's is under systemd."""

    def __init__(self) -> None:
        self.holder = subprocess.Popen(["unshare", "-m", "sleep", "infinity"])
        own = os.readlink("/proc/self/ns/mnt")
        wait_until(lambda: os.readlink(f"/proc/{self.holder.pid}/ns/mnt") != own)

    def mounts(self, place: Path) -> list[str]:
        """Sources of the hugetlbfs mounts below ``place``."""
        lines = Path(f"/proc/{self.holder.pid}/mounts").read_text().splitlines()
        return [line.split()[0] for line in lines if line.split()[1].startswith(f"{place}/")]

    def run(self, *argv: str | Path) -> str:
        """The output of a program of the host."""
        command = ["nsenter", "-m", "-t", str(self.holder.pid), *map(str, argv)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    def map(self, user: int, place: Path, size: int) -> int:
        """The errno with which a program of ``user`` fails to have ``size`` bytes there; 0 if it does not."""
        return int(self.run(sys.executable, "-c", PROGRAM, str(user), place, str(size)))

    def close(self) -> None:
        """End it; the mounts go with it."""
        self.holder.kill()
        self.holder.wait()


@pytest.fixture
def host() -> Iterator[Host]:
    host = Host()
    yield host
    host.close()


@pytest.fixture
def pool() -> Iterator[Pool]:
    with enlarged(16) as enough:
        yield enough


@pytest.fixture
def bed(host: Host) -> Iterator[Bed]:
    bed = Bed()
    bed.command += ["--mounts", f"/proc/{host.holder.pid}/ns/mnt"]
    (bed.place / "huge").mkdir()
    yield bed
    print(bed.log.read_text())
    bed.close()


def want(bed: Bed, *mounts: str) -> None:
    """Have broker.toml want these; @ is the bed's directory."""
    text = bed.config.read_text().partition("\n[[hugepages.mount]]")[0]
    tables = [f"\n[[hugepages.mount]]\n{mount.replace('@', str(bed.place))}\n" for mount in mounts]
    bed.config.write_text("".join([text, *tables]))


def reload(bed: Bed) -> None:
    assert bed.process is not None
    before = bed.said("policy reloaded")
    bed.process.send_signal(signal.SIGHUP)
    wait_until(lambda: bed.said("policy reloaded") > before)


USUAL = 'path = "@/huge"\nsize = "8M"\nmin-size = "4M"\nuser = "alice"\nmode = "700"'


def test_it_is_mounted_at_start_with_pages_of_its_own_for_those_it_is_for(
    bed: Bed, host: Host, pool: Pool
) -> None:
    before = pool.figures()
    want(bed, USUAL)
    bed.start()
    place = bed.place / "huge"
    options = f"pagesize=2M,size=8M,min_size=4M,uid={ALICE},gid=0,mode=700"
    assert host.mounts(bed.place) == [f"vmbus:{bed.instance}:{options}"]
    assert bed.said(f"hugetlbfs on {place}: mounted, {options}") == 1
    assert not os.path.ismount(place)  # the broker's own namespace, and the test's, are others
    flags = host.run("findmnt", "-n", "-o", "OPTIONS", place).split(",")
    assert {"nosuid", "nodev", "noexec", "pagesize=2M"} <= set(flags)
    assert pool.figures() == before | {"resv": before["resv"] + 2, "left": before["left"] - 2}

    # No machine gets what is reserved, however much its owner may have.
    client, name = bed.connect(), new_uuid()
    client.ask(wire.Own, uuid=name, uid=ALICE)
    size = (before["left"] - 1) * PAGE
    if size <= 64 * MIB:  # alice's quota
        huge = client.ask(wire.Spawn, uuid=name, memory=size, vcpus=1, memory_kind="huge", page_size=PAGE)
        assert (huge.error, huge.argument) == ("Unavailable", "memory"), huge

    # Its user has all of it and no more, even when nothing else is left beside what is reserved.
    assert host.map(ALICE, place, 8 * MIB) == 0
    assert host.map(ALICE, place, 10 * MIB) == errno.ENOMEM
    assert host.map(BOB, place, PAGE) == errno.EACCES
    assert pool.figures()["resv"] == before["resv"] + 2


def test_it_outlives_the_broker_and_is_not_mounted_again(bed: Bed, host: Host, pool: Pool) -> None:
    want(bed, USUAL)
    bed.start()
    there = host.mounts(bed.place)
    for kill in (True, False):
        bed.stop(kill=kill)
        assert host.mounts(bed.place) == there != []
        bed.start()
        assert host.mounts(bed.place) == there
    assert bed.said("mounted,") == 1


def test_what_is_not_wanted_any_more_is_unmounted_unless_it_is_in_use(
    bed: Bed, host: Host, pool: Pool
) -> None:
    before, place = pool.figures(), bed.place / "huge"
    want(bed, USUAL)
    bed.start()
    want(bed, USUAL.replace('"8M"', '"16M"').replace('"4M"', '"6M"'))
    reload(bed)
    (source,) = host.mounts(bed.place)
    assert "size=16M,min_size=6M" in source
    assert pool["resv"] == before["resv"] + 3

    with Path(f"/proc/{host.holder.pid}/root{place}/held").open("w"):
        want(bed)
        reload(bed)
        assert bed.said(f"hugetlbfs on {place}: InUse: ") == 1
        assert host.mounts(bed.place) == [source]
    reload(bed)
    assert host.mounts(bed.place) == []
    assert pool.figures() == before


def test_what_others_have_mounted_stays(bed: Bed, host: Host, pool: Pool) -> None:
    for name in ("theirs", "other"):
        (bed.place / name).mkdir()
    host.run("mount", "-t", "hugetlbfs", "none", bed.place / "theirs")
    host.run("mount", "-t", "hugetlbfs", "vmbus:another:x", bed.place / "other")
    want(bed)
    bed.start()
    reload(bed)
    assert host.mounts(bed.place) == ["none", "vmbus:another:x"]


def test_more_than_the_pool_has_is_said_and_mounted_when_it_has_grown(
    bed: Bed, host: Host, pool: Pool
) -> None:
    before = pool.figures()
    least = before["left"] + 2
    want(bed, f'path = "@/huge"\nsize = "{least * PAGE}"\nmin-size = "{least * PAGE}"')
    bed.config.write_text(bed.config.read_text().replace("[open]", '[hugepages]\ngrow = "64M"\n[open]', 1))
    bed.start()
    said = f"Unavailable: min-size: {least} pages of 2 MiB are wanted, and {before['left']} are free"
    assert bed.said(said) == 1
    assert host.mounts(bed.place) == []
    assert pool.figures() == before
    grown = bed.connect().ask(wire.Tune, settings={SETTING: str(before["nr"] + 2)})
    assert grown.error is None, grown
    assert len(host.mounts(bed.place)) == 1
    assert pool["resv"] == before["resv"] + least


@pytest.mark.parametrize(
    ("mount", "said"),
    [
        ('path = "@/none"\nsize = "2M"', "NotFound: path: cannot be reached"),
        ('path = "@/file"\nsize = "2M"', "AccessDenied: path: cannot be reached (Not a directory)"),
        (
            'path = "@/link"\nsize = "2M"',
            "AccessDenied: path: cannot be reached (Too many levels of symbolic",
        ),
        (
            'path = "@/link/below"\nsize = "2M"',
            "AccessDenied: path: cannot be reached (Too many levels of sym",
        ),
        ('path = "@/home/alice"\nsize = "2M"', "AccessDenied: path: others than root can write"),
        ('path = "@/pool"\nsize = "2M"', "AccessDenied: path: others than root can write"),
        ('path = "@/huge"\nsize = "2M"\nuser = "nobody-there"', "NotFound: user: there is no user"),
        ('path = "@/huge"\nsize = "2M"\ngroup = "nobody-there"', "NotFound: group: there is no group"),
    ],
)
def test_what_cannot_be_mounted_is_said_by_name_and_the_broker_serves(
    bed: Bed, host: Host, pool: Pool, mount: str, said: str
) -> None:
    before = pool.figures()
    (bed.place / "file").touch()
    (bed.place / "link").symlink_to(bed.place / "huge")
    (bed.place / "huge/below").mkdir()
    want(bed, mount + '\nmin-size = "2M"')
    bed.start()
    assert bed.said(said) == 1
    assert bed.connect().ask(wire.Workers).error is None
    assert host.mounts(bed.place) == []
    assert pool.figures() == before


def test_a_namespace_that_is_not_there_costs_the_mounts_only(bed: Bed, pool: Pool) -> None:
    bed.command[-1] = "/none/such"
    want(bed, USUAL)
    bed.start()
    assert bed.said("no file system was mounted: ") == 1
    assert bed.connect().ask(wire.Workers).error is None
