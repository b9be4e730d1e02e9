# SPDX-License-Identifier: Apache-2.0
"""Backing chains, as qemu-img makes them and as nobody should."""

from __future__ import annotations

import os
import random
import shutil
import struct
import subprocess
from io import BytesIO
from pathlib import Path

import pytest

from vmbus.cli import chain, qcow2_header
from vmbus.wire.errors import VmbusError

needs_qemu_img = pytest.mark.skipif(
    shutil.which("qemu-img") is None, reason="needs qemu-img: the package qemu-utils is not installed"
)


def qemu_img(*words: object) -> None:
    subprocess.run(["qemu-img", *map(str, words)], check=True, capture_output=True, timeout=60)


def resolve(
    path: Path, image_format: str = "qcow2", backing_format: str | None = None
) -> list[tuple[str, str | None]]:
    layers = chain.resolve(str(path), image_format, backing_format=backing_format, argument="disks[0].path")
    return [(layer.path or "", layer.backing_name) for layer in layers]


def header(
    backing: bytes = b"", *, version: int = 3, cluster_bits: int = 16, offset: int | None = None
) -> bytearray:
    """A qcow2 header of 112 bytes, an empty extension area and ``backing`` behind it."""
    at = (120 if backing else 0) if offset is None else offset
    names = struct.pack(">4sIQII", b"QFI\xfb", version, at, len(backing), cluster_bits)
    sizes = struct.pack(">QIIQQIIQ", 1 << 20, 0, 1, 65536, 131072, 1, 0, 0)
    features = struct.pack(">QQQII", 0, 0, 0, 4, 104)
    head = names + sizes + features
    return bytearray(head.ljust(112, b"\0") + b"\0" * 8 + backing).ljust(1 << 16, b"\0")


@needs_qemu_img
def test_a_chain_of_three_is_followed_to_its_end(tmp_path: Path) -> None:
    qemu_img("create", "-f", "raw", tmp_path / "base.raw", "4M")
    qemu_img("create", "-f", "qcow2", "-b", "base.raw", "-F", "raw", tmp_path / "middle.qcow2")
    qemu_img("create", "-f", "qcow2", "-b", tmp_path / "middle.qcow2", "-F", "qcow2", tmp_path / "top.qcow2")

    assert resolve(tmp_path / "top.qcow2") == [
        (str(tmp_path / "top.qcow2"), str(tmp_path / "middle.qcow2")),
        (str(tmp_path / "middle.qcow2"), "base.raw"),
        (str(tmp_path / "base.raw"), None),
    ]


@needs_qemu_img
def test_a_version_2_image_is_followed_too(tmp_path: Path) -> None:
    qemu_img("create", "-f", "raw", tmp_path / "base.raw", "4M")
    qemu_img(
        "create", "-f", "qcow2", "-o", "compat=0.10", "-b", "base.raw", "-F", "raw", tmp_path / "old.qcow2"
    )

    assert [name for _, name in resolve(tmp_path / "old.qcow2")] == ["base.raw", None]


@needs_qemu_img
def test_an_external_data_file_belongs_to_its_layer(tmp_path: Path) -> None:
    qemu_img("create", "-f", "qcow2", "-o", f"data_file={tmp_path}/data.raw", tmp_path / "meta.qcow2", "4M")

    (layer,) = chain.resolve(str(tmp_path / "meta.qcow2"), "qcow2", argument="disk")

    assert layer.data_name == layer.data_path == f"{tmp_path}/data.raw"


@needs_qemu_img
def test_a_backing_format_that_no_header_states_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "base.raw").write_bytes(bytes(1 << 20))
    (tmp_path / "top.qcow2").write_bytes(header(b"base.raw"))

    with pytest.raises(VmbusError, match="backing-format="):
        resolve(tmp_path / "top.qcow2")
    assert len(resolve(tmp_path / "top.qcow2", backing_format="raw")) == 2


def test_a_chain_that_comes_back_to_itself_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.qcow2").write_bytes(header(b"b.qcow2"))
    (tmp_path / "b.qcow2").write_bytes(header(b"a.qcow2"))

    with pytest.raises(VmbusError, match="its own backing file"):
        resolve(tmp_path / "a.qcow2", backing_format="qcow2")


def test_a_chain_longer_than_200_is_refused(tmp_path: Path) -> None:
    for number in range(202):
        (tmp_path / f"{number}").write_bytes(header(str(number + 1).encode())[:512])
    with pytest.raises(VmbusError, match="more than 200"):
        resolve(tmp_path / "0", backing_format="qcow2")


@pytest.mark.parametrize("name", [b"nbd://host/x", b'json:{"driver":"raw"}', b"fat:rw:/home"])
def test_a_name_that_is_no_local_file_is_refused(name: bytes, tmp_path: Path) -> None:
    (tmp_path / "top.qcow2").write_bytes(header(name))
    with pytest.raises(VmbusError) as caught:
        resolve(tmp_path / "top.qcow2", backing_format="raw")
    assert caught.value.kind == "NotSupported"


def test_a_colon_behind_a_slash_is_part_of_a_file_name(tmp_path: Path) -> None:
    (tmp_path / "a:b").write_bytes(bytes(512))
    (tmp_path / "top.qcow2").write_bytes(header(b"./a:b"))
    assert resolve(tmp_path / "top.qcow2", backing_format="raw")[1][0] == str(tmp_path / "a:b")


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda path: None, "NotFound"),
        (lambda path: path.mkdir(), "InvalidArgument"),
        (os.mkfifo, "InvalidArgument"),
        (lambda path: path.write_bytes(b"MZ"), "ImageInvalid"),
        (lambda path: path.write_bytes(header()[:60]), "ImageInvalid"),
    ],
    ids=["missing", "directory", "FIFO", "not qcow2", "cut short"],
)
def test_what_is_no_image_is_refused_by_name(make: object, kind: str, tmp_path: Path) -> None:
    assert callable(make)
    make(tmp_path / "x")
    with pytest.raises(VmbusError) as caught:
        resolve(tmp_path / "x")
    assert (caught.value.kind, caught.value.argument) == (kind, "disks[0].path")


def test_the_directorys_links_are_followed_and_the_last_one_is_kept(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "real/now").symlink_to("image.raw")
    (tmp_path / "real/image.raw").write_bytes(bytes(512))
    assert resolve(tmp_path / "link/now", "raw") == [(f"{tmp_path}/real/now", None)]


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (header(version=4), "version is 4"),
        (header(cluster_bits=40), "cluster size"),
        (header(b"x", offset=1 << 40), "outside the header"),
        (header(b"x" * 1024), "outside the header"),
        (header(b"\xff\xfe"), "not UTF-8"),
        (header(b"a\0b"), "NUL"),
    ],
)
def test_a_hostile_header_is_an_error_that_says_what_is_wrong(raw: bytes, words: str) -> None:
    with pytest.raises(qcow2_header.HeaderError, match=words):
        qcow2_header.read(BytesIO(raw))


def test_no_mangled_header_does_anything_but_read_or_raise() -> None:
    seed = random.Random(2)
    good = bytes(header(b"base.raw"))
    for _ in range(3000):
        raw = bytearray(good[: seed.choice((len(good), seed.randrange(200)))])
        for _ in range(seed.randrange(1, 6)):
            if raw:
                raw[seed.randrange(min(len(raw), 140))] = seed.randrange(256)
        try:
            found = qcow2_header.read(BytesIO(bytes(raw)))
        except qcow2_header.HeaderError:
            continue
        assert found.backing_name is None or 0 < len(found.backing_name) <= 1023
