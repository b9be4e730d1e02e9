# SPDX-License-Identifier: Apache-2.0
"""The C ABI as Python read it from the header is the one that the library has."""

from __future__ import annotations

import json
import os
import threading

import pytest

from vmbus._native import ffi, lib
from vmbus.wire.definition import MEMORY_LEAST, MEMORY_MOST, MIB
from vmbus.wire.errors import VmbusError
from vmbus.worker import core

UUID = "00000000-0000-4000-8000-000000000000"


def described() -> list[list[str]]:
    text: bytes = ffi.string(lib.vmbus_layout())
    return [line.split() for line in text.decode().splitlines()]


def test_the_library_is_the_one_the_worker_was_written_for() -> None:
    core.check_abi()
    assert lib.vmbus_abi_version() == core.ABI


def test_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core, "ABI", core.ABI + 1)
    with pytest.raises(RuntimeError, match="needs"):
        core.check_abi()


def test_structs_have_the_same_layout_on_both_sides() -> None:
    event = ffi.typeof("VmbusEvent")
    here = [["VmbusEvent", str(ffi.sizeof(event)), str(ffi.alignof(event))]]
    for name, field in event.fields:
        here.append([f"VmbusEvent.{name}", str(field.offset), str(ffi.sizeof(field.type))])
    assert described() == here


@pytest.mark.parametrize(
    ("function", "argument", "name"),
    [("vmbus_sandbox_seccomp", 2, "profile"), ("vmbus_sandbox_narrow", 8, "role")],
)
def test_a_number_out_of_range_is_an_error_that_names_the_argument(
    function: str, argument: int, name: str
) -> None:
    with pytest.raises(VmbusError) as caught:
        core.call(getattr(lib, function)(argument))
    assert (caught.value.kind, caught.value.argument) == ("InvalidArgument", name)


def test_no_thread_is_narrowed_in_a_process_that_is_not_closed() -> None:
    with pytest.raises(VmbusError) as caught:
        core.narrow("vcpu")
    assert caught.value.kind == "InvalidState"


def test_an_error_belongs_to_its_thread() -> None:
    assert lib.vmbus_sandbox_narrow(9) == -1
    here: bytes = ffi.string(lib.vmbus_error())
    there: list[bytes] = []
    thread = threading.Thread(target=lambda: there.append(ffi.string(lib.vmbus_error())))
    thread.start()
    thread.join()
    assert b"role 9" in here
    assert there == [b""]


@pytest.mark.parametrize("text", [b"", b"[]", b"{}", b"\xff\xfe", b'{"machine_type": 3}'])
def test_what_is_no_configuration_is_refused(text: bytes) -> None:
    out = ffi.new("VmbusMachine **")
    with pytest.raises(VmbusError) as caught:
        core.call(lib.vmbus_machine_new(text, len(text), out))
    assert caught.value.kind == "InvalidArgument"
    assert out[0] == ffi.NULL


@pytest.mark.parametrize(
    ("memory", "argument"),
    [
        (MEMORY_LEAST, "kernel.cmdline"),
        (MEMORY_MOST, "kernel.cmdline"),
        (MEMORY_LEAST - MIB, "memory"),
        (MEMORY_MOST + MIB, "memory"),
    ],
)
def test_the_core_takes_as_much_memory_as_a_definition_may_say(memory: int, argument: str) -> None:
    """The command line, which is looked at next, is too long for any machine to be made of this."""
    kvm, console, kernel = (os.open(os.devnull, os.O_RDONLY) for _ in range(3))  # the core closes them
    wrong = {
        **{"machine_type": "vmbus-1", "uuid": UUID, "vcpus": 1, "memory": memory, "cpu_model": "host"},
        **{"kvm_fd": kvm, "console_fd": console, "kernel": {"fd": kernel, "cmdline": "x" * 5000}},
    }
    text = json.dumps(wrong).encode()
    with pytest.raises(VmbusError) as caught:
        core.call(lib.vmbus_machine_new(text, len(text), ffi.new("VmbusMachine **")))
    assert (caught.value.kind, caught.value.argument) == ("InvalidArgument", argument)


def test_no_machine_is_an_error_and_not_a_crash() -> None:
    event = ffi.new("VmbusEvent *")
    for result in (
        lib.vmbus_machine_request(ffi.NULL, 0, 0, 1),
        lib.vmbus_machine_event_fd(ffi.NULL),
        lib.vmbus_machine_next_event(ffi.NULL, event),
    ):
        assert result == -1
    lib.vmbus_machine_free(ffi.NULL)
