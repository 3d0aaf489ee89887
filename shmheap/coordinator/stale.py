"""Stale heaps: what is left when everybody was killed at once.

A heap goes with its last user; its coordinator removes the files, or the last user does if that
died. Killed together, by the kernel for want of memory or with their container, nobody is left to.
Such a heap is over: it was not to be kept, its users are dead, and so is its coordinator. Every
coordinator looks for others of its user when it starts, and `shmheap rm --stale` does.

    nobody has the coordinator's place  --  take it, and make one turn of its loop
                                              CLOSED: reaped, and closed for ever under the lock
                                                that attaching takes: remove its names
                                              not yet: leases in their grace, or a user who just
                                                came: start a coordinator, which sees to it

A heap that is being made has a user or a coordinator before it has a name. One that cannot be read,
or has been found corrupt, stays for `shmheap rm NAME`.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING

from shmheap import _core
from shmheap.arena import (
    bell_name,
    find_arenas,
    find_bells,
    open_arena,
    read_config,
    remove,
    remove_bell,
)
from shmheap.coordinator.collector import resume
from shmheap.coordinator.loop import Coordinator, Outcome
from shmheap.coordinator.trace import Trace
from shmheap.errors import HeapError

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from shmheap.config import Config
    from shmheap.coordinator import SlotKey, Steward

Start = Callable[[str, "Config", int], None]
"""Starts a coordinator for the heap at a path, with that open file."""


class _NeverWaits:
    """One turn is made, and none is waited for."""

    def wait(self, _timeout_s: float, _processes: Mapping[SlotKey, int], /) -> Collection[SlotKey]:
        return ()


def remove_stale(directory: str | None, start: Start) -> Iterator[str]:
    """Remove this user's stale heaps of a directory; gives the name of each that it removed.

    Args:
        directory: where they lie; None: /dev/shm.
        start: starts a coordinator where there is none and one is needed.

    Cost: some ten system calls for each heap that has a coordinator, a collection for others.
    """
    for file in find_arenas(directory):
        if file.uid == os.geteuid():
            with suppress(HeapError, OSError):  # gone meanwhile, or no heap at all
                if _remove_if_stale(file.path, start):
                    yield file.name


def _remove_if_stale(path: str, start: Start) -> bool:
    fd, _ = open_arena(path)
    try:
        config = _config_if_deserted(fd, path)
        if config is None:
            return False
        with suppress(BlockingIOError):  # a coordinator started just now
            if _close(_core.Steward(fd), config, path, os.fstat(fd)):
                return True
            start(path, config, fd)
        return False
    finally:
        os.close(fd)


def _config_if_deserted(fd: int, path: str) -> Config | None:
    """The config of a heap that is not kept, and has nobody alive; else None.

    A look that changes nothing.
    """
    observer = _core.Observer(fd)
    try:
        header = observer.header()
        if header["coordinator_alive"] or header["users_alive"]:
            return None
        config = read_config(fd, path)
        return None if config.keep and not header["unlinked"] else config
    finally:
        observer.close()


def _close(steward: Steward, config: Config, path: str, file: os.stat_result) -> bool:
    """Be its coordinator for one turn; True if that closed and removed it."""
    log = logging.Logger("shmheap.stale")
    try:
        if not steward.closing():
            coordinator = Coordinator(steward, config, time, _NeverWaits(), Trace(None), log)
            resume(steward, time, steward.begin(), config.gc_percent)
            if coordinator.turn() is not Outcome.CLOSED:
                return False
        remove(path, file, steward.nonce)
        return True
    finally:
        steward.close()


def remove_orphaned_bells(directory: str | None) -> Iterator[str]:
    """Remove doorbells of heaps that were unlinked before everybody was killed; gives their names.

    Such a bell is nobody's: no heap of the directory has its nonce, and no process has it mapped,
    of those of this PID namespace, to which it belongs.
    Who should need it after all makes it anew. Cost: a look at every process's maps, if there is
    any bell without a heap.
    """
    known = {bell_name(nonce) for nonce in _nonces(directory)}
    lonely = [(name, inode) for name, inode in find_bells() if name not in known]
    mapped = _mapped_inodes() if lonely else set()
    for name, inode in lonely:
        if inode not in mapped and remove_bell(name):
            yield name


def _nonces(directory: str | None) -> Iterator[int]:
    for file in {*find_arenas(directory), *find_arenas(None)}:
        with suppress(HeapError, OSError):
            fd, _ = open_arena(file.path, read_only=True)
            try:
                yield _core.Observer(fd).nonce
            finally:
                os.close(fd)


def _mapped_inodes() -> set[int]:
    """The inode of every file that a process which this user may look at maps."""
    found: set[int] = set()
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError), open(f"/proc/{pid}/maps", errors="replace") as maps:
            found.update(int(line.split(maxsplit=5)[4]) for line in maps)
    return found
