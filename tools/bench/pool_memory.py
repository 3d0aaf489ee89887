"""What memory it takes to hand arrays to workers: proportional sets of all processes."""

from __future__ import annotations

import fcntl
import gc
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from bench_common import Result, progress
from pool_peers import Array, Candidate, Workers

from shmheap import rss

SHARERS = 8
"""Workers that use one array at the same time."""

PATIENCE_S = 120.0


def measure_shared(candidates: dict[str, Candidate], nbytes: int) -> dict[str, Result]:
    """Memory of all processes while every worker has read an array, each candidate alone."""
    array = np.full(nbytes, 7, np.uint8)
    found = {}
    for name, start in progress(list(candidates.items()), "one array for all"):
        with start(SHARERS) as workers:
            if workers.on_each:
                before = _memory(workers.servants)
                with _all_holding(workers, array):
                    held = _memory(workers.servants)
                found[name] = {what: (held[what] - before[what]) / nbytes for what in held}
    return found


@contextmanager
def _all_holding(workers: Workers, array: Array) -> Iterator[None]:
    """Every worker has read the array, and keeps it until the end of this context."""
    assert workers.on_each is not None
    with (
        tempfile.TemporaryDirectory() as folder,
        ThreadPoolExecutor(1) as thread,
        open(Path(folder, "gate"), "w") as gate,
    ):
        fcntl.flock(gate, fcntl.LOCK_EX)
        task = thread.submit(workers.on_each, partial(_read_and_wait, folder), array)
        try:
            deadline = time.monotonic() + PATIENCE_S
            while len(os.listdir(folder)) <= SHARERS and not task.done():
                if time.monotonic() > deadline:
                    raise TimeoutError(f"not {SHARERS} workers at the same time")
                time.sleep(0.001)
            yield
        finally:
            fcntl.flock(gate, fcntl.LOCK_UN)
            task.result()


def _read_and_wait(folder: str, array: Array) -> None:
    array[:: rss.PAGE_BYTES].max()
    Path(folder, str(os.getpid())).touch()
    with open(Path(folder, "gate")) as gate:
        fcntl.flock(gate, fcntl.LOCK_SH)


def _memory(servants: Sequence[int]) -> Result:
    return _sums(_everybody(servants))


def _everybody(servants: Sequence[int]) -> set[int]:
    """This process, all that it started, and others."""
    own = psutil.Process()
    return {own.pid, *(child.pid for child in own.children(recursive=True)), *servants}


def _sums(pids: Iterable[int]) -> Result:
    """Their proportional sets, bytes."""
    found = [rss.process_memory(pid) for pid in pids]
    return {"pss": sum(one.pss for one in found), "pss_shmem": sum(one.pss_shmem for one in found)}


# --------------------------------------------------------------------------------------------------
# What an array there and one back take at most


def measure_peaks(
    candidates: dict[str, Candidate], nbytes: int, workers: int, seconds: float
) -> dict[str, Result]:
    """The most that all processes have while arrays are sent and as large ones come back.

    Each candidate alone; above what there was before, in which the array itself is.
    """
    array = np.full(nbytes, 7, np.uint8)
    with multiprocessing.get_context("spawn").Pool(1) as looker:
        return {
            name: _peak(start, array, workers, seconds, looker)
            for name, start in progress(list(candidates.items()), "peaks")
        }


def _peak(start: Candidate, array: Array, workers: int, seconds: float, looker: Any) -> Result:
    gc.collect()  # what another candidate has left
    with start(workers) as there:
        there.sender(array[:1])()  # some start their workers now
        pids = _everybody(there.servants) - {worker.pid for worker in looker._pool}
        before = _sums(pids)
        send = there.sender(array)
        looked = looker.apply_async(_look, (pids, seconds))
        while not looked.ready():
            send()
        peak = looked.get()
    return {what: (peak[what] - before[what]) / array.nbytes for what in before}


def _look(pids: Sequence[int], seconds: float) -> Result:
    """In a process of its own: the largest sums in that time."""
    over = time.monotonic() + seconds
    seen: list[Result] = []
    while not seen or time.monotonic() < over:
        with suppress(OSError):  # one of them has just ended
            seen.append(_sums(pids))
    return {what: max(one[what] for one in seen) for what in seen[0]}
