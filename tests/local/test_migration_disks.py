# SPDX-License-Identifier: Apache-2.0
"""Machines that take along what is on their disks while their guests write to them: two whole systems side by
side, each with an image of its own, compared by qemu-img."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pwd
import random
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.lab.system import ALICE
from tests.local.migration_bed import (
    LOOP,
    MEMORY,
    Pair,
    Relay,
    done,
    model,
    move,
    nothing_left,
    pair,
    says,
    state,
    worker_of,
)
from tests.local.service_bed import ROOT, Caller, ended, scenario, uuid_of
from vmbus.bus import Variant
from vmbus.wire.errors import VmbusError

pytestmark = [pytest.mark.requires("root", "kvm"), pytest.mark.long]

SEED = int(os.environ.get("VMBUS_SEED", "0")) or random.randrange(1 << 32)
SEEDS = [pytest.param(SEED + n, marks=[pytest.mark.soak] if n >= 2 else []) for n in range(20)]
SIZE = 8 << 20
COPY = {"copy": Variant("as", ["disk/root"])}


@pytest.fixture(scope="module")
def systems() -> Iterator[Pair]:
    with pair() as made:
        yield made


@pytest.fixture
def both(systems: Pair) -> Iterator[Pair]:
    with nothing_left(systems):
        yield systems


class Images(NamedTuple):
    """The files of a machine's disk, here and there, with their formats."""

    here: tuple[str, str]
    there: tuple[str, str]

    def differ(self) -> str:
        """What qemu-img says of it; "" if both hold the same."""
        (here, of_here), (there, of_there) = self
        return qemu_img("compare", "-f", of_here, "-F", of_there, here, there)

    def damage(self) -> str:
        """What qemu-img finds wrong in those that are qcow2."""
        return "".join(qemu_img("check", path) for path, format in self if format == "qcow2")

    def errors(self) -> str:
        """The same without clusters that are lost, as they are when a worker is killed."""
        found = (qemu_img("check", path) for path, format in self if format == "qcow2")
        return "".join(text for text in found if "errors were found" in text)


def qemu_img(*words: str) -> str:
    found = subprocess.run(["qemu-img", *words], capture_output=True, text=True, check=False)
    return found.stdout + found.stderr if found.returncode else ""


def image(both: Pair, name: str, format: str, content: bytes = b"", backing: str = "") -> tuple[str, str]:
    """An image of alice's of SIZE bytes, which begins with ``content``."""
    system = both.systems[0]
    path = system.files(ALICE) / name
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    below = ["-b", backing, "-F", "raw"] if backing else []
    made = system.run_as(ALICE, ["qemu-img", "create", "-q", "-f", format, *below, path, str(SIZE)])
    assert made.returncode == 0, made.stderr
    if content:
        raw = system.files(ALICE) / f"{name}.content"
        raw.write_bytes(content)
        words = ["qemu-img", "convert", "-n", "-f", "raw", "-O", format, str(raw), str(path)]
        subprocess.run(words, check=True)
        raw.unlink()
    return str(path), format


def full(seed: int) -> bytes:
    """As much as fits, with holes in it."""
    chance = random.Random(seed)
    pieces = [
        chance.randbytes(1 << 16) if chance.random() < 0.5 else bytes(1 << 16) for _ in range(SIZE >> 16)
    ]
    return b"".join(pieces)


@asynccontextmanager
async def writing(
    both: Pair, images: Images, backing: tuple[str, str] | None = None, more: Sequence[dict[str, Any]] = ()
) -> AsyncIterator[tuple[Caller, Caller, str]]:
    """A machine whose guest writes to its disk here; there it has an image of its own. It has ``more`` disks,
    the same on both sides."""
    async with both.callers() as (here, there):
        layers = [{"format": images.here[1], "path": images.here[0]}]
        if backing:
            layers[0]["backing-name"] = backing[0]
            layers.append({"format": backing[1], "path": backing[0]})
        fits = {"cpu_model": model(), "memory": MEMORY}
        machine = await here(
            ROOT,
            "Manager.DefineMachine",
            both.here.guest(LOOP, disks=[{"id": "root", "layers": layers}, *more], **fits),
        )
        other = [{"id": "root", "layers": [{"format": images.there[1], "path": images.there[0]}]}, *more]
        await there(
            ROOT, "Manager.DefineMachineAs", both.here.guest(LOOP, disks=other, **fits), uuid_of(machine)
        )
        await here(machine, "Machine.Start", {}, {})
        await says(here, machine, "loop: beat")
        yield here, there, machine


async def stop(caller: Caller, machine: str) -> None:
    """Its images are closed as they should be."""
    await done(caller, await caller(machine, "Machine.Stop", 0))


async def writes_on(caller: Caller, machine: str) -> None:
    """The guest goes on, and its disk with it."""
    said = await says(caller, machine, "loop: beat")
    assert "begins" not in said
    assert "status" not in said


@pytest.mark.parametrize(
    ("format", "to"), [("raw", "qcow2"), ("qcow2", "raw"), ("qcow2", "qcow2"), ("raw", "raw")]
)
@scenario
async def test_the_copy_holds_what_the_disk_held_when_the_machine_was_handed_on(
    both: Pair, format: str, to: str
) -> None:
    # An older copy, of which nothing may be left, where both are of the same format.
    old = full(7) if format == to else b""
    images = Images(image(both, "here", format, full(1)), image(both, "there", to, old))
    async with writing(both, images) as (here, there, machine):
        received, sent = await move(
            here, there, machine, receive={**COPY, "paused": Variant("b", True)}, **COPY
        )
        result = (await done(here, sent))["Result"]
        await done(there, received)
        assert result["disk-sent"] > SIZE // 4
        assert await state(here, machine) == ("stopped", "migrated")
        await there(machine, "Machine.Resume")
        await writes_on(there, machine)
        await there(machine, "Machine.Pause")
        # Back, and this time it stands there: both hold the same.
        received, sent = await move(
            there, here, machine, receive={**COPY, "paused": Variant("b", True)}, **COPY
        )
        await done(there, sent)
        await done(here, received)
        await stop(here, machine)
        assert images.differ() == ""
        assert images.damage() == ""


@scenario
async def test_a_copy_has_what_the_guest_sees_of_all_layers(both: Pair) -> None:
    base = image(both, "base", "raw", full(3))
    images = Images(image(both, "here", "qcow2", backing=base[0]), image(both, "there", "qcow2"))
    async with writing(both, images, base) as (here, there, machine):
        paused = {**COPY, "paused": Variant("b", True)}
        received, sent = await move(here, there, machine, receive=paused, **COPY)
        await done(here, sent)
        await done(there, received)
        await stop(there, machine)
        assert images.differ() == ""
        assert images.damage() == ""


@scenario
async def test_some_disks_go_along_whatever_they_are_on_and_others_are_shared(both: Pair) -> None:
    moved = {
        name: Images(image(both, f"here-{name}", "raw", full(number)), image(both, f"there-{name}", "qcow2"))
        for number, name in enumerate(("root", "data"))
    }
    shared = image(both, "common", "raw", full(9))

    def disk(name: str, at: tuple[str, str], **more: str) -> dict[str, Any]:
        return {"id": name, "layers": [{"format": at[1], "path": at[0]}], **more}

    async with both.callers() as (here, there):
        common = disk("common", shared)
        fits = {"cpu_model": model(), "memory": MEMORY}
        ours = [disk("root", moved["root"].here), disk("data", moved["data"].here, bus="scsi"), common]
        theirs = [disk("root", moved["root"].there), disk("data", moved["data"].there, bus="scsi"), common]
        machine = await here(ROOT, "Manager.DefineMachine", both.here.guest(LOOP, disks=ours, **fits))
        form = both.here.guest(LOOP, disks=theirs, **fits)
        await there(ROOT, "Manager.DefineMachineAs", form, uuid_of(machine))
        await here(machine, "Machine.Start", {}, {})
        await says(here, machine, "loop: beat")
        both_go = {"copy": Variant("as", ["disk/data", "disk/root"])}
        received, sent = await move(
            here, there, machine, receive={**both_go, "paused": Variant("b", True)}, **both_go
        )
        result = (await done(here, sent))["Result"]
        await done(there, received)
        assert result["disk-total"] == 2 * SIZE
        await stop(there, machine)
        for images in moved.values():
            assert images.differ() == ""
            assert images.damage() == ""


async def length(both: Pair) -> int:
    """How many bytes it takes to move such a machine, at the least."""
    if both.length == 0:
        images = Images(image(both, "here", "raw", full(1)), image(both, "there", "qcow2"))
        async with writing(both, images) as (here, there, machine):
            await here(machine, "Machine.Pause")
            with Relay() as relay:
                received, sent = await move(here, there, machine, relay, receive=COPY, **COPY)
                await done(here, sent)
                await done(there, received)
            await stop(there, machine)
            for caller in (here, there):
                await caller(machine, "Machine.Undefine")
            both.length = relay.passed
    return both.length


@pytest.mark.parametrize("seed", SEEDS)
@scenario
async def test_cancelled_at_any_moment_of_its_disk_it_goes_on_where_it_is(both: Pair, seed: int) -> None:
    chance = random.Random(seed)
    total = await length(both)
    images = Images(image(both, "here", "qcow2", full(1)), image(both, "there", "qcow2"))
    async with writing(both, images) as (here, there, machine):
        for _ in range(3):
            loop, moment, go_on = asyncio.get_running_loop(), asyncio.Event(), threading.Event()

            def reached(moment: Any = moment, go_on: Any = go_on, loop: Any = loop) -> None:
                loop.call_soon_threadsafe(moment.set)
                go_on.wait()

            with Relay(chance.randrange(1, total * 9 // 10), reached) as relay:
                try:
                    received, sent = await move(here, there, machine, relay, receive=COPY, **COPY)
                    await moment.wait()
                    of, job = chance.choice([(here, sent), (there, received)])
                    await of(job, "Job.Cancel")
                finally:
                    go_on.set()
                states = [(await ended(c, j))["State"] for c, j in ((here, sent), (there, received))]
            assert "done" not in states
            assert await state(here, machine) == ("running", "")
            assert (await state(there, machine))[0] == "stopped"
            await writes_on(here, machine)
        # And then it goes, over what the others have left.
        received, sent = await move(
            here, there, machine, receive={**COPY, "paused": Variant("b", True)}, **COPY
        )
        await done(here, sent)
        await done(there, received)
        await stop(there, machine)
        assert images.differ() == ""
        assert images.errors() == ""


@scenario
async def test_a_destination_that_is_killed_leaves_the_source_writing(both: Pair) -> None:
    total = await length(both)
    images = Images(image(both, "here", "raw", full(1)), image(both, "there", "qcow2"))
    async with writing(both, images) as (here, there, machine):
        for part in (0.2, 0.6):

            def kill() -> None:
                os.kill(worker_of(both.systems[1]), signal.SIGKILL)

            with Relay(int(total * part), kill) as relay:
                received, sent = await move(here, there, machine, relay, receive=COPY, **COPY)
                assert (await ended(here, sent))["State"] == "failed"
                assert (await ended(there, received))["State"] == "failed"
            assert await state(here, machine) == ("running", "")
            await writes_on(here, machine)


SMALL = """
[[open.grant]]
users = ["*"]
prefixes = ["{place}"]
"""


@pytest.fixture
def small() -> Iterator[Path]:
    """A directory of alice's on a file system with little room."""
    place = Path(tempfile.mkdtemp(prefix="vmbus-small-"))
    owner = pwd.getpwnam(ALICE).pw_uid
    words = ["mount", "-t", "tmpfs", "-o", f"size=1M,mode=0700,uid={owner}", "none", str(place)]
    mounted = subprocess.run(words, capture_output=True, text=True, check=False)
    if mounted.returncode:
        place.rmdir()
        pytest.skip(f"no tmpfs can be mounted: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)
    place.rmdir()


@scenario
async def without_room(both: Pair, place: Path) -> None:
    made = image(both, "there", "qcow2")
    path = str(place / "there")
    shutil.move(made[0], path)
    shutil.chown(path, ALICE)
    images = Images(image(both, "here", "raw", full(1)), (path, "qcow2"))
    async with writing(both, images) as (here, there, machine):
        received, sent = await move(here, there, machine, receive=COPY, **COPY)
        for caller, job in ((there, received), (here, sent)):
            found = await ended(caller, job)
            assert found["Error"] == "org.vmbus1.Error.Unavailable", found
            assert "disk/root" in found["Message"]
        assert await state(here, machine) == ("running", "")
        await writes_on(here, machine)


def test_a_destination_without_room_is_told_by_its_disk_s_name(small: Path) -> None:
    with pair(SMALL.format(place=small)) as systems, nothing_left(systems):
        without_room(systems, small)


@scenario
async def test_a_disk_that_is_neither_shared_nor_copied_is_refused_unless_somebody_answers_for_it(
    both: Pair,
) -> None:
    images = Images(image(both, "here", "raw"), image(both, "there", "raw"))
    async with writing(both, images) as (here, there, machine):
        separate = {"separate": Variant("as", ["disk/root"])}
        for receive, options, argument in (
            ({}, {}, "disk/root"),
            (COPY, {}, "copy"),
            (separate, COPY, "copy"),
        ):
            received, sent = await move(here, there, machine, receive=receive, **options)
            found = await ended(there, received)
            assert found["Error"] == "org.vmbus1.Error.InvalidArgument"
            assert argument in found["Message"], found
            assert (await ended(here, sent))["State"] == "failed"
            await writes_on(here, machine)
        for options, of in (
            ({"copy": Variant("as", ["disk/none"])}, "copy"),
            ({**COPY, **separate}, "separate"),
            ({"copy": Variant("s", "disk/root")}, "copy"),
        ):
            with pytest.raises(VmbusError) as caught:
                await move(here, there, machine, receive=options)
            assert (caught.value.kind, str(caught.value).partition(":")[0]) == ("InvalidArgument", of)
        received, sent = await move(here, there, machine, receive=separate)
        await done(here, sent)
        await done(there, received)


@scenario
async def test_devices_and_disks_stay_as_they_are_while_their_machine_moves(both: Pair) -> None:
    images = Images(image(both, "here", "raw", full(1)), image(both, "there", "qcow2"))
    spare, plugged = image(both, "spare", "raw"), image(both, "plugged", "raw")
    more: list[dict[str, Any]] = [
        {"id": "plugged", "slot": 2, "layers": [{"format": plugged[1], "path": plugged[0]}]},
        {"id": "cd", "cdrom": True, "layers": []},
    ]
    async with writing(both, images, more=more) as (here, there, machine):
        loop, moment, go_on = asyncio.get_running_loop(), asyncio.Event(), threading.Event()

        def reached() -> None:
            loop.call_soon_threadsafe(moment.set)
            go_on.wait()

        disk = {
            "id": Variant("s", "spare"),
            "slot": Variant("u", 1),
            "layers": Variant("aa{sv}", [{"format": Variant("s", "raw"), "path": Variant("s", spare[0])}]),
        }
        with Relay(1 << 20, reached) as relay:
            try:
                received, sent = await move(here, there, machine, relay, receive=COPY, **COPY)
                await moment.wait()
                for method, arguments in (
                    ("ResizeDisk", ("root", 2 * SIZE)),
                    ("AttachDisk", (disk, {})),
                    ("ChangeMedia", ("cd", {"layers": disk["layers"]}, {}, {})),
                ):
                    with pytest.raises(VmbusError) as caught:
                        await here(machine, f"Machine.{method}", *arguments)
                    assert caught.value.kind == "InvalidState", (method, caught.value)
                detached = await ended(here, await here(machine, "Machine.DetachDisk", "plugged", 1_000_000))
                assert detached["Error"] == "org.vmbus1.Error.InvalidState"
            finally:
                go_on.set()
            await done(here, sent)
            await done(there, received)
        await writes_on(there, machine)


def test_vmbusctl_makes_the_image_and_takes_it_away_when_it_fails(both: Pair) -> None:
    here, there = both.systems
    files = here.files(ALICE)
    source, _ = image(both, "here", "raw", full(1))
    words = ["--memory", "16M", "--cpu-model", model(), "--kernel", both.here.kernel(), "--cmdline", LOOP]

    def vmbusctl(on: Any, *words: str, fails: bool = False) -> str:
        done = on.vmbusctl(ALICE, *words, timeout=60)
        assert bool(done.returncode) == fails, done.stderr
        return str(done.stderr if fails else done.stdout)

    vmbusctl(here, "define", "--name", "web", *words, "--disk", f"id=root,format=raw,path={source}")
    vmbusctl(here, "start", "web")
    target = files / "copy.qcow2"
    target.unlink(missing_ok=True)
    migrate = ["migrate", "web", "--to", there.bus_address]
    for flags, said in (
        (["--copy-disk", "data"], "these are: root"),
        (["--copy-disk", "root="], "not DISK"),
        (["--copy-disk", f"root={target},format=vdi"], "qcow2 or raw"),
        (["--copy-disk", f"root={files}/nowhere/copy"], "No such file"),
        (["--copy-disk", "root", "--copy-disk", "disk/root"], "twice"),
        (["--separate-disk", "cd"], "these are: root"),
        # Made, and then the other side cannot have it.
        (["--copy-disk", f"root={target}", "--file", f"kernel={files}/nowhere"], "nowhere"),
        # Its own image.
        (["--copy-disk", "root"], "another process uses"),
    ):
        assert said in vmbusctl(here, *migrate, *flags, fails=True), flags
        assert not target.exists()
        assert vmbusctl(there, "list") == ""
    assert "running" in vmbusctl(here, "list")
    said = vmbusctl(here, *migrate, "--copy-disk", f"root={target}", "--paused", "--undefine-source")
    assert "of disks" in said
    assert target.stat().st_mode & 0o777 == 0o600
    vmbusctl(there, "stop", "web", "--deadline", "0")
    assert Images((source, "raw"), (str(target), "qcow2")).differ() == ""
    assert qemu_img("check", str(target)) == ""
    # An image that is there is stated, and overwritten.
    vmbusctl(there, "start", "web")
    other = ["--copy-disk", f"root={source}"]
    back = ["migrate", "web", "--to", here.bus_address]
    assert "qcow2" in vmbusctl(there, *back, *other, fails=True)
    vmbusctl(there, *back, "--copy-disk", f"root={source},format=raw", "--undefine-source")
    assert "running" in vmbusctl(here, "list")
