"""What an allocation costs: beside its peers, with two processes, and among many free spans."""

from __future__ import annotations

import ctypes
import importlib
import os
import random
import shutil
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from multiprocessing.heap import BufferWrapper
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

from bench_common import (
    GIB,
    KIB,
    MIB,
    Calls,
    Case,
    Result,
    Row,
    console,
    figure_axes,
    measure,
    new_loop,
    one_cpu,
    progress,
    ratio,
    show_rows,
    size_text,
    together,
    workers,
)
from rich.table import Table

import shmheap

SIZES = (64, KIB, 4 * KIB, 64 * KIB, MIB)
PAGE = 8 * KIB
ROOT = Path(__file__).resolve().parents[2]


class Alloc:
    """The command `alloc`."""

    summary = "cost of alloc and drop: beside peers, two processes, many free spans"

    def run(self, *, quick: bool) -> Result:
        """Measure everything; about two minutes, `quick` some seconds."""
        peers = measure_peers(rounds=5 if quick else 41, slice_ms=1 if quick else 5)
        scaling = measure_scaling(rounds=3 if quick else 25, window_ms=5 if quick else 40)
        counts = (10, 100) if quick else (10, 100, 1_000, 10_000, 100_000)
        spans = measure_free_spans(counts, rounds=5 if quick else 41, slice_ms=1 if quick else 4)
        pages = measure_pages_in_c(100 if quick else 1_000_000)
        rows = [row.as_json() for row in _rows(peers, scaling, spans, pages)]
        return {
            "peers": peers,
            "scaling": scaling,
            "free_spans": spans,
            "free_spans_c": pages,
            "rows": rows,
        }

    def show(self, result: Result) -> None:
        """Print tables."""
        console().print(_peer_table(result["peers"]))
        _show_part("two processes", result["scaling"], _scaling_table)
        console().print(_span_table(result["free_spans"]))
        _show_part("the page heap in C", result["free_spans_c"], _page_table)
        show_rows(result["rows"])

    def plot(self, result: Result, file: Path) -> None:
        """Draw cost over the number of free spans."""
        figure, axes = figure_axes()
        for probe, points in result["free_spans"].items():
            spans = [point["free_spans"] for point in points]
            axes.plot(spans, [point["ns"] for point in points], marker="o", label=probe)
        runs = result["free_spans_c"].get("runs", [])
        counts = [run["free_spans"] for run in runs]
        axes.plot(counts, [run["take_give_ns"] for run in runs], marker="s", label="page heap in C")
        axes.set(xscale="log", xlabel="free spans", ylabel="ns per alloc and drop", ylim=(0, None))
        axes.legend()
        figure.savefig(file, dpi=120)


def _show_part(what: str, found: Result, table: Callable[[Result], Table]) -> None:
    if "skipped" in found:
        console().print(f"{what}: skipped, {found['skipped']}")
    else:
        console().print(table(found))


def _rows(peers: Result, scaling: Result, spans: Result, pages: Result) -> Iterator[Row]:
    small, large = peers["64"]["ratios"], peers["65536"]["ratios"]
    yield Row("alloc(64) / bytearray(64)", small["shmheap / bytearray"], 1.3, 0.8)
    if "shmheap dirty / numpy.empty" in large:
        what = "alloc(65536, zero=False) / numpy.empty(8192)"
        yield Row(what, large["shmheap dirty / numpy.empty"], 2.0, 1.0)
    faster = 1 / small["shmheap / multiprocessing.heap"]
    yield Row("multiprocessing.heap / alloc, 64 B", faster, 20, 50, at_least=True)
    if "skipped" not in scaling:
        what = "scaling to two processes / that of bytearray, 64 B"
        yield Row(what, scaling["quotient"], 0.9, 1.0, at_least=True)
        yield Row(f"{what}, by CPU time", scaling["quotient_cpu"], at_least=True)
    most = max(points[-1]["free_spans"] for points in spans.values())
    for probe, points in spans.items():
        yield Row(f"{most:,} free spans / 10: {probe}", points[-1]["ratio"], 1.3, 1.0)
    if "runs" in pages:
        first, last = pages["runs"][0], pages["runs"][-1]
        what = f"{last['free_spans']:,} free spans / 10: page heap in C"
        yield Row(what, last["take_give_ns"] / first["take_give_ns"], 1.3, 1.0)
        yield Row(f"{what}, any page", last["replace_ns"] / first["replace_ns"])


@contextmanager
def scratch_heap(capacity: int) -> Iterator[shmheap.Heap]:
    """Make a heap that is gone afterwards."""
    with shmheap.Heap.create(capacity=capacity) as heap:
        try:
            yield heap
        finally:
            heap.unlink()


# --------------------------------------------------------------------------------------------------
# Beside the peers


def measure_peers(rounds: int, slice_ms: float) -> Result:
    """Alloc and drop of each size by each candidate, in turns, in one process on one CPU."""
    found: Result = {}
    with ExitStack() as stack:
        stack.enter_context(one_cpu())
        heap = stack.enter_context(scratch_heap(GIB))
        loan = stack.enter_context(_iceoryx_loan())
        for size in progress(SIZES, "beside peers"):
            cases = _candidates(heap, loan, size)
            measure(cases, rounds, slice_ms)
            found[str(size)] = {
                "ns": {case.name: statistics.median(case.ns) for case in cases},
                "best_ns": {case.name: min(case.ns) for case in cases},
                "ratios": _ratios(cases),
            }
    return found


def _candidates(heap: shmheap.Heap, loan: Callable[..., object] | None, size: int) -> list[Case]:
    cases = [
        Case("shmheap", heap.alloc, size),
        Case("bytearray", bytearray, size),
        Case("shmheap dirty", heap.alloc, size, new_loop(dirty=True)),
    ]
    try:
        import numpy
    except ImportError:
        pass
    else:
        cases.append(Case("numpy.empty", numpy.empty, size // 8))
    cases.append(Case("multiprocessing.heap", BufferWrapper, size))
    cases.append(Case("SharedMemory", _shared_memory, size))
    if loan is not None:
        cases.append(Case("iceoryx2 loan", loan, size))
    return cases


def _ratios(cases: list[Case]) -> dict[str, float]:
    ours = [case for case in cases if case.name.startswith("shmheap")]
    peers = [case for case in cases if case not in ours]
    return {f"{a.name} / {b.name}": ratio(a.ns, b.ns) for a in ours for b in peers}


def _shared_memory(nbytes: int) -> None:
    block = SharedMemory(create=True, size=nbytes)
    block.close()
    block.unlink()


@contextmanager
def _iceoryx_loan() -> Iterator[Callable[..., object] | None]:
    """Give the function that borrows a slice of n bytes to write; None: not installed."""
    try:
        iceoryx2 = importlib.import_module("iceoryx2")
    except ImportError:
        yield None
        return
    iceoryx2.set_log_level(iceoryx2.LogLevel.Error)
    node = iceoryx2.NodeBuilder.new().create(iceoryx2.ServiceType.Ipc)
    name = iceoryx2.ServiceName.new(f"shmheap-bench-{os.getpid()}")
    pattern = node.service_builder(name).publish_subscribe(iceoryx2.Slice[ctypes.c_uint8])
    service = pattern.create()
    publisher = service.publisher_builder().initial_max_slice_len(max(SIZES)).create()
    yield publisher.loan_slice_uninit
    for made in (publisher, service, node):
        if hasattr(made, "delete"):
            made.delete()


def _peer_table(peers: Result) -> Table:
    table = Table("ns per alloc and drop", title="one pinned process, median (best)")
    names = list(next(iter(peers.values()))["ns"])
    for size in peers:
        table.add_column(size_text(int(size)), justify="right")
    for name in names:
        figures = [f"{p['ns'][name]:,.0f} ({p['best_ns'][name]:,.0f})" for p in peers.values()]
        table.add_row(name, *figures)
    table.add_section()
    for name in next(iter(peers.values()))["ratios"]:
        table.add_row(name, *(f"{p['ratios'][name]:.2f}" for p in peers.values()))
    return table


# --------------------------------------------------------------------------------------------------
# Two processes in one heap


def measure_scaling(rounds: int, window_ms: int) -> Result:
    """Throughput of two pinned processes over that of one, for shmheap and for bytearray.

    Both processes work through the same window of time; each is alone in turns. `wall` is calls
    per second of the clock on the wall. `cpu` is calls per second of CPU time: it leaves out what
    other processes of the machine took, and waiting too, so `blocked` counts how often a process
    gave up the CPU of its own accord.
    """
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) < 2:
        return {"skipped": "it needs two CPUs"}
    with scratch_heap(GIB) as heap, workers(cpus[:2], [(_both, (heap,))] * 2) as ends:
        found = together(ends, ("shmheap", "bytearray"), rounds, window_ms)
    ratios = {name: one.pop("ratios") for name, one in found.items()}
    quotients = {
        clock: 1 / ratio(ratios["bytearray"][clock], ratios["shmheap"][clock])
        for clock in ("wall", "cpu")
    }
    return {
        "quotient": quotients["wall"],
        "quotient_cpu": quotients["cpu"],
        "blocked": found["shmheap"]["blocked"],
        **found,
    }


@contextmanager
def _both(heap: shmheap.Heap) -> Iterator[Calls]:
    with heap:
        yield {
            "shmheap": (heap.alloc, 64, new_loop()),
            "bytearray": (bytearray, 64, new_loop()),
        }


def _scaling_table(scaling: Result) -> Table:
    table = Table("64 B, two pinned processes / one", title="scaling")
    table.add_column("by the wall clock", justify="right")
    table.add_column("by CPU time", justify="right")
    for name in ("shmheap", "bytearray"):
        table.add_row(name, f"{scaling[name]['wall']:.3f}", f"{scaling[name]['cpu']:.3f}")
    table.add_row("quotient", f"{scaling['quotient']:.3f}", f"{scaling['quotient_cpu']:.3f}")
    table.caption = f"two processes of shmheap blocked {scaling['blocked']} times"
    return table


# --------------------------------------------------------------------------------------------------
# Among many free spans

BURST_BYTES = 240
"""A class whose spans are one page, other than the one that makes the free spans."""

SPAN_BLOCK_BYTES = 256
SPAN_BLOCKS = PAGE // SPAN_BLOCK_BYTES


def measure_free_spans(counts: tuple[int, ...], rounds: int, slice_ms: float) -> Result:
    """Cost in heaps that have so many free spans of one page, every other page in use.

    The heaps are there together and take turns. Probes: a small block, a burst that goes through
    more than one page of its class and so through the page heap, and a large block.
    """
    with ExitStack() as stack:
        stack.enter_context(one_cpu())
        heaps = []
        for count in progress(counts, "free spans"):
            heap = stack.enter_context(scratch_heap((2 * count + 1000) * PAGE + 64 * MIB))
            stack.enter_context(_every_other_span_free(heap, count))
            heaps.append(heap)
        probes: dict[str, Callable[[shmheap.Heap], Case]] = {
            "64 B": lambda heap: Case("64 B", heap.alloc, 64),
            "3 pages of 240 B": lambda heap: Case("burst", partial(_burst, heap.alloc), 100),
            "80 KiB": lambda heap: Case("80 KiB", heap.alloc, 80 * KIB, new_loop(dirty=True)),
        }
        return {
            name: _points(counts, [make(heap) for heap in heaps], rounds, slice_ms)
            for name, make in probes.items()
        }


def _burst(alloc: Callable[[int], object], times: int) -> None:
    [alloc(BURST_BYTES) for _ in range(times)]


def _points(counts: tuple[int, ...], cases: list[Case], rounds: int, slice_ms: float) -> list[Any]:
    measure(cases, rounds, slice_ms)
    return [
        {
            "free_spans": count,
            "ns": statistics.median(case.ns) / (case.n if case.name == "burst" else 1),
            "ratio": ratio(case.ns, cases[0].ns),
        }
        for count, case in zip(counts, cases, strict=True)
    ]


@contextmanager
def _every_other_span_free(heap: shmheap.Heap, count: int) -> Iterator[None]:
    """Fill 2 * count pages with small blocks and drop those of every other page, in any order."""
    pages: dict[int, list[shmheap.Block]] = {}
    for _ in range(2 * count * SPAN_BLOCKS):
        block = heap.alloc(SPAN_BLOCK_BYTES, zero=False)
        pages.setdefault(block.offset // PAGE, []).append(block)
    order = sorted(pages)[1::2]
    random.Random(1).shuffle(order)
    del block
    for page in order:
        del pages[page]
    yield
    pages.clear()


def _span_table(spans: Result) -> Table:
    counts = [point["free_spans"] for point in next(iter(spans.values()))]
    table = Table("ns (ratio to the first)", title="cost among free spans, every other page in use")
    for count in counts:
        table.add_column(f"{count:,}", justify="right")
    for name, points in spans.items():
        table.add_row(name, *(f"{p['ns']:,.0f} ({p['ratio']:.2f})" for p in points))
    return table


# --------------------------------------------------------------------------------------------------
# The page heap alone, in C


def measure_pages_in_c(most: int) -> Result:
    """Build and run tests/c/bench_pages.c on the source tree this file lies in."""
    source, core = ROOT / "tests" / "c" / "bench_pages.c", ROOT / "shmheap" / "csrc"
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None or not source.exists() or not core.exists():
        return {"skipped": "it needs a C compiler and the source tree"}
    files = [str(file) for file in sorted(core.glob("*.c"))]
    flags = ["-std=c11", "-O2", "-D_GNU_SOURCE", "-pthread", "-Wl,--wrap=sh_os_commit"]
    with tempfile.TemporaryDirectory() as folder:
        program = str(Path(folder, "bench_pages"))
        build = [compiler, *flags, "-I", str(core), str(source), *files, "-o", program]
        subprocess.run(build, check=True)
        done = subprocess.run([program, str(most)], check=True, capture_output=True, text=True)
    lines = [line.split() for line in done.stdout.splitlines()]
    names = ("take_give_ns", "replace_ns")
    return {
        "runs": [
            {"free_spans": int(spans), **dict(zip(names, map(float, costs), strict=True))}
            for spans, *costs in lines
        ]
    }


def _page_table(pages: Result) -> Table:
    table, runs = Table("ns", title="the page heap in C, committing stubbed"), pages["runs"]
    for run in runs:
        table.add_column(f"{run['free_spans']:,}", justify="right")
    table.add_row("take a page, give it back", *(f"{run['take_give_ns']:.0f}" for run in runs))
    table.add_row("give any page, take one", *(f"{run['replace_ns']:.0f}" for run in runs))
    return table
