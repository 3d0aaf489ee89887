"""What it costs to hand arrays and small tasks to worker processes, and what memory that takes."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import psutil
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
from pool_peers import PEERS, Array, Candidate, Workers, bump, mark_done, missing
from rich.table import Table

from shmheap import rss

WORKERS = 2
SHARERS = 8
"""Workers that use one array at the same time."""

SIZES = (1, MIB, 16 * MIB, 256 * MIB)
PATIENCE_S = 120.0
LEAST_ROUNDS = 5
MEMCPY = "memcpy each way"

TASKS: dict[str, tuple[Callable[[Any], Any], Callable[[int], Any]]] = {
    "ints": (bump, lambda i: i),
    "records": (mark_done, lambda i: {"id": i, "name": f"task {i}", "at": (i / 7, i / 9)}),
}
"""Small tasks: what a worker does, and what it is done to."""

CHUNKS = {"chunked": (None, 4000), "chunksize 1": (1, 400)}
"""How they are handed out, and how many at a time."""

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
        sizes = [min(size, 2 * MIB) for size in SIZES[:3]] if quick else SIZES
        transfers = measure_transfers(found, sizes, rounds=3 if quick else 21)
        small = measure_small(rounds=3 if quick else 41)
        shared = measure_shared(found, sizes[-1])
        rows = [row.as_json() for row in _rows(transfers, small, shared)]
        return {
            "left_out": left_out,
            "transfers": transfers,
            "small": small,
            "shared": shared,
            "rows": rows,
        }

    def show(self, result: Result) -> None:
        """Print tables."""
        if result["left_out"]:
            console().print(f"not installed: {', '.join(result['left_out'])}")
        console().print(_transfer_table(result["transfers"]))
        console().print(_small_table(result["small"]))
        console().print(_shared_table(result["shared"]))
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


def _rows(transfers: list[Result], small: list[Result], shared: dict[str, Result]) -> Iterator[Row]:
    large = transfers[-1]
    size = size_text(large["nbytes"])
    for name, memcpys in large["memcpys"].items():
        yield Row(f"{name}: {size} there and back / {MEMCPY}", memcpys)


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
    cases = [_case(name, workers.sender(array)) for name, workers in there.items()]
    cases.append(_case(MEMCPY, _memcpy_each_way(array)))
    measure(cases, rounds, slice_ms=20, first=WORKERS + 1)
    return {
        "nbytes": nbytes,
        "rounds": rounds,
        "ms": {case.name: statistics.median(case.ns) / 1e6 for case in cases},
        "best_ms": {case.name: min(case.ns) / 1e6 for case in cases},
        "memcpys": {case.name: ratio(case.ns, cases[-1].ns) for case in cases},
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
    return {"multiprocessing": context.Pool(WORKERS)}


def measure_small(rounds: int) -> list[Result]:
    """`map` over many small tasks, all pools in turns."""
    found = []
    for method in METHODS:
        with ExitStack() as stack:
            pools = {name: stack.enter_context(pool) for name, pool in _pools(method).items()}
            jobs = [(kind, chunks) for kind in TASKS for chunks in CHUNKS]
            for kind, chunks in progress(jobs, f"small tasks, {method}"):
                small = _small(pools, kind, chunks, rounds)
                found.append({"method": method, "tasks": kind, "chunks": chunks, **small})
    return found


def _small(pools: dict[str, Any], kind: str, chunks: str, rounds: int) -> Result:
    function, task = TASKS[kind]
    size, count = CHUNKS[chunks]
    tasks = [task(i) for i in range(count)]

    def case(name: str, pool: Any) -> Case:
        return Case(name, lambda n: pool.map(function, n, size), tasks, clock=time.perf_counter_ns)

    cases = [case(name, pool) for name, pool in pools.items()]
    measure(cases, rounds, slice_ms=20, first=2)
    return {
        "us": {case.name: statistics.median(case.ns) / 1e3 / count for case in cases},
        "ratios": {case.name: ratio(case.ns, cases[0].ns) for case in cases},
    }


# --------------------------------------------------------------------------------------------------
# What one array takes that many workers use


def measure_shared(candidates: dict[str, Candidate], nbytes: int) -> dict[str, Result]:
    """Memory of all processes while every worker has read an array, each candidate alone."""
    array = np.full(nbytes, 7, np.uint8)
    found = {}
    for name, start in progress(list(candidates.items()), "one array for all"):
        with start(SHARERS) as workers:
            if workers.on_each:
                before = _memory()
                with _all_holding(workers, array):
                    held = _memory()
                found[name] = {what: (held[what] - before[what]) / nbytes for what in held}
    return found


@contextmanager
def _all_holding(workers: Workers, array: Array) -> Iterator[None]:
    """Every worker has read the array, and keeps it until the end of this context."""
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


def _memory() -> Result:
    """Proportional sets of this process and all that it started, bytes."""
    own = psutil.Process()
    found = [rss.process_memory(p.pid) for p in (own, *own.children(recursive=True))]
    return {"pss": sum(one.pss for one in found), "pss_shmem": sum(one.pss_shmem for one in found)}


# --------------------------------------------------------------------------------------------------


def _transfer_table(transfers: list[Result]) -> Table:
    table = Table("ms, an array there and one back", title=f"{WORKERS} workers")
    for one in transfers:
        table.add_column(size_text(one["nbytes"]), justify="right")
    for name in transfers[-1]["ms"]:
        table.add_row(name, *(f"{one['ms'][name]:.3g}" for one in transfers))
    return table


def _small_table(small: list[Result]) -> Table:
    table = Table("us per small task", title=f"{WORKERS} workers")
    for name in small[0]["us"]:
        table.add_column(name, justify="right")
    for one in small:
        what = f"{one['tasks']}, {one['chunks']}, {one['method']}"
        table.add_row(what, *(f"{us:.3g}" for us in one["us"].values()))
    return table


def _shared_table(shared: dict[str, Result]) -> Table:
    table = Table("times its size", title=f"memory for one array that {SHARERS} workers use")
    for name in ("all (PSS)", "shared (PSS)"):
        table.add_column(name, justify="right")
    for name, one in shared.items():
        table.add_row(name, f"{one['pss']:.3f}", f"{one['pss_shmem']:.3f}")
    return table
