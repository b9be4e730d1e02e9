# SPDX-License-Identifier: Apache-2.0
"""Encrypted images beside qemu-img: every cipher, mode, IV generator and hash that we claim, both ways;
key slots added by one and opened by the other; what is refused.
"""

from __future__ import annotations

import base64
import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.local.image_bed import ours, qemu
from vmbus import image
from vmbus.wire.errors import VmbusError

pytestmark = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="qemu-img (package qemu-utils)")
MIB = 1 << 20
SECRET = "secret,id=s0,data=correct horse"
OTHER = "secret,id=s1,data=battery staple"
# As little key derivation as the format allows: these tests are about bytes.
LUKS = "encrypt.format=luks,encrypt.key-secret=s0,encrypt.iter-time=1"

SUITES = [
    "encrypt.cipher-alg=aes-256",
    "encrypt.cipher-alg=aes-192,encrypt.ivgen-alg=plain",
    "encrypt.cipher-alg=serpent-256,encrypt.hash-alg=sha1",
    "encrypt.cipher-alg=twofish-128,encrypt.hash-alg=ripemd160",
    "encrypt.cipher-mode=cbc,encrypt.ivgen-alg=essiv,encrypt.ivgen-hash-alg=sha256,encrypt.hash-alg=sha512",
    "cluster_size=512",
    "extended_l2=on",
    "compat=0.10",
    "data_file={dir}/data",
]
LONG = [
    "encrypt.cipher-alg=aes-128",
    "encrypt.cipher-alg=serpent-128",
    "encrypt.cipher-alg=twofish-256",
    "encrypt.ivgen-alg=essiv,encrypt.ivgen-hash-alg=sha256",
    "encrypt.cipher-alg=aes-128,encrypt.cipher-mode=cbc,encrypt.ivgen-alg=essiv",
    "encrypt.cipher-alg=aes-256,encrypt.cipher-mode=cbc",
    "encrypt.cipher-alg=serpent-256,encrypt.cipher-mode=cbc,encrypt.ivgen-alg=plain",
    "encrypt.cipher-alg=twofish-256,encrypt.cipher-mode=cbc,encrypt.ivgen-alg=essiv",
    "encrypt.hash-alg=sha224",
    "encrypt.hash-alg=sha384",
    "cluster_size=2M",
]


def opts(path: Path, secret: str = "s0", *more: str) -> str:
    return ",".join([f"driver=qcow2,file.filename={path},encrypt.key-secret={secret}", *more])


def clean(path: Path, *more: str) -> None:
    words = ("check", "--object", SECRET, "--object", OTHER, "--output=json", "--image-opts")
    found = json.loads(qemu("qemu-img", *words, opts(path, "s0", *more)))
    assert found["check-errors"] == 0 and "corruptions" not in found and "leaks" not in found
    ours("check", "-q", path)


def same_for_both(raw: Path, path: Path) -> None:
    for compare in (lambda *words: qemu("qemu-img", *words), ours):
        compare(
            "compare", "--object", SECRET, "--image-opts", f"driver=raw,file.filename={raw}", opts(path)
        )  # fmt: skip


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """3 MiB with noise and holes, in pieces that are not whole clusters."""
    path = tmp_path / "source.raw"
    numbers = random.Random(11)
    with path.open("wb") as file:
        file.truncate(3 * MIB)
        for start in range(0, 3 * MIB, MIB // 2):
            file.seek(start + 512 * numbers.randrange(200))
            file.write(numbers.randbytes(512 * numbers.randrange(1, 500)))
    return path


@pytest.mark.parametrize(
    "suite",
    [
        SUITES[0],
        *(pytest.param(one, marks=pytest.mark.long) for one in SUITES[1:]),
        *(pytest.param(one, marks=pytest.mark.soak) for one in LONG),
    ],
)
def test_what_is_encrypted_by_one_is_read_and_written_by_the_other(
    tmp_path: Path, raw: Path, suite: str
) -> None:
    for name, convert in (("ours", ours), ("theirs", lambda *words: qemu("qemu-img", *words))):
        path = tmp_path / name
        options = f"{LUKS},{suite}".format(dir=tmp_path)
        convert("convert", "-f", "raw", "-O", "qcow2", "--object", SECRET, "-o", options, raw, path)
        clean(path)
        same_for_both(raw, path)
    # And each goes on where the other ended.
    changed = raw.read_bytes()
    for name in ("ours", "theirs"):
        path = tmp_path / name
        if "data_file" in suite and name == "ours":
            continue  # both name the same data file, which is now the other's
        secrets = [image.Secret("correct horse")]
        with image.open(str(path), "qcow2", secrets=secrets) as disk:
            disk.write(1000, b"q" * 70_000)
            disk.write_zeroes(2 * MIB, 66_000)
        writes = ["-c", "write -P 0x77 1536k 70k", "-c", "write -z 100k 4k"]
        qemu("qemu-io", "--object", SECRET, *writes, "--image-opts", opts(path))
        expected = bytearray(changed)
        expected[1000:71_000] = b"q" * 70_000
        expected[2 * MIB : 2 * MIB + 66_000] = bytes(66_000)
        expected[1536 * 1024 : 1606 * 1024] = b"\x77" * (70 * 1024)
        expected[100 * 1024 : 104 * 1024] = bytes(4096)
        wanted = tmp_path / "wanted.raw"
        wanted.write_bytes(expected)
        clean(path)
        same_for_both(wanted, path)


@pytest.mark.long
def test_info_says_what_qemu_says(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "image"
    suite = "encrypt.cipher-mode=cbc,encrypt.ivgen-alg=essiv,encrypt.ivgen-hash-alg=sha256"
    ours("create", "-q", "-f", "qcow2", "--object", SECRET, "-o", f"{LUKS},{suite}", path, "10M")
    capfd.readouterr()
    ours("info", "--output=json", path)
    mine = json.loads(capfd.readouterr().out)
    theirs = json.loads(qemu("qemu-img", "info", "--output=json", path))
    assert mine["encrypted"] is True
    assert mine["format-specific"] == theirs["format-specific"]
    ours("info", path)
    people = capfd.readouterr().out
    for line in ("encrypted: yes", "    encrypt:", "        slots:", "            [0]:"):
        assert line + "\n" in people
    for words in (("--size", "1G"), ("--image-opts", opts(path))):
        asked = ("measure", "--object", SECRET, "-O", "qcow2", "-o", LUKS, "--output=json", *words)
        ours(*asked)
        assert (
            json.loads(capfd.readouterr().out)["required"] == json.loads(qemu("qemu-img", *asked))["required"]
        )


@pytest.mark.long
def test_key_slots_of_one_open_with_the_other(tmp_path: Path, raw: Path) -> None:
    for name, make, change in (
        ("ours", lambda *words: qemu("qemu-img", *words), ours),
        ("theirs", ours, lambda *words: qemu("qemu-img", *words)),
    ):
        path = tmp_path / name
        make("convert", "-f", "raw", "-O", "qcow2", "--object", SECRET, "-o", LUKS, raw, path)
        both = ("--object", SECRET, "--object", OTHER)
        add = "encrypt.state=active,encrypt.new-secret=s1,encrypt.iter-time=1"
        change("amend", *both, "--image-opts", "-o", add, opts(path))
        change("amend", *both, "--image-opts", "-o", f"{add},encrypt.keyslot=6", opts(path))
        states = [slot["active"] for slot in slots(path)]
        assert states == [True, True, False, False, False, False, True, False]
        for key in ("s0", "s1"):
            qemu("qemu-io", *both, "-c", "read 0 1M", "--image-opts", opts(path, key))
            ours("map", "--output=json", *both, "--image-opts", opts(path, key))
        clean(path)
        change(
            "amend", *both, "--image-opts", "-o", "encrypt.state=inactive,encrypt.keyslot=0", opts(path, "s1")
        )
        qemu("qemu-io", *both, "-c", "read 0 1M", "--image-opts", opts(path, "s0"), code=1)
        ours("map", *both, "--image-opts", opts(path, "s0"), code=1)
        qemu("qemu-io", *both, "-c", "read 0 1M", "--image-opts", opts(path, "s1"))
        ours("map", "--output=json", *both, "--image-opts", opts(path, "s1"))


def slots(path: Path) -> list[dict[str, Any]]:
    found = image.info(str(path), "qcow2")["qcow2"]["encrypt"]["slots"]
    return list(found)


def test_the_last_key_slot_is_erased_only_by_force(tmp_path: Path) -> None:
    path = str(tmp_path / "image")
    one, two = image.Secret("one"), image.Secret("two")
    image.create(path, size=MIB, encrypt=image.Encryption(one, iter_time=1))
    for refused in ({"slot": 0}, {"old": one}):
        with pytest.raises(VmbusError, match="no active key slot would be left"):
            image.erase_key(path, one, **refused)
    with pytest.raises(VmbusError, match="is active"):
        image.add_key(path, one, two, slot=0, iter_time=1)
    with pytest.raises(VmbusError, match="erased already"):
        image.erase_key(path, one, slot=3)
    with pytest.raises(VmbusError, match="none of the image's key slots") as wrong:
        image.add_key(path, two, one, iter_time=1)
    assert wrong.value.kind == "AccessDenied"
    image.add_key(path, one, two, iter_time=1)
    image.add_key(path, one, one, iter_time=1)
    image.erase_key(path, two, old=one)
    assert [slot["active"] for slot in slots(Path(path))] == [False, True] + [False] * 6
    image.erase_key(path, two, slot=1, force=True)
    with pytest.raises(VmbusError, match="none of the image's key slots"):
        image.open(path, "qcow2", secrets=[two])


def test_a_wrong_or_missing_passphrase_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = str(tmp_path / "image")
    image.create(path, size=MIB, encrypt=image.Encryption(image.Secret("right"), iter_time=1))
    plain = str(tmp_path / "plain")
    image.create(plain, size=MIB)
    cases: list[tuple[str, list[image.Secret], str, str]] = [
        (path, [image.Secret("wrong")], "AccessDenied", "none of the image's key slots"),
        (path, [], "InvalidArgument", "a passphrase is needed"),
        (plain, [image.Secret("any")], "InvalidArgument", "not encrypted"),
    ]
    for which, secrets, kind, said in cases:
        with pytest.raises(VmbusError, match=said) as refused:
            image.open(which, "qcow2", secrets=secrets)
        assert refused.value.kind == kind
    for words in (
        ("--object", SECRET, "--image-opts", opts(Path(path), "unknown")),
        ("--object", "secret,id=s0", path),
        ("--object", "secret,id=s0,data=?,format=base64", path),
        ("--object", "secret,id=s0,data=x,keyid=s1", path),
        ("--object", "tls-creds-x509,id=s0", path),
        ("--image-opts", f"driver=qcow2,file.filename={path},l2-cache-size=1"),
        ("json:{nothing",),
        ('json:{"driver":"qcow2","file":["x"]}',),
    ):
        ours("map", *words, code=1)
    said = capfd.readouterr().err
    assert "Traceback" not in said and "wrong" not in said


def test_passphrases_come_from_files_and_base64_too(tmp_path: Path) -> None:
    path, plain, coded = tmp_path / "image", tmp_path / "plain", tmp_path / "coded"
    plain.write_text("correct horse")
    coded.write_bytes(base64.b64encode(b"correct horse") + b"\n")
    ours("create", "-q", "-f", "qcow2", "--object", SECRET, "-o", LUKS, path, "1M")
    for where in (f"file={plain}", f"file={coded},format=base64", "data=Y29ycmVjdCBob3JzZQ==,format=base64"):
        known = ("--object", f"secret,id=s0,{where}")
        ours("map", *known, "--output=json", "--image-opts", opts(path))
        qemu("qemu-img", "map", *known, "--output=json", "--image-opts", opts(path))
        named = json.dumps({"driver": "qcow2", "file": {"filename": str(path)}, "encrypt.key-secret": "s0"})
        ours("map", *known, "--output=json", f"json:{named}")


def test_compression_and_encryption_exclude_each_other(tmp_path: Path, raw: Path) -> None:
    made = tmp_path / "image"
    ours("convert", "-c", "-O", "qcow2", "--object", SECRET, "-o", LUKS, raw, made, code=1)
    ours("create", "-q", "-f", "qcow2", "--object", SECRET, "-o", LUKS, made, "3M")
    known = ("--object", SECRET, "--target-image-opts")
    ours("convert", "-c", "-n", "-O", "qcow2", *known, raw, opts(made), code=1)
    clean(made)


@pytest.mark.parametrize("preallocation", ["metadata", "falloc", "full"])
def test_a_preallocated_encrypted_image_reads_as_zeros(tmp_path: Path, preallocation: str) -> None:
    made, zeros = tmp_path / "image", tmp_path / "zeros"
    options = f"{LUKS},preallocation={preallocation}"
    ours("create", "-q", "-f", "qcow2", "--object", SECRET, "-o", options, made, "3M")
    with zeros.open("wb") as file:
        file.truncate(3 * MIB)
    clean(made)
    same_for_both(zeros, made)
    if preallocation != "metadata":
        assert made.stat().st_blocks * 512 >= 3 * MIB
    with image.open(str(made), "qcow2", secrets=[image.Secret("correct horse")]) as disk:
        before = made.stat().st_size
        disk.write(MIB, b"x" * 1000)
        assert disk.read(MIB - 10, 1020) == bytes(10) + b"x" * 1000 + bytes(10)
    assert made.stat().st_size == before
    clean(made)


def test_the_old_aes_is_read_to_get_away_from_it(tmp_path: Path, raw: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    aes = "encrypt.format=aes,encrypt.key-secret=s0"
    qemu("qemu-img", "convert", "-f", "raw", "-O", "qcow2", "--object", SECRET, "-o", aes, raw, old)
    ours(
        "convert", "-O", "qcow2", "--object", SECRET, "--object", OTHER, "--image-opts",
        "-o", "encrypt.format=luks,encrypt.key-secret=s1,encrypt.iter-time=1", opts(old), new,
    )  # fmt: skip
    qemu(
        "qemu-img", "compare", "--object", OTHER, "--image-opts", f"driver=raw,file.filename={raw}",
        opts(new, "s1"),
    )  # fmt: skip
    with pytest.raises(VmbusError, match="old AES"):
        image.open(str(old), "qcow2", secrets=[image.Secret("correct horse")])
    ours("create", "-f", "qcow2", "--object", SECRET, "-o", aes, tmp_path / "none", "1M", code=1)


def test_a_chain_may_be_encrypted_in_parts(tmp_path: Path, raw: Path) -> None:
    base, top = tmp_path / "base", tmp_path / "top"
    both = ("--object", SECRET, "--object", OTHER)
    ours("convert", "-f", "raw", "-O", "qcow2", *both, "-o", LUKS.replace("s0", "s1"), raw, base)
    ours(
        "create", "-q", "-f", "qcow2", *both, "-o", LUKS, "-b", str(base), "-F", "qcow2", top
    )  # fmt: skip
    chain = opts(top, "s0", "backing.encrypt.key-secret=s1")
    secrets = [image.Secret("correct horse"), image.Secret("battery staple")]
    expected = bytearray(raw.read_bytes())
    with image.open(str(top), "qcow2", secrets=secrets) as disk:
        disk.write(300_000, b"k" * 123_456)
        disk.snapshot("before")
        disk.write(10_000, b"later" * 1000)
        disk.apply_snapshot("before")
        disk.resize(4 * MIB)
    expected[300_000:423_456] = b"k" * 123_456
    wanted = tmp_path / "wanted"
    wanted.write_bytes(expected + bytes(MIB))
    plain = f"driver=raw,file.filename={wanted}"
    for compare in (lambda *words: qemu("qemu-img", *words), ours):
        compare("compare", *both, "--image-opts", plain, chain)
    clean(top, "backing.encrypt.key-secret=s1")

    flat = tmp_path / "flat"
    ours("convert", *both, "-O", "raw", "--image-opts", chain, flat)
    assert flat.read_bytes() == wanted.read_bytes()
    ours("snapshot", *both, "-d", "before", "--image-opts", chain)
    ours("commit", "-q", *both, "--image-opts", chain)
    for compare in (lambda *words: qemu("qemu-img", *words), ours):
        compare("compare", *both, "--image-opts", plain, opts(base, "s1"))

    other = tmp_path / "other"
    ours("convert", "-O", "qcow2", *both, "-o", LUKS, raw, other)
    onto = ("-b", str(other), "-F", "qcow2", "--backing-secret", "s0")
    ours("rebase", "-q", *both, "--image-opts", *onto, chain)
    moved = opts(top, "s0", "backing.encrypt.key-secret=s0")
    qemu("qemu-img", "compare", *both, "--image-opts", plain, moved)
    clean(top, "backing.encrypt.key-secret=s0")


def test_nothing_shows_a_passphrase() -> None:
    secret = image.Secret("correct horse")
    layer = image.Layer("a", "qcow2", secret=secret)
    assert "correct" not in f"{secret} {secret!r} {layer} {image.Encryption(secret)}"


@pytest.mark.parametrize("options", ["cluster_size=4k", "extended_l2=on"])
def test_ours_and_qemus_tools_work_on_one_encrypted_image_in_turns(tmp_path: Path, options: str) -> None:
    seed = random.randrange(1 << 32) if "VMBUS_SEED" not in os.environ else int(os.environ["VMBUS_SEED"])
    print(f"VMBUS_SEED={seed}")
    numbers = random.Random(seed)
    path, wanted = tmp_path / "image", tmp_path / "wanted.raw"
    size = 2 * MIB
    ours("create", "-q", "-f", "qcow2", "--object", SECRET, "-o", f"{LUKS},{options}", path, str(size))
    expected = bytearray(size)
    kept: dict[str, bytes] = {}
    secrets = [image.Secret("correct horse")]
    for step in range(10):
        commands: list[str] = []
        with image.open(str(path), "qcow2", secrets=secrets) as disk:
            for _ in range(6):
                start = numbers.randrange(size // 512) * 512
                length = min(numbers.randrange(1, 200) * 512, size - start)
                value = numbers.randrange(1, 256)
                if numbers.randrange(4) == 0:
                    disk.write_zeroes(start, length)
                    value = 0
                else:
                    disk.write(start, bytes([value]) * length)
                expected[start : start + length] = bytes([value]) * length
            if step in {2, 5}:
                disk.snapshot(f"s{step}")
                kept[f"s{step}"] = bytes(expected)
            elif step == 7:
                disk.apply_snapshot("s2")
                expected[:] = kept["s2"]
            elif step == 8:
                disk.delete_snapshot("s5")
        for _ in range(6):
            start = numbers.randrange(size // 512) * 512
            length = min(numbers.randrange(1, 200) * 512, size - start)
            value = numbers.choice([0, numbers.randrange(1, 256)])
            commands += ["-c", f"write {'-z' if value == 0 else f'-P {value}'} {start} {length}"]
            expected[start : start + length] = bytes([value]) * length
        qemu("qemu-io", "--object", SECRET, *commands, "--image-opts", opts(path))
        wanted.write_bytes(expected)
        clean(path)
        same_for_both(wanted, path)
