"""`shmheap run`: be a heap's coordinator.

`open` and `create` start it like this, too, with a path for a name and the standard streams on
/dev/null. Somebody who starts it by hand may do so before there is a heap: it is made first.
"""

from __future__ import annotations

import argparse
import json
import os

from shmheap import arena
from shmheap.config import Config, parse_size
from shmheap.coordinator.process import is_detached
from shmheap.coordinator.process import main as coordinate
from shmheap.errors import HeapExists

__all__ = ["run"]


def run(options: argparse.Namespace) -> int:
    """Serve the heap until its last user has left, or until SIGINT or SIGTERM."""
    name: str = options.name
    path = name if name.startswith("/") else arena.file_path(name, options.directory)
    foreground = not is_detached()
    made = foreground and _make(path, options)
    status = coordinate(path, foreground=foreground)
    if options.json:
        print(json.dumps({"name": name, "path": path, "made": made, "exit_status": status}))
    return status


def _make(path: str, options: argparse.Namespace) -> bool:
    """Make the heap if there is none; return whether it was."""
    directory = options.directory
    capacity = options.capacity
    nbytes = arena.capacity_of(directory) if capacity is None else parse_size(capacity)
    try:
        os.close(arena.create_file(path, nbytes, Config(directory=directory)))
    except HeapExists:
        if capacity is not None:
            raise
        return False
    return True

