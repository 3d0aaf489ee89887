"""What it costs to hand arrays and small tasks to worker processes, and what memory that takes."""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from bench_common import (
    MIB,
    Case,
    Result,
    Row,
    console,
    figure_axes,
    measure,
    progress,
    ratio,
    show_rows,
    size_text,
)
from bench_memory import look
from pool_limits import THRESHOLD_SIZES, cpu_clock, measure_deaths, measure_threshold
from pool_memory import SHARERS, measure_peaks, measure_shared
from pool_peers import (
    BESIDE,
    COPIED,
    COPIED_BOTH_WAYS,
    OURS,
    PEERS,
    SHARED,
    Array,
    Candidate,
    Workers,
    answer,
    bump,
    mark_done,
    missing,
)
from rich.table import Table

import shmheap

WORKERS = 2
SIZES = (1, MIB, 16 * MIB, 256 * MIB)
LEAST_ROUNDS = 5
MEMCPY = "memcpy each way"
SMALL = "shmheap, 1 byte"
"""The task beside which a large one of ours is held."""

TASKS: dict[str, tuple[Callable[[Any], Any], Callable[[int], Any]]] = {
    "ints": (bump, lambda i: i),
    "records": (mark_done, lambda i: {"id": i, "name": f"task {i}", "at": (i / 7, i / 9)}),
}
"""Small tasks: what a worker does, and what it is done to."""

CHUNKS = {"chunked": (None, 4000), "chunksize 1": (1, 2000)}
"""How they are handed out, and how many at a time."""

CLOCKS = ("wall", "caller's CPU", "CPU of all")
SMALL_LIMITS = {"chunked": (1.05, 0.8), "chunksize 1": (1.25, 1.0)}

METHODS = ("fork", "spawn")


class Pool:
    """The command `pool`."""

    summary = "arrays to workers and back beside peers, small tasks, memory that this takes"
    options: ClassVar[Result] = {
        "peers": {
            "nargs": "*",
            "choices": list(PEERS),
            "default": list(PEERS),
            "help": "only these; those that are not installed are left out and named",
        }
    }

    def run(self, *, quick: bool, peers: Sequence[str]) -> Result:
        """Measure everything; some minutes and 10 GiB, `quick` some seconds."""
        left_out = missing(peers)
        found = {name: PEERS[name][0] for name in PEERS if name in peers and name not in left_out}
        ours = {
            name: start for name, start in OURS.items() if BESIDE.get(name, name) in OURS | found
        }
        found = ours | found
        sizes = [min(size, 2 * MIB) for size in SIZES[:3]] if quick else SIZES
        transfers = measure_transfers(found, sizes, rounds=3 if quick else 21)
        small = measure_small(rounds=3 if quick else 41)
        shared = measure_shared(found, sizes[-1])
        peaks = measure_peaks(found, sizes[-1], WORKERS, seconds=0.2 if quick else 4)
        left = measure_left(sizes[-1])
        threshold = measure_threshold(THRESHOLD_SIZES[:: 3 if quick else 1], 3 if quick else 41)
        deaths = measure_deaths(2 if quick else 50)
        rows = [row.as_json() for row in _rows(transfers, small, shared, left, deaths)]
        return {
            "left_out": left_out,
            "transfers": transfers,
            "small": small,
            "shared": shared,
            "peaks": peaks,
            "left": left,
            "threshold": threshold,
            "deaths": deaths,
            "rows": rows,
        }

    def show(self, result: Result) -> None:
        """Print tables."""
        if result["left_out"]:
            console().print(f"not installed: {', '.join(result['left_out'])}")
        console().print(_transfer_table(result["transfers"]))
        console().print(_small_table(result["small"]))
        console().print(_memory_table(result["shared"], result["peaks"]))
        console().print(_threshold_table(result["threshold"]))
        show_rows(result["rows"])

    def plot(self, result: Result, file: Path) -> None:
        """Draw the time there and back over the size."""
        figure, axes = figure_axes()
        transfers = result["transfers"]
        for name in transfers[-1]["ms"]:
            points = [one["ms"].get(name) for one in transfers]
            axes.plot([one["nbytes"] for one in transfers], points, marker="o", label=name)
        axes.set(xscale="log", yscale="log", xlabel="bytes", ylabel="ms there and back")
        axes.legend()
        figure.savefig(file, dpi=120)


def _rows(
    transfers: list[Result],
    small: list[Result],
    shared: dict[str, Result],
    left: Result,
    deaths: dict[str, Result],
) -> Iterator[Row]:
    large, size = transfers[-1], size_text(transfers[-1]["nbytes"])
    yield Row(f"{size} in the heap there and back / 1 byte", large["of_small"], 3, 1.2)
    if large["best_peer"]:
        what = f"{large['best_peer']} / {size} in the heap"
        yield Row(what, large["best_peer_times"], 50, 300, at_least=True)
    what = f"{size} {{}} / {MEMCPY}"
    yield Row(what.format("copied both ways"), large["memcpys"][COPIED_BOTH_WAYS], 2.0, 1.1)
    yield Row(what.format("copied there, made in the heap"), large["memcpys"][COPIED])
    for one in small:
        what = f"{_kind(one)} / {next(iter(one['us']['wall']))}"
        limits = SMALL_LIMITS[one["chunks"]] if one["how"] in METHODS else ()
        yield Row(what, one["ratios"]["wall"], *limits)
        yield Row(f"{what}, by CPU time", one["ratios"]["CPU of all"])
    what = f"shared memory of all while {SHARERS} use one array / its size"
    yield Row(what, shared[SHARED]["pss_shmem"], 1.02, 1.0)
    yield Row("left after the pool, of one array", 100 * left["share"], 0.1, 0, unit="%")
    for name, one in deaths.items():
        what = f"from a worker's SIGKILL to its task's error, {name}, the longest of {one['count']}"
        yield Row(what, one["max_ms"], 1000, unit="ms")


# --------------------------------------------------------------------------------------------------
# An array there and one back


def measure_transfers(
    candidates: dict[str, Candidate], sizes: Sequence[int], rounds: int
) -> list[Result]:
    """Send arrays of these sizes, all candidates in turns; fewer rounds where one takes seconds."""
    with ExitStack() as stack:
        there = {
            name: stack.enter_context(start(WORKERS))
            for name, start in progress(list(candidates.items()), "starting")
        }
        return [
            _transfers(there, nbytes, max(LEAST_ROUNDS, rounds >> i) if i else rounds)
            for i, nbytes in enumerate(progress(sizes, "arrays"))
        ]


def _transfers(there: dict[str, Workers], nbytes: int, rounds: int) -> Result:
    array = np.full(nbytes, 7, np.uint8)
    cases = {name: _case(name, workers.sender(array)) for name, workers in there.items()}
    cases[MEMCPY] = _case(MEMCPY, _memcpy_each_way(array))
    cases[SMALL] = _case(SMALL, there[SHARED].sender(array[:1]))
    measure(list(cases.values()), rounds, slice_ms=20, first=WORKERS)
    ns = {name: case.ns for name, case in cases.items()}
    peers = {name: statistics.median(ns[name]) for name in ns.keys() & PEERS.keys()}
    best = min(peers, key=lambda name: peers[name], default=None)
    return {
        "nbytes": nbytes,
        "rounds": rounds,
        "ms": {name: statistics.median(found) / 1e6 for name, found in ns.items()},
        "best_ms": {name: min(found) / 1e6 for name, found in ns.items()},
        "memcpys": {name: ratio(found, ns[MEMCPY]) for name, found in ns.items()},
        "of_small": ratio(ns[SHARED], ns[SMALL]),
        "best_peer": best,
        "best_peer_times": ratio(ns[best], ns[SHARED]) if best else None,
    }


def _case(name: str, send: Callable[[], Array]) -> Case:
    found = send()
    if found[0] != 8:
        raise ValueError(f"{name}: another array came back")
    return Case(name, lambda _: send(), None, clock=time.perf_counter_ns)


def _memcpy_each_way(array: Array) -> Callable[[], Array]:
    there, back = array.copy(), array.copy()
    answer = array + 1

    def send() -> Array:
        np.copyto(there, array)
        np.copyto(back, answer)
        return back

    return send


# --------------------------------------------------------------------------------------------------
# Many small tasks


def _pools(method: str) -> dict[str, Any]:
    context = multiprocessing.get_context(method)
    return {
        "multiprocessing": context.Pool(WORKERS),
        "shmheap": shmheap.Pool(WORKERS, context=context),
    }


class _ExecutorAsPool:
    """What is asked of a pool here, of an executor."""

    def __init__(self, executor: ProcessPoolExecutor) -> None:
        self._executor = executor

    def __enter__(self) -> _ExecutorAsPool:
        return self

    def __exit__(self, *_: object) -> None:
        self._executor.shutdown()

    @property
    def _pool(self) -> list[BaseProcess]:
        return list(self._executor._processes.values())

    def map(self, function: Callable[[Any], Any], tasks: Sequence[Any], size: int) -> list[Any]:
        return list(self._executor.map(function, tasks, chunksize=size))


def _executors(method: str) -> dict[str, Any]:
    context = multiprocessing.get_context(method)
    return {
        "concurrent.futures": _ExecutorAsPool(ProcessPoolExecutor(WORKERS, context)),
        "shmheap": _ExecutorAsPool(shmheap.ProcessPoolExecutor(WORKERS, context)),
    }


def measure_small(rounds: int) -> list[Result]:
    """`map` over many small tasks, all pools in turns; executors likewise, one by one."""
    every = [(kind, chunks) for kind in TASKS for chunks in CHUNKS]
    found = [one for method in METHODS for one in _smalls(_pools(method), method, every, rounds)]
    return found + _smalls(_executors("fork"), "executor", [("ints", "chunksize 1")], rounds)


def _smalls(
    started: dict[str, Any], how: str, jobs: Sequence[tuple[str, str]], rounds: int
) -> list[Result]:
    with ExitStack() as stack:
        pools = {name: stack.enter_context(pool) for name, pool in started.items()}
        return [
            {"how": how, "tasks": kind, "chunks": chunks, **_small(pools, kind, chunks, rounds)}
            for kind, chunks in progress(jobs, f"small tasks, {how}")
        ]


def _small(pools: dict[str, Any], kind: str, chunks: str, rounds: int) -> Result:
    function, task = TASKS[kind]
    size, count = CHUNKS[chunks]
    tasks = [task(i) for i in range(count)]
    cases = {
        (clock, name): Case(name, _mapping(pool, function, size), tasks, clock=_clocks(pool)[clock])
        for clock in CLOCKS
        for name, pool in pools.items()
    }
    measure(list(cases.values()), rounds, slice_ms=20, first=2)
    ns = {clock: {name: cases[clock, name].ns for name in pools} for clock in CLOCKS}
    return {
        "us": {
            clock: {name: statistics.median(one) / 1e3 / count for name, one in found.items()}
            for clock, found in ns.items()
        },
        "ratios": {clock: ratio(*reversed(found.values())) for clock, found in ns.items()},
    }


def _mapping(pool: Any, function: Callable[[Any], Any], size: int | None) -> Callable[[Any], Any]:
    return lambda tasks: pool.map(function, tasks, size)


def _clocks(pool: Any) -> dict[str, Callable[[], int]]:
    """The clock on the wall, CPU time of this process, and that of the workers, too."""
    clocks = (time.perf_counter_ns, time.process_time_ns, cpu_clock(pool))
    return dict(zip(CLOCKS, clocks, strict=True))


# --------------------------------------------------------------------------------------------------
# What is left


def measure_left(nbytes: int) -> Result:
    """Send arrays of that size there and back, end the pool, collect, scavenge; what is held?"""
    with shmheap.Heap.create(capacity=16 * nbytes + 64 * MIB) as heap:
        array = np.full(nbytes, 7, np.uint8)
        with shmheap.Pool(WORKERS, heap=heap) as pool:
            pool.map(answer, [array, heap.array(array)] * WORKERS, chunksize=1)
            used = look(heap)["held_bytes"]
            pool.close()
            pool.join()
        heap.gc()
        heap.scavenge(all=True)
        left = look(heap)["held_bytes"]
        heap.unlink()
    return {"used_bytes": used, "held_bytes": left, "share": left / nbytes}


# --------------------------------------------------------------------------------------------------


def _transfer_table(transfers: list[Result]) -> Table:
    table = Table("ms, an array there and one back", title=f"{WORKERS} workers")
    for one in transfers:
        table.add_column(size_text(one["nbytes"]), justify="right")
    for name in transfers[-1]["ms"]:
        table.add_row(name, *(f"{one['ms'][name]:.3g}" for one in transfers))
    return table


def _small_table(small: list[Result]) -> Table:
    table = Table("us per small task", title=f"the standard library | shmheap, {WORKERS} workers")
    for clock in CLOCKS:
        table.add_column(clock, justify="right")
    for one in small:
        cells = (" | ".join(f"{us:.3g}" for us in found.values()) for found in one["us"].values())
        table.add_row(_kind(one), *cells)
    return table


def _kind(one: Result) -> str:
    return f"{one['tasks']}, {one['chunks']}, {one['how']}"


def _memory_table(shared: dict[str, Result], peaks: dict[str, Result]) -> Table:
    table = Table("times an array's size", title="memory of all processes (PSS), and shared of it")
    for name in (f"{SHARERS} workers use one", "of it shared", "there and back, peak", "shared"):
        table.add_column(name, justify="right")
    for name, peak in peaks.items():
        found = [*shared.get(name, {}).values()] or [float("nan")] * 2
        table.add_row(name, *(f"{times:.2f}" for times in (*found, *peak.values())))
    return table


def _threshold_table(threshold: list[Result]) -> Table:
    table = Table("us of CPU, there and back", title="by the heap | by the pipe")
    sizes = sorted({one["nbytes"] for one in threshold})
    for nbytes in sizes:
        table.add_column(size_text(nbytes), justify="right")
    for task in dict.fromkeys(one["task"] for one in threshold):
        found = {one["nbytes"]: one["us"] for one in threshold if one["task"] == task}
        table.add_row(task, *(" | ".join(f"{us:.3g}" for us in found[n].values()) for n in sizes))
    return table
