# SPDX-License-Identifier: Apache-2.0
"""vmbus-img in the place of qemu-img: the same words on equal files, in two directories, and then the same
exit code, the same output, the same errors, and files with the same content.

A case is a line of words, after a line before it where something must be so first (both tools' own, so that
each works on what it made). Where the two differ on purpose, the case says so and why, in ``BECAUSE``;
nothing else is left out of the comparison but times, how often a progress line is drawn, and the names of
the programs.
"""

from __future__ import annotations

import contextlib
import filecmp
import hashlib
import json
import os
import random
import re
import shlex
import shutil
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.local.image_bed import MIB, mine, plain, qemu, theirs

pytestmark = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="qemu-img (package qemu-utils)")

SECRET = "--object secret,id=s,data=abc"
LUKS = "driver=qcow2,file.filename=luks,encrypt.key-secret=s"

CASES = r"""
info raw
info -f raw raw
info --format=raw raw
info --for raw raw
info short
info base
info -U base
info top
info -b top
info --backing-chain --output=json top
info --output json base
info --output=human v2
info ext
info packed
info luks
info --output json luks
info data
info --output=json data
info leaky
info --image-opts driver=qcow2,file.filename=base
info 'json:{"driver": "raw", "file": {"filename": "raw"}}'
info
info raw raw
info -f
info --format
info --output
info --output=xml raw
info --bogus raw
info -x raw
info --force-share=1 raw
info --fo raw raw
info --image-opts -f raw driver=raw,file.filename=raw
info --image-opts driver=bogus,file.filename=raw
info -f bogus raw
info -f qcow2 raw
info none
info orphan
info -b orphan

create new 1M
create -q new 1M
create -f raw new 1000
create -f qcow2 new 1M
create --format qcow2 new 1.5G
create -f qcow2 -o cluster_size=64k,refcount_bits=8 new 3M
create -f qcow2 -o compat=0.10 new 3M
create -f qcow2 -o compat=v3,lazy_refcounts=on new 3M
create -f qcow2 -o extended_l2=on -o compression_type=zstd new 3M
create -f qcow2 -o preallocation=metadata new 3M
create -f qcow2 -o preallocation=falloc new 1M
create -f qcow2 -o data_file=new.raw,data_file_raw=on new 3M
create -f qcow2 -o size=5M new
create -f qcow2 -o size=5M new 1M
create -f qcow2 -b base -F qcow2 new
create -f qcow2 --backing base --backing-format qcow2 new 9M
create -f qcow2 -o backing_file=base,backing_fmt=qcow2 new
create -f qcow2 -b raw -F raw new
create -f qcow2 -u -b none -F qcow2 new 1M
create -f qcow2 -u -b none -F qcow2 new
create -f qcow2 -b none -F qcow2 new 1M
create -f qcow2 -b base new
create -f qcow2 -F qcow2 new 1M
create -f qcow2 -b new -F qcow2 new 1M
create -f qcow2 -b base -F bogus new
create -b base -F qcow2 new
create -f qcow2 new
create -f bogus new 1M
create new 1x
create new 1.5
create new -1
create new 1M 2M
create
create -f qcow2 -o bogus=1 new 1M
create -f raw -o cluster_size=4k new 1M
create -f qcow2 -o cluster_size=3 new 1M
create -f qcow2 -o cluster_size=x new 1M
create -f qcow2 -o lazy_refcounts=maybe new 1M
create -f qcow2 -o refcount_bits=x new 1M
create -f qcow2 -o refcount_bits=7 new 1M
create -f qcow2 -o compat=0.10,lazy_refcounts=on new 1M
create -f qcow2 -o compat=0.10,refcount_bits=8 new 1M
create -f qcow2 -o compat=2 new 1M
create -f qcow2 -o preallocation=some new 1M
create -f qcow2 -o compression_type=lzma new 1M
create -f qcow2 -o data_file_raw=on new 1M
create -f raw -o preallocation=full new 1M
create -f raw -o preallocation=metadata new 1M
create {SECRET} -f qcow2 -o encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10 new 1M
create -f qcow2 -o encrypt.format=luks new 1M
create -f qcow2 -o encrypt.format=luks,encrypt.key-secret=t new 1M

check base
check -q base
check --output json base
check --output=json packed
check -f qcow2 top
check leaky
check --output json leaky
check -r leaks leaky
check --repair all leaky
check corrupt
check -r leaks corrupt
check -r all corrupt
check --output json -r all corrupt
check raw
check -f raw raw
check none
check -r bogus base
check -T bogus base
check -T none base
check -U -r all base
check
check -q raw

compare raw base
compare -q raw base
compare -p raw base
compare -s raw base
compare -s base base2
compare raw other
compare -q raw other
compare raw top
compare -s raw top
compare raw short
compare -f raw -F qcow2 raw base
compare --a-format raw --b-format qcow2 raw base
compare -f qcow2 raw raw
compare raw none
compare none raw
compare raw
compare a b c
compare -T bogus raw base
compare -T none raw base
compare -U raw base

convert raw new
convert -O qcow2 raw new
convert -f raw -O qcow2 -p raw new
convert -q -p raw new
convert base new
convert --source-format qcow2 --target-format raw base new
convert -O qcow2 -c raw new
convert -O qcow2 --compress --target-options compression_type=zstd,cluster_size=4k raw new
convert -O qcow2 -o cluster_size=4k,size=3M raw new
convert -O qcow2 raw short other new
convert -O raw base raw new
convert -O qcow2 -c short raw short new
convert -l one snaps new
convert -l snapshot.name=one snaps new
convert -l snapshot.id=2 -O qcow2 snaps new
convert --source-snapshot 1 snaps new
convert -l bogus snaps new
convert -l snapshot.id=7 snaps new
convert -l one raw new
convert -l one snaps raw new
convert -B base -F qcow2 -O qcow2 top new
convert -B mid -F qcow2 -O qcow2 top new
convert -O qcow2 --backing base --backing-format qcow2 raw new
convert -B base -O qcow2 raw new
convert -B base -F qcow2 raw new
convert -B base -F qcow2 -O qcow2 raw raw new
convert -F qcow2 -O qcow2 raw new
convert -n raw other
convert -n -O qcow2 raw base
convert -n -O qcow2 raw mid
convert --no-create raw short
convert -n raw none
convert -n -o x=y raw other
convert -n --target-is-zero raw zeros
convert --target-is-zero raw new
convert -n --target-is-zero -O qcow2 -B base -F qcow2 raw mid
convert -S 0 raw new
convert -S 64k -O qcow2 raw new
convert --sparse-size 1k raw new
convert -S 100 raw new
convert -S foo raw new
convert -m 4 -W -O qcow2 raw new
convert --parallel 1 --oob-writes raw new
convert -m 0 raw new
convert -m 17 raw new
convert -m foo raw new
convert -r 100M raw new
convert -r x raw new
convert -t none -T none raw new
convert -t writethrough -T directsync -O qcow2 raw new
convert -t bogus raw new
convert -T bogus raw new
convert -C raw new
convert -C -S 4k raw new
convert -C -c -O qcow2 raw new
convert -C --salvage raw new
convert --salvage raw new
convert -c raw new
convert -O qcow2 -o preallocation=metadata -c raw new
convert -O qcow2 -o preallocation=metadata raw new
convert -O qcow2 -o bogus=3 raw new
convert -O qcow2 -o cluster_size=3 raw new
convert -O bogus raw new
convert --bitmaps -O qcow2 snaps new
convert --bitmaps raw new
convert --bitmaps -O qcow2 raw snaps new
convert --skip-broken-bitmaps raw new
convert --image-opts driver=raw,file.filename=raw new
convert --source-image-opts driver=qcow2,file.filename=base new
convert --image-opts -f raw driver=raw,file.filename=raw new
convert -n --target-image-opts raw driver=raw,file.filename=other
convert --target-image-opts raw driver=raw,file.filename=other
convert -n -O raw --target-image-opts raw driver=raw,file.filename=other
convert {SECRET} --image-opts {LUKS} new
convert {SECRET} -O qcow2 -o encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10 raw new
convert {SECRET} -c -O qcow2 -o encrypt.format=luks,encrypt.key-secret=s raw new
convert luks new
convert none new
convert raw
convert
convert orphan new
convert -U base new
convert data new
convert raw none/new

dd if=raw of=new
dd -O qcow2 if=raw of=new
dd -f qcow2 -O raw if=base of=new bs=1M
dd --output-format qcow2 -U if=base of=new
dd --image-opts if=driver=raw,file.filename=raw of=new
dd count=2 bs=1k skip=1 if=raw of=new
dd count=0 if=raw of=new
dd bs=1M skip=5 if=raw of=new
dd bs=1000 skip=3 if=raw of=new
dd bs=0 if=raw of=new
dd bs=foo if=raw of=new
dd skip=x if=raw of=new
dd count=-1 if=raw of=new
dd if=raw
dd
dd if=raw of=new extra
dd if=raw of=new foo=1
dd if=none of=new
dd -O bogus if=raw of=new

map raw
map base
map top
map packed
map --output=json raw
map --output json top
map --output=json packed
map --output=json ext
map --output=json zeroed
map zeroed
map -s 1M -l 64k base
map --start-offset 4k --max-length=64k --output json raw
map -s 4 raw
map -l 4 raw
map -s 4G raw
map -l x raw
map -s x raw
map data
map -U raw
map none
map
map luks
map {SECRET} --image-opts {LUKS}

measure raw
measure base
measure -O qcow2 base
measure --target-format qcow2 -o cluster_size=4k raw
measure -O qcow2 snaps
measure -O qcow2 -l one snaps
measure --snapshot bogus -O qcow2 snaps
measure --size 1G
measure -O qcow2 --size 1G
measure -O qcow2 -o compat=0.10 --size 1M
measure -O qcow2 -o preallocation=full raw
measure -O qcow2 -o extended_l2=on raw
measure --output json -O qcow2 --size 4M
measure --output=json -O qcow2 packed
measure -s 4M
measure --size x
measure -O bogus --size 1M
measure -O qcow2 -o bogus=1 --size 1M
measure
measure --size 1M raw
measure none
measure -O qcow2 -U raw

resize -f raw raw 3M
resize raw +1M
resize -f raw raw -512k
resize --shrink -f raw raw -512k
resize -f raw raw 1M
resize -f raw --shrink raw 1000
resize -f raw raw +1000
resize -f raw raw -9M
resize --shrink -f raw raw -9M
resize base 3M
resize -q base +1M
resize base +0
resize base -1M
resize --shrink base 1M
resize base --shrink -- -1M
resize --preallocation=metadata base +1M
resize --preallocation=falloc base +1M
resize --preallocation full base 4M
resize --preallocation=falloc -f raw raw +1M
resize --preallocation=full -f raw raw +1M
resize --preallocation=metadata -f raw raw +1M
resize --preallocation=falloc --shrink base 1M
resize --preallocation=bogus base +1M
resize --preallocation=off top +1M
resize top +1M
resize --shrink mid 1M
resize base foo
resize base
resize base 1M 2M
resize
resize none 1M
resize snaps +1M
resize --image-opts driver=qcow2,file.filename=base 3M
resize {SECRET} --image-opts {LUKS} 2M
resize {SECRET} --preallocation=metadata --image-opts {LUKS} 2M

commit top
commit -q top
commit -p top
commit -qp top
commit -d top
commit --drop top
commit -b mid top
commit -b base top
commit --base base -p top
commit -b none top
commit -b raw top
commit -r 100M top
commit -r x top
commit -t none top
commit -t bogus top
commit -f qcow2 mid
commit onraw
commit raw
commit base
commit
commit top mid
commit none
commit --image-opts driver=qcow2,file.filename=top

rebase -b base -F qcow2 top
rebase -p -b base -F qcow2 top
rebase -b '' top
rebase -c -b '' top
rebase -c -b base -F qcow2 top
rebase --backing raw --backing-format raw mid
rebase -u -b elsewhere -F raw mid
rebase -u -b '' mid
rebase -u mid
rebase -u -b foo mid
rebase -b raw mid
rebase -b none -F qcow2 mid
rebase -b raw -F bogus mid
rebase mid
rebase -t none -T none -b base -F qcow2 top
rebase -t bogus -b base -F qcow2 top
rebase -T bogus -b base -F qcow2 top
rebase -U -b base -F qcow2 top
rebase -f raw -b base -F qcow2 raw
rebase -b mid -F qcow2 mid
rebase
rebase -b short -F raw mid
rebase -b top -F qcow2 onraw

snapshot -l snaps
snapshot snaps
snapshot --list snaps
snapshot -q -l snaps
snapshot -U -l snaps
snapshot -l base
snapshot -l raw
snapshot -c new base
snapshot --create new snaps
snapshot -c one snaps
snapshot -d one snaps
snapshot --delete 2 snaps
snapshot -d none snaps
snapshot -a one olds
snapshot --apply 2 olds
snapshot -a none olds
snapshot -a one snaps
snapshot -c x raw
snapshot -l -c x snaps
snapshot -c a b c
snapshot
snapshot -U -c x base
snapshot -l none

bitmap --add base b
bitmap --add -g 4k base b
bitmap --add --granularity 64k --disable base b
bitmap --add snaps b0
bitmap --add -g 100 base b
bitmap -g x --add base b
bitmap --remove snaps b0
bitmap --remove snaps none
bitmap --clear snaps b0
bitmap --enable snaps b1
bitmap --enable snaps b0
bitmap --disable snaps b0
bitmap --disable snaps b1
bitmap --disable --clear --enable snaps b0
bitmap --merge b0 snaps b1
bitmap --merge none snaps b1
bitmap --add --merge b0 --merge b1 snaps b2
bitmap -b snaps -F qcow2 --add --merge b0 base b
bitmap --source-file snaps --source-format qcow2 --add --merge b0 base b
bitmap -b snaps --add base b
bitmap -F qcow2 --merge b0 snaps b1
bitmap -g 4k --clear snaps b0
bitmap --add raw b
bitmap --add v2 b
bitmap snaps b0
bitmap --add base
bitmap
bitmap --bogus

amend -o size=9M base
amend -p -o size=9M base
amend -q -o size=9M base
amend --options compat=0.10 base
amend -o compat=1.1 v2
amend -o lazy_refcounts=on base
amend -o refcount_bits=8 base
amend -o compat=0.10 ext
amend -o compat=0.10 data
amend -o compat=0.10 snaps
amend -o compat=0.10 zeroed
amend -o compat=0.10 packed
amend -o compat=0.10 olds
amend -o compat=0.10,lazy_refcounts=on base
amend -o compat=0.10,refcount_bits=8 base
amend -o refcount_bits=8,compat=0.10 base
amend -o refcount_bits=8 v2
amend -o compat=v3,refcount_bits=32,lazy_refcounts=on v2
amend -o data_file=elsewhere.raw data
amend -o backing_file=x base
amend -o bogus=x base
amend -o cluster_size=4k base
amend -o compat=9 base
amend -o lazy_refcounts=maybe base
amend -o lazy_refcounts=on v2
amend -o refcount_bits=7 base
amend -o size=foo base
amend -f raw -o size=9M raw
amend -t bogus -o size=9M base
amend base
amend -o size=9M
amend -o help
amend -f raw -o help
amend {SECRET} --object secret,id=n,data=new --image-opts -o
encrypt.state=active,encrypt.new-secret=n,encrypt.iter-time=10 {LUKS} amend {SECRET} --image-opts -o
encrypt.state=inactive,encrypt.keyslot=0 {LUKS} amend {SECRET} --image-opts --force -o
encrypt.state=inactive,encrypt.keyslot=0 {LUKS} amend {SECRET} --image-opts -o
encrypt.state=inactive,encrypt.keyslot=9 {LUKS}

bench -c 10 raw
bench -q -c 10 raw
bench --count 10 --depth 2 --buffer-size 2k --offset 1k --step-size 8k raw
bench -w -f raw -c 10 raw
bench -w -c 10 --pattern 7 base
bench -w -f raw -d 1 -c 10 --flush-interval 2 raw
bench -w -f raw -d 1 -c 10 --flush-interval 2 --no-drain raw
bench -i threads -c 10 raw
bench -i io_uring -t none -c 10 raw
bench -t directsync -w -c 10 base
bench -w -c 10 --flush-interval 3 base
bench --flush-interval 64 raw
bench -c 0 raw
bench -d 0 raw
bench -s 0 raw
bench -S x raw
bench -o x raw
bench -i foo raw
bench -t bogus raw
bench -w --pattern 300 raw
bench -c 10 -o 100M raw
bench
bench none

-T
bogus

--bogus
-x
""".replace("{SECRET}", SECRET).replace("{LUKS}", LUKS)

HELP = "qemu-img 10's help lists the option, and it does not read it"
LESS = "nothing half-made is left behind"
FIXED = "qemu-img says of each cluster how it repairs it, and counts errors of one cluster once"
MORE = "the error says more of what is wrong, or what to do"

# What differs, and why.
BECAUSE: dict[str, tuple[set[str], str]] = {
    "convert --source-format qcow2 --target-format raw base new": ({"code", "err", "files"}, HELP),
    "convert -O qcow2 --compress --target-options compression_type=zstd,cluster_size=4k raw new": (
        {"code", "err", "files"},
        HELP,
    ),
    "convert --source-snapshot 1 snaps new": ({"code", "err", "files"}, HELP),
    "convert --no-create raw short": ({"err"}, HELP),
    "snapshot --create new snaps": ({"code", "err", "files"}, HELP),
    "snapshot --delete 2 snaps": ({"code", "err", "files"}, HELP),
    "snapshot --apply 2 olds": ({"code", "err", "files"}, HELP),
    "measure -s 4M": ({"code", "out", "err"}, HELP),
    "create -f raw -o preallocation=metadata new 1M": ({"files"}, LESS),
    "convert -t bogus raw new": ({"files"}, LESS),
    "convert -n --target-is-zero -O qcow2 -B base -F qcow2 raw mid": (
        {"code"},
        "what was refused has failed",
    ),
    "check -r leaks leaky": ({"err"}, FIXED),
    "check --repair all leaky": ({"err"}, FIXED),
    "check corrupt": ({"err"}, "the words for flags are our own"),
    "check -r leaks corrupt": (
        {"code", "out", "err"},
        "what is found is told though not all is to be repaired",
    ),
    "check -r all corrupt": ({"out", "err"}, FIXED),
    "check --output json -r all corrupt": ({"out", "err"}, FIXED),
    "convert luks new": ({"err"}, MORE),
    "map luks": ({"err"}, MORE),
    "snapshot -a one snaps": ({"err"}, MORE),
    "bitmap --add -g 100 base b": ({"err"}, MORE),
    "bitmap --add raw b": ({"err"}, "no names of QEMU's block graph"),
    "bitmap --add v2 b": ({"err"}, "no names of QEMU's block graph"),
    "rebase -b mid -F qcow2 mid": ({"err"}, MORE),
    "bench -c 10 -o 100M raw": ({"err"}, MORE),
    "resize -f raw --shrink raw 1000": ({"files"}, "a disk has whole sectors"),
}


# What else a file needs to be there.
BELOW = {"top": ("mid", "base"), "mid": ("base",), "onraw": ("raw",), "data": ("data.raw",)}


@pytest.fixture(scope="module")
def bed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files on which all work."""
    path = tmp_path_factory.mktemp("bed")
    with contextlib.chdir(path):
        _make_files()
    return path


def _make_files() -> None:
    numbers = random.Random(11)
    noise = numbers.randbytes(700_000)
    words = b"the same words again and again, " * 16384
    for name, content in (("raw", noise + words), ("other", noise + words[:-512] + bytes(512))):
        Path(name).write_bytes(content)
        os.truncate(name, 2 * MIB)
    Path("short").write_bytes(noise[:100_864])
    Path("zeros").touch()
    os.truncate("zeros", 2 * MIB)
    lines = f"""
qemu-img convert -f raw -O qcow2 raw base
qemu-img convert -f raw -O qcow2 raw base2
qemu-io -f qcow2 -c "write -P 3 2000k 40k" base2
qemu-img create -f qcow2 -b base -F qcow2 mid
qemu-io -f qcow2 -c "write -P 1 128k 100k" -c "write -z 512k 128k" mid
qemu-img create -f qcow2 -b mid -F qcow2 top 3M
qemu-io -f qcow2 -c "write -P 2 1M 64k" -c "write -P 4 2560k 64k" top
qemu-img create -f qcow2 -b raw -F raw onraw
qemu-io -f qcow2 -c "write -P 2 1M 64k" onraw
qemu-img convert -f raw -O qcow2 -c raw packed
qemu-img convert -f raw -O qcow2 -o compat=0.10 raw v2
qemu-img convert -f raw -O qcow2 -o extended_l2=on raw ext
qemu-img convert -f raw -O qcow2 -o data_file=data.raw raw data
qemu-img create -f qcow2 zeroed 1M
qemu-io -f qcow2 -c "write -P 1 0 128k" -c "write -z 128k 64k" -c "write -zu 64k 32k" zeroed
qemu-img create {SECRET} -f qcow2 -o encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10 luks 1M
qemu-io {SECRET} --image-opts -c "write -P 5 64k 128k" {LUKS}
qemu-img convert -f raw -O qcow2 raw olds
qemu-img snapshot -c one olds
qemu-io -f qcow2 -c "write -P 9 0 1M" olds
qemu-img snapshot -c two olds
cp olds snaps
qemu-img bitmap --add snaps b0
qemu-io -f qcow2 -c "write -P 9 1M 64k" snaps
qemu-img bitmap --add --disable snaps b1
qemu-img create -f qcow2 -u -b gone -F qcow2 orphan 1M
cp base leaky
cp base corrupt
"""
    for line in lines.strip().splitlines():
        qemu(*shlex.split(line))
    os.truncate("leaky", os.stat("leaky").st_size // 65536 * 65536 + 3 * 65536)
    for name, cluster, count in (("leaky", os.stat("leaky").st_size // 65536 - 2, 1), ("corrupt", 8, 0)):
        with open(name, "r+b") as file:
            file.seek(48)
            (table,) = struct.unpack(">Q", file.read(8))
            file.seek(table)
            (block,) = struct.unpack(">Q", file.read(8))
            file.seek(block + 2 * cluster)
            file.write(struct.pack(">H", count))


def _copy(bed: Path, place: Path, line: str) -> None:
    """The files that a line speaks of, those below them too. Images have no holes: QEMU shows these."""
    place.mkdir()
    named = set(re.findall(r"[\w.]+", line)) & set(os.listdir(bed))
    for name in named.union(*(BELOW.get(one, ()) for one in named)):
        content = (bed / name).read_bytes()
        with (place / name).open("wb") as file:
            if name not in {"raw", "other", "zeros"}:
                file.write(content)
                continue
            file.truncate(len(content))
            for at in range(0, len(content), 4096):
                if any(content[at : at + 4096]):
                    os.pwrite(file.fileno(), content[at : at + 4096], at)


def _cases() -> list[Any]:
    """The lines; QEMU takes seconds to find out how fast it derives keys, whatever iter-time says."""
    luks = "encrypt.format=luks,encrypt.key-secret=s"
    lines = [line for line in CASES.splitlines() if line]
    return [pytest.param(line, marks=[pytest.mark.long] if luks in line else []) for line in lines]


@pytest.mark.parametrize("line", _cases())
def test_it_does_what_qemu_img_does(
    bed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str
) -> None:
    words = shlex.split(line)
    found = []
    for name, tool in (("theirs", theirs), ("mine", mine)):
        place = tmp_path / name
        _copy(bed, place, line)
        monkeypatch.chdir(place)
        found.append(tool(words))
    expected, got = found
    differs = []
    if expected.code != got.code:
        differs.append(f"exit code {got.code}, not {expected.code}")
    for what in ("out", "err"):
        a, b = plain(getattr(expected, what)), plain(getattr(got, what))
        if a.startswith(("{", "[")) and a != b:
            with contextlib.suppress(ValueError):
                a, b = json.loads(a), json.loads(b)
        if a != b:
            differs.append(f"{what}: theirs\n{a}\n-- mine\n{b}")
    differs += _files(bed, tmp_path / "theirs", tmp_path / "mine")
    kinds = {_kind(one) for one in differs}
    expected_kinds, _ = BECAUSE.get(line, (set(), ""))
    assert kinds == expected_kinds, "\n".join(differs)


def _kind(difference: str) -> str:
    begin = difference.partition(" ")[0].rstrip(":")
    return {"exit": "code", "out": "out", "err": "err"}.get(begin, "files")


def _files(bed: Path, theirs: Path, mine: Path) -> list[str]:
    """What is different in the files that one of the two has changed."""
    differs = []
    names = [sorted(os.listdir(place)) for place in (theirs, mine)]
    if names[0] != names[1]:
        differs.append(f"files: {set(names[0]) ^ set(names[1])}")
    for name in sorted(set(names[0]) & set(names[1])):
        a, b = theirs / name, mine / name
        if filecmp.cmp(a, b, shallow=False):
            continue
        if (bed / name).exists() and filecmp.cmp(bed / name, a, shallow=False):
            differs.append(f"{name}: changed by mine only")
        one, other = (_said(path) for path in (a, b))
        if one != other:
            differs.append(f"{name}: theirs\n{one}\n-- mine\n{other}")
        if not _equal(a, b):
            differs.append(f"{name}: the content is another")
    return differs


def _equal(one: Path, other: Path) -> bool:
    """Whether both disks hold the same, or neither can be opened."""
    words = ["qemu-img", "compare", "-q", str(one), str(other)]
    done = subprocess.run(words, capture_output=True, check=False)
    return done.returncode == 0 or _content(one) == _content(other)


def _content(path: Path) -> str | None:
    """A digest of the disk; None if it cannot be opened for what it lacks (a backing file, a passphrase)."""
    seen = path.parent / "seen"
    seen.unlink(missing_ok=True)
    words = ["qemu-img", "convert", "-O", "raw", path.name, seen.name]
    done = subprocess.run(words, cwd=path.parent, capture_output=True, check=False)
    if done.returncode:
        return None
    with seen.open(
        "rb"
    ) as file:  # too large to be held: each child of this process would be as large at first
        return hashlib.file_digest(file, "sha256").hexdigest()


def _said(path: Path) -> dict[str, Any]:
    done = subprocess.run(["qemu-img", "info", "--output=json", path], capture_output=True, check=False)
    found: dict[str, Any] = json.loads(done.stdout or b"{}")
    for key in ("actual-size", "children", "filename", "full-backing-filename"):
        found.pop(key, None)
    encrypt = found.get("format-specific", {}).get("data", {}).get("encrypt", {})
    for key in ("uuid", "master-key-iters"):
        encrypt.pop(key, None)
    for one in encrypt.get("slots", []):
        one.pop("iters", None)
    for one in found.get("snapshots", []):
        for key in ("date-sec", "date-nsec", "icount"):
            one.pop(key, None)
    return found
