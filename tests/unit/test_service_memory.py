# SPDX-License-Identifier: Apache-2.0
"""Which targets a machine's memory may have."""

from __future__ import annotations

import pytest

from vmbus.service.machine import Machine
from vmbus.service.memory import check_target
from vmbus.wire import dbus_form
from vmbus.wire.errors import VmbusError

MIB = 1 << 20


def machine(**changes: object) -> Machine:
    form = {"name": "one", "memory": 64 * MIB, "kernel": {"path": "/vmlinuz"}, **changes}
    return Machine("uuid", 1000, dbus_form.parse(form), persistent=True)


@pytest.mark.parametrize("kind", ["mergeable", "shareable"])
def test_from_the_floor_to_the_whole(kind: str) -> None:
    for target in (16 * MIB, 40 * MIB + 4096, 64 * MIB):
        check_target(machine(**{"memory-kind": kind}), target)


def test_huge_memory_is_reserved() -> None:
    with pytest.raises(VmbusError, match="cannot be ballooned, merged or swapped") as caught:
        check_target(machine(**{"memory-kind": "huge"}), 32 * MIB)
    assert caught.value.kind == "NotSupported"
