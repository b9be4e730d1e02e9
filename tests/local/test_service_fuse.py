# SPDX-License-Identifier: Apache-2.0
"""Files of a FUSE server that never answers FLUSH, so that no close() of them returns: refused, and nothing
else waits."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pwd
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.local.broker_fuse import Fuse
from tests.local.service_bed import ROOT, Bed, scenario
from tests.local.service_fakes import eventually
from vmbus.bus import DAEMON, Bus
from vmbus.service import descriptors
from vmbus.service.files import STUCK
from vmbus.wire.errors import VmbusError

FLUSH = 25

pytestmark = pytest.mark.requires("fuse")


@contextmanager
def poison(place: Path) -> Iterator[int]:
    """An open file whose close() hangs for user vmbus until the server is ended.

    Not for all: the bus daemon has a copy too, closes it, and would hang itself.
    """
    place.mkdir()
    vmbus = pwd.getpwnam("vmbus").pw_uid
    fuse = Fuse(place, silent=False, owner=os.getuid(), silent_on=FLUSH, silent_to=vmbus)
    fd = os.open(place / "disk", os.O_RDWR)
    try:
        yield fd
    finally:
        fuse.close()
        with contextlib.suppress(OSError):
            os.close(fd)


@pytest.fixture(params=["dbus_next", "dbus_fast"])
def bed(request: pytest.FixtureRequest) -> Iterator[Bed]:
    with Bed(request.param) as made:
        yield made


@scenario
async def test_it_is_refused_and_everything_stays_responsive(bed: Bed, tmp_path: Path) -> None:
    with poison(tmp_path / "fuse") as fd:
        async with bed.caller() as alice:
            machine = await alice.define(kernel={"source": "fd"})
            before = bed.fds()
            for _ in range(3):
                begin = time.monotonic()
                with pytest.raises(VmbusError) as caught:
                    await alice(machine, "Machine.Start", {}, {"kernel": fd})
                assert caught.value.kind == "InvalidArgument"
                assert time.monotonic() - begin < 2
                assert await alice(ROOT, "Manager.ListMachines", timeout=2) == [machine]
            # the machine, the broker and files that are fit still work
            with open(bed.file(), "rb") as kernel:
                await alice(machine, "Machine.Start", {}, {"kernel": kernel.fileno()})
            await alice(machine, "Machine.Pause")
            await alice(machine, "Machine.Kill")
            assert bed.fds() == before


@scenario
async def test_kill_9_frees_the_name_although_closes_hang(bed: Bed, tmp_path: Path) -> None:
    with poison(tmp_path / "fuse") as fd:
        async with bed.caller() as alice:
            machine = await alice.define(kernel={"source": "fd"})
            for _ in range(2):
                with pytest.raises(VmbusError):
                    await alice(machine, "Machine.AddFile", "kernel", fd)
            assert await asyncio.to_thread(eventually, lambda: _threads(bed) > 1), "nothing hangs: no test"
            os.kill(bed.service_pid, 9)
            begin = time.monotonic()
            while await _has_owner(alice.client.bus):
                assert time.monotonic() - begin < 20, "the name is not freed"  # a busy host; else never
                await asyncio.sleep(0.01)


@scenario
async def test_a_user_s_hanging_closes_are_capped(bed: Bed, tmp_path: Path) -> None:
    with poison(tmp_path / "fuse") as fd:
        async with bed.caller() as alice:
            machine = await alice.define(kernel={"source": "fd"})
            for _ in range(STUCK + 4):
                with pytest.raises(VmbusError):
                    await alice(machine, "Machine.AddFile", "kernel", fd)
            assert _threads(bed) <= STUCK + 1
            assert await alice(ROOT, "Manager.ListMachines", timeout=2) == [machine]


@scenario
async def test_one_poisonous_file_spoils_the_message_and_the_others_are_closed(
    bed: Bed, tmp_path: Path
) -> None:
    with poison(tmp_path / "fuse") as fd, open(bed.file(), "rb") as good:
        async with bed.caller() as alice:
            machine = await alice.define(kernel={"source": "fd", "initrd": True})
            before = bed.fds()
            with pytest.raises(VmbusError) as caught:
                await alice(machine, "Machine.Start", {}, {"kernel": good.fileno(), "initrd": fd})
            assert "file 2 of 2" in str(caught.value)
            assert bed.fds() == before


def test_a_mount_that_vmbusd_sees_is_named(tmp_path: Path) -> None:
    server = contextlib.ExitStack()  # mounted before vmbusd starts, ended before it is stopped
    fd = server.enter_context(poison(tmp_path / "fuse"))
    with Bed() as bed, server:

        async def story() -> None:
            async with bed.caller() as alice:
                machine = await alice.define(kernel={"source": "fd"})
                with pytest.raises(VmbusError) as caught:
                    await alice(machine, "Machine.AddFile", "kernel", fd)
                assert "FUSE" in str(caught.value)

        asyncio.run(story())


def test_without_a_layout_nothing_is_expelled() -> None:
    assert descriptors.limit() == 0
    assert not descriptors.expel([0], lambda: None)


def _threads(bed: Bed) -> int:
    return len(os.listdir(f"/proc/{bed.service_pid}/task"))


async def _has_owner(bus: Bus) -> bool:
    answer = await bus.call(DAEMON, "/org/freedesktop/DBus", DAEMON, "NameHasOwner", "s", ["org.vmbus1"])
    return bool(answer.body[0])
