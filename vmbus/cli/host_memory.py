# SPDX-License-Identifier: Apache-2.0
"""What vmbusctl does about the host's memory: pools of huge pages."""

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
    said = await remote.finish(await remote.resize_pool(pool["Path"], change))
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
