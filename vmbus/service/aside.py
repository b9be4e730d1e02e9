# SPDX-License-Identifier: Apache-2.0
"""Work that may take long, beside the loop, each piece in a thread of its own.

asyncio's pool of threads must not be used here: a pool's thread lives on with the table of descriptors that
it was born with, and ``descriptors.expel`` gives the loop another one. In the old table everything is closed:
such a thread reaches no file of ours, and cannot even wake the loop. A fresh thread has the loop's table of
now. Should the table change while it works, its own files fail, and the loop, which looks by itself, learns
of it all the same.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import Final, TypeVar

T = TypeVar("T")

LOOK: Final = 0.5
"""Seconds after which the loop looks whether work is done that could not wake it."""


async def aside(work: Callable[..., T], *arguments: object) -> T:
    """The result of ``work(*arguments)``, or what it raised."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def tell(settle: Callable[..., None], what: object) -> None:
        if not done.done():
            settle(what)

    def run() -> None:
        try:
            outcome, settle = work(*arguments), done.set_result
        except BaseException as error:
            outcome, settle = error, done.set_exception  # type: ignore[assignment]
        # Where the table has changed the loop is not woken; this is in its queue all the same.
        with contextlib.suppress(OSError):
            loop.call_soon_threadsafe(tell, settle, outcome)

    threading.Thread(target=run, name="aside", daemon=True).start()
    while not done.done():
        await asyncio.wait({done}, timeout=LOOK)
    return done.result()
