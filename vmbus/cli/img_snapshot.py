# SPDX-License-Identifier: Apache-2.0
"""``vmbus-img snapshot``: list, take, go back to and delete internal snapshots."""

from __future__ import annotations

from types import SimpleNamespace

from vmbus.cli import img_options, img_source, img_text
from vmbus.wire.errors import VmbusError

ACTIONS = ("list", "create", "apply", "delete")


def run(options: SimpleNamespace) -> int:
    """Do what the option says; without one, list."""
    chosen = [(name, value) for name, value in options.given if name in ACTIONS]
    if len(chosen) > 1:
        raise img_options.UsageError("Cannot mix '-l', '-a', '-c', '-d'", "snapshot")
    action, name = chosen[0] if chosen else ("list", "")
    [text] = img_options.operands(options, 1, "Expecting one image file name")
    source = img_source.of(options, text, options.format)
    with img_source.opened(source, write=action != "list", share=options.share) as one:
        if action == "list":
            found = one.snapshots() if source.format == "qcow2" else []
            print(img_text.snapshots_for_people(found), end="")
            return 0
        try:
            if source.format == "raw":
                raise VmbusError("NotSupported", "Operation not supported")
            known = {found[key] for found in one.snapshots() for key in ("id", "name")}
            if action != "create" and name not in known:
                message = "Failed to load snapshot: No such file or directory"
                raise VmbusError("InvalidArgument", "snapshot not found" if action == "delete" else message)
            if action == "create":
                one.snapshot(name)
            elif action == "apply":
                one.apply_snapshot(name)
            else:
                one.delete_snapshot(name)
        except VmbusError as error:
            raise VmbusError(error.kind, f"Could not {action} snapshot '{name}': {error}") from None
    return 0
