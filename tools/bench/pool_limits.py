"""Two figures about pools: from which size on the heap pays, and how soon a death is noticed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from bench_common import KIB, Case, Result, measure, progress
from pool_peers import Array, answer

import shmheap

THRESHOLD_SIZES = tuple(KIB << i for i in range(2, 9))
"""Bytes: 4 KiB to 256 KiB."""


def measure_threshold(sizes: Sequence[int], rounds: int) -> list[Result]:
    """CPU time of all processes for a plain array there and one back: by the heap, by the pipe."""
    return [
        {"task": task, "nbytes": nbytes, "us": _by_heap_and_pipe(function, nbytes, rounds)}
        for task, function in TASKS.items()
        for nbytes in progress(sizes, f"heap or pipe, {task}")
    ]


def _by_heap_and_pipe(
    function: Callable[[Array], Array], nbytes: int, rounds: int
) -> dict[str, float]:
    array = np.full(nbytes, 7, np.uint8)
    start = partial(shmheap.Pool, 1, context=multiprocessing.get_context("fork"))
    with start(min_bytes=nbytes) as by_heap, start(min_bytes=nbytes + 1) as by_pipe:
        cases = [
            Case(name, _sender(pool, function), array, clock=cpu_clock(pool))
            for name, pool in (("heap", by_heap), ("pipe", by_pipe))
        ]
        measure(cases, rounds, slice_ms=20, first=2)
    return {case.name: statistics.median(case.ns) / 1e3 for case in cases}


def _sender(pool: shmheap.Pool, function: Callable[[Array], Array]) -> Callable[[Any], Any]:
    return lambda array: pool.apply(function, (array,))


def echo(array: Array) -> Array:
    """Return the argument."""
    return array


TASKS = {"the argument comes back": echo, "NumPy makes the result": answer}


def cpu_clock(pool: Any) -> Callable[[], int]:
    """Return a clock of the CPU time of this process and of a pool's workers, ns."""

    def now() -> int:
        workers = [Path(f"/proc/{worker.pid}/schedstat").read_text() for worker in pool._pool]
        return time.process_time_ns() + sum(int(text.split()[0]) for text in workers)

    return now


def measure_deaths(count: int) -> dict[str, Result]:
    """From a worker's SIGKILL in the middle of its task to the error of that task, ms."""
    started: dict[str, Callable[[], Any]] = {
        "Pool": partial(shmheap.Pool, 2),
        "ProcessPoolExecutor": partial(shmheap.ProcessPoolExecutor, 2),
    }
    return {
        name: _summary([_death(name, start) for _ in progress(range(count), f"deaths, {name}")])
        for name, start in started.items()
    }


def _death(name: str, start: Callable[[], Any]) -> float:
    with start() as pool:
        array = pool.heap.zeros(1, np.int64)
        wait = (
            pool.apply_async(tell_and_wait, (array,)).get
            if name == "Pool"
            else pool.submit(tell_and_wait, array).result
        )
        while not (pid := int(array[0])):
            time.sleep(0.001)
        began = time.perf_counter()
        os.kill(pid, signal.SIGKILL)
        try:
            wait()
        except BrokenProcessPool:
            return 1e3 * (time.perf_counter() - began)
    raise AssertionError("the task of a dead worker succeeded")


def tell_and_wait(array: Array) -> None:
    """Say who has the task, and never end."""
    array[0] = os.getpid()
    signal.pause()


def _summary(ms: list[float]) -> Result:
    return {"count": len(ms), "p50_ms": statistics.median(ms), "max_ms": max(ms)}
