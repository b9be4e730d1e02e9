# SPDX-License-Identifier: Apache-2.0
"""Who may do what over D-Bus: owners and others, public and private, polkit's rules, absent and slow."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.local.service_bed import ALICE, BOB, ROOT, Bed, Caller, form, scenario, uuid_of
from vmbus.bus import RemoteError, SignalMessage, variants
from vmbus.service.dispatcher import IN_FLIGHT
from vmbus.wire import contract, dbus_form
from vmbus.wire.definition import Disk, Layer, Nic
from vmbus.wire.errors import VmbusError

RULE = (
    "polkit.addRule(function(action, subject) {{ "
    "if (subject.user == '{user}' && action.id == '{action}') return polkit.Result.{result}; }});"
)


@pytest.fixture(scope="module", params=["dbus_next", "dbus_fast"])
def bed(request: pytest.FixtureRequest) -> Iterator[Bed]:
    with Bed(request.param) as made:
        yield made


@pytest.fixture(autouse=True)
def _as_it_was(bed: Bed) -> Iterator[None]:
    yield
    bed.broker.reset()
    bed.system.rule("")


async def refused(work: Any, kind: str) -> VmbusError:
    with pytest.raises(VmbusError) as caught:
        await work
    assert caught.value.kind == kind, str(caught.value)
    return caught.value


@scenario
async def test_ones_own_machine_works_without_any_right(bed: Bed) -> None:
    async with bed.caller(ALICE) as alice:
        machine = await alice.define()
        await alice(machine, "Machine.Start", {}, {}, interactive=False)
        await alice.until(machine, "running")
        await alice(machine, "Machine.Kill", interactive=False)
        await alice(machine, "Machine.Undefine", interactive=False)


@scenario
async def test_another_s_machine_is_refused_in_every_method(bed: Bed) -> None:
    nic = variants(dbus_form.build(Nic("nic0", "52:54:00:00:00:01", kind="user")))
    disk = variants(dbus_form.build(Disk("data", [Layer("raw", "/data")])))
    ours, theirs = socket.socketpair()
    named = {"nic": nic, "disk": disk, "socket": theirs.fileno()}
    with open("/etc/hostname", "rb") as file:
        passed = os.dup(file.fileno())
    plain = {"s": "nic0", "t": 0, "u": 0, "b": True, "h": passed, "a{sv}": {}, "a{sh}": {}}
    async with bed.caller(ALICE) as alice, bed.caller(BOB) as bob:
        machine = await alice.define()
        for name, method in contract.load()["org.vmbus1.Machine"].methods.items():
            if name == "AddFile":
                with open("/etc/hostname", "rb") as file:
                    await refused(bob(machine, "Machine.AddFile", "kernel", file.fileno()), "NotAuthorized")
            else:
                arguments = [named.get(arg.name, plain[arg.signature]) for arg in method.ins]
                await refused(bob(machine, f"Machine.{name}", *arguments), "NotAuthorized")
        assert await alice.state(machine) == "stopped"
    ours.close()
    theirs.close()


@scenario
async def test_private_properties_of_another_s_machine_are_not_shown(bed: Bed) -> None:
    public = {"Uuid", "Owner", "State"}
    async with bed.caller(ALICE) as alice, bed.caller(BOB) as bob:
        machine = await alice.define()
        assert set(await bob.client.get_all(machine, "Machine")) == public
        shown = (await bob.client.managed_objects())[machine]["org.vmbus1.Machine"]
        assert set(shown) == public
        for name in contract.load()["org.vmbus1.Machine"].properties:
            if name not in public:
                await refused(bob.client.get(machine, "Machine", name), "NotAuthorized")
        mine = (await alice.client.managed_objects())[machine]["org.vmbus1.Machine"]
        assert set(mine) == set(contract.load()["org.vmbus1.Machine"].properties)


@scenario
async def test_lists_hold_one_s_own_and_names_are_one_s_own(bed: Bed) -> None:
    async with bed.caller(ALICE) as alice, bed.caller(BOB) as bob, bed.caller("root") as root:
        hers = await alice.define(name="shared-name")
        his = await bob.define(name="shared-name")
        assert hers in await alice(ROOT, "Manager.ListMachines")
        assert his not in await alice(ROOT, "Manager.ListMachines")
        assert {hers, his} <= set(await root(ROOT, "Manager.ListMachines"))
        assert await bob(ROOT, "Manager.GetMachine", "shared-name") == his
        uuid = await alice.client.get(hers, "Machine", "Uuid")
        assert await bob(ROOT, "Manager.GetMachine", uuid) == hers


@scenario
async def test_polkit_rules_change_it_live(bed: Bed) -> None:
    async with bed.caller(ALICE) as alice, bed.caller(BOB) as bob:
        machine = await alice.define()
        await refused(bob(machine, "Machine.Start", {}, {}), "NotAuthorized")
        bed.system.rule(RULE.format(result="YES", user=BOB, action="org.vmbus1.machine.start-any"))
        await bob(machine, "Machine.Start", {}, {})
        assert await alice.until(machine, "running")
        assert "Name" not in await bob.client.get_all(machine, "Machine")
        bed.system.rule(RULE.format(result="YES", user=BOB, action="org.vmbus1.machine.read-any"))
        assert "Name" in await bob.client.get_all(machine, "Machine")
        assert "Name" in (await bob.client.managed_objects())[machine]["org.vmbus1.Machine"]
        await refused(bob(machine, "Machine.Kill"), "NotAuthorized")
        bed.system.rule(RULE.format(result="NO", user=ALICE, action="org.vmbus1.machine.stop"))
        await refused(alice(machine, "Machine.Kill"), "NotAuthorized")
        bed.system.rule("")
        await alice(machine, "Machine.Kill")


@scenario
async def test_a_rule_sees_the_owner(bed: Bed) -> None:
    rule = (
        "polkit.addRule(function(action, subject) { if (action.id == 'org.vmbus1.machine.stop-any' && "
        "action.lookup('owner') == '%d') return polkit.Result.YES; });"
    )
    async with bed.caller(ALICE) as alice, bed.caller(BOB) as bob:
        hers, his = await alice.define(), await bob.define()
        await alice(hers, "Machine.Start", {}, {})
        await bob(his, "Machine.Start", {}, {})
        bed.system.rule(rule % alice.uid)
        await bob(hers, "Machine.Kill")
        await refused(alice(his, "Machine.Kill"), "NotAuthorized")
        await bob(his, "Machine.Kill")


@scenario
async def test_a_bridge_needs_an_action_of_its_own(bed: Bed) -> None:
    nics = [{"id": "net", "mac": "52:54:00:00:00:01", "bridge": "br0"}]
    async with bed.caller(ALICE) as alice:
        error = await refused(alice.define(nics=nics), "NotAuthorized")
        assert "org.vmbus1.bridge.use" in str(error)
        bed.system.rule(RULE.format(result="YES", user=ALICE, action="org.vmbus1.bridge.use"))
        machine = await alice.define(nics=nics)
        bed.system.rule("")
        await alice(machine, "Machine.Start", {}, {})
        await alice(machine, "Machine.Kill")


@scenario
async def test_private_signals_go_to_the_subscribed_owner_alone(bed: Bed) -> None:
    heard: dict[str, list[str]] = {"alice": [], "unsubscribed": [], "bob": []}

    def hear(who: str) -> Any:
        def on_signal(signal: SignalMessage) -> None:
            if signal.member == "PropertiesChanged":
                heard[who] += list(signal.body[1])
            else:
                heard[who].append(signal.member)

        return on_signal

    async with bed.caller(ALICE) as alice, bed.caller(ALICE) as other, bed.caller(BOB) as bob:
        for who, caller in (("alice", alice), ("unsubscribed", other), ("bob", bob)):
            caller.client.bus.on_signal = hear(who)
            await caller.client.bus.add_match("type='signal',sender='org.vmbus1'")
        await alice(ROOT, "Manager.Subscribe")
        await bob(ROOT, "Manager.Subscribe")
        machine = await alice.define()
        await alice(machine, "Machine.Start", {}, {})
        worker = bed.broker.workers[await alice.client.get(machine, "Machine", "Uuid")]
        worker.event("console")
        await alice(machine, "Machine.Reset")
        await asyncio.sleep(0.5)
        await alice(machine, "Machine.Kill")
        await alice(machine, "Machine.Undefine")
        await asyncio.sleep(0.2)
    assert {"ConsoleActivity", "GuestReset", "StateReason", "WorkerPid", "State", "StateChanged"} <= set(
        heard["alice"]
    )
    for who in ("unsubscribed", "bob"):
        assert set(heard[who]) - {"NameAcquired"} == {
            "InterfacesAdded",
            "InterfacesRemoved",
            "State",
            "StateChanged",
        }


async def one_of_each(alice: Caller) -> dict[str, str]:
    """Interface → an object that has it."""
    machine = await alice.define()
    await alice(machine, "Machine.Start", {}, {})
    job = await alice(machine, "Machine.Stop", 0)
    await alice.until(machine, "stopped")
    objects = await alice.client.managed_objects()
    pools = [path for path, interfaces in objects.items() if "org.vmbus1.HugePages" in interfaces]
    return {
        "Manager": ROOT,
        "Host": f"{ROOT}/host",
        "Machine": machine,
        "Job": job,
        "HugePages": pools[0],
        "Ksm": f"{ROOT}/ksm",
    }


@scenario
async def test_properties_are_those_of_the_xml_with_their_types(bed: Bed) -> None:
    declared = contract.load()
    async with bed.caller(ALICE) as alice:
        places = await one_of_each(alice)
        assert {f"org.vmbus1.{name}" for name in places} == set(declared)
        for name, path in places.items():
            properties = declared[f"org.vmbus1.{name}"].properties
            assert set(await alice.client.get_all(path, name)) == set(properties)
            if properties:
                words = ["busctl", "get-property", "org.vmbus1", path, f"org.vmbus1.{name}", *properties]
                shown = await asyncio.to_thread(bed.system.run_as, ALICE, words)
                types = [line.split()[0] for line in shown.stdout.splitlines()]
                assert types == [found.signature for found in properties.values()], shown.stderr


@scenario
async def test_introspection_is_the_xml(bed: Bed) -> None:
    async with bed.caller(ALICE) as alice:
        for name, path in (await one_of_each(alice)).items():
            answer = await alice.client.bus.call(
                "org.vmbus1", path, "org.freedesktop.DBus.Introspectable", "Introspect"
            )
            served = ET.fromstring(answer.body[0])
            found = [e for e in served.findall("interface") if e.attrib["name"] == f"org.vmbus1.{name}"]
            ours = ET.parse(contract.directory() / f"org.vmbus1.{name}.xml").find("interface")
            assert ours is not None and len(found) == 1
            assert ET.canonicalize(ET.tostring(found[0]), strip_text=True) == ET.canonicalize(
                ET.tostring(ours), strip_text=True
            )


@scenario
async def test_polkitd_absent_is_unavailable_and_lists_go_on(bed: Bed) -> None:
    async with bed.caller(ALICE) as alice:
        machine = await alice.define()
        bed.system.polkitd.kill()
        try:
            error = await refused(alice(machine, "Machine.Start", {}, {}), "Unavailable")
            assert "polkitd" in str(error)
            assert machine in await alice(ROOT, "Manager.ListMachines")
            assert await alice.state(machine) == "stopped"
        finally:
            bed.system.polkitd.start()
        await alice(machine, "Machine.Start", {}, {})
        await alice(machine, "Machine.Kill")


@scenario
async def test_a_packaging_mistake_is_told_from_a_denial(bed: Bed) -> None:
    installed = bed.system.place / "stage" / "actions" / "org.vmbus1.policy"
    text = installed.read_text()
    async with bed.caller(ALICE) as alice:
        machine = await alice.define()
        try:
            for broken, message in (
                (
                    text.replace("org.vmbus1.machine.start", "org.vmbus1.machine.begin"),
                    "does not know the action",
                ),
                (text.replace("unix-user:vmbus", "unix-user:nobody"), "lacks the annotation"),
            ):
                installed.write_text(broken)
                bed.system.polkitd.kill()
                bed.system.polkitd.start()
                error = await refused(alice(machine, "Machine.Start", {}, {}), "Unavailable")
                assert message in str(error)
                host = await alice(f"{ROOT}/host", "Host.GetCapabilities")
                assert host["polkit"] is False
        finally:
            installed.write_text(text)
            bed.system.polkitd.kill()
            bed.system.polkitd.start()
        await alice(machine, "Machine.Start", {}, {})
        await alice(machine, "Machine.Kill")


@scenario
async def test_a_connection_has_so_many_calls_waiting_and_no_more(bed: Bed) -> None:
    async with bed.caller(ALICE) as alice, bed.caller(ALICE) as other:
        machine = await alice.define()
        with polkit_stopped(bed):
            waiting = [asyncio.ensure_future(alice(machine, "Machine.Undefine")) for _ in range(IN_FLIGHT)]
            await asyncio.sleep(0.3)
            with pytest.raises(RemoteError) as caught:
                await alice(machine, "Machine.Undefine")
            assert caught.value.name == "org.freedesktop.DBus.Error.LimitsExceeded"
            assert machine in await other(ROOT, "Manager.ListMachines")
        done = await asyncio.gather(*waiting, return_exceptions=True)
        assert done.count(None) == 1


@contextmanager
def polkit_stopped(bed: Bed) -> Iterator[None]:
    """polkitd stopped in its tracks: questions stay open."""
    os.kill(bed.system.polkitd.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(bed.system.polkitd.pid, signal.SIGCONT)


@scenario
async def test_a_caller_that_leaves_while_polkit_asks_starts_nothing(bed: Bed) -> None:
    async with bed.caller(ALICE) as alice:
        machine = await alice.define(kernel={"source": "fd"})
        asked, fds = len(bed.broker.asked), bed.fds()
        with polkit_stopped(bed):
            async with bed.caller(ALICE) as leaver:
                with bed.file().open("rb") as kernel:
                    files = {"kernel": kernel.fileno()}
                    call = asyncio.ensure_future(leaver(machine, "Machine.Start", {}, files))
                    await asyncio.sleep(0.3)
                    assert bed.fds() > fds  # the file waits with its call
                call.cancel()
            await asyncio.sleep(0.3)
        await asyncio.sleep(0.5)
        assert await alice.state(machine) == "stopped"
        assert len(bed.broker.asked) == asked
        assert bed.fds() == fds


@scenario
async def test_lists_and_properties_do_not_wait_for_polkit(bed: Bed) -> None:
    async with bed.caller(ALICE) as alice:
        machine = await alice.define()
        with polkit_stopped(bed):
            waiting = asyncio.ensure_future(alice(machine, "Machine.Start", {}, {}))
            await asyncio.sleep(0.2)
            assert machine in await alice(ROOT, "Manager.ListMachines", timeout=1)
            assert (await alice.client.get_all(machine, "Machine"))["State"] == "stopped"
            assert not waiting.done()
        await waiting
        await alice(machine, "Machine.Kill")


@scenario
async def test_what_changed_while_polkit_was_asked_is_said(bed: Bed) -> None:
    async with bed.caller(ALICE) as alice:
        machine = await alice(ROOT, "Manager.CreateTransient", form(), {}, {})
        with polkit_stopped(bed):
            pause = asyncio.ensure_future(alice(machine, "Machine.Pause"))
            await asyncio.sleep(0.2)
            bed.broker.workers[uuid_of(machine)].end("guest-poweroff")
            await asyncio.sleep(0.3)
        await refused(pause, "Changed")
