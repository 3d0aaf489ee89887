"""Copies of a heap with a byte of the header changed, used by everybody who opens heaps.

Run as a program, in a process of its own, which a signal would end: prints what became of how many.

    python bad_bytes.py NAME OFFSET:VALUE...
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
from collections import Counter

from shmheap import Config, Heap, HeapError, _core, arena
from shmheap.cli import main as command
from shmheap.coordinator import process
from shmheap.verify import verify

CAPACITY = 4 << 20
CASE_S = 30
"""A case takes milliseconds; one that takes so long hangs, and SIGALRM ends the process."""

TYPED = (HeapError, OSError, ValueError)
"""HeapFull, TimeoutError, BlockingIOError and UnicodeDecodeError are among them."""

Extents = list[tuple[int, bytes]]


def make_original(name: str) -> tuple[int, Extents]:
    """A heap in use, as (bytes of its file, what is in it)."""
    path = arena.file_path(name)
    fd = arena.make_file(path, CAPACITY, Config(keep=True))
    steward = _core.Steward(fd)
    steward.begin()
    heap = Heap._attached(os.dup(fd), path, name, new=True)
    assert heap is not None
    blocks = [heap.put(bytes(n)) for n in (10, 100, 1000, 10_000, 100_000)]
    heap.roots["name"] = blocks[0]
    del blocks[2]
    found = extents(fd)
    size = os.fstat(fd).st_size
    heap.close()
    os.unlink(path)
    steward.close()
    os.close(fd)
    return size, found


def extents(fd: int) -> Extents:
    found, at = [], 0
    with contextlib.suppress(OSError):  # ENXIO: only a hole is left
        while True:
            at = os.lseek(fd, at, os.SEEK_DATA)
            end = os.lseek(fd, at, os.SEEK_HOLE)
            found.append((at, os.pread(fd, end - at, at)))
            at = end
    return found


def copy_to(path: str, size: int, original: Extents, offset: int, value: int) -> int:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    os.ftruncate(fd, size)
    for at, data in original:
        os.pwrite(fd, data, at)
    os.pwrite(fd, bytes([value]), offset)
    return fd


def observe(fd: int) -> None:
    observer = _core.Observer(fd)
    try:
        observer.stats()
        observer.header()
        observer.processes()
        observer.check()
        verify(fd, observer.books())
    finally:
        observer.close()


def coordinate(fd: int, heap: Heap | None) -> None:
    steward = _core.Steward(fd)
    try:
        steward.begin()
        steward.start_cycle()
        steward.mark()
        steward.finish_mark()
        steward.sweep()
        steward.stamp(1)
        steward.end_cycle(1 << 20, False, 0)
        steward.release((1 << 29) - 1, 1 << 30, 0)
        for slot in steward.slots():
            steward.reap(slot[0], 0)
        if heap is not None:
            use(heap)
    finally:
        steward.close()


def use(heap: Heap) -> None:
    kept = [heap.put(bytes(n)) for n in (10, 100, 10_000, 100_000)]
    heap.roots["other"] = kept[0]
    heap.stats()
    assert dict(heap.roots.items())["other"] == kept[0]
    heap.check()


def show(name: str) -> None:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        assert command(["verify", "--deep", name]) in (0, 1, 2)
        assert command(["stat", name, "--json"]) in (0, 2)


def one(name: str, size: int, original: Extents, offset: int, value: int) -> str:
    """What became of it: the name of the first error, or ""."""
    path = arena.file_path(name)
    fd = copy_to(path, size, original, offset, value)
    heap: Heap | None = None
    errors = []
    try:
        for step in (observe, lambda fd: show(name), lambda fd: coordinate(fd, heap)):
            try:
                step(fd)
            except TYPED as error:
                errors.append(type(error).__name__)
        try:
            heap = Heap._attached(os.dup(fd), path, name)
            if heap is not None:
                coordinate(fd, heap)
        except TYPED as error:
            errors.append(type(error).__name__)
        if heap is not None:
            heap.close()
    finally:
        with contextlib.suppress(FileNotFoundError):  # its last user may have been told to
            os.unlink(path)
        os.close(fd)
    return errors[0] if errors else ""


def run(name: str, changes: list[str]) -> None:
    process.ensure_running = lambda *_: None
    size, original = make_original(name)
    became: Counter[str] = Counter()
    for change in changes:
        offset, _, value = change.partition(":")
        signal.alarm(CASE_S)
        try:
            became[one(name, size, original, int(offset), int(value))] += 1
        except BaseException:
            print("case", change, file=sys.stderr)
            raise
    print(dict(became))


if __name__ == "__main__":
    run(sys.argv[1], sys.argv[2:])
