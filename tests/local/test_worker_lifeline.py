# SPDX-License-Identifier: Apache-2.0
"""The frozen lifeline: what was recorded once, every worker still answers."""

from __future__ import annotations

import msgspec
import pytest

from tests.local.worker_lifeline import Replay, decoded, lines
from vmbus.wire.inlet import Greeting
from vmbus.wire.worker import Answer, Request


@pytest.mark.requires("kvm")
def test_a_worker_of_today_keeps_to_the_recorded_lifeline() -> None:
    replay = Replay()
    try:
        for word, rest in lines():
            replay.play(word, rest)
    finally:
        replay.close()


def test_a_service_of_today_still_writes_the_recorded_bytes() -> None:
    """A worker that was started long ago gets from it what it always got."""
    written = [bytes.fromhex(rest) for word, rest in lines() if word in (">", ">fd")]
    for datagram in written:
        kind = Greeting if decoded(datagram)["op"] == "greeting" else Request
        message = msgspec.msgpack.decode(datagram, type=kind)
        assert msgspec.msgpack.encode(message) == datagram


def test_a_service_of_today_still_understands_the_recorded_answers() -> None:
    for word, rest in lines():
        if word == "<":
            datagram = bytes.fromhex(rest)
            message = msgspec.msgpack.decode(datagram, type=Answer)
            for field, value in decoded(datagram).items():
                assert field == "op" or getattr(message, field) == value


def test_the_transcript_has_the_whole_lifeline() -> None:
    said = {decoded(bytes.fromhex(rest))["op"] for word, rest in lines() if word.startswith(">")}
    assert said == {
        *("greeting", "hello", "ack", "console", "pause", "resume", "reset", "shutdown", "stop"),
    }
    heard = [decoded(bytes.fromhex(rest)) for word, rest in lines() if word == "<"]
    assert {message["kind"] for message in heard if message["op"] == "event"} == {"state", "reset", "ended"}
