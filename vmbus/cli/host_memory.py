# SPDX-License-Identifier: Apache-2.0
"""What vmbusctl does about the host's memory: pools of huge pages, and merging of equal pages."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from vmbus.cli import output
from vmbus.cli.remote import Remote
from vmbus.wire.definition import PAGE_SIZES
from vmbus.wire.errors import VmbusError

_COLUMNS = ("PAGE", "NODE", "TOTAL", "FREE", "RESERVED", "IDLE", "GROWN", "MACHINES")


async def hugepages(remote: Remote, arguments: argparse.Namespace) -> int:
    """List the pools, or make one larger or smaller and wait for it."""
    if (arguments.action == "list") != (arguments.pages is None):
        message = "say how many with grow and shrink, and with these alone"
        raise VmbusError("InvalidArgument", message, argument="PAGES")
    pools = await remote.pools()
    if arguments.action == "list":
        return await _list(remote, pools, as_json=arguments.json)
    if arguments.pages < 1:
        raise VmbusError("InvalidArgument", f"{arguments.pages} is not 1 or more", argument="PAGES")
    pool = _chosen(pools, PAGE_SIZES[arguments.page_size], arguments.node)
    change = arguments.pages if arguments.action == "grow" else -arguments.pages
    said = (await remote.finish(await remote.resize_pool(pool["Path"], change))).message
    (pool,) = (one for one in await remote.pools() if one["Path"] == pool["Path"])
    if arguments.json:
        output.print_json({**_plain(pool), "message": said})
    else:
        if said:
            output.warn(said)
        print(f"{pool['Total']} pages of {output.size(pool['PageSize'])}, {pool['Idle']} idle")
    return 0


def _chosen(pools: list[Mapping[str, Any]], size: int, node: int | None) -> Mapping[str, Any]:
    for pool in pools:
        if pool["PageSize"] == size and node in (None, pool["Node"]):
            return pool
    where = "" if node is None else f" on node {node}"
    raise VmbusError("NotFound", f"this host has no pages of {output.size(size)}{where}", argument="--node")


async def ksm(remote: Remote, arguments: argparse.Namespace) -> int:
    """Show KSM, change its settings, or what it does for machines and others."""
    if (arguments.action == "set") != bool(arguments.settings):
        message = "NAME=VALUE stands with set, and with it alone"
        raise VmbusError("InvalidArgument", message, argument="NAME=VALUE")
    if arguments.action == "set":
        await remote.set_ksm(dict(map(_setting, arguments.settings)))
    elif arguments.action == "restore":
        await remote.restore_ksm()
    elif arguments.action == "machines":
        return await _ksm_machines(remote, as_json=arguments.json)
    elif arguments.action == "others":
        return await _ksm_others(remote, as_json=arguments.json)
    properties = await remote.ksm()
    if arguments.json:
        names = {"ActiveDomain": "active-domain"}
        output.print_json({names.get(key, key.lower()): value for key, value in properties.items()})
        return 0
    found = properties["Found"]
    output.print_fields(
        [
            *(
                (name, f"{value} (found: {found[name]})" if name in found else value)
                for name, value in properties["Settings"].items()
            ),
            *((name, value) for name, value in properties["Figures"].items()),
            ("active-domain", properties["ActiveDomain"] or "-"),
            ("tuner", properties["Tuner"]),
        ]
    )
    return 0


def _setting(text: str) -> tuple[str, int | str]:
    name, equals, value = text.partition("=")
    if not equals or not name or not value:
        raise VmbusError("InvalidArgument", f"{text!r} is not NAME=VALUE", argument="NAME=VALUE")
    try:
        return name, int(value)
    except ValueError:
        return name, value


async def _ksm_machines(remote: Remote, *, as_json: bool) -> int:
    machines = await remote.ksm_machines()
    if as_json:
        output.print_json({path: dict(figures) for path, figures in machines.items()})
        return 0
    rows = []
    for path, figures in machines.items():
        sizes = (output.size(figures[name]) for name in ("merged", "unshared", "zero"))
        rows.append(((await remote.machine(path)).name, figures["domain"], *sizes, figures["profit"]))
    output.print_table(("NAME", "DOMAIN", "MERGED", "UNSHARED", "ZERO", "PROFIT"), rows)
    return 0


async def _ksm_others(remote: Remote, *, as_json: bool) -> int:
    names = ("pid", "uid", "name", "merged", "profit")
    others = await remote.ksm_others()
    if as_json:
        output.print_json([dict(zip(names, row, strict=True)) for row in others])
    else:
        output.print_table([name.upper() for name in names], others)
    return 0


async def _list(remote: Remote, pools: list[Mapping[str, Any]], *, as_json: bool) -> int:
    held = {pool["Path"]: await remote.pool_machines(pool["Path"]) for pool in pools}
    if as_json:
        output.print_json([{**_plain(pool), "machines": dict(held[pool["Path"]])} for pool in pools])
        return 0
    rows = [
        (
            output.size(pool["PageSize"]),
            pool["Node"] if pool["Node"] >= 0 else "-",
            *(pool[name] for name in ("Total", "Free", "Reserved", "Idle", "Grown")),
            sum(held[pool["Path"]].values()),
        )
        for pool in pools
    ]
    output.print_table(_COLUMNS, rows)
    return 0


def _plain(pool: Mapping[str, Any]) -> dict[str, Any]:
    names = {"PageSize": "page-size"}
    return {names.get(key, key.lower()): value for key, value in pool.items()}
