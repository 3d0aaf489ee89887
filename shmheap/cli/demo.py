"""`shmheap demo`: fill a heap with real files, use it from a pool, and see the memory go back.

    this process                   pool of workers             bystander
    ------------                   ---------------             ---------
    empty      make the heap       attach                      attach
    loaded     a block per file ------------------------------> touch every page, keep nothing
    computed   handles ----------> compress in place
               compare <---------- handles of result blocks --> touch every page, keep nothing
    dropped    drop all handles
    collected  wait for the collector
    scavenged  wait for the scavenger                          its RssShmem falls, too

What is shown of the kernel comes from `rss`, which knows nothing of the heap's books. The processes
are spawned: they inherit nothing, and find the heap by its handle like any other process.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from multiprocessing.pool import Pool
from pathlib import Path

from shmheap import arena
from shmheap.block import Block
from shmheap.cli.demo_files import Load, find_files, plan_load
from shmheap.cli.demo_meter import Meter, Phase, Sample
from shmheap.cli.demo_show import Screen, draw, print_phases, require_plot
from shmheap.cli.demo_work import attach, compress_blocks, compressed, digest, touch
from shmheap.cli.show import print_json, size
from shmheap.cli.signals import uninterrupted
from shmheap.config import Config, parse_size
from shmheap.errors import HeapError
from shmheap.heap import Heap
from shmheap.rss import shm_free
from shmheap.stats import HeapStats

__all__ = ["demo"]

START_METHOD = "spawn"
FORCED_GC_S = 1.0
SCAVENGE_AFTER_S = 2.0
"""Seconds, where a heap's own Config has two and five minutes."""

CHUNK_BYTES = 1 << 20
CHUNK_BLOCKS = 64
"""A task is so much, so that neither many small files nor a few large ones are slow to hand out."""

RESULT_S = 300.0
"""A pool waits for ever for the task of a worker that was killed."""

PATIENCE_S = 60.0
LOOK_S = 0.02


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the demo found."""

    load: Load
    results: int
    wrong: int
    phases: list[Phase]
    samples: list[Sample]

    @property
    def mismatched_pages(self) -> int:
        """Sum over all phases."""
        return sum(row.mismatched_pages for row in self.phases)

    @property
    def peak_bytes(self) -> int:
        """The most that the kernel held for the data area in a phase."""
        return max(row.held_bytes for row in self.phases)

    @property
    def returned_ratio(self) -> float:
        """Share of that which it holds no longer."""
        return 1 - self.phases[-1].held_bytes / self.peak_bytes

    @property
    def good(self) -> bool:
        """Whether all results are right, and books and kernel always agreed."""
        return not self.wrong and not self.mismatched_pages


def demo(options: argparse.Namespace) -> int:
    """Run it; 1 if a result is wrong or a page is not as the books say."""
    if options.plot is not None:
        require_plot(options.plot)
    screen = Screen(quiet=options.json)
    want = None if options.size is None else parse_size(options.size)
    free = shm_free(options.directory or arena.DIRECTORY)
    load = plan_load(find_files(options.input), want, free)
    screen.say(f"{load}")
    started_s = time.monotonic()
    outcome = _run(options, load, screen)
    if options.plot is not None:
        draw(options.plot, outcome.samples, outcome.phases)
    if options.json:
        print_json(_as_json(outcome, options, time.monotonic() - started_s))
    else:
        print_phases(outcome.phases)
        _print_outcome(outcome, options.workers)
    return 0 if outcome.good else 1


@dataclass(frozen=True, slots=True)
class _Stage:
    """All that is needed to play the phases."""

    heap: Heap
    workers: Pool
    bystander: Pool
    meter: Meter
    screen: Screen


def _run(options: argparse.Namespace, load: Load, screen: Screen) -> Outcome:
    config = Config(
        forced_gc_s=FORCED_GC_S,
        scavenge_after_s=SCAVENGE_AFTER_S,
        lease_grace_s=1.0,
        directory=options.directory,
    )
    with (
        _new_heap(options.name, config) as heap,
        _pool(options.workers, heap) as workers,
        _pool(1, heap) as bystander,
        Meter(arena.file_path(heap.name, config.directory), bystander.apply(os.getpid)) as meter,
        _samples(meter, wanted=options.plot is not None) as samples,
    ):
        _wait(meter, "the workers", lambda stats: stats.processes == options.workers + 2)
        stage = _Stage(heap, workers, bystander, meter, screen)
        phases, results, wrong = _phases(stage, load)
    return Outcome(load, results, wrong, phases, samples)


def _samples(meter: Meter, *, wanted: bool) -> AbstractContextManager[list[Sample]]:
    return meter.sampling() if wanted else nullcontext([])


@contextmanager
def _new_heap(name: str | None, config: Config) -> Iterator[Heap]:
    """A heap that is gone afterwards, whatever happens."""
    heap = None
    try:
        with uninterrupted():
            heap = Heap.create(name, config=config)
        yield heap
    finally:
        if heap is not None:
            heap.unlink()
            heap.close()


@contextmanager
def _pool(processes: int, heap: Heap) -> Iterator[Pool]:
    """A pool that has the heap; it ends in order, or at once if there is an error."""
    # Children inherit it: Ctrl-C in a terminal goes to all processes, and is for this one.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        context = multiprocessing.get_context(START_METHOD)
        pool = context.Pool(processes, initializer=attach, initargs=(heap,))
    finally:
        signal.signal(signal.SIGINT, before)
    with pool:  # terminates
        yield pool
        pool.close()
        pool.join()


def _phases(stage: _Stage, load: Load) -> tuple[list[Phase], int, int]:
    """Play all phases; returns their rows, the number of results, and of wrong ones."""
    meter = stage.meter
    phases = [meter.phase("empty")]

    blocks, expected = _load(stage, load)
    _touch(stage.bystander, blocks)
    phases.append(meter.phase("loaded"))

    results, wrong = _compute(stage, load, blocks, expected)
    _touch(stage.bystander, results)
    phases.append(meter.phase("computed"))

    count = len(results)
    blocks.clear()
    results.clear()
    _wait(meter, "the last handle to go", lambda stats: stats.heap_objects == 0)
    phases.append(meter.phase("dropped"))

    cycles = meter.stats().num_gc
    _wait(meter, "the collector", lambda stats: stats.num_gc > cycles)
    phases.append(meter.phase("collected"))

    # A run that is just being given back counts as in use: it is nobody else's to take.
    in_use = phases[-1].in_use_bytes
    _wait(meter, "the scavenger", lambda stats: stats.committed_bytes <= stats.heap_inuse <= in_use)
    phases.append(meter.phase("scavenged"))
    return phases, count, wrong


def _load(stage: _Stage, load: Load) -> tuple[list[Block], list[bytes]]:
    """Put the files into the heap; returns the blocks, and the digest of what each must become.

    The latter is the plain run: this process alone, on the bytes of each file, without the heap.
    """
    blocks: list[Block] = []
    expected: list[bytes] = []
    with stage.screen.bar("loading", load.nbytes) as advance:
        for path, copies in load.copies:
            data = Path(path).read_bytes()
            blocks += [stage.heap.put(data) for _ in range(copies)]
            expected += [digest(compressed(data))] * copies
            advance(len(data) * copies)
    return blocks, expected


def _compute(
    stage: _Stage, load: Load, blocks: list[Block], expected: list[bytes]
) -> tuple[list[Block], int]:
    """Have the workers compress all blocks; returns their results, and how many are wrong."""
    results: list[Block] = []
    wrong = 0
    with stage.screen.bar("computing", load.nbytes) as advance:
        done = stage.workers.imap(compress_blocks, _chunks(blocks))
        while len(results) < len(blocks):
            chunk = done.next(RESULT_S)
            first, end = len(results), len(results) + len(chunk)
            wrong += sum(map(_differs, chunk, expected[first:end]))
            results += chunk
            advance(sum(map(len, blocks[first:end])))
    return results, wrong


def _differs(result: Block, expected: bytes) -> bool:
    return digest(result) != expected


def _touch(bystander: Pool, blocks: Sequence[Block]) -> None:
    for _ in bystander.imap_unordered(touch, _chunks(blocks)):
        pass


def _chunks(blocks: Sequence[Block]) -> Iterator[list[Block]]:
    """Cut the blocks into tasks."""
    chunk: list[Block] = []
    nbytes = 0
    for block in blocks:
        chunk.append(block)
        nbytes += len(block)
        if nbytes >= CHUNK_BYTES or len(chunk) == CHUNK_BLOCKS:
            yield chunk
            chunk, nbytes = [], 0
    if chunk:
        yield chunk


def _wait(meter: Meter, what: str, come: Callable[[HeapStats], bool]) -> None:
    """Wait until the heap's numbers say that it has come. HeapError: they do not."""
    deadline_s = time.monotonic() + PATIENCE_S
    while not come(meter.stats()):
        if time.monotonic() > deadline_s:
            raise HeapError(f"waited {PATIENCE_S:.0f} s for {what}; now {meter.stats()}")
        time.sleep(LOOK_S)


def _as_json(outcome: Outcome, options: argparse.Namespace, seconds: float) -> dict[str, object]:
    load = outcome.load
    return {
        "results_correct": not outcome.wrong,
        "results": outcome.results,
        "wrong_results": outcome.wrong,
        "returned_ratio": outcome.returned_ratio,
        "mismatched_pages": outcome.mismatched_pages,
        "workers": options.workers,
        "start_method": START_METHOD,
        "input": {
            "files": len(load.copies),
            "blocks": load.blocks,
            "bytes": load.nbytes,
            "limit_bytes": load.limit_bytes,
        },
        "seconds": seconds,
        "phases": [asdict(row) for row in outcome.phases],
    }


def _print_outcome(outcome: Outcome, workers: int) -> None:
    last = outcome.phases[-1]
    print(
        f"returned to the system: {outcome.returned_ratio:.2%} of {size(outcome.peak_bytes)}; "
        f"{size(last.held_bytes)} of data and {size(last.metadata_bytes)} of metadata are held"
    )
    print(f"pages on which books and kernel disagree: {outcome.mismatched_pages}")
    says = f"{outcome.wrong} are wrong" if outcome.wrong else "all equal a plain run's"
    load = outcome.load
    print(
        f"results: {outcome.results:,} blocks ({size(load.nbytes)}) of {len(load.copies):,} files, "
        f"compressed by {workers} {START_METHOD}ed workers; {says}"
    )
