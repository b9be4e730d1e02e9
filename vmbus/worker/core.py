# SPDX-License-Identifier: Apache-2.0
"""The cffi face of the core: its exports as Python functions, its errors as VmbusError.

What may take long (building a machine opens images; freeing one waits for its threads) runs on the *core
thread*, which is made before the main thread narrows itself and so is no narrower than the threads that
the core makes from it. Once there is a machine it narrows itself too: from then on nobody in the process can
make a thread, a VM or a filter. cffi lets go of the interpreter during a call, so the control channel answers
meanwhile. Everything else here returns at once.
"""

from __future__ import annotations

import _thread
import os
import sys
from collections import deque
from collections.abc import Callable
from typing import Any, Final

import msgspec

from vmbus._native import ffi, lib
from vmbus.wire.definition import (
    FIRMWARE_CODE,
    FIRMWARE_NIC_ROM,
    FIRMWARE_VARIABLES,
    Definition,
    Disk,
    Nic,
    boot_order,
    has_balloon,
    is_read_only,
    slots,
)
from vmbus.wire.errors import KINDS, VmbusError
from vmbus.worker.files import RESTORE, Files
from vmbus.worker.loop import Loop

ABI: Final = 2
PROFILES: Final = {"plain": 0, "vfio": 1}
ROLES: Final = {
    "main": 0,
    "control": 1,
    "vcpu": 2,
    "block": 3,
    "network": 4,
    "memory": 5,
    "crew": 6,
    "migration": 7,
}
SLOT_OPERATIONS: Final = {"attach-disk": 0, "attach-nic": 1, "detach": 2, "keep": 3, "medium": 4, "vsock": 5}
OPERATIONS: Final = {
    "run": 0,
    "pause": 1,
    "resume": 2,
    "power-button": 3,
    "reset": 4,
    "stop": 5,
    "stats": 6,
    "memory-target": 7,
    "prefault": 8,
    "cancel-prefault": 9,
    "cancel-save": 10,
}
FILE_OPERATIONS: Final = {"save": 0, "restore": 1, "tidy": 2, "send": 3, "receive": 4}


class CoreError(msgspec.Struct):
    """An error as the core writes it."""

    kind: str
    argument: str
    message: str

    def raised(self) -> VmbusError:
        """The same as an exception."""
        kind = self.kind if self.kind in KINDS else "Internal"
        return VmbusError(kind, self.message, argument=self.argument)


class End(msgspec.Struct):
    """How a machine ended: a ``wire.worker.EndReason`` and a sentence."""

    reason: str
    detail: str


class Gone(msgspec.Struct):
    """A device that the guest has let go of, and what went wrong when it was flushed."""

    device: str
    detail: str


class CoreEvent(msgspec.Struct):
    """What ``Machine.next_event`` gives; ``kind`` is a value of _EVENTS."""

    kind: str
    id: int
    json: bytes


# include/linux/miscdevice.h, /dev/vhost-net
_VHOST_NET: Final = os.makedev(10, 238)
# native/vmm/src/config/devices.rs, LinkKind
_LINKS: Final = {"bridge": "tap", "macvtap": "tap", "user": "stream", "isolated": "hub"}
# native/capi/src/event.rs
_EVENTS: Final = {
    1: "done",
    2: "failed",
    3: "running",
    4: "paused",
    5: "reset",
    6: "ended",
    7: "detached",
    8: "watchdog",
}
_error_decoder = msgspec.json.Decoder(CoreError)
_end_decoder = msgspec.json.Decoder(End)
_gone_decoder = msgspec.json.Decoder(Gone)
_action_decoder = msgspec.json.Decoder(dict[str, str])
_stats_decoder = msgspec.json.Decoder(dict[str, Any])
_encoder = msgspec.json.Encoder()


def check_abi() -> None:
    """Raise RuntimeError unless the library is the one that this module was written for."""
    version = lib.vmbus_abi_version()
    if version != ABI:
        raise RuntimeError(f"the core has ABI {version}, this worker needs {ABI}")


def call(result: int) -> int:
    """A core function's result; raises VmbusError for -1."""
    if result < 0:
        raise _error_decoder.decode(ffi.string(lib.vmbus_error())).raised()
    return result


def rings(count: int, entries: int, files: int) -> int:
    """Make io_uring rings for the machine to come; returns how many, 0 where the host has none."""
    return call(lib.vmbus_sandbox_rings(count, entries, files))


def landlock() -> int:
    """Deny every path; returns the kernel's Landlock ABI, 0 if it has none."""
    return call(lib.vmbus_sandbox_landlock())


def seccomp(profile: str) -> None:
    """Install the base filter on all threads."""
    call(lib.vmbus_sandbox_seccomp(PROFILES[profile]))


def narrow(role: str) -> None:
    """Narrow the calling thread."""
    call(lib.vmbus_sandbox_narrow(ROLES[role]))


def configuration(
    uuid: str,
    definition: Definition,
    files: Files,
    *,
    kvm: int,
    console: int,
    merge: bool = True,
    restore: bool = False,
    clone: bool = False,
) -> bytes:
    """The core's ``Config`` (native/vmm/src/config) as JSON: the definition, each file by its fd.

    ``merge``: whether mergeable memory is offered to KSM; ``restore``: the machine goes on from a file, whose
    memory a ``clone`` has.
    Raises InvalidArgument for a slot that is not
    filled. All the slots that it names, ``kvm`` and ``console``
    belong to the core once the bytes are given to it.
    """
    config: dict[str, Any] = {
        "machine_type": definition.machine_type,
        "uuid": uuid,
        "vcpus": definition.vcpus,
        "memory": definition.memory,
        "memory_kind": definition.memory_kind,
        "cpu_model": definition.cpu_model,
        "kvm_fd": kvm,
        "console_fd": console,
        "disks": [disk_configuration(disk, files) for disk in definition.disks],
        "nics": [nic_configuration(nic, files) for nic in definition.nics],
        "ports": [
            {"name": name, "fd": files.all(f"port/{number}")[-1]}
            for number, name in enumerate(definition.ports)
        ],
        "vsock": definition.vsock or None,
        "rng": definition.rng,
        "balloon": has_balloon(definition),
        "merge": merge and definition.memory_kind == "mergeable",
        "locked": definition.locked,
        "memory_nodes": definition.memory_nodes,
        "on_reset": definition.on_reset,
        "watchdog": None if definition.watchdog == "off" else definition.watchdog,
        "restore": restore,
    }
    config |= _beginning(definition, files)
    if clone:
        config["clone_fd"] = files.one(RESTORE)
    if definition.memory_kind != "mergeable":
        config["memory_fd"] = files.one("memory")
    return _encoder.encode(config)


def disk_configuration(disk: Disk, files: Files) -> dict[str, Any]:
    """The core's ``Disk``. Raises InvalidArgument for a slot that is not filled."""
    layers: list[dict[str, Any]] = []
    for index, layer in enumerate(disk.layers):
        slot = f"disk/{disk.id}/{index}"
        entry: dict[str, Any] = {"fd": files.one(slot), "format": layer.format}
        if layer.backing_name is not None:
            entry["backing_name"] = layer.backing_name
        if layer.data_name is not None:
            entry |= {"data_name": layer.data_name, "data_fd": files.one(f"{slot}/data")}
        if layer.encrypted:
            entry["secret_fd"] = files.one(f"{slot}/secret")
        layers.append(entry)
    return {
        "id": disk.id,
        "layers": layers,
        "bus": disk.bus,
        "cdrom": disk.cdrom,
        "read_only": is_read_only(disk),
        "serial": disk.serial,
        "queues": disk.queues,
        "slot": disk.slot or None,
        "detect_zeroes": disk.detect_zeroes,
    }


def nic_configuration(nic: Nic, files: Files) -> dict[str, Any]:
    """The core's ``Nic``. Raises InvalidArgument for a slot that is not filled."""
    fds = [fd for slot in nic_slots(nic) for fd in files.all(slot)]
    helpers = [fd for fd in fds if os.fstat(fd).st_rdev == _VHOST_NET]
    return {
        "id": nic.id,
        "mac": nic.mac,
        "queues": nic.queues,
        "link": _LINKS[nic.kind],
        "tap_fds": [fd for fd in fds if fd not in helpers],
        "vhost_fds": helpers,
        "slot": nic.slot or None,
        "carrier": nic.carrier,
    }


def _beginning(definition: Definition, files: Files) -> dict[str, Any]:
    """What is booted: a kernel or firmware."""
    if definition.kernel is None:
        firmware: dict[str, Any] = {
            "code_fd": files.one(FIRMWARE_CODE),
            "boot": boot_order(definition),
            "menu": definition.boot_menu,
        }
        for key, slot in (("variables_fd", FIRMWARE_VARIABLES), ("nic_rom_fd", FIRMWARE_NIC_ROM)):
            if files.has(slot):
                firmware[key] = files.one(slot)
        return {"firmware": firmware}
    kernel: dict[str, Any] = {"fd": files.one("kernel"), "cmdline": definition.kernel.cmdline}
    if any(slot.name == "initrd" for slot in slots(definition)):
        kernel["initrd_fd"] = files.one("initrd")
    return {"kernel": kernel}


def nic_slots(nic: Nic) -> list[str]:
    """The slots of its host's end; the links of an isolated network come when it is built."""
    return [] if nic.kind == "isolated" else [f"nic/{nic.id}"]


def named_slots(definition: Definition, files: Files) -> list[str]:
    """The slots whose files ``configuration`` gives to the core."""
    names = [slot.name for slot in slots(definition)]
    if definition.kernel is None:
        names += filter(files.has, (FIRMWARE_CODE, FIRMWARE_VARIABLES, FIRMWARE_NIC_ROM))
    names += [slot for nic in definition.nics for slot in nic_slots(nic)]
    names += [f"port/{number}" for number, _ in enumerate(definition.ports)]
    if definition.memory_kind != "mergeable":
        names.append("memory")
    return names


class Core:
    """The machine in the core, and the thread for its long calls."""

    def __init__(self, loop: Loop, event: Callable[[CoreEvent], None]) -> None:
        self._loop = loop
        self._event = event
        self._machine: Any = None
        self._event_fd = -1
        self._jobs: deque[Callable[[], Callable[[], None]]] = deque()
        self._finished: deque[Callable[[], None]] = deque()
        self._jobs_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_SEMAPHORE)
        self._finished_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        loop.watch(self._finished_fd, lambda _: self._run_finished())

    def start_thread(self) -> None:
        """Start the core thread."""
        _thread.start_new_thread(self._work, ())

    def _work(self) -> None:
        """Jobs in order; what each returns runs on the main thread. A bug here ends the worker, as there."""
        try:
            while True:
                os.eventfd_read(self._jobs_fd)
                self._finished.append(self._jobs.popleft()())
                os.eventfd_write(self._finished_fd, 1)
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(1)

    def _begin(self, job: Callable[[], Callable[[], None]]) -> None:
        self._jobs.append(job)
        os.eventfd_write(self._jobs_fd, 1)

    def _run_finished(self) -> None:
        os.eventfd_read(self._finished_fd)
        while self._finished:
            self._finished.popleft()()

    def build(self, config: bytes, done: Callable[[VmbusError | None], None]) -> None:
        """Build the machine; ``done`` gets None or why not. The fds in ``config`` are gone either way."""

        def job() -> Callable[[], None]:
            out = ffi.new("VmbusMachine **")
            try:
                call(lib.vmbus_machine_new(config, len(config), out))
                narrow("control")
            except VmbusError as error:
                failure = error
                return lambda: done(failure)
            return lambda: self._built(out[0], done)

        self._begin(job)

    def _built(self, machine: Any, done: Callable[[VmbusError | None], None]) -> None:
        self._machine = machine
        self._event_fd = call(lib.vmbus_machine_event_fd(machine))
        self._loop.watch(self._event_fd, lambda _: self._read_events())
        done(None)

    def request(self, operation: str, request: int, argument: int = 0) -> None:
        """Ask for one of OPERATIONS; an event done or failed with this id answers. Never waits."""
        call(lib.vmbus_machine_request(self._machine, OPERATIONS[operation], argument, request))

    def attach(
        self, operation: str, request: int, device: dict[str, Any], failed: Callable[[VmbusError], None]
    ) -> None:
        """Attach a ``device`` ("attach-disk" or "attach-nic"), or change a "medium"; the fds are gone.

        An event done or failed with this id answers, or ``failed`` is called. Images are opened on the core
        thread."""
        machine, json = self._machine, _encoder.encode(device)

        def job() -> Callable[[], None]:
            try:
                call(lib.vmbus_machine_slot(machine, SLOT_OPERATIONS[operation], request, json, len(json)))
            except VmbusError as error:
                failure = error
                return lambda: failed(failure)
            return lambda: None

        self._begin(job)

    def slot(self, operation: str, request: int, device: str) -> None:
        """Ask the guest to "detach" a device or let it "keep" it. Never waits."""
        json = _encoder.encode(device)
        call(lib.vmbus_machine_slot(self._machine, SLOT_OPERATIONS[operation], request, json, len(json)))

    def vsock(self, request: int, port: int, fd: int, *, accept: bool) -> None:
        """A socket for a connection with the guest; ``fd`` is the core's. An event answers."""
        json = _encoder.encode({"port": port, "accept": accept, "fd": fd})
        call(lib.vmbus_machine_slot(self._machine, SLOT_OPERATIONS["vsock"], request, json, len(json)))

    def change(self, request: int, device: str, kind: str, value: bool | int) -> None:
        """Change a device; ``kind`` is one of native/vmm/src/config, ``ChangeKind``. An event answers."""
        words = _encoder.encode({"device": device, "change": {kind: value}})
        call(lib.vmbus_machine_change(self._machine, request, words, len(words)))

    def link(self, request: int, device: str, peer: str, fd: int) -> None:
        """Another machine has come to the device's network; ``fd`` is the core's. An event answers."""
        words = _encoder.encode({"device": device, "peer": peer, "fd": fd})
        call(lib.vmbus_machine_link(self._machine, request, words, len(words)))

    def keep(self, operation: str, request: int, **arguments: Any) -> None:
        """One of FILE_OPERATIONS; ``fd``, if it is among the arguments, is the core's. An event answers."""
        words = _encoder.encode(arguments)
        call(lib.vmbus_machine_keep(self._machine, FILE_OPERATIONS[operation], request, words, len(words)))

    def _read_events(self) -> None:
        event = ffi.new("VmbusEvent *")
        # A callback may free the machine.
        while self._machine is not None and call(lib.vmbus_machine_next_event(self._machine, event)):
            self._event(CoreEvent(_EVENTS[event.kind], event.id, ffi.string(event.json)))

    def free(self) -> None:
        """Free the machine, if there is one, on the core thread: memory and files go as soon as they can."""
        machine, self._machine = self._machine, None
        if machine is None:
            return
        self._loop.forget(self._event_fd)

        def job() -> Callable[[], None]:
            lib.vmbus_machine_free(machine)
            return lambda: None

        self._begin(job)


def error_of(event: CoreEvent) -> VmbusError:
    """Why the request of a ``failed`` event failed."""
    return _error_decoder.decode(event.json).raised()


def end_of(event: CoreEvent) -> End:
    """The reason in an ``ended`` event."""
    return _end_decoder.decode(event.json)


def gone_of(event: CoreEvent) -> Gone:
    """The device in a ``detached`` event."""
    return _gone_decoder.decode(event.json)


def action_of(event: CoreEvent) -> str:
    """What the watchdog does, in a ``watchdog`` event."""
    return _action_decoder.decode(event.json)["action"]


def stats_of(event: CoreEvent) -> dict[str, Any]:
    """The counters in a ``done`` event; none for a request without a result."""
    return _stats_decoder.decode(event.json) if event.json else {}
