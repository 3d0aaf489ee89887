"""What a collection costs: marking, sweeping, who waits for it, and the barrier off and on."""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bench_common import Result, Row, console, figure_axes, one_cpu, progress, show_rows
from bench_lock import compare, coprocess, instructions
from rich.table import Table

ROOT = Path(__file__).resolve().parents[2]
CORE = ROOT / "shmheap" / "csrc"
SOURCE = ROOT / "tests" / "c" / "bench_gc.c"
PEER = Path(__file__).with_name("gc_peer.go")
SIZES = (10_000, 100_000, 1_000_000, 10_000_000)
"""Blocks in a graph."""

SHAPES = ("graph", "tree")
STEPS = ("clear_ns", "mark_ns", "finish_ns", "sweep_ns", "stamp_ns")
WAITS = ("p50_ns", "p99_ns", "p9999_ns", "max_ns")
STORES = (
    "store a reference",
    "alloc and drop of 64 B",
    "store a reference, while marking",
    "alloc and drop of 64 B, while marking",
)
"""What bench_gc prints, in its order."""


class Gc:
    """The command `gc`."""

    summary = "marking and sweeping, who waits for a collection, what the barrier costs"

    def run(self, *, quick: bool) -> Result:
        """Build and measure; some minutes and 4 GiB of memory, `quick` some seconds."""
        compiler = shutil.which(os.environ.get("CC", "cc"))
        if compiler is None or not CORE.exists():
            return {"skipped": "it needs a C compiler and the source tree", "rows": []}
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            flags = ["-O0"] if quick else ["-O2", "-flto=auto"]  # else as the wheel has it
            whole, without = _build(folder, compiler, flags)
            peer = _build_peer(folder)
            sizes, rounds = (SIZES[:1], 3) if quick else (SIZES, 7)
            jobs = [(shape, n) for shape in SHAPES for n in sizes]
            cycles = [
                measure_cycles(whole, peer, shape, n, rounds)
                for shape, n in progress(jobs, "graphs")
            ]
            waits = measure_waits(whole, sizes[-1] if quick else 1_000_000, 3 if quick else 15)
            with one_cpu():
                barrier = measure_barrier(whole, without, 3 if quick else 301)
            counted = {} if quick else count_instructions(whole, without)
        found = {"cycles": cycles, "waits": waits, "barrier": barrier, "instructions": counted}
        return found | {"rows": [row.as_json() for row in _rows(found)]}

    def show(self, result: Result) -> None:
        """Print tables."""
        if "skipped" in result:
            console().print(f"skipped, {result['skipped']}")
            return
        console().print(_cycle_table(result["cycles"]))
        console().print(_wait_table(result["waits"]))
        console().print(_barrier_table(result["barrier"], result["instructions"]))
        show_rows(result["rows"])

    def plot(self, result: Result, file: Path) -> None:
        """Draw blocks marked per second over the size of the graph."""
        figure, axes = figure_axes()
        for shape in SHAPES:
            found = [one for one in result.get("cycles", ()) if one["shape"] == shape]
            sizes = [one["blocks"] for one in found]
            axes.plot(sizes, [one["marked_per_s"] for one in found], "o-", label=shape)
            if any(one["go"] for one in found):
                axes.plot(sizes, [one["go"]["marked_per_s"] for one in found], "x--", label="Go")
        axes.set(xscale="log", yscale="log", xlabel="blocks", ylabel="marked per second, one core")
        axes.legend()
        figure.savefig(file, dpi=120)


def _rows(found: Result) -> Iterator[Row]:
    for one in found["cycles"]:
        what = f"{one['shape']} of {one['blocks']:,}"
        rate = one["marked_per_s"] / 1e6
        yield Row(f"marking a {what}", rate, 5, 20, at_least=True, unit="million/s")
        if one["go"]:
            times = one["marked_per_s"] / one["go"]["marked_per_s"]
            yield Row(f"marking a {what} / Go", times, None, 1, at_least=True)
    idle, cycle = (found["waits"][key]["p9999_ns"] for key in ("idle", "cycle"))
    yield Row(
        "an alloc's wait for a collection, p99.99", (cycle - idle) / 1e3, 1000, 100, unit="us"
    )
    store = found["barrier"][STORES[0]]
    yield Row("barrier, of a store without collection", 100 * store["share"], 5, 1, unit="%")
    marking = found["barrier"][STORES[2]]
    yield Row("barrier, of a store while marking", 100 * marking["share"], unit="%")


# --------------------------------------------------------------------------------------------------
# Building


def _build(folder: Path, compiler: str, flags: Sequence[str]) -> tuple[Path, Path]:
    """Compile the C benchmark as it is, and without the barrier. Raises CalledProcessError."""
    common = ["-std=c11", "-D_GNU_SOURCE", "-DNDEBUG", "-pthread", f"-I{CORE}", *flags]
    files = [str(SOURCE), *map(str, sorted(CORE.glob("*.c")))]

    def compile_one(name: str, *options: str) -> Path:
        program = folder / name
        subprocess.run([compiler, *common, *options, *files, "-o", str(program)], check=True)
        return program

    with ThreadPoolExecutor() as pool:
        without = pool.submit(compile_one, "without", "-DSH_NO_BARRIER")
        return compile_one("whole"), without.result()


def _build_peer(folder: Path) -> Path | None:
    """Compile the same graph for Go's collector; None where Go is not installed."""
    go = shutil.which("go")
    if go is None:
        return None
    environment = {**os.environ, "GOCACHE": str(folder / "go"), "GOTOOLCHAIN": "local"}
    program = folder / "gc_peer"
    subprocess.run([go, "build", "-o", str(program), str(PEER)], check=True, env=environment)
    return program


# --------------------------------------------------------------------------------------------------
# Measuring


def _lines(command: Sequence[object], **environment: str) -> list[list[int]]:
    done = subprocess.run(
        [str(word) for word in command],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )
    return [[int(word) for word in line.split()] for line in done.stdout.splitlines()]


def measure_cycles(whole: Path, peer: Path | None, shape: str, blocks: int, rounds: int) -> Result:
    """Collect a graph that is all in use, and then all garbage; medians, and Go's beside."""
    *alive, (_, swept, *dead) = _lines([whole, shape, blocks, rounds])
    marked = alive[0][0]
    steps = dict(
        zip(STEPS, map(statistics.median, list(zip(*alive, strict=True))[2:]), strict=True)
    )
    walked_ns, freed_ns = steps["sweep_ns"], dead[STEPS.index("sweep_ns")]
    return {
        "shape": shape,
        "blocks": blocks,
        **steps,
        "cycle_ns": sum(steps.values()),
        "marked_per_s": marked / steps["mark_ns"] * 1e9,
        "swept_in_use_per_s": marked / walked_ns * 1e9,
        "swept_garbage_per_s": swept / freed_ns * 1e9,
        "go": _measure_peer(peer, shape, blocks, rounds) if peer else {},
    }


def _measure_peer(peer: Path, shape: str, blocks: int, rounds: int) -> Result:
    """Go's whole collection, which is marking but for a little: it sweeps later."""
    turns = _lines([peer, shape, blocks, rounds], GOMAXPROCS="1", GOGC="off")
    cycle_ns = statistics.median(cpu_ns for cpu_ns, _ in turns)
    return {"cycle_ns": cycle_ns, "marked_per_s": blocks / cycle_ns * 1e9}


def measure_waits(whole: Path, blocks: int, rounds: int) -> Result:
    """Time each alloc of another process, with a cycle and without, in turns; medians."""
    lines = _lines([whole, "waits", blocks, rounds])
    return {"blocks": blocks} | {
        key: dict(zip(WAITS, map(statistics.median, zip(*turns, strict=True)), strict=True))
        for key, turns in (("idle", lines[::2]), ("cycle", lines[1::2]))
    }


def measure_barrier(whole: Path, without: Path, rounds: int) -> Result:
    """Let both builds take turns; `share`: how much longer the whole one takes."""
    ours, theirs = (coprocess([str(program), "stores"], None) for program in (whole, without))
    cases = compare(STORES, ours, theirs, rounds)
    for case in cases.values():
        case["share"] = case["difference_ns"] / case["without_ns"]
    return cases


def count_instructions(whole: Path, without: Path) -> Result:
    """Instructions of a store, by valgrind; empty where that is not installed."""
    if shutil.which("valgrind") is None:
        return {}
    counts = [instructions(program, "stores") for program in (whole, without)]
    return {"whole": counts[0], "without": counts[1], "difference": counts[0] - counts[1]}


# --------------------------------------------------------------------------------------------------
# Tables


def _cycle_table(cycles: Sequence[Result]) -> Table:
    table = Table("one core, CPU time", title="a cycle")
    for one in cycles:
        table.add_column(f"{one['shape']} {one['blocks']:,}", justify="right")

    def add(what: str, key: str, scale: float) -> None:
        table.add_row(what, *(f"{one[key] / scale:.3g}" for one in cycles))

    add("marked, million/s", "marked_per_s", 1e6)
    if any(one["go"] for one in cycles):
        rates: list[Any] = [one["go"]["marked_per_s"] / 1e6 for one in cycles]
        table.add_row("the same, Go", *(f"{rate:.3g}" for rate in rates))
    add("swept in use, million/s", "swept_in_use_per_s", 1e6)
    add("swept garbage, million/s", "swept_garbage_per_s", 1e6)
    for key in (*STEPS, "cycle_ns"):
        add(f"{key.removesuffix('_ns')}, ms", key, 1e6)
    return table


def _wait_table(waits: Result) -> Table:
    table = Table("ns of one alloc", title=f"beside a cycle over {waits['blocks']:,} blocks")
    for name in ("p50", "p99", "p99.99", "longest"):
        table.add_column(name, justify="right")
    for key, what in (("idle", "no collection"), ("cycle", "in a collection")):
        table.add_row(what, *(f"{waits[key][name]:,.0f}" for name in WAITS))
    return table


def _barrier_table(barrier: Result, counted: Result) -> Table:
    table = Table("ns of CPU time, median", title="the barrier, one pinned process")
    for name in ("as it is", "without", "difference"):
        table.add_column(name, justify="right")
    for what, case in barrier.items():
        numbers = (case[key] for key in ("whole_ns", "without_ns", "difference_ns"))
        table.add_row(what, *(f"{ns:.2f}" for ns in numbers))
    if counted:
        table.add_row("instructions of a store", *(f"{n:.0f}" for n in counted.values()))
    return table
