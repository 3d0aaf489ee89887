"""`shmheap gc`, `scavenge`, `rm`: have something done.

gc and scavenge become users of the heap for as long as they take, so that its coordinator answers
them, and is started if it was dead.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict

from shmheap import _core, arena
from shmheap.cli import one_line
from shmheap.cli.look import live_pids, observed
from shmheap.cli.show import print_json, print_pairs, size
from shmheap.coordinator.process import ensure_running
from shmheap.coordinator.stale import remove_orphaned_bells, remove_stale
from shmheap.errors import HeapCorrupt, HeapError, HeapNotFound
from shmheap.heap import Heap

__all__ = ["gc", "rm", "scavenge"]

START_S = 10.0


def gc(options: argparse.Namespace) -> int:
    """Run a whole collection, and show its report."""
    with Heap.attach(options.name, directory=options.directory) as heap:
        report = heap.gc()
    if options.json:
        print_json({"name": options.name} | asdict(report))
        return 0
    freed = (
        ("freed", report.freed_bytes),
        ("freed, of the dead", report.freed_dead_bytes),
        ("freed, of old leases", report.freed_lease_bytes),
    )
    print_pairs(
        [
            ("collection", report.cycle),
            ("blocks in use", f"{report.marked:,}"),
            ("blocks freed", f"{report.swept:,}"),
            *((name, size(nbytes)) for name, nbytes in freed),
            ("longest pause", f"{report.pause_max_ns / 1e3:.1f} us"),
            ("took", f"{report.duration_ns / 1e6:.1f} ms"),
        ]
    )
    return 0


def scavenge(options: argparse.Namespace) -> int:
    """Give idle memory back, and show the report."""
    with Heap.attach(options.name, directory=options.directory) as heap:
        report = heap.scavenge(all=options.all)
    if options.json:
        print_json({"name": options.name} | asdict(report))
        return 0
    print_pairs(
        [
            ("returned to the system", size(report.released_bytes)),
            ("in runs of pages", f"{report.runs:,}"),
            ("took", f"{report.duration_ns / 1e6:.1f} ms"),
        ]
    )
    return 0


def rm(options: argparse.Namespace) -> int:
    """Remove heaps; goes on after one that cannot be removed, and then is 2."""
    if bool(options.name) is options.stale:
        raise ValueError("rm wants names, or --stale")
    removed: list[dict[str, object]] = []
    failed: list[dict[str, object]] = []
    say = (lambda _text: None) if options.json else print
    for name in _stale(options.directory) if options.stale else ():
        removed.append({"name": name, "processes": []})
        say(f"{name}: removed")
    for name in options.name:
        try:
            users = _remove(arena.file_path(name, options.directory), options, name)
            removed.append({"name": name, "processes": users})
            say(f"{name}: removed" + (f"; {users} still use it" if users else ""))
        except (HeapError, OSError, ValueError) as error:
            failed.append({"name": name, "error": one_line(error)})
            print(f"shmheap: {name}: {one_line(error)}", file=sys.stderr)
    if options.json:
        print_json({"removed": removed, "failed": failed})
    return 2 if failed else 0


def _stale(directory: str | None) -> Iterator[str]:
    yield from remove_stale(directory, ensure_running)
    for _ in remove_orphaned_bells(directory):
        pass  # of heaps that have no name any more


def _remove(path: str, options: argparse.Namespace, name: str) -> list[int]:
    """Remove one heap; returns the pids of those that go on using it."""
    try:
        with observed(path) as (fd, observer):
            users = live_pids(fd, observer)
            nonce = observer.nonce
            file = os.fstat(fd)
    except HeapNotFound:
        raise
    except HeapError:
        if not options.force:
            raise
        os.unlink(path)
        return []
    try:
        if users or not _remove_deserted(path, nonce):
            with Heap.attach(name, directory=options.directory) as heap:
                _wait_for_coordinator(heap)
                heap.unlink()
    except HeapCorrupt:  # nobody can use it any more, and nobody will remove it
        arena.remove(path, file, nonce)
    return users


def _wait_for_coordinator(heap: Heap) -> None:
    """Wait until one that attaching had to start has opened the heap: it does so by its name."""
    deadline_s = time.monotonic() + START_S
    while not heap._coordinator_alive() and time.monotonic() < deadline_s:
        time.sleep(0.01)


def _remove_deserted(path: str, nonce: int) -> bool:
    """Remove a heap whose processes are all dead, with its doorbell; False if one is alive.

    Holding the coordinator's place meanwhile keeps anybody from starting one.
    """
    fd, _ = arena.open_arena(path)
    file = os.fstat(fd)
    try:
        steward = _core.Steward(fd)
    except BlockingIOError:
        return False
    finally:
        os.close(fd)
    try:
        if steward.nonce != nonce or any(steward.alive(slot[0]) for slot in steward.slots()):
            return False
        arena.remove(path, file, nonce)
        return True
    finally:
        steward.close()
