# SPDX-License-Identifier: Apache-2.0
"""Files that the broker has opened for a machine: as whom, where, and what it refuses."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.local.broker_bed import ALICE, BOB, Bed, Client, Machine, broker, new_uuid, wait_until
from tests.local.broker_fuse import CONTENT, Fuse
from vmbus.wire import broker as wire

pytestmark = pytest.mark.requires("root", "kvm")


@pytest.fixture(scope="module")
def bed() -> Iterator[Bed]:
    with broker() as started:
        yield started


@pytest.fixture(scope="module")
def client(bed: Bed) -> Client:
    return bed.connect()


@pytest.fixture(scope="module")
def machine(bed: Bed, client: Client) -> Machine:
    return bed.machine(client)


def test_a_file_of_the_owner_s_arrives_at_the_worker(bed: Bed, machine: Machine) -> None:
    path = bed.file("disk.raw", b"hello")
    reply = machine.open(path)
    seen = path.stat()
    assert reply.identity == wire.Identity(
        dev=seen.st_dev, ino=seen.st_ino, rdev=0, mode=seen.st_mode, size=5
    ), reply
    wait_until(lambda: machine.ask(do="files").get("disk/a/0", {}).get("data") == b"hello")


def test_reading_and_writing_are_told_apart(bed: Bed, machine: Machine) -> None:
    path = bed.file("rw.raw", b"old")
    assert machine.open(path, "ro").error is None
    assert machine.open(path, "rw", writable=True).error is None
    wait_until(lambda: "rw" in machine.ask(do="files"))
    assert "errno" in machine.ask(do="write", slot="ro", data=b"new")
    assert machine.ask(do="write", slot="rw", data=b"new") == {"written": 3}
    assert path.read_bytes() == b"new"
    path.chmod(0o400)
    assert machine.open(path, "rw", writable=True).error == "AccessDenied"


def test_a_block_device_is_known_by_its_number_and_size(bed: Bed, machine: Machine) -> None:
    image = bed.file("image", bytes(1 << 20))
    made = subprocess.run(["losetup", "-f", "--show", image], capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"requires a loop device ({made.stderr.strip()})")
    loop = Path(made.stdout.strip())
    node = bed.home / "alice/block"
    try:
        os.mknod(node, stat.S_IFBLK | 0o600, loop.stat().st_rdev)
        os.chown(node, ALICE, ALICE)
        reply = machine.open(node)
        assert reply.identity is not None, reply
        assert reply.identity.rdev == loop.stat().st_rdev
        assert reply.identity.size == 1 << 20
    finally:
        subprocess.run(["losetup", "-d", loop], check=True)


def test_another_s_file_is_refused_whatever_root_may(bed: Bed, machine: Machine) -> None:
    theirs = bed.file("secret", owner=BOB)
    assert machine.open(theirs).error == "AccessDenied"
    closed = bed.home / "alice/closed"
    closed.write_bytes(b"root's")
    closed.chmod(0o600)
    reply = machine.open(closed)
    assert (reply.error, reply.argument) == ("AccessDenied", "path")


def test_the_owner_s_groups_count(bed: Bed, machine: Machine) -> None:
    path = bed.pool / "shared.raw"
    path.write_bytes(b"x")
    os.chown(path, 0, 61020)
    path.chmod(0o660)
    assert machine.open(path, writable=True).error is None
    other = bed.machine(machine.client, owner=BOB)
    assert other.open(path).error == "AccessDenied"
    machine.client.ask(wire.Kill, uuid=other.uuid)
    machine.client.wait_ended(other.uuid)
    other.close()


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "/etc/shadow", "/", "/dev/kvm", "/proc/1/environ", "/dev/mem"]
)
def test_a_path_outside_the_prefixes_is_refused(machine: Machine, path: str) -> None:
    reply = machine.open(path)
    assert (reply.error, reply.argument) == ("AccessDenied", "path")
    assert "broker.toml" in reply.message


@pytest.mark.parametrize("tail", ["../bob/secret", "./disk", "a/../../bob/secret", "..", "x\0y"])
def test_dots_are_refused_before_anything_is_opened(bed: Bed, machine: Machine, tail: str) -> None:
    reply = machine.open(f"{bed.home}/alice/{tail}")
    assert (reply.error, reply.argument) == ("InvalidArgument", "path")


def test_a_prefix_is_matched_by_whole_names(bed: Bed, machine: Machine) -> None:
    evil = bed.home / "alice-evil"
    evil.mkdir()
    evil.chmod(0o777)
    (evil / "disk").write_bytes(b"x")
    (evil / "disk").chmod(0o666)
    assert machine.open(evil / "disk").error == "AccessDenied"
    assert machine.open(bed.home / "alice").error == "AccessDenied"


@pytest.mark.parametrize("target", ["/etc/passwd", "../bob/secret", "../../../../../../etc/passwd"])
def test_a_symlink_out_of_the_prefix_is_refused(bed: Bed, machine: Machine, target: str) -> None:
    link = bed.home / "alice/link"
    link.unlink(missing_ok=True)
    link.symlink_to(target)
    reply = machine.open(link)
    assert reply.error == "AccessDenied"
    assert "leads out of" in reply.message


def test_a_symlink_within_the_prefix_works(bed: Bed, machine: Machine) -> None:
    bed.file("real", b"real")
    (bed.home / "alice/d").mkdir(exist_ok=True)
    os.chown(bed.home / "alice/d", ALICE, ALICE)
    link = bed.home / "alice/d/inner"
    link.symlink_to("../real")
    assert machine.open(link).error is None


def test_a_directory_that_is_swapped_for_a_link_out_gets_nothing(bed: Bed, machine: Machine) -> None:
    gate = bed.home / "alice/gate"
    gate.symlink_to("/etc")
    assert machine.open(gate / "passwd").error == "AccessDenied"


def test_a_magic_link_is_not_followed(bed: Bed, machine: Machine) -> None:
    place = bed.home / "alice/proc"
    place.mkdir()
    holder = os.open("/etc/passwd", os.O_RDONLY)
    assert bed.process is not None
    inside = ["nsenter", f"--mount=/proc/{bed.process.pid}/ns/mnt", "mount", "-t", "proc", "proc", str(place)]
    assert os.spawnvp(os.P_WAIT, inside[0], inside) == 0
    try:
        reply = machine.open(place / "self/exe")
        assert reply.error == "AccessDenied", reply
        assert "magic link" in reply.message
    finally:
        os.close(holder)
        inside[2:] = ["umount", str(place)]
        os.spawnvp(os.P_WAIT, inside[0], inside)


def test_what_is_no_file_is_refused_without_opening_it(bed: Bed, machine: Machine) -> None:
    home = bed.home / "alice"
    os.mkfifo(home / "fifo")
    (home / "dir").mkdir()
    os.mknod(home / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(home / "sock"))
    for name in ("fifo", "dir", "null", "sock"):
        path = home / name
        os.chown(path, ALICE, ALICE)
        began = time.monotonic()
        reply = machine.open(path)
        assert (reply.error, reply.argument) == ("InvalidArgument", "path"), name
        assert time.monotonic() - began < 2
    listener.close()


def test_a_file_that_is_not_there(bed: Bed, machine: Machine) -> None:
    reply = machine.open(bed.home / "alice/none")
    assert (reply.error, reply.argument) == ("NotFound", "path")


def test_a_machine_that_does_not_run_gets_nothing(bed: Bed, client: Client) -> None:
    name = new_uuid()
    client.ask(wire.Own, uuid=name, uid=ALICE)
    reply = client.ask(wire.Open, uuid=name, slot="kernel", path=str(bed.file("k")))
    assert reply.error == "InvalidState"
    assert client.ask(wire.Open, uuid=new_uuid(), slot="kernel", path="/x").error == "NotFound"


def test_the_broker_holds_no_file_of_a_user(bed: Bed, machine: Machine) -> None:
    path = bed.file("held", b"x")
    assert machine.open(path).error is None
    assert bed.process is not None
    held = Path(f"/proc/{bed.process.pid}/fd")
    assert str(path) not in [os.readlink(fd) for fd in held.iterdir()]


# -- FUSE -------------------------------------------------------------------------------------------


def fuse_bed(*, silent: bool, allowed: bool = False) -> tuple[Bed, Fuse]:
    """A bed with a FUSE file system at alice's home/fuse, mounted before the broker starts."""
    bed = Bed()
    if allowed:
        bed.config.write_text(bed.config.read_text().replace("[open]", "[open]\nfuse = true"))
    place = bed.home / "alice/fuse"
    place.mkdir()
    fuse = Fuse(place, silent=silent, owner=ALICE)
    bed.start()
    return bed, fuse


def end(bed: Bed, fuse: Fuse) -> None:
    print(bed.log.read_text())
    fuse.close()
    argv = ["umount", "-l", str(fuse.place)]
    os.spawnvp(os.P_WAIT, argv[0], argv)
    bed.close()


@pytest.mark.requires("fuse")
class TestFuse:
    def test_a_path_on_fuse_is_refused_and_its_server_is_not_even_asked(self) -> None:
        bed, fuse = fuse_bed(silent=True)
        try:
            client = bed.connect()
            machine = bed.machine(client)
            began = time.monotonic()
            for path in (fuse.place / "disk", fuse.place / "deep/er/disk", fuse.place):
                reply = machine.open(path)
                assert (reply.error, reply.argument) == ("AccessDenied", "path"), reply
                assert "FUSE" in reply.message
            assert time.monotonic() - began < 3
            assert fuse.asked() == b""
            machine.close()
        finally:
            end(bed, fuse)

    def test_where_it_is_allowed_a_file_on_fuse_is_opened(self) -> None:
        bed, fuse = fuse_bed(silent=False, allowed=True)
        try:
            client = bed.connect()
            machine = bed.machine(client)
            reply = machine.open(fuse.place / "disk")
            assert reply.identity is not None, reply
            wait_until(lambda: machine.ask(do="files")["disk/a/0"]["data"] == CONTENT)
            machine.close()
        finally:
            end(bed, fuse)

    @pytest.mark.long
    def test_a_server_that_never_answers_costs_its_owner_four_places_and_nobody_else(self) -> None:
        bed, fuse = fuse_bed(silent=True, allowed=True)
        try:
            client = bed.connect()
            hung, other = bed.machine(client), bed.machine(client, owner=BOB)
            numbers = [
                client.post(wire.Open, uuid=hung.uuid, slot="a", path=str(fuse.place / "disk"))
                for _ in range(5)
            ]
            began = time.monotonic()
            assert other.open(bed.file("fine", owner=BOB)).error is None
            assert client.ask(wire.Workers).error is None
            assert time.monotonic() - began < 3
            for number in numbers:
                assert client.reply(number, 20)[0].error == "Timeout"
            assert bed.process is not None
            children = Path(f"/proc/{bed.process.pid}/task/{bed.process.pid}/children").read_text().split()
            stuck = [pid for pid in children if int(pid) not in (hung.pid, other.pid)]
            assert len(stuck) == 4
            own = client.post(wire.Open, uuid=hung.uuid, slot="a", path=str(bed.file("own")))
            assert other.open(bed.file("fine", owner=BOB)).error is None
            assert client.ask(wire.Kill, uuid=hung.uuid).error is None
            client.wait_ended(hung.uuid)  # the hanging children hold no worker
            fuse.close()
            client.reply(own)
            wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in stuck))
            hung.close()
            other.close()
        finally:
            end(bed, fuse)
