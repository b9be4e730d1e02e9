# SPDX-License-Identifier: Apache-2.0
"""A MAC address is there once on a bridge, whoever the machines belong to and whatever happens to vmbusd."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.lab.bridge import RULE
from tests.local.service_bed import ALICE, BOB, Bed, Caller, scenario, uuid_of
from vmbus.bus import variants
from vmbus.wire import broker, dbus_form
from vmbus.wire.definition import Nic
from vmbus.wire.errors import VmbusError

MAC, OTHER = "52:54:00:00:00:01", "52:54:00:00:00:02"


@pytest.fixture
def bed() -> Iterator[Bed]:
    with Bed() as made:
        made.system.rule(RULE)
        yield made


def nic(bridge: str, mac: str = MAC) -> dict[str, str]:
    return {"id": "net", "mac": mac, "bridge": bridge}


async def defined(caller: Caller, *nics: dict[str, str]) -> str:
    return await caller.define(nics=list(nics))


async def started(caller: Caller, *nics: dict[str, str]) -> str:
    machine = await defined(caller, *nics)
    await caller(machine, "Machine.Start", {}, {})
    return machine


async def refused(caller: Caller, machine: str, method: str, *words: Any) -> str:
    with pytest.raises(VmbusError) as caught:
        await caller(machine, f"Machine.{method}", *words)
    assert caught.value.kind == "InUse" and "nic/net" in str(caught.value)
    return str(caught.value)


@scenario
async def test_of_two_machines_with_one_address_on_one_bridge_one_runs(bed: Bed) -> None:
    async with bed.caller(ALICE) as alice, bed.caller(BOB) as bob:
        hers, his = await started(alice, nic("br0")), await defined(bob, nic("br0"))
        message = await refused(bob, his, "Start", {}, {})
        assert uuid_of(hers) in message and MAC in message and "br0" in message
        # Nothing was asked of the bridge, and the worker that was there has gone.
        asked = [request.uuid for request in bed.broker.asked if isinstance(request, broker.Tap)]
        assert asked == [uuid_of(hers)]
        assert await bob.until(his, "stopped") and set(bed.broker.workers) == {uuid_of(hers)}

        for elsewhere in (nic("br1"), nic("br0", OTHER)):
            await started(bob, elsewhere)
        await alice(hers, "Machine.Pause")  # it is there all the same
        await refused(bob, his, "Start", {}, {})
        await alice(hers, "Machine.Kill")
        await bob(his, "Machine.Start", {}, {})
        await refused(alice, hers, "Start", {}, {})


@scenario
async def test_an_address_that_a_running_machine_has_is_not_attached_to_another(bed: Bed) -> None:
    async with bed.caller(ALICE) as alice:
        first, second = await started(alice, nic("br0")), await started(alice)
        plugged = variants(dbus_form.build(Nic("net", MAC, bridge="br0")))
        await refused(alice, second, "AttachNic", plugged)
        assert (await alice.client.get(second, "Machine", "Definition"))["nics"] == []
        await alice(first, "Machine.Kill")
        await alice(second, "Machine.AttachNic", plugged)


@scenario
async def test_the_addresses_of_running_machines_are_known_to_the_next_vmbusd(bed: Bed) -> None:
    async with bed.caller(ALICE) as alice:
        hers = await started(alice, nic("br0"))
    bed.system.service.kill()
    bed.system.service.start()
    async with bed.caller(ALICE) as alice, bed.caller(BOB) as bob:
        await alice.until(hers, "running")
        his = await defined(bob, nic("br0"))
        await refused(bob, his, "Start", {}, {})
