# SPDX-License-Identifier: Apache-2.0
"""The event queue: numbered, kept until acknowledged, bounded."""

from __future__ import annotations

from vmbus.worker.events import LIMIT, EventQueue


def numbers(events: EventQueue, after: int = 0) -> list[int]:
    return [event.seq for event in events.after(after)]


def test_events_are_numbered_from_one_and_kept_until_acknowledged() -> None:
    events = EventQueue()
    for _ in range(4):
        events.add("reset")
    assert numbers(events) == [1, 2, 3, 4]
    assert numbers(events, after=2) == [3, 4]
    events.acknowledge(3)
    assert numbers(events) == [4]


def test_an_old_acknowledgement_changes_nothing() -> None:
    events = EventQueue()
    events.add("reset")
    events.add("reset")
    events.acknowledge(1)
    events.acknowledge(0)
    assert numbers(events) == [2]


def test_a_guest_that_resets_without_end_does_not_make_it_grow() -> None:
    events = EventQueue()
    for _ in range(10 * LIMIT):
        events.add("reset")
    assert len(events) == LIMIT
    assert numbers(events)[-1] == 10 * LIMIT == events.last


def test_the_end_is_never_given_up() -> None:
    events = EventQueue()
    end = events.add("ended", reason="stopped")
    for _ in range(2 * LIMIT):
        events.add("console")
    assert next(events.after(0)) == end
    assert events.holds("ended")
    events.acknowledge(end.seq)
    assert not events.holds("ended")
