# SPDX-License-Identifier: Apache-2.0
"""Events that the service has not yet said it has stored: numbered, bounded, sent again.

At least once: an event stays here until an acknowledgement covers it, whatever connections come and go.
Bounded: a guest that resets itself without end, or a service that is away, cannot make this grow. When
it is full the oldest event that tells nothing any more goes (``console``: there is newer output;
``reset``; ``state``: a newer state follows); ``ended`` never goes. Numbers keep growing over such gaps.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, Literal

from vmbus.wire.worker import Event, State

LIMIT: Final = 128

Kind = Literal["state", "ended", "console", "reset", "detached"]


class EventQueue:
    """Unacknowledged events, oldest first."""

    def __init__(self) -> None:
        self.last = 0  # the number of the newest event there ever was
        self._events: list[Event] = []

    def __len__(self) -> int:
        return len(self._events)

    def add(
        self, kind: Kind, *, state: State = "ready", reason: str = "", detail: str = "", device: str = ""
    ) -> Event:
        """Number and keep an event."""
        self.last += 1
        event = Event(seq=self.last, kind=kind, state=state, reason=reason, detail=detail, device=device)
        self._events.append(event)
        if len(self._events) > LIMIT:
            victim = next(index for index, old in enumerate(self._events) if old.kind != "ended")
            del self._events[victim]
        return event

    def acknowledge(self, seq: int) -> None:
        """Forget the events up to ``seq``, which may be one of an earlier acknowledgement."""
        self._events = [event for event in self._events if event.seq > seq]

    def after(self, seq: int) -> Iterator[Event]:
        """The kept events behind ``seq``, in order."""
        return (event for event in self._events if event.seq > seq)

    def holds(self, kind: Kind) -> bool:
        """Whether an event of this kind waits for its acknowledgement."""
        return any(event.kind == kind for event in self._events)
