# SPDX-License-Identifier: Apache-2.0
"""The broker's loop, its tasks, and its steps."""

from __future__ import annotations

import contextlib
import os
import time

import pytest

from vmbus.broker.children import Channel, Crew
from vmbus.broker.loop import Loop, Pending, Task, start
from vmbus.broker.steps import Step, carry_out, log
from vmbus.wire.errors import VmbusError


def test_a_task_waits_for_what_is_pending_and_gets_its_value_or_error() -> None:
    first: Pending[int] = Pending()
    second: Pending[int] = Pending()

    def task() -> Task[str]:
        value = yield from first
        try:
            yield from second
        except VmbusError as error:
            return f"{value} {error.kind}"
        return "no error"

    outcome = start(task())
    assert not outcome.settled
    first.settle(7)
    first.settle(8)
    second.settle(None, VmbusError("Timeout", "x"))
    assert outcome.result() == "7 Timeout"


def test_timers_come_in_order_and_can_be_cancelled() -> None:
    loop, seen = Loop(), list[str]()
    loop.later(0.03, lambda: loop.stop(5))
    loop.later(0.02, lambda: seen.append("b"))
    loop.later(0.01, lambda: seen.append("a"))
    loop.cancel(loop.later(0.015, lambda: seen.append("never")))
    assert loop.run() == 5
    assert seen == ["a", "b"]


def test_a_mistake_in_one_call_costs_that_call_only(capfd: pytest.CaptureFixture[str]) -> None:
    loop = Loop()
    loop.later(0, lambda: 1 / 0)
    loop.later(0.01, loop.stop)
    assert loop.run() == 0
    assert "bug: ZeroDivisionError" in capfd.readouterr().err


def test_one_descriptor_closed_by_another_s_call_is_not_served() -> None:
    loop, seen = Loop(), list[int]()
    pipes = [os.pipe() for _ in range(2)]
    for index, (read, write) in enumerate(pipes):
        os.write(write, b"x")

        def call(index: int = index) -> None:
            seen.append(index)
            for other, _ in pipes:
                loop.unwatch(other)

        loop.watch(read, call)
    loop.later(0.05, loop.stop)
    loop.run()
    assert len(seen) == 1


class _Note:
    def __init__(self, name: str, notes: list[str], *, fails: bool = False) -> None:
        self.name, self.notes, self.fails = name, notes, fails

    def describe(self) -> str:
        return self.name

    def execute(self) -> None:
        if self.fails:
            raise OSError("no")
        self.notes.append(f"+{self.name}")

    def undo(self) -> None:
        self.notes.append(f"-{self.name}")


def test_steps_are_done_in_order_and_undone_in_reverse() -> None:
    notes: list[str] = []
    steps: list[Step] = [
        _Note("a", notes),
        _Note("b", notes),
        _Note("c", notes, fails=True),
        _Note("d", notes),
    ]
    with pytest.raises(OSError, match="no"):
        carry_out(steps)
    assert notes == ["+a", "+b", "-b", "-a"]


def test_the_log_is_one_line_an_entry(capfd: pytest.CaptureFixture[str]) -> None:
    log("path=/x\n2026-01-01T00:00:00Z forged\x1b[31m")
    (line,) = capfd.readouterr().err.splitlines()
    assert line.endswith(r"path=/x\n2026-01-01T00:00:00Z forged\x1b[31m")


def crew_run(loop: Loop, *tasks: Task[int]) -> list[Pending[int]]:
    outcomes = [start(task) for task in tasks]
    end = time.monotonic() + 20
    while not all(outcome.settled for outcome in outcomes) and time.monotonic() < end:
        loop.later(0.02, loop.stop)
        loop._code = None
        loop.run()
    return outcomes


def test_a_child_keeps_only_what_it_was_handed() -> None:
    loop = Loop()
    read, write = os.pipe()

    def work(channel: Channel) -> None:
        held = sorted(int(name) for name in os.listdir("/proc/self/fd"))
        os.write(channel.fds[0], b"here")
        channel.report(len(held))

    (outcome,) = crew_run(loop, Crew(loop).run(1000, work, int, [write]))
    assert os.read(read, 10) == b"here"
    assert outcome.result() == 6  # 0, 1, 2, the report, the pipe, and the directory that is being listed


def test_a_child_that_dies_or_talks_nonsense_is_an_internal_error() -> None:
    loop = Loop()

    def dies(_: Channel) -> None:
        os._exit(9)

    def nonsense(channel: Channel) -> None:
        channel.socket.send(b"\xc1\xff")

    def wrong_type(channel: Channel) -> None:
        channel.report("text")

    def raises(_: Channel) -> None:
        raise RuntimeError("oops")

    crew = Crew(loop)
    for work in (dies, nonsense, wrong_type, raises):
        (outcome,) = crew_run(loop, crew.run(1000, work, int, []))
        with pytest.raises(VmbusError) as caught:
            outcome.result()
        assert caught.value.kind == "Internal"


def test_four_children_a_user_and_the_fifth_waits() -> None:
    loop = Loop()
    crew = Crew(loop)
    here, say = os.pipe()
    gate, hold = os.pipe()
    os.set_blocking(here, False)

    def work(channel: Channel) -> None:
        os.write(channel.fds[0], b"x")
        os.read(channel.fds[1], 1)  # until the gate's other end is closed
        channel.report(1)

    outcomes = [start(crew.run(user, work, int, [say, gate])) for user in [1000] * 5 + [1001]]
    seen = b""
    end = time.monotonic() + 20
    while len(seen) < 5 and time.monotonic() < end:
        time.sleep(0.01)
        with contextlib.suppress(BlockingIOError):
            seen += os.read(here, 100)
    time.sleep(0.3)
    with contextlib.suppress(BlockingIOError):
        seen += os.read(here, 100)
    assert seen == b"x" * 5  # four of the first user's, one of the other's
    os.close(hold)
    while not all(outcome.settled for outcome in outcomes) and time.monotonic() < end:
        loop.later(0.05, loop.stop)
        loop._code = None
        loop.run()
    assert sum(outcome.result() for outcome in outcomes) == 6
