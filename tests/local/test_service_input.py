# SPDX-License-Identifier: Apache-2.0
"""Bad input over D-Bus: a named error that says what was wrong; nothing started, nothing left."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.local.service_bed import ALICE, BOB, ROOT, Bed, Caller, form, scenario, uuid_of
from vmbus.bus import _SIGNAL, RemoteError, Variant, _Message
from vmbus.service.files import HELD
from vmbus.wire.errors import VmbusError


@pytest.fixture(scope="module", params=["dbus_next", "dbus_fast"])
def bed(request: pytest.FixtureRequest) -> Iterator[Bed]:
    with Bed(request.param) as made:
        yield made


@pytest.fixture(autouse=True)
def _nothing_is_left(bed: Bed) -> Iterator[None]:
    before = bed.fds()
    yield
    bed.broker.reset()
    asyncio.run(_remove_all(bed))
    for _ in range(100):
        if bed.fds() <= before and not bed.broker.workers:
            break
        asyncio.run(asyncio.sleep(0.05))
    assert bed.fds() <= before
    assert not bed.broker.workers
    assert not bed.broker.owners
    assert not list((bed.system.run_dir / "service").iterdir())


async def _remove_all(bed: Bed) -> None:
    for user in (ALICE, BOB):
        async with bed.caller(user) as caller:
            for machine in await caller(ROOT, "Manager.ListMachines"):
                shown = await caller.client.get_all(machine, "Machine")
                if shown["State"] not in ("stopped", "crashed"):
                    await caller(machine, "Machine.Kill")
                if shown["Persistent"]:
                    await caller(machine, "Machine.Undefine")


async def refused(work: Any, kind: str, argument: str = "") -> VmbusError:
    with pytest.raises(VmbusError) as caught:
        await work
    assert caught.value.kind == kind, f"{caught.value.kind}: {caught.value}"
    assert str(caught.value).startswith(f"{argument}:" if argument else ""), str(caught.value)
    assert "Traceback" not in str(caught.value)
    return caught.value


async def raw(caller: Caller, member: str, signature: str, body: list[Any], path: str = ROOT) -> Any:
    interface = "org.vmbus1.Manager" if path == ROOT else "org.vmbus1.Machine"
    return await caller.client.bus.call("org.vmbus1", path, interface, member, signature, body)


@scenario
async def test_a_wrong_signature_is_answered_with_the_right_one(bed: Bed) -> None:
    async with bed.caller() as alice:
        error = await refused(raw(alice, "DefineMachine", "s", ["one"]), "InvalidArgument")
        assert str(error) == "DefineMachine takes (a{sv}): definition a{sv}; not (s)"
        await refused(raw(alice, "ListMachines", "u", [1]), "InvalidArgument")


@pytest.mark.parametrize(
    ("path", "interface", "member", "name"),
    [
        ("/nowhere", "org.vmbus1.Manager", "ListMachines", "UnknownObject"),
        (ROOT, "org.vmbus1.Machine", "Start", "UnknownInterface"),
        (ROOT, "org.vmbus1.Manager", "Explode", "UnknownMethod"),
        (ROOT, "org.freedesktop.DBus.Peer", "Explode", "UnknownMethod"),
        (f"{ROOT}/host", "org.freedesktop.DBus.ObjectManager", "GetManagedObjects", "UnknownInterface"),
    ],
)
@scenario
async def test_what_does_not_exist_has_the_standard_errors(
    bed: Bed, path: str, interface: str, member: str, name: str
) -> None:
    async with bed.caller() as alice:
        with pytest.raises(RemoteError) as caught:
            await alice.client.bus.call("org.vmbus1", path, interface, member)
        assert caught.value.name == f"org.freedesktop.DBus.Error.{name}"


@scenario
async def test_a_method_is_found_without_its_interface(bed: Bed) -> None:
    async with bed.caller() as alice:
        bus = alice.client.bus
        message = _Message(
            destination="org.vmbus1", path=ROOT, member="ListMachines", serial=bus._bus.next_serial()
        )
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        bus._pending[message.serial] = future
        bus._send(message)
        reply, _ = await future
        assert reply.body == [[]]


@pytest.mark.parametrize(
    ("changes", "argument"),
    [
        ({"vcpus": Variant("u", 0)}, "vcpus"),
        ({"vcpus": Variant("u", 1000)}, "vcpus"),
        ({"memory": Variant("t", 0)}, "memory"),
        ({"name": Variant("s", "a/b")}, "name"),
        ({"colour": Variant("s", "red")}, "colour"),
        ({"kernel": Variant("a{sv}", {"path": Variant("s", "vmlinuz")})}, "kernel.path"),
    ],
)
@scenario
async def test_a_definition_that_cannot_be_names_the_argument(
    bed: Bed, changes: dict[str, Any], argument: str
) -> None:
    async with bed.caller() as alice:
        bad = {**form(), **changes}
        await refused(alice(ROOT, "Manager.DefineMachine", bad), "InvalidArgument", argument)
        await refused(alice(ROOT, "Manager.CreateTransient", bad, {}, {}), "InvalidArgument", argument)
        assert await alice(ROOT, "Manager.ListMachines") == []


@scenario
async def test_a_definition_that_no_message_can_hold_is_refused_at_once(bed: Bed) -> None:
    layers = [
        {"format": "qcow2", "path": f"/{'x' * 4000}{n}", **({"backing-name": "b"} if n < 19 else {})}
        for n in range(20)
    ]
    async with bed.caller() as alice:
        error = await refused(
            alice.define(disks=[{"id": "d", "layers": layers}]), "InvalidArgument", "definition"
        )
        assert "not up to 61440" in str(error)


@scenario
async def test_a_name_is_taken_once(bed: Bed) -> None:
    async with bed.caller() as alice:
        await alice.define(name="twice")
        await refused(alice.define(name="twice"), "AlreadyExists", "name")
        await refused(
            alice(ROOT, "Manager.CreateTransient", form(name="twice"), {}, {}), "AlreadyExists", "name"
        )


@scenario
async def test_the_broker_s_quota_is_passed_on(bed: Bed) -> None:
    bed.broker.refuse["check"] = ("QuotaExceeded", "memory: 16 MiB is above your 8 MiB", "memory")
    async with bed.caller() as alice:
        await refused(alice.define(), "QuotaExceeded", "memory")
        assert await alice(ROOT, "Manager.ListMachines") == []


@scenario
async def test_without_a_broker_nothing_is_defined_and_lists_work(bed: Bed) -> None:
    async with bed.caller() as alice:
        machine = await alice.define()
        bed.broker.stop()
        await asyncio.sleep(0.1)
        try:
            await refused(alice.define(), "Unavailable")
            await refused(alice(machine, "Machine.Start", {}, {}), "Unavailable")
            assert await alice(ROOT, "Manager.ListMachines") == [machine]
            assert await alice.state(machine) == "stopped"
        finally:
            bed.broker.start()
        await asyncio.sleep(0.5)
        await alice(machine, "Machine.Start", {}, {})


@scenario
async def test_operations_in_the_wrong_state_say_which_is_right(bed: Bed) -> None:
    async with bed.caller() as alice:
        machine = await alice.define()
        for method, args in (
            ("Pause", []),
            ("Resume", []),
            ("Reset", []),
            ("Kill", []),
            ("GetStats", []),
            ("Stop", [0]),
        ):
            error = await refused(alice(machine, f"Machine.{method}", *args), "InvalidState")
            assert "it is stopped" in str(error)
        await alice(machine, "Machine.Start", {}, {})
        running: list[tuple[str, list[Any]]] = [("Start", [{}, {}]), ("Resume", []), ("Undefine", [])]
        for method, args in running:
            error = await refused(alice(machine, f"Machine.{method}", *args), "InvalidState")
            assert "it is running" in str(error)


@scenario
async def test_options_are_checked_by_name(bed: Bed) -> None:
    async with bed.caller() as alice:
        machine = await alice.define()
        bad = {"pause": Variant("b", True)}
        await refused(alice(machine, "Machine.Start", bad, {}), "InvalidArgument", "pause")
        bad = {"paused": Variant("u", 1)}
        await refused(alice(machine, "Machine.Start", bad, {}), "InvalidArgument", "paused")
        assert await alice.state(machine) == "stopped"


@scenario
async def test_an_owner_s_record_that_was_lost_is_made_again_at_a_start(bed: Bed) -> None:
    async with bed.caller() as alice:
        machine = await alice.define()
        bed.broker.refuse["spawn"] = ("NotFound", "no recorded owner", "uuid")
        asked = len(bed.broker.asked)
        await refused(alice(machine, "Machine.Start", {}, {}), "NotFound")
        kinds = [type(request).__name__ for request in bed.broker.asked[asked:]]
        assert kinds[:3] == ["Spawn", "Own", "Spawn"]
        bed.broker.refuse = {}
        await alice.until(machine, "stopped")
        await alice(machine, "Machine.Start", {}, {})


@pytest.mark.parametrize("step", ["spawn", "open"])
@scenario
async def test_a_start_that_the_broker_refuses_leaves_nothing(bed: Bed, step: str) -> None:
    async with bed.caller() as alice:
        machine = await alice.define()
        bed.broker.refuse[step] = ("AccessDenied", "not for you", "path")
        error = await refused(alice(machine, "Machine.Start", {}, {}), "AccessDenied")
        assert "not for you" in str(error)
        assert not bed.broker.workers
        shown = await alice.client.get_all(machine, "Machine")
        assert (shown["State"], shown["StateReason"]) == ("stopped", "start-failed")


@pytest.mark.parametrize("step", ["hello", "configure", "run"])
@scenario
async def test_a_start_that_the_worker_refuses_leaves_nothing(bed: Bed, step: str) -> None:
    def make(worker: Any) -> None:
        worker.refuse[step] = ("ImageInvalid", "not a kernel", "kernel")

    bed.broker.make_worker = make
    async with bed.caller() as alice:
        machine = await alice.define()
        await refused(alice(machine, "Machine.Start", {}, {}), "ImageInvalid", "kernel")
        assert not bed.broker.workers
        assert await alice.state(machine) == "stopped"


@scenario
async def test_a_path_that_is_not_there_is_named_by_its_slot(bed: Bed) -> None:
    async with bed.caller() as alice:
        machine = await alice.define(kernel={"path": "/nowhere/vmlinuz"})
        error = await refused(alice(machine, "Machine.Start", {}, {}), "NotFound", "kernel")
        assert "/nowhere/vmlinuz" in str(error)


@scenario
async def test_a_kernel_that_is_a_directory_or_a_device_is_refused(bed: Bed) -> None:
    async with bed.caller() as alice:
        for path in ("/tmp", "/dev/null"):
            machine = await alice.define(kernel={"path": path})
            await refused(alice(machine, "Machine.Start", {}, {}), "InvalidArgument", "kernel")


# -- files


def disk(**more: Any) -> dict[str, Any]:
    return {"id": "root", "source": "fd", "layers": [{"format": "raw"}], **more}


@scenario
async def test_files_reach_the_worker_and_nobody_else_keeps_them(bed: Bed) -> None:
    async with bed.caller() as alice:
        with open(bed.file(), "rb") as kernel, open(bed.file(), "r+b") as image:
            files = {"kernel": kernel.fileno(), "disk/root/0": image.fileno()}
            machine = await alice(
                ROOT, "Manager.CreateTransient", form(kernel={"source": "fd"}, disks=[disk()]), files, {}
            )
            worker = bed.broker.workers[uuid_of(machine)]
            assert os.path.samestat(os.fstat(worker.files["disk/root/0"]), os.fstat(image.fileno()))
            assert os.path.samestat(os.fstat(worker.files["kernel"]), os.fstat(kernel.fileno()))
        await alice(machine, "Machine.Kill")


@scenario
async def test_files_given_one_by_one_are_used_by_the_next_start(bed: Bed) -> None:
    async with bed.caller() as alice:
        options = {"start": Variant("b", False)}
        machine = await alice(ROOT, "Manager.CreateTransient", form(kernel={"source": "fd"}), {}, options)
        with open(bed.file(), "rb") as kernel:
            await alice(machine, "Machine.AddFile", "kernel", kernel.fileno())
            await alice(machine, "Machine.AddFile", "kernel", kernel.fileno())
        await alice(machine, "Machine.Start", {}, {})
        assert list(bed.broker.workers[uuid_of(machine)].files) == ["kernel"]


@scenario
async def test_files_and_machines_that_were_not_started_go_with_their_connection(bed: Bed) -> None:
    async with bed.caller() as stays:
        async with bed.caller() as leaves:
            options = {"start": Variant("b", False)}
            machine = await leaves(
                ROOT, "Manager.CreateTransient", form(kernel={"source": "fd"}), {}, options
            )
            with open(bed.file(), "rb") as kernel:
                await leaves(machine, "Machine.AddFile", "kernel", kernel.fileno())
        for _ in range(100):
            if not await stays(ROOT, "Manager.ListMachines"):
                return
            await asyncio.sleep(0.02)
    pytest.fail("the machine is still there")


@scenario
async def test_a_user_s_waiting_files_are_capped_over_all_connections(bed: Bed) -> None:
    disks = [{"id": f"d{n}", "source": "fd", "layers": [{"format": "raw"}]} for n in range(16)]
    async with bed.caller() as alice:
        machines = [await alice.define(disks=disks) for _ in range(5)]
        with open(bed.file(), "r+b") as file:
            async with contextlib.AsyncExitStack() as connections:
                for number in range(HELD + 1):
                    if number % 16 == 0:
                        giver = await connections.enter_async_context(bed.caller())
                    slot = f"disk/d{number % 16}/0"
                    call = giver(machines[number // 16], "Machine.AddFile", slot, file.fileno())
                    if number < HELD:
                        await call
                    else:
                        await refused(call, "QuotaExceeded", "files")


@scenario
async def test_slots_must_be_filled_and_exist(bed: Bed) -> None:
    async with bed.caller() as alice:
        machine = await alice.define(kernel={"source": "fd"})
        await refused(alice(machine, "Machine.Start", {}, {}), "InvalidArgument", "kernel")
        with open(bed.file(), "rb") as file:
            fd = file.fileno()
            files = {"kernel": fd, "initrd": fd}
            await refused(alice(machine, "Machine.Start", {}, files), "InvalidArgument", "initrd")
            await refused(alice(machine, "Machine.AddFile", "floppy", fd), "InvalidArgument", "slot")


@scenario
async def test_a_disk_that_is_written_needs_a_file_that_can_be(bed: Bed) -> None:
    async with bed.caller() as alice:
        machine = await alice.define(disks=[disk()])
        with open(bed.file(), "rb") as image:
            files = {"disk/root/0": image.fileno()}
            error = await refused(
                alice(machine, "Machine.Start", {}, files), "InvalidArgument", "disk/root/0"
            )
            assert "reading and writing" in str(error)


@pytest.mark.parametrize("path", ["/dev/zero", "/tmp", "pipe", "socket", "o_path"])
@scenario
async def test_what_is_no_file_is_refused(bed: Bed, path: str) -> None:
    opened: list[Any] = []
    if path == "pipe":
        fds = list(os.pipe())
    elif path == "socket":
        opened = list(socket.socketpair())
        fds = [opened[0].fileno()]
    else:
        flags = os.O_PATH if path == "o_path" else os.O_RDONLY
        fds = [os.open(bed.file() if path == "o_path" else path, flags)]
    async with bed.caller() as alice:
        machine = await alice.define(kernel={"source": "fd"})
        # A socket gets further: some methods take one.
        where = "files[kernel]" if path == "socket" else "files"
        await refused(alice(machine, "Machine.Start", {}, {"kernel": fds[0]}), "InvalidArgument", where)
    for sock in opened:
        sock.close()
    if path != "socket":
        for fd in fds:
            os.close(fd)


@scenario
async def test_files_to_methods_that_take_none_are_closed(bed: Bed) -> None:
    async with bed.caller() as alice:
        before = bed.fds()
        with open(bed.file(), "rb") as file:
            for member in ("ListMachines", "Explode"):
                for _ in range(20):
                    call = alice.client.bus.call(
                        "org.vmbus1", ROOT, "org.vmbus1.Manager", member, fds=[file.fileno()] * 16
                    )
                    with contextlib.suppress(RemoteError):
                        await call
            for _ in range(20):  # and with a signal
                message = alice.client.bus
                message._send(_signal_with_fd(message, file.fileno()))
            await alice(ROOT, "Manager.ListMachines")
        assert bed.fds() == before


def _signal_with_fd(bus: Any, fd: int) -> Any:
    return _Message(
        message_type=_SIGNAL,
        destination="org.vmbus1",
        path="/x",
        interface="x.y",
        member="Z",
        signature="h",
        body=[0],
        unix_fds=[fd],
    )


@scenario
async def test_seventeen_files_are_not_sent_and_if_they_are_the_bus_drops_the_sender(bed: Bed) -> None:
    async with bed.caller() as alice, bed.caller() as other:
        machine = await alice.define(kernel={"source": "fd"})
        before = bed.fds()
        with open(bed.file(), "rb") as file:
            files = {f"disk/d/{n}": file.fileno() for n in range(17)}
            error = await refused(other(machine, "Machine.Start", {}, files), "InvalidArgument")
            assert "16" in str(error)
            message = _Message(
                destination="org.vmbus1",
                path=machine,
                interface="org.vmbus1.Machine",
                member="Start",
                signature="a{sv}a{sh}",
                body=[{}, {name: n for n, name in enumerate(files)}],
                unix_fds=list(files.values()),
            )
            other.client.bus._send(message)
            await asyncio.wait_for(other.client.bus.wait_lost(), 5)
        assert await alice.state(machine) == "stopped"
        assert bed.fds() <= before


@scenario
async def test_an_index_without_its_file_is_refused(bed: Bed) -> None:
    async with bed.caller() as alice:
        machine = await alice.define(kernel={"source": "fd"})
        body = [{}, {"kernel": 3}]
        with open(bed.file(), "rb") as file:
            call = alice.client.bus.call(
                "org.vmbus1", machine, "org.vmbus1.Machine", "Start", "a{sv}a{sh}", body, fds=[file.fileno()]
            )
            await refused(call, "InvalidArgument")


# -- claims


@scenario
async def test_a_writer_excludes_everybody_and_readers_share(bed: Bed) -> None:
    path = str(bed.file())
    link = Path(path + "-link")
    os.link(path, link)

    def on(file: str, **more: Any) -> dict[str, Any]:
        return {"disks": [{"id": "d", "layers": [{"format": "raw", "path": file}], **more}]}

    async with bed.caller() as alice, bed.caller(BOB) as bob:
        writer, second = await alice.define(**on(path)), await bob.define(**on(str(link)))
        reader, other_reader = [await alice.define(**on(path, **{"read-only": True})) for _ in range(2)]
        await alice(writer, "Machine.Start", {}, {})
        await refused(bob(second, "Machine.Start", {}, {}), "InUse", "disk/d/0")
        await refused(alice(reader, "Machine.Start", {}, {}), "InUse", "disk/d/0")
        await alice(writer, "Machine.Kill")
        await alice(reader, "Machine.Start", {}, {})
        await alice(other_reader, "Machine.Start", {}, {})
        await refused(bob(second, "Machine.Start", {}, {}), "InUse", "disk/d/0")


@scenario
async def test_one_image_twice_in_a_machine_is_refused(bed: Bed) -> None:
    path = str(bed.file())
    disks = [{"id": name, "layers": [{"format": "raw", "path": path}]} for name in ("a", "b")]
    async with bed.caller() as alice:
        machine = await alice.define(disks=disks)
        error = await refused(alice(machine, "Machine.Start", {}, {}), "InUse", "disk/b/0")
        assert "disk/a/0 of this machine" in str(error)
