# SPDX-License-Identifier: Apache-2.0
"""Runs vmbus-broker and notes each module that it or a child of it loads, with the uid at that moment.

    python broker_imports.py NOTES vmbus-broker's options…

The note is made by a finder in front of all others, so nothing that is imported escapes it; in a worker's new
root, where NOTES cannot be opened, nothing of the broker can be imported either.
"""

import importlib.abc
import os
import sys


class Notes(importlib.abc.MetaPathFinder):
    """Finds nothing; writes "UID MODULE"."""

    def __init__(self, path: str) -> None:
        self.path = path

    def find_spec(self, fullname: str, path: object, target: object = None) -> None:
        """Called before the import system looks for ``fullname``."""
        notes = os.open(self.path, os.O_WRONLY | os.O_APPEND)
        os.write(notes, f"{os.getuid()} {fullname}\n".encode())
        os.close(notes)


if __name__ == "__main__":
    sys.meta_path.insert(0, Notes(sys.argv[1]))
    sys.argv = ["vmbus-broker", *sys.argv[2:]]
    from vmbus.broker.main import main

    sys.exit(main())
