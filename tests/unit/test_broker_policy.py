# SPDX-License-Identifier: Apache-2.0
"""broker.toml: what it grants, and what it refuses to be."""

# ruff: noqa: PLC0415 (code of vmbus.broker.dropped cannot be imported by root)
from __future__ import annotations

import os
import pwd
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.unit.broker_nobody import as_nobody
from vmbus.broker.policy import Rights, Survey
from vmbus.broker.root import Image
from vmbus.wire.errors import VmbusError

EXAMPLE = Path(__file__).parents[2] / "systemd/broker.toml"


def loaded(text: bytes) -> Any:
    """What dropped.policy.load makes of ``text``, as plain values."""
    from vmbus.broker.dropped import policy

    return msgspec.to_builtins(policy.load(text))


def granted(text: bytes, name: str, groups: list[str]) -> tuple[list[str], list[int]]:
    from vmbus.broker.dropped import policy

    account = policy.Account(name, f"/home/{name}", groups)
    return policy.load(text).prefixes(account), policy.load(text).limits(account)


def rights(**changes: Any) -> Rights:
    """alice's."""
    known: dict[str, Any] = {
        "uid": 1000,
        "name": "alice",
        "gids": [1000],
        "prefixes": ["/home/alice", "/srv/a"],
    }
    known |= {"grants": ["bridges.br0"], "limits": [1000, 4, 2, 500, 100]}
    return Rights(**(known | changes))


def mount(text: str, path: str = "/mnt/huge") -> bytes:
    """A ``[[hugepages.mount]]``."""
    return f'[[hugepages.mount]]\npath = "{path}"\n{text}\n'.encode()


def test_the_example_is_used_as_it_is() -> None:
    policy = as_nobody(loaded, EXAMPLE.read_bytes())
    assert policy["open"]["grant"][0]["users"] == ["*"]
    assert policy["open"]["fuse"] is False
    assert policy["bridges"] == {}
    prefixes, limits = as_nobody(granted, EXAMPLE.read_bytes(), "alice", [])
    assert prefixes == ["/home/alice", "/boot", "/var/lib/vmbus/images"]
    assert limits == [8 << 30, 16, 16, 0, 0]


def test_every_commented_line_of_the_example_is_valid_too() -> None:
    lines = [line.removeprefix("# ") for line in EXAMPLE.read_text().splitlines()]
    text = "\n".join(line for line in lines if re.match(r"\[|[a-z_-]+ = ", line))
    policy = as_nobody(loaded, text.encode())
    assert policy["bridges"]["br0"]["groups"] == ["netdev"]
    assert policy["owners"]["uid_min"] == 1000
    assert policy["quota"]["for"][0]["memory"] == "64G"
    assert policy["hugepages"]["mount"][0]["min-size"] == "2G"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"[open]\nfues = true", "fues"),
        (b"[opne]", "opne"),
        (b"[open]\nfuse = 1", "fuse"),
        (b"[[open.grant]]\nusers = ['a']", "prefixes"),
        (b"[[open.grant]]\nprefixes = ['relative']", "prefixes"),
        (b"[quota]\nmemory = '8 GB'", "memory"),
        (b"[quota]\nmemory = 8", "memory"),
        (b"[bridges]\nbr0 = true", "bridges"),
        (b"[workers]\nuid_first = 0", "uid_first"),
        (b"[workers]\nuid_count = 1", "uid_count"),
        (mount("size = '3M'"), "size 3M, min-size 0: is no multiple"),
        (mount("size = '4M'\nmin-size = '1M'"), "min-size 1M: is no multiple"),
        (mount("size = '4M'\nmin-size = '6M'"), "no more in all than is reserved"),
        (mount("size = '0'"), "size 0"),
        (mount("size = '2M'\npage-size = '1G'"), "size 2M"),
        (mount("size = '2M'\npage-size = '4K'"), "page-size"),
        (mount("size = '2M'\nmode = '4755'"), "mode"),
        (mount("size = '2M'", path="mnt/huge"), "path"),
        (mount("size = '2M'", path="/mnt/../etc"), "path"),
        (mount("size = '2M'", path="/mnt/a b"), "path"),
        (mount("size = '2M'") * 2, "names a path twice"),
        (b"[open", "table declaration"),
        (b"\xff\xfe", "utf-8"),
    ],
)
def test_a_mistake_is_refused_by_name(text: bytes, said: str) -> None:
    with pytest.raises(VmbusError, match=said) as caught:
        as_nobody(loaded, text)
    assert caught.value.kind == "InvalidArgument"


def test_an_empty_file_grants_no_directory_and_no_bridge() -> None:
    prefixes, _ = as_nobody(granted, b"", "alice", [])
    assert prefixes == []


def test_grants_and_quotas_are_for_those_they_name() -> None:
    text = b"""
    [open]
    grant = [ {users = ["alice"], prefixes = ["/a/{user}"]}, {groups = ["vm"], prefixes = ["{home}/vm"]} ]
    [quota]
    memory = "1G"
    for = [
      {groups = ["vm"], memory = "64G", vcpus = 0, hugepages = "2G", locked = "1G"},
      {users = ["*"], machines = 1},
    ]
    """
    assert as_nobody(granted, text, "alice", []) == (["/a/alice"], [1 << 30, 8, 1, 0, 0])
    assert as_nobody(granted, text, "bob", ["vm"]) == (["/home/bob/vm"], [64 << 30, 0, 8, 2 << 30, 1 << 30])
    assert as_nobody(granted, text, "bob", []) == ([], [1 << 30, 8, 1, 0, 0])


@pytest.mark.parametrize(
    ("text", "granted"),
    [(b"", False), (b'[vhost-net]\nusers = ["alice"]', True), (b'[vhost-net]\nusers = ["bob"]', False)],
)
def test_vhost_net_is_for_those_it_names(text: bytes, granted: bool) -> None:
    def asked() -> list[str]:
        from vmbus.broker.dropped import policy

        return policy.load(text).grants(policy.Account("alice", "/home/alice", []))

    assert ("vhost-net" in as_nobody(asked)) == granted


def test_a_home_directory_that_is_the_root_grants_nothing() -> None:
    def asked(home: str) -> list[str]:
        from vmbus.broker.dropped import policy

        text = b"[[open.grant]]\nusers = ['*']\nprefixes = ['{home}', '/x']"
        return policy.load(text).prefixes(policy.Account("daemon", home, []))

    assert as_nobody(asked, "/") == ["/x"]
    assert as_nobody(asked, "") == ["/x"]
    assert as_nobody(asked, "/home/a") == ["/home/a", "/x"]


def test_sizes_are_powers_of_1024() -> None:
    def sizes(_: None) -> list[int]:
        from vmbus.broker.dropped import policy

        return [policy.size(text) for text in ("7", "1K", "2M", "3G", "4T")]

    assert as_nobody(sizes, None) == [7, 1 << 10, 2 << 20, 3 << 30, 4 << 40]


def split(path: str, **changes: Any) -> Any:
    """What a child that is not root makes of a path."""

    def asked(_: None) -> tuple[str, str]:
        from vmbus.broker.dropped import paths

        return paths.split(rights(**changes), path)

    return as_nobody(asked, None)


@pytest.mark.parametrize(
    ("path", "prefix", "rest"),
    [
        ("/home/alice/disk", "/home/alice", "disk"),
        ("/home//alice///a//b", "/home/alice", "a/b"),
        ("/srv/a/x", "/srv/a", "x"),
    ],
)
def test_a_granted_path_is_split(path: str, prefix: str, rest: str) -> None:
    assert split(path) == (prefix, rest)


def test_the_longest_prefix_counts() -> None:
    assert split("/srv/a/b/c", prefixes=["/", "/srv", "/srv/a"]) == ("/srv/a", "b/c")
    assert split("/x", prefixes=["/"]) == ("/", "x")


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("relative", "InvalidArgument"),
        ("", "InvalidArgument"),
        ("/home/alice/../bob/x", "InvalidArgument"),
        ("/home/alice/./x", "InvalidArgument"),
        ("/home/alice/x\0y", "InvalidArgument"),
        ("/home/alice", "AccessDenied"),
        ("/home/alice/", "AccessDenied"),
        ("/home/alicex/disk", "AccessDenied"),
        ("/home/bob/disk", "AccessDenied"),
        ("/etc/passwd", "AccessDenied"),
    ],
)
def test_any_other_path_is_refused(path: str, kind: str) -> None:
    with pytest.raises(VmbusError) as caught:
        split(path)
    assert (caught.value.kind, caught.value.argument) == (kind, "path")


def test_a_home_directory_with_dots_grants_nothing() -> None:
    with pytest.raises(VmbusError):
        split("/home/../etc/passwd", prefixes=["/home/../etc"])
    with pytest.raises(VmbusError):
        split("/etc/passwd", prefixes=["/home/../etc"])


@pytest.mark.parametrize(
    ("used", "wanted", "argument"),
    [
        ([500, 0, 0, 0, 0], [501, 1, 1, 0, 0], "memory"),
        ([0, 3, 0, 0, 0], [1, 2, 1, 0, 0], "vcpus"),
        ([0, 0, 2, 0, 0], [1, 1, 1, 0, 0], ""),
        ([0, 0, 0, 0, 0], [501, 1, 1, 501, 0], "memory"),
        ([400, 1, 1, 400, 0], [101, 1, 1, 101, 0], "memory"),
        ([60, 1, 1, 0, 60], [41, 1, 1, 0, 41], "locked"),
    ],
)
def test_a_quota_is_for_all_machines_together(used: list[int], wanted: list[int], argument: str) -> None:
    rights().check_quota([900, 3, 1, 400, 0], [100, 1, 1, 100, 100])
    with pytest.raises(VmbusError) as caught:
        rights().check_quota(used, wanted)
    assert (caught.value.kind, caught.value.argument) == ("QuotaExceeded", argument)


SURVEY = Survey(
    image=Image([], [], []),
    label="",
    uid_first=2_000_000_000,
    uid_count=16,
    uid_min=0,
    overhead=0,
    fuse=False,
    helpers={},
)


def test_a_real_user_has_rights_by_name_and_groups() -> None:
    def asked(uid: int) -> tuple[str, list[str], list[int]]:
        from vmbus.broker.dropped import accounts

        text = b"[[open.grant]]\nusers = ['*']\nprefixes = ['/x/{user}']\ngroups = ['none-such']"
        found = accounts.look_up(uid, text, SURVEY)
        return found.name, found.prefixes, found.gids

    me = pwd.getpwuid(os.getuid())
    name, prefixes, gids = as_nobody(asked, me.pw_uid)
    assert (name, prefixes, gids[0]) == (me.pw_name, [f"/x/{me.pw_name}"], me.pw_gid)
    with pytest.raises(VmbusError, match="no user with uid"):
        as_nobody(asked, 3_999_999_999)
