"""The end of a soak: what is left when all are dead, or what is kept when something went wrong."""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from soak_run import CAPACITY, GRACE_S, Soak
from soak_worker import NAMES, Kept, WrongError, open_letter, require_content, stamp_of

import shmheap
from shmheap import arena, rss
from shmheap._core import Observer, Steward
from shmheap.coordinator import FREE
from shmheap.coordinator.pacing import EVERYTHING
from shmheap.verify import verify_quiet

PATIENCE_S = 30.0
COPY_STEP = 1 << 20


@dataclass(slots=True)
class Left:
    """What is left; all of it is to be 0."""

    blocks: int = 0
    bytes: int = 0
    leases: int = 0
    pages: int = 0
    kernel_bytes: int = 0  # of the data area
    disagreeing_pages: int = 0
    files: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """The fields, files counted."""
        return asdict(self) | {"files": len(self.files), "file_names": self.files}

    @property
    def total(self) -> int:
        """0 if nothing is left."""
        return sum(value for value in self.as_json().values() if isinstance(value, int))


def finish(soak: Soak) -> Left:
    """Kill the rest, and see the heap empty: first as a user does, then as nobody's heap."""
    soak.kill_everybody()
    left = Left()
    try:
        drop_what_is_known(soak)
        left.disagreeing_pages = collect_with_its_coordinator(soak)
        bare(soak, left)
    except (WrongError, shmheap.HeapError, OSError) as error:
        soak.fail("the end", f"{type(error).__name__}: {error}")
    return left


def drop_what_is_known(soak: Soak) -> None:
    """Open the letters that are still under way, and clear the names."""
    for letter in soak.letters():
        open_letter(letter)
    for name in NAMES:
        block = soak.heap.roots.pop(name, None)
        if block is not None:
            require_content(*Kept(block, *stamp_of(block)))


def collect_with_its_coordinator(soak: Soak) -> int:
    """Have it all collected and given back as any user may; returns the pages that disagree."""
    given_up = time.monotonic() + GRACE_S + PATIENCE_S
    heap = soak.heap
    heap.gc()
    while heap.stats().heap_objects and time.monotonic() < given_up:
        time.sleep(0.1)  # leases of the dead last for their grace
        heap.gc()
    heap.scavenge(all=True)
    soak.check()
    report = verify_quiet(soak.arena_fd, soak.observer, 3)
    return len(report.mismatches)


def bare(soak: Soak, left: Left) -> None:
    """Leave, so that the heap has no user at all; look at what is left, and remove it."""
    soak.heap.close()
    steward = steward_of(soak)
    give_everything_back(steward)
    for line in steward.check():
        soak.fail("check() at the end", line)
    stats = shmheap.HeapStats(**steward.stats())
    left.blocks, left.bytes, left.leases = stats.heap_objects, stats.heap_alloc, stats.leases
    left.pages = stats.heap_inuse // soak.observer.header()["page_bytes"]
    data_offset = soak.observer.books()[1]
    left.kernel_bytes = rss.witness_for(soak.arena_fd).held(data_offset, CAPACITY)
    left.disagreeing_pages += len(verify_quiet(soak.arena_fd, soak.observer, 3).mismatches)
    steward.close()
    if soak.tally.failures or left.total:
        return  # the arena is to be looked at
    nonce = soak.observer.nonce
    shmheap.unlink(soak.heap.name)
    left.files = files_left(soak.path, nonce)


def steward_of(soak: Soak) -> Steward:
    """Take the coordinator's place as soon as it has left."""
    given_up = time.monotonic() + PATIENCE_S
    while True:
        try:
            return Steward(soak.arena_fd)
        except BlockingIOError:
            if time.monotonic() > given_up:
                raise
            time.sleep(0.01)


def give_everything_back(steward: Steward) -> None:
    """One turn of a coordinator: reap, collect, release."""
    steward.begin()
    for slot in steward.slots():
        if slot[1] != FREE and not steward.alive(slot[0]):
            steward.reap(slot[0], time.monotonic_ns())
    steward.start_cycle()
    steward.mark()
    steward.finish_mark()
    steward.sweep()
    steward.stamp(steward.now_stamp())
    steward.end_cycle(0, True, 0)
    page = -1
    while page:
        *_, page = steward.release(EVERYTHING, CAPACITY, max(page, 0))


def files_left(path: str, nonce: int) -> list[str]:
    """Name the heap's files that are still there after a while: its coordinator removes them."""
    bell = f"/dev/shm/sem.{arena.bell_name(nonce)[1:]}"
    given_up = time.monotonic() + PATIENCE_S
    while left := [name for name in (path, bell) if os.path.lexists(name)]:
        if time.monotonic() > given_up:
            break
        time.sleep(0.01)
    return left


def keep_arena(soak: Soak, file: Path) -> Path:
    """Copy the arena, with its holes: it can be looked at when the heap is gone. Returns the file.

    Everybody stands still, or is dead.
    """
    size = os.fstat(soak.arena_fd).st_size
    to = os.open(file, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(to, size)
        at = 0
        with contextlib.suppress(OSError):  # ENXIO: there is no more data
            while True:
                at = os.lseek(soak.arena_fd, at, os.SEEK_DATA)
                end = os.lseek(soak.arena_fd, at, os.SEEK_HOLE)
                while at < end:
                    data = os.pread(soak.arena_fd, min(COPY_STEP, end - at), at)
                    at += os.pwrite(to, data, at)
    finally:
        os.close(to)
    return file


def is_readable(file: Path) -> bool:
    """Whether a copy is an arena that `shmheap verify` takes."""
    fd, _ = arena.open_arena(str(file), read_only=True)
    try:
        Observer(fd)
    finally:
        os.close(fd)
    return True
