"""What memory comes back, what the books cost, and what releasing costs: by an outside witness."""

from __future__ import annotations

import gc
import mmap
import multiprocessing
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.heap import BufferWrapper
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
from bench_alloc import scratch_heap
from bench_common import (
    GIB,
    KIB,
    MIB,
    Result,
    Row,
    console,
    figure_axes,
    progress,
    ratio,
    show_rows,
    size_text,
)
from rich.table import Table

import shmheap
from shmheap._core import Observer
from shmheap.verify import verify_quiet

OS_PAGE = mmap.PAGESIZE
PIN_BYTES = 8
MIXED = (256, 4 * KIB, 64 * KIB, MIB)


class Memory:
    """The command `memory`."""

    summary = "memory that comes back, metadata, cost of releasing and of creating"

    def run(self, *, quick: bool) -> Result:
        """Measure everything; about two minutes and 2.5 GiB, `quick` some seconds and 64 MiB."""
        total = 32 * MIB if quick else GIB
        held = [
            measure_held("all dropped", MIXED, total, keep_one_in=0),
            measure_held("1 in 64 of 16 KiB kept", (16 * KIB,), total, keep_one_in=64),
            measure_held("1 in 64 of 256 B kept", (256,), total, keep_one_in=64),
        ]
        peers = measure_peers_held(total)
        metadata = measure_metadata(total)
        release = measure_release(total, rounds=3 if quick else 9)
        create = measure_create(rounds=5 if quick else 51)
        mismatched = sum(found["mismatched_pages"] for found in [*held, metadata, release])
        rows = [row.as_json() for row in _rows(held, metadata, release, create, mismatched)]
        return {
            "total_bytes": total,
            "held": held,
            "peers_held": peers,
            "metadata": metadata,
            "release": release,
            "create": create,
            "mismatched_pages": mismatched,
            "rows": rows,
        }

    def show(self, result: Result) -> None:
        """Print tables."""
        console().print(_held_table(result))
        console().print(_release_table(result["release"]))
        show_rows(result["rows"])

    def plot(self, result: Result, file: Path) -> None:
        """Draw what is held after the blocks were dropped."""
        figure, axes = figure_axes()
        bars = {f"shmheap: {found['what']}": found["share"] for found in result["held"]}
        for found in result["peers_held"]:
            bars[f"{found['name']}: {found['what']}"] = found["share"]
        axes.barh(list(bars), [100 * share for share in bars.values()])
        axes.set(xlabel="% still held after drop, collect, scavenge")
        axes.invert_yaxis()
        figure.savefig(file, dpi=120)


def _rows(
    held: list[Result], metadata: Result, release: Result, create: Result, mismatched: int
) -> Iterator[Row]:
    limits = ((0.1, 0.0), (2.5, 1.6), (30.0, 25.0))
    for found, (must, aim) in zip(held, limits, strict=True):
        yield Row(f"held: {found['what']}", 100 * found["share"], must, aim, unit="%")
    yield Row("pages on which books and kernel disagree", mismatched, 0, 0, unit="pages")
    what = "release, inside the coordinator / MADV_REMOVE"
    yield Row(what, release["ratio_inside"], 1.2, 1.0)
    yield Row("release, the best of each", release["ratio_best"])
    yield Row("release, as the caller sees it / MADV_REMOVE", release["ratio_call"])
    share = 100 * metadata["metadata_bytes"] / metadata["in_use_bytes"]
    yield Row("metadata of memory in use, 4 KiB blocks", share, 2, 1, unit="%")
    yield Row("create 1 TiB, coordinator not started", create["ms"], 10, 1, unit="ms")
    yield Row("create 1 TiB, with its start", create["with_coordinator_ms"], unit="ms")


# --------------------------------------------------------------------------------------------------
# What comes back


def look(heap: shmheap.Heap) -> Result:
    """Ask kernel and books at a quiet moment: bytes held of the data area and of the rest."""
    fd = os.open(heap._path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        observer = Observer(fd)
        report = verify_quiet(fd, observer)
        observer.close()
    finally:
        os.close(fd)
    return {
        "held_bytes": report.kernel_held_bytes,
        "metadata_bytes": report.metadata_bytes,
        "mismatched_pages": len(report.mismatches),
    }


def measure_held(what: str, sizes: Sequence[int], total: int, *, keep_one_in: int) -> Result:
    """Fill a heap with blocks of these sizes, drop them, collect, scavenge; what is held then?

    The pages of this process's pins are in the data area, and counted.
    """
    with scratch_heap(4 * total) as heap:
        blocks = [
            _touched(heap.alloc(size, zero=False), size)
            for size in progress(sizes, what)
            for _ in range(total // len(sizes) // size)
        ]
        filled = look(heap)
        kept = _survivors(blocks, keep_one_in)
        blocks.clear()
        gc.collect()
        dropped = look(heap)
        heap.gc()
        heap.scavenge(all=True)
        after = look(heap)
        del kept
    wrong = sum(found["mismatched_pages"] for found in (filled, dropped, after))
    return {
        "what": what,
        "filled_bytes": filled["held_bytes"],
        "dropped_bytes": dropped["held_bytes"],
        "scavenged_bytes": after["held_bytes"],
        "share": after["held_bytes"] / total,
        "metadata_filled_bytes": filled["metadata_bytes"],
        "metadata_scavenged_bytes": after["metadata_bytes"],
        "mismatched_pages": wrong,
    }


def _touched(block: Any, size: int) -> Any:
    with memoryview(block) as view:
        for start in range(0, size, OS_PAGE):
            view[start] = 1
    return block


def _survivors(blocks: list[Any], one_in: int) -> list[Any]:
    """Choose a uniformly random share of the blocks."""
    count = len(blocks) // one_in if one_in else 0
    return random.Random(1).sample(blocks, count)


def measure_peers_held(total: int) -> list[Result]:
    """Measure what peers keep with one in 64 blocks of 16 KiB alive, each in a fresh process."""
    context = multiprocessing.get_context("spawn")
    found = []
    for name in progress(list(_PEERS), "peers"):
        ours, theirs = context.Pipe()
        process = context.Process(target=_peer_held, args=(theirs, name, total))
        process.start()
        theirs.close()
        kept, before = ours.recv()
        process.join()
        found.append(
            {
                "name": name,
                "what": "1 in 64 of 16 KiB kept",
                "filled_bytes": before,
                "kept_bytes": kept,
                "share": kept / total,
            }
        )
    return found


def _wrapped(nbytes: int) -> BufferWrapper:
    block = BufferWrapper(nbytes)
    _touched(block.create_memoryview(), nbytes)
    return block


_PEERS: dict[str, Callable[[int], object]] = {
    "bytearray (malloc)": bytearray,
    "multiprocessing.heap": _wrapped,
}


def _peer_held(answer: Connection, name: str, total: int) -> None:
    """Resident set of this process, shared pages included: how much it grows, and what stays."""
    make, size, process = _PEERS[name], 16 * KIB, psutil.Process()
    before = process.memory_info().rss
    blocks = [make(size) for _ in range(total // size)]
    filled = process.memory_info().rss - before
    kept = _survivors(blocks, 64)
    blocks.clear()
    gc.collect()
    answer.send((process.memory_info().rss - before, filled))
    del kept


# --------------------------------------------------------------------------------------------------
# What the books cost


def measure_metadata(total: int) -> Result:
    """Bytes that the kernel holds of tables and pins with `total` bytes in blocks of 4 KiB."""
    with scratch_heap(4 * total) as heap:
        blocks = [heap.alloc(4 * KIB, zero=False) for _ in range(total // (4 * KIB))]
        found = look(heap)
        stats = heap.stats()
        pins = -(-stats.pins * PIN_BYTES // OS_PAGE) * OS_PAGE
        del blocks
    return {
        "tables_bytes": found["metadata_bytes"],
        "pins_bytes": pins,
        "metadata_bytes": found["metadata_bytes"] + pins,
        "in_use_bytes": stats.heap_alloc,
        "mismatched_pages": found["mismatched_pages"],
    }


# --------------------------------------------------------------------------------------------------
# What releasing costs


def measure_release(total: int, rounds: int) -> Result:
    """Releasing everything, beside one MADV_REMOVE of a plain file of the same size, in turns.

    Both are touched by this process and released by another that has them mapped and untouched.
    `inside` is what the coordinator says it took, `call` what heap.scavenge took.
    """
    inside, call, plain, wrong, released = [], [], [], 0, []
    with _releaser(total) as (file, remove):
        for _ in progress(range(rounds), "releasing"):
            with scratch_heap(2 * total) as heap:
                blocks = [_touched(heap.alloc(MIB), MIB) for _ in range(total // MIB)]
                blocks.clear()
                heap.gc()
                start = time.perf_counter_ns()
                report = heap.scavenge(all=True)
                call.append(time.perf_counter_ns() - start)
                inside.append(report.duration_ns)
                released.append(report.released_bytes)
                wrong += look(heap)["mismatched_pages"]
            os.posix_fallocate(file.fileno(), 0, total)
            with mmap.mmap(file.fileno(), total) as memory, memoryview(memory) as view:
                for at in range(0, total, OS_PAGE):
                    view[at] = 1
                plain.append(remove())
    return {
        "released_bytes": min(released),
        "inside_ms": statistics.median(inside) / 1e6,
        "call_ms": statistics.median(call) / 1e6,
        "madv_remove_ms": statistics.median(plain) / 1e6,
        "ratio_inside": ratio(inside, plain),
        "ratio_best": min(inside) / min(plain),
        "ratio_call": ratio(call, plain),
        "mismatched_pages": wrong,
    }


@contextmanager
def _releaser(nbytes: int) -> Iterator[tuple[Any, Callable[[], int]]]:
    """Give a file in /dev/shm and what has another process punch it: returns nanoseconds."""
    context = multiprocessing.get_context("fork")
    fd = os.open("/dev/shm", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    with open(fd, "r+b", buffering=0) as file:
        file.truncate(nbytes)
        ours, theirs = context.Pipe()
        process = context.Process(target=_remove_when_told, args=(theirs, fd, nbytes))
        process.start()
        theirs.close()

        def remove() -> int:
            ours.send(True)
            took: int = ours.recv()
            return took

        yield file, remove
        ours.send(False)
        process.join()


def _remove_when_told(orders: Connection, fd: int, nbytes: int) -> None:
    with mmap.mmap(fd, nbytes) as memory:
        while orders.recv():
            start = time.perf_counter_ns()
            memory.madvise(mmap.MADV_REMOVE)
            orders.send(time.perf_counter_ns() - start)


# --------------------------------------------------------------------------------------------------
# What creating costs


def measure_create(rounds: int) -> Result:
    """Heap.create of 1 TiB, with the coordinator's start left out, and with it; milliseconds."""

    def create_ms() -> float:
        start = time.perf_counter_ns()
        heap = shmheap.Heap.create(capacity="1TiB")
        took = time.perf_counter_ns() - start
        heap.unlink()
        heap.close()
        return took / 1e6

    with mock.patch("shmheap.coordinator.process.ensure_running"):
        bare = [create_ms() for _ in progress(range(rounds), "creating")]
    whole = [create_ms() for _ in range(5)]
    return {
        "ms": statistics.median(bare),
        "best_ms": min(bare),
        "worst_ms": max(bare),
        "with_coordinator_ms": statistics.median(whole),
    }


# --------------------------------------------------------------------------------------------------


def _held_table(result: Result) -> Table:
    table = Table("held by the kernel", title=f"blocks of {size_text(result['total_bytes'])}")
    for column in ("filled", "dropped", "scavenged", "share", "metadata"):
        table.add_column(column, justify="right")
    for found in result["held"]:
        names = ("filled_bytes", "dropped_bytes", "scavenged_bytes")
        table.add_row(
            found["what"],
            *(size_text(found[name]) for name in names),
            f"{100 * found['share']:.3g} %",
            size_text(found["metadata_scavenged_bytes"]),
        )
    for found in result["peers_held"]:
        filled, kept = size_text(found["filled_bytes"]), size_text(found["kept_bytes"])
        name = f"{found['name']}: {found['what']}"
        table.add_row(name, filled, kept, "", f"{100 * found['share']:.3g} %", "")
    return table


def _release_table(release: Result) -> Table:
    size = size_text(release["released_bytes"])
    table = Table("ms", f"releasing {size}", title="beside one MADV_REMOVE")
    table.add_row("inside the coordinator", f"{release['inside_ms']:.1f}")
    table.add_row("heap.scavenge(all=True)", f"{release['call_ms']:.1f}")
    table.add_row("MADV_REMOVE of a plain file", f"{release['madv_remove_ms']:.1f}")
    return table
