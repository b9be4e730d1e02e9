# SPDX-License-Identifier: Apache-2.0
"""What the broker's child may change of the host, and its record, on a /sys of the test."""

# ruff: noqa: PLC0415 (code of vmbus.broker.dropped cannot be imported by root)
from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.unit.broker_nobody import as_nobody
from vmbus.wire import broker as wire
from vmbus.wire.errors import VmbusError

POOL = "devices/system/node/node0/hugepages/hugepages-2048kB/nr_hugepages"
RUN = "kernel/mm/ksm/run"
GRANTED = b'[ksm]\nmanage = true\n[hugepages]\ngrow = "20M"\n'


@pytest.fixture
def sys() -> Iterator[Path]:
    """A /sys that nobody may read and write."""
    with tempfile.TemporaryDirectory() as place:
        os.chmod(place, 0o755)
        root = Path(place)
        node, whole = (root / POOL).parent, root / "kernel/mm/hugepages/hugepages-2048kB"
        for directory in (node, whole):
            directory.mkdir(parents=True)
            for name, value in (("nr", 10), ("free", 10), ("resv", 0)):
                (directory / f"{name}_hugepages").write_text(f"{value}\n")
        (root / "kernel/mm/ksm").mkdir()
        (root / RUN).write_text("0\n")
        (root / "record").write_text("")
        for path in root.rglob("*"):
            path.chmod(0o777)
        yield root


def attempt(sys: Path, settings: dict[str, str], text: bytes = GRANTED) -> dict[str, Any]:
    """The record after the settings were written."""

    def work() -> dict[str, Any]:
        from vmbus.broker.dropped import policy
        from vmbus.broker.dropped import settings as module

        record = os.open(sys / "record", os.O_RDWR)
        host = module.Host(record, policy.load(text), sys)
        for name, value in settings.items():
            fd = os.open(sys / name, os.O_RDWR)
            (host.set_ksm if "/ksm/" in name else host.set_pool)(name, fd, value)
        return dict(msgspec.to_builtins(host.record))

    return dict(as_nobody(work))


def test_what_was_found_is_kept_until_it_is_put_back(sys: Path) -> None:
    assert attempt(sys, {RUN: "1"})["found"] == {RUN: "0"}
    assert attempt(sys, {RUN: "2"})["found"] == {RUN: "0"}
    assert attempt(sys, {RUN: ""})["found"] == {}
    assert (sys / RUN).read_text() == "0\n"


def test_only_pages_that_were_added_are_taken_away(sys: Path) -> None:
    assert attempt(sys, {POOL: "14"})["grown"] == {POOL: 4}
    (sys / POOL).write_text("16\n")  # the administrator adds two
    for path in (sys / POOL, sys / "kernel/mm/hugepages/hugepages-2048kB/nr_hugepages"):
        (path.parent / "free_hugepages").write_text("16\n")
    with pytest.raises(VmbusError, match="4 pages of this pool were added by vmbus") as caught:
        attempt(sys, {POOL: "11"})
    assert caught.value.kind == "AccessDenied"
    assert attempt(sys, {POOL: "12"})["grown"] == {}


def test_a_write_that_was_cut_short_is_reckoned_the_next_time(sys: Path) -> None:
    (sys / "record").write_text(json.dumps({"pending": {POOL: 7}}))
    assert attempt(sys, {})["grown"] == {POOL: 3}


@pytest.mark.parametrize("text", ["", "{", "[]", '{"grown": 5}', "\0" * 50])
def test_a_record_that_is_none_is_an_empty_one(sys: Path, text: str) -> None:
    (sys / "record").write_text(text)
    assert attempt(sys, {})["grown"] == {}


def test_pages_in_use_are_not_taken_away(sys: Path) -> None:
    attempt(sys, {POOL: "20"})
    (sys / POOL).with_name("free_hugepages").write_text("3\n")
    with pytest.raises(VmbusError, match="3 pages of this pool are neither") as caught:
        attempt(sys, {POOL: "16"})
    assert caught.value.kind == "InUse"


@pytest.mark.parametrize(
    ("settings", "text", "words"),
    [
        ({RUN: "1"}, b"", r"manage = true in \[ksm\]"),
        ({RUN: ""}, b"[hugepages]\ngrow='1G'", r"manage = true in \[ksm\]"),
        ({POOL: "11"}, b"[ksm]\nmanage=true", "add 0 bytes"),
        ({POOL: "21"}, GRANTED, "add 20971520 bytes.* 0 are added, 23068672 asked for"),
    ],
)
def test_what_broker_toml_does_not_grant_is_refused_and_nothing_written(
    sys: Path, settings: dict[str, str], text: bytes, words: str
) -> None:
    with pytest.raises(VmbusError, match=words) as caught:
        attempt(sys, settings, text)
    assert caught.value.kind == "AccessDenied"
    assert ((sys / RUN).read_text(), (sys / POOL).read_text()) == ("0\n", "10\n")


@pytest.mark.parametrize(
    "name",
    [
        "kernel/mm/ksm/../../../etc/passwd",
        "kernel/mm/ksm/run\n",
        "kernel/mm/ksm/",
        "/etc/passwd",
        "devices/system/node/node0/hugepages/hugepages-2048kB/free_hugepages",
        "devices/system/node/../node0/hugepages/hugepages-2048kB/nr_hugepages",
        "kernel/mm/transparent_hugepage/enabled",
    ],
)
def test_no_other_file_can_be_named(name: str) -> None:
    decoder = msgspec.msgpack.Decoder(wire.Request)
    good = msgspec.msgpack.encode({"op": "tune", "id": 1, "settings": {RUN: "1", POOL: "5"}})
    assert isinstance(decoder.decode(good), wire.Tune)
    with pytest.raises(msgspec.ValidationError):
        decoder.decode(msgspec.msgpack.encode({"op": "tune", "id": 1, "settings": {name: "1"}}))
