# SPDX-License-Identifier: Apache-2.0
"""Runs a function as a user without rights: code of vmbus.broker.dropped refuses to be loaded by root."""

from __future__ import annotations

import os
import pickle
import traceback
from collections.abc import Callable
from typing import Any

from vmbus.wire.errors import VmbusError

NOBODY = 65534


def as_nobody(function: Callable[..., Any], *arguments: Any) -> Any:
    """What ``function`` returns, or the VmbusError that it raises, in a child that is not root."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            if os.getuid() == 0:
                os.setgroups([])
                os.setresgid(NOBODY, NOBODY, NOBODY)
                os.setresuid(NOBODY, NOBODY, NOBODY)
            answer: tuple[str, Any]
            try:
                answer = ("value", function(*arguments))
            except VmbusError as error:
                answer = ("error", (error.kind, error.message, error.argument))
            except BaseException:
                answer = ("bug", traceback.format_exc())
            os.write(write, pickle.dumps(answer))
        finally:
            os._exit(0)
    os.close(write)
    data = b""
    while more := os.read(read, 65536):
        data += more
    os.close(read)
    os.waitpid(pid, 0)
    kind, value = pickle.loads(data)
    if kind == "error":
        raise VmbusError(value[0], value[1], argument=value[2])
    assert kind == "value", value
    return value
