"""What the demo measures: the heap's books, and beside them what the kernel says."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from shmheap import _core, arena
from shmheap.rss import held_bytes, process_memory, sum_pss
from shmheap.stats import HeapStats
from shmheap.verify import verify_quiet

__all__ = ["Meter", "Phase", "Sample"]

SAMPLE_S = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """One row of the demo's table. Bytes unless said.

    Attributes:
        phase: Its name.
        at_s: When it was measured, seconds since the start.
        in_use_bytes, idle_bytes, released_bytes: The heap's own numbers.
        held_bytes: What the kernel holds for the data area.
        metadata_bytes: What it holds for the rest of the file.
        pss_bytes: Memory of all the processes, shared pages counted once.
        bystander_rss_shmem_bytes: RssShmem of the process that touched everything.
        mismatched_pages: Number of pages on which books and kernel disagree.
    """

    phase: str
    at_s: float
    in_use_bytes: int
    idle_bytes: int
    released_bytes: int
    held_bytes: int
    metadata_bytes: int
    pss_bytes: int
    bystander_rss_shmem_bytes: int
    mismatched_pages: int


@dataclass(frozen=True, slots=True)
class Sample:
    """One point of the plot: seconds since the start, and bytes."""

    at_s: float
    held_bytes: int
    in_use_bytes: int
    released_bytes: int


class Meter:
    """Looks at a heap from outside. A context manager."""

    def __init__(self, path: str, bystander_pid: int) -> None:
        self._fd, _ = arena.open_arena(path, read_only=True)
        self._observer = _core.Observer(self._fd)
        self._bystander_pid = bystander_pid
        self._start_s = time.monotonic()

    def stats(self) -> HeapStats:
        """The heap's numbers now."""
        return HeapStats(**self._observer.stats())

    def phase(self, name: str) -> Phase:
        """Measure a row of the table. Cost: walks the page tables of all the processes."""
        report = verify_quiet(self._fd, self._observer)
        stats = self.stats()
        return Phase(
            phase=name,
            at_s=self._now_s(),
            in_use_bytes=stats.heap_inuse,
            idle_bytes=stats.heap_idle,
            released_bytes=stats.heap_released,
            held_bytes=report.kernel_held_bytes,
            metadata_bytes=report.metadata_bytes,
            pss_bytes=sum_pss(self._pids()),
            bystander_rss_shmem_bytes=process_memory(self._bystander_pid).rss_shmem,
            mismatched_pages=len(report.mismatches),
        )

    def sample(self) -> Sample:
        """Measure a point of the plot. Cost: two system calls."""
        stats = self.stats()
        held = max(0, held_bytes(self._fd) - stats.metadata_bytes)
        return Sample(self._now_s(), held, stats.heap_inuse, stats.heap_released)

    @contextmanager
    def sampling(self) -> Iterator[list[Sample]]:
        """Measure all the time; gives the list that grows."""
        samples: list[Sample] = []
        enough = threading.Event()

        def measure() -> None:
            while not enough.wait(SAMPLE_S):
                samples.append(self.sample())

        thread = threading.Thread(target=measure, name="samples", daemon=True)
        thread.start()
        try:
            yield samples
        finally:
            enough.set()
            thread.join()
        samples.append(self.sample())

    def _now_s(self) -> float:
        return time.monotonic() - self._start_s

    def _pids(self) -> list[int]:
        """This process, its workers and bystander, and the coordinator."""
        children = [child.pid for child in multiprocessing.active_children() if child.pid]
        header = self._observer.header()
        coordinator = [header["coordinator_pid"]] if header["coordinator_alive"] else []
        return [os.getpid(), *children, *coordinator]

    def __enter__(self) -> Meter:
        return self

    def __exit__(self, *exc: object) -> None:
        self._observer.close()
        os.close(self._fd)
