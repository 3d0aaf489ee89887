"""What an array costs that NumPy makes in a heap, beside the same array elsewhere."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from contextvars import Context, copy_context
from pathlib import Path
from typing import Any

from bench_common import (
    GIB,
    KIB,
    MIB,
    Case,
    Loop,
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
)
from rich.table import Table

import shmheap

SIZES = (8, KIB, 16 * KIB, 64 * KIB, MIB, 16 * MIB, 256 * MIB)
OWN, INSIDE, MADE = "numpy.empty", "in the block", "heap.empty"


class Arrays:
    """The command `arrays`."""

    summary = "cost of an array that NumPy makes in the allocator's block, and of heap.empty"

    def run(self, *, quick: bool) -> Result:
        """Measure everything; half a minute, `quick` some seconds."""
        rounds, slice_ms = (3, 0.5) if quick else (41, 4)
        sizes = SIZES[:-1] if quick else SIZES
        with ExitStack() as stack:
            stack.enter_context(one_cpu())
            heap = stack.enter_context(shmheap.Heap.create(capacity=GIB))
            inside = _context_of(heap)
            arrays = {
                str(nbytes): measure_size(nbytes, heap, inside, rounds, slice_ms)
                for nbytes in progress(sizes, "arrays")
            }
        return {"arrays": arrays, "rows": [row.as_json() for row in _rows(arrays)]}

    def show(self, result: Result) -> None:
        """Print tables."""
        table = Table("bytes", title="ns to make an array and drop it")
        for name in (OWN, INSIDE, MADE):
            table.add_column(name, justify="right")
        for nbytes, found in result["arrays"].items():
            table.add_row(size_text(int(nbytes)), *(f"{ns:,.0f}" for ns in found["ns"].values()))
        console().print(table)
        show_rows(result["rows"])

    def plot(self, result: Result, file: Path) -> None:
        """Draw cost over size."""
        figure, axes = figure_axes()
        for name in (OWN, INSIDE, MADE):
            points = [found["ns"][name] for found in result["arrays"].values()]
            axes.plot([int(nbytes) for nbytes in result["arrays"]], points, marker="o", label=name)
        axes.set(xscale="log", yscale="log", xlabel="bytes", ylabel="ns to make and drop")
        axes.legend()
        figure.savefig(file, dpi=120)


def _rows(arrays: Result) -> Iterator[Row]:
    for nbytes in (8, KIB, 16 * KIB):
        what = f"{size_text(nbytes)}, too small for the heap: in the block / outside"
        yield Row(what, arrays[str(nbytes)]["ratio"], 1.1, 1.0)
    largest = max(arrays, key=int)
    us = arrays[largest]["ns"][INSIDE] / 1000
    yield Row(f"{size_text(int(largest))} in the block, committed", us, 50, 10, unit="us")


def _context_of(heap: shmheap.Heap) -> Context:
    """A context in which the allocator is in force."""
    from shmheap.plugins.numpy import allocator

    with allocator(heap):
        return copy_context()


def measure_size(
    nbytes: int, heap: shmheap.Heap, inside: Context, rounds: int, slice_ms: float
) -> Result:
    """Make arrays of so many bytes and drop them, in turns."""
    import numpy

    def loop_inside(call: Callable[..., object], n: Any, times: int) -> None:
        inside.run(own_loop, call, n, times)

    own_loop: Loop = new_loop()
    cases = [
        Case(OWN, numpy.empty, max(nbytes // 8, 1)),
        Case(INSIDE, numpy.empty, max(nbytes // 8, 1), loop_inside),
        Case(MADE, heap.empty, max(nbytes // 8, 1)),
    ]
    measure(cases, rounds, slice_ms)
    return {
        "ns": {case.name: statistics.median(case.ns) for case in cases},
        "ratio": ratio(cases[1].ns, cases[0].ns),
    }
