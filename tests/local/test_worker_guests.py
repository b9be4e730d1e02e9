# SPDX-License-Identifier: Apache-2.0
"""Bare-metal guests in a closed worker: how they run, what they say, and each way to end."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import time
from pathlib import Path

import pytest

from tests.local.worker_guest import Guest, read_until
from vmbus.wire.definition import Layer
from vmbus.wire.worker import Pause, Reset, Resume, Run, Shutdown, Stats, Stop

pytestmark = pytest.mark.requires("kvm")


@pytest.mark.parametrize(
    ("mode", "reason"),
    [
        ("hello", "guest-poweroff"),
        ("triple-fault", "triple-fault"),
        ("bad-instruction", "kvm-internal-error"),
    ],
)
def test_each_end_has_its_reason(mode: str, reason: str) -> None:
    with Guest(mode) as guest:
        guest.start()
        end = guest.service.event("ended")
        assert end.reason == reason
        assert end == guest.service.events[-1]
        guest.service.acknowledge()
        assert guest.worker.wait() == 0


@pytest.mark.parametrize("means", ["cf9", "i8042"])
def test_a_reset_is_an_event_and_the_guest_goes_on(means: str) -> None:
    with Guest(f"reset-once {means}") as guest:
        guest.start()
        assert b"second boot" in guest.said(b"second boot")
        guest.service.event("reset")
        assert guest.service.event("ended").reason == "guest-poweroff"


def test_a_reset_ends_a_machine_that_is_defined_so() -> None:
    with Guest("reset-once cf9", on_reset="end") as guest:
        guest.start()
        assert guest.service.event("ended").reason == "guest-reset"


def test_the_states_follow_each_other() -> None:
    with Guest("idle") as guest:
        guest.start()
        guest.said(b"idle")
        assert guest.service.do(Run).error == "InvalidState"
        assert guest.service.do(Pause).error is None
        assert guest.service.do(Pause).error == "InvalidState"
        assert guest.service.do(Resume).error is None
        assert guest.service.do(Reset).error is None
        guest.said(b"idle")
        stats = guest.service.do(Stats).stats
        assert stats["resets"] == 1
        assert len(stats["vcpus"]) == 1
        assert guest.service.do(Stop).error is None
        assert guest.service.event("ended").reason == "stopped"
        states = [event.state for event in guest.service.events if event.kind == "state"]
        assert states == ["configured", "running", "paused", "running"]


def test_once_there_is_a_machine_every_thread_is_narrowed() -> None:
    with Guest("idle", vcpus=2) as guest:
        guest.start()
        guest.said(b"idle")
        filters = {}
        for thread in Path(f"/proc/{guest.worker.pid}/task").iterdir():
            lines = dict(line.split(":\t", 1) for line in (thread / "status").read_text().splitlines())
            filters[lines["Name"], thread.name] = int(lines["Seccomp_filters"])
        # three of the base and one of the role
        assert set(filters.values()) == {4}, filters
        assert len(filters) >= 5  # main, core, control, two vCPUs


def test_a_paused_guest_says_nothing() -> None:
    with Guest("flood") as guest:
        guest.start()
        guest.said(b"line 100\n")
        assert guest.service.do(Pause).error is None
        time.sleep(0.3)
        drain(guest.console)
        time.sleep(0.5)
        assert drain(guest.console) == 0
        assert guest.service.do(Resume).error is None
        assert guest.console.recv(100)


def drain(sock: socket.socket) -> int:
    """Read what is there; how much it was."""
    sock.setblocking(False)
    total = 0
    try:
        while data := sock.recv(1 << 16):
            total += len(data)
    except BlockingIOError:
        pass
    sock.settimeout(10)
    return total


def drained(sock: socket.socket) -> bytes:
    """All that a console still has, up to its end."""
    sock.settimeout(10)
    data = b""
    while chunk := sock.recv(1 << 16):
        data += chunk
    return data


def test_the_power_button_reaches_the_guest() -> None:
    with Guest("wait-power-button") as guest:
        guest.start()
        guest.said(b"waiting\n")
        assert guest.service.do(Shutdown).error is None
        guest.said(b"power button\n")
        assert guest.service.event("ended").reason == "guest-poweroff"


def test_keys_reach_the_guest_and_come_back() -> None:
    with Guest("echo") as guest:
        guest.start()
        guest.said(b"ready\n")
        keys = bytes(range(32, 113)) * 20
        guest.console.send(keys)
        assert guest.said(keys, 20) == keys
        guest.console.send(b"q")
        guest.said(b"bye\n")
        assert guest.service.event("ended").reason == "guest-poweroff"


def test_twenty_readers_of_a_flood_see_every_line_though_one_never_reads() -> None:
    with Guest("flood count=3000") as guest:
        lazy = guest.open_console()
        readers = [guest.open_console() for _ in range(20)]
        guest.start()
        expected = b"".join(b"line %d\n" % number for number in range(3000)) + b"flooded\n"
        collected = [b""] * 20
        deadline = time.monotonic() + 60
        while any(b"flooded\n" not in data for data in collected) and time.monotonic() < deadline:
            for index, sock in enumerate(readers):
                sock.setblocking(False)
                try:
                    collected[index] += sock.recv(1 << 16)
                except BlockingIOError:
                    continue
        assert collected == [expected] * 20
        lazy.close()


def test_a_console_that_comes_late_gets_the_history() -> None:
    with Guest("idle") as guest:
        guest.start()
        guest.said(b"idle\n")
        late = guest.open_console()
        assert read_until(late, b"idle\n") == b"idle\n"


def test_the_guest_outlives_every_service() -> None:
    with Guest("echo") as guest:
        guest.start()
        guest.said(b"ready\n")
        for _ in range(3):
            guest.service.sock.close()
            guest.console.send(b"x")
            guest.said(b"x")
            guest.service = guest.worker.control()
            assert guest.service.welcome.state == "running"
        guest.service.event("state", state="running")
        assert guest.service.do(Stop).error is None


def test_console_activity_is_told_at_most_once_a_second_and_only_when_the_last_was_heard() -> None:
    with Guest("flood") as guest:
        guest.start()
        begin = time.monotonic()
        for count in range(1, 4):
            guest.service.event("console")
            guest.service.acknowledge()
            guest.service.events.clear()
            assert time.monotonic() - begin > count - 1.1
        drain(guest.console)
        guest.service.event("console")
        with pytest.raises(TimeoutError):
            guest.service.event("console", seconds=1.5, reason="a second one")
        assert [event.kind for event in guest.service.events] == ["console"]


def test_a_kernel_that_is_none_is_the_end_with_a_reason() -> None:
    with Guest("hello", kernel=b"this is no kernel" * 100) as guest:
        assert guest.configured.error == "ImageInvalid"
        assert guest.configured.argument == "kernel"
        end = guest.service.event("ended")
        assert end.reason == "error"
        assert "kernel" in end.detail
        guest.service.acknowledge()
        assert guest.worker.wait() == 0


def test_stop_before_the_machine_is_built_ends_it_too() -> None:
    with Guest("hello") as guest:
        assert guest.service.do(Stop).error is None
        assert guest.service.event("ended").reason == "stopped"


def test_several_vcpus_run() -> None:
    with Guest("smp", vcpus=2) as guest:
        guest.start()
        assert guest.service.event("ended", seconds=20).reason == "guest-poweroff"


def test_an_ended_worker_waits_for_its_service_and_then_goes_alone() -> None:
    with Guest("hello") as guest:
        guest.start()
        end = guest.service.event("ended")
        guest.service.sock.close()
        time.sleep(0.5)
        assert guest.worker.process.poll() is None
        guest.service = guest.worker.control()
        assert guest.service.event("ended") == end
        guest.service.acknowledge()
        assert guest.worker.wait() == 0


LATE = """
import os, sys
from vmbus.worker import main

armed = False

def watch(event, arguments):
    if armed and event in ("import", "open", "os.listdir", "ctypes.dlopen"):
        os.write(2, f"late: {event} {arguments}\\n".encode())

def arm(worker):
    global armed
    armed = True

sys.addaudithook(watch)
main.STEPS += (("watch what comes late", arm),)
main.main()
"""


def test_nothing_is_imported_or_opened_once_the_root_is_empty() -> None:
    """A whole life, mistakes included, needs no file: there is none any more."""
    with Guest("reset-once cf9", program=("-c", LATE)) as guest:
        guest.service.sock.send(b"\xc1 no message")
        assert guest.service.ended()
        guest.service = guest.worker.control()
        assert guest.service.do(Shutdown).error == "InvalidState"
        guest.start()
        guest.said(b"second boot")
        stranger = guest.worker.connect()
        stranger.send(b"\xa3\xff\xff\xff")
        assert stranger.recv(10) == b""
        assert guest.service.event("ended").reason == "guest-poweroff"
        guest.service.acknowledge()
        assert guest.worker.wait() == 0
        assert "late:" not in guest.worker.log()


class TestDisks:
    """Images by slot: what is built from them, and what is refused with which name."""

    @pytest.fixture
    def images(self, tmp_path: Path) -> dict[str, Path]:
        """A raw image and a qcow2 one with the raw one beneath it."""
        raw, top = tmp_path / "base.raw", tmp_path / "top.qcow2"
        raw.write_bytes(bytes(1 << 20))
        subprocess.run(
            ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", str(raw), str(top)], check=True
        )
        return {"raw": raw, "top": top}

    @pytest.mark.parametrize("rings", [0, 2])
    def test_a_machine_with_disks_runs_and_stops_clean(self, images: dict[str, Path], rings: int) -> None:
        chain = [Layer(format="qcow2", backing_name=str(images["raw"])), Layer(format="raw")]
        disks = {"root": (chain, [images["top"], images["raw"]])}
        with Guest("idle", vcpus=2, disks=disks, rings=rings) as guest:
            guest.start()
            guest.said(b"idle")
            assert guest.service.do(Pause).error is None
            assert guest.service.do(Resume).error is None
            assert guest.service.do(Stop).error is None
            assert guest.service.event("ended").reason == "stopped"
            assert guest.worker.log() == ""
        subprocess.run(["qemu-img", "check", "-q", str(images["top"])], check=True)

    @pytest.mark.parametrize("rings", [0, 2])
    @pytest.mark.parametrize(
        "mode", ["disk-pattern count=256", "disk-zero", "disk-interrupt", "disk-hostile", "random"]
    )
    def test_a_guest_s_input_and_output_passes_the_filters(
        self, images: dict[str, Path], mode: str, rings: int
    ) -> None:
        """Every kind of request, allocation in qcow2 and copies from the backing file included."""
        chain = [Layer(format="qcow2", backing_name=str(images["raw"])), Layer(format="raw")]
        disks = {"root": (chain, [images["top"], images["raw"]])}
        with Guest(mode, disks=disks, rings=rings) as guest:
            guest.start()
            assert guest.service.event("ended", seconds=60).reason == "guest-poweroff"
            said = drained(guest.console)
            assert f"{mode.split(maxsplit=1)[0].removeprefix('disk-')}: ".encode() in said
            for wrong in (b"differently", b"none", b"features refused", b"status 1", b"status 2"):
                assert wrong not in said, said
        subprocess.run(["qemu-img", "check", "-q", str(images["top"])], check=True)

    def test_compressed_clusters_are_expanded_behind_the_filters(self, tmp_path: Path) -> None:
        """By the I/O thread and the threads that help it, 32 clusters a request."""
        raw, packed = tmp_path / "content.raw", tmp_path / "packed.qcow2"
        words = [sector * 0x9E3779B97F4A7C15 % 2**64 for sector in range(4096)]
        raw.write_bytes(b"".join(struct.pack("<64Q", word, *range(63)) for word in words))
        how = ["-O", "qcow2", "-c", "-o", "cluster_size=64k"]
        subprocess.run(["qemu-img", "convert", "-f", "raw", *how, str(raw), str(packed)], check=True)
        disks = {"root": ([Layer(format="qcow2")], [packed])}
        with Guest("disk-span bytes=2097152 times=5", vcpus=2, disks=disks) as guest:
            tasks = Path(f"/proc/{guest.worker.pid}/task").glob("*/comm")
            names = [task.read_text().strip() for task in tasks]
            helpers = min(2, len(os.sched_getaffinity(0)) - 1)
            assert sum(name.startswith("coder-") for name in names) == helpers
            guest.start()
            said = guest.said(b"span: 2097152 bytes, sum ")
            assert guest.service.event("ended", seconds=60).reason == "guest-poweroff"
            said += drained(guest.console)
            assert b"sum %x" % (sum(words) % 2**64) in said

    def test_a_write_that_the_file_refuses_is_the_guest_s_error_and_not_the_end(self, tmp_path: Path) -> None:
        image = tmp_path / "small.raw"
        image.write_bytes(bytes(1 << 20))
        with Guest(
            "disk-pattern sector=2048 count=1", disks={"a": ([Layer(format="raw")], [image])}
        ) as guest:
            guest.start()
            assert b"status 1" in guest.said(b"status 1")
            assert guest.service.event("ended").reason == "guest-poweroff"

    @pytest.mark.parametrize(
        ("layer", "kind"),
        [
            (Layer(format="qcow2"), "BackingChanged"),
            (Layer(format="qcow2", backing_name="/elsewhere"), "BackingChanged"),
        ],
    )
    def test_a_header_that_names_another_backing_file_is_refused(
        self, images: dict[str, Path], layer: Layer, kind: str
    ) -> None:
        with Guest("idle", disks={"root": ([layer], [images["top"]])}) as guest:
            assert guest.configured.error == kind
            assert guest.service.event("ended").reason == "error"

    def test_what_is_no_qcow2_is_refused(self, images: dict[str, Path]) -> None:
        with Guest("idle", disks={"root": ([Layer(format="qcow2")], [images["raw"]])}) as guest:
            assert guest.configured.error == "ImageInvalid"
            assert guest.configured.argument == "disk/root/0"

    def test_an_image_that_another_machine_writes_is_in_use(self, images: dict[str, Path]) -> None:
        disks = {"root": ([Layer(format="raw")], [images["raw"]])}
        with Guest("idle", disks=disks) as first:
            first.start()
            with Guest("idle", disks=disks) as second:
                assert second.configured.error == "InUse"
            assert first.service.do(Stats).stats["state"] == "running"


def test_a_bug_on_the_core_s_thread_ends_the_worker_and_does_not_hang_it() -> None:
    broken = """
from vmbus.worker import core, main
def forget(worker):
    core.lib = None
main.STEPS += (("lose the library", forget),)
main.main()
"""
    with pytest.raises(ConnectionResetError):
        Guest("hello", program=("-c", broken))


def test_the_clock_interrupts_for_seconds_an_alarm_and_many_times_a_second() -> None:
    with Guest("rtc") as guest:
        guest.start()
        guest.said(b"rtc: update 1", 30)
        guest.said(b"rtc: alarm 1", 30)
        guest.said(b"rtc: periodic 10", 30)


def test_the_clock_interrupts_again_once_a_paused_machine_goes_on() -> None:
    with Guest("rtc-seconds") as guest:
        guest.start()
        guest.said(b"rtc-seconds: 1, 90", 30)
        assert guest.service.do(Pause).error is None
        assert guest.service.do(Resume).error is None
        guest.said(b"rtc-seconds: 3, 90", 30)
