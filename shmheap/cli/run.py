"""`shmheap run`: be a heap's coordinator.

`open` and `create` start it like this, too, with a path for a name and the standard streams on
/dev/null. Somebody who starts it by hand may do so before there is a heap of that name: it is made
first.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from contextlib import suppress

from shmheap import _core, arena
from shmheap.cli.signals import INTERRUPTED, uninterrupted
from shmheap.config import Config, parse_size
from shmheap.coordinator.process import is_detached
from shmheap.coordinator.process import main as coordinate
from shmheap.errors import HeapExists, HeapNotFound

__all__ = ["run"]


def run(options: argparse.Namespace) -> int:
    """Serve the heap until its last user has left, or until SIGINT or SIGTERM."""
    name: str = options.name
    path = name if name.startswith("/") else arena.file_path(name, options.directory)
    foreground = not is_detached()
    steward = None
    status = INTERRUPTED
    with suppress(KeyboardInterrupt):  # before the coordinator handles it
        if foreground and path != name:  # a path is that of a heap that there is
            with uninterrupted():
                steward = _make(path, options)
        status = coordinate(path, foreground=foreground, steward=steward)
    if made := steward is not None:
        steward.close()
        _remove_unused(path)
    if options.json:
        print(json.dumps({"name": name, "path": path, "made": made, "exit_status": status}))
    return status


def _make(path: str, options: argparse.Namespace) -> _core.Steward | None:
    """Make the heap if there is none; return its coordinator's place then, taken."""
    if options.capacity is not None:
        nbytes = parse_size(options.capacity)
    else:
        nbytes = arena.capacity_of(options.directory)
    fd = arena.make_file(path, nbytes, Config(directory=options.directory))
    try:
        steward = _core.Steward(fd)  # before there is a name: see arena.give_name
        arena.give_name(fd, path)
    except HeapExists:
        if options.capacity is not None:
            print(f"shmheap: {path} exists, and keeps its capacity", file=sys.stderr)
        return None
    finally:
        os.close(fd)
    print(f"shmheap: made {path}", file=sys.stderr)
    return steward


def _remove_unused(path: str) -> None:
    """Remove a heap that was made here if nobody came, and this process was ended early."""
    try:
        fd, _ = arena.open_arena(path)
    except HeapNotFound:
        return  # the coordinator has removed it
    file = os.fstat(fd)
    with suppress(BlockingIOError):
        try:
            steward = _core.Steward(fd)
        finally:
            os.close(fd)
        if steward.try_close():
            arena.remove(path, file, steward.nonce)
