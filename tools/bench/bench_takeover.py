"""How long a heap is without a coordinator: from its SIGKILL until a successor answers."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import repeat
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "soak"))

from bench_common import Result, Row, console, figure_axes, progress, show_rows
from rich.table import Table
from soak_board import open_schedstat, run_delay_ns, waited_ns

import shmheap
from shmheap._core import Observer, Steward
from shmheap.coordinator import ASK_SCAVENGE_AGED

PAGE = 8 << 10
MS = 1e6
PATIENCE_S = 60.0
ROOT = Path(__file__).resolve().parents[2]
STARTS = {
    "python": ["-c", "pass"],
    "python and what a coordinator imports": ["-c", "import shmheap.cli.run"],
}
WORK = """
import json, os, sys, time
sys.path.insert(0, sys.argv[2])
import bench_takeover
bench_takeover.work(sys.argv[1])
"""


class Takeover:
    """The command `takeover`."""

    summary = "from a coordinator's SIGKILL until its successor answers, and who waits meanwhile"

    def run(self, *, quick: bool) -> Result:
        """Measure everything; about a minute, `quick` some seconds."""
        counts = (1_000,) if quick else (1_000, 10_000, 100_000)
        rounds = 5 if quick else 100
        starts = {name: measure_start(args, 3 if quick else 31) for name, args in STARTS.items()}
        takeovers = [measure_takeover(count, rounds) for count in counts]
        begin = measure_begin_in_c(10_000 if quick else 1_000_000)
        rows = [row.as_json() for row in _rows(takeovers, starts)]
        return {"starts_ms": starts, "takeovers": takeovers, "begin_in_c": begin, "rows": rows}

    def show(self, result: Result) -> None:
        """Print tables."""
        console().print(_takeover_table(result["takeovers"]))
        table = Table("start of", "ms, median", title="of which Python's start")
        for name, ms in result["starts_ms"].items():
            table.add_row(name, f"{ms:.1f}")
        console().print(table)
        if "skipped" in result["begin_in_c"]:
            console().print(f"sh_begin in C: skipped, {result['begin_in_c']['skipped']}")
        else:
            console().print(_begin_table(result["begin_in_c"]["runs"]))
        show_rows(result["rows"])

    def plot(self, result: Result, file: Path) -> None:
        """Draw p50 and p99 over the number of spans."""
        figure, axes = figure_axes()
        spans = [found["spans"] for found in result["takeovers"]]
        for name in ("p50", "p99"):
            axes.plot(
                spans, [f["answered_ms"][name] for f in result["takeovers"]], "o-", label=name
            )
        axes.set(xscale="log", xlabel="spans", ylabel="ms until the successor answers")
        axes.legend()
        figure.savefig(file, dpi=120)


def _rows(takeovers: Sequence[Result], starts: Result) -> Iterator[Row]:
    for found in takeovers:
        most = found["spans"] == 100_000
        must, aim = (250.0, 150.0) if most else (None, 150.0)
        what = f"takeover, {found['spans']:,} spans, p99"
        yield Row(what, found["answered_ms"]["p99"], must, aim, unit="ms")
        what = f"a worker's longest wait meanwhile, {found['spans']:,} spans"
        yield Row(what, found["worker"]["longest_ms"], 100.0, unit="ms")
    yield Row("of which Python's start", starts["python"], unit="ms")


def quantiles(values: Sequence[float]) -> Result:
    """p50, p99 (one of the values; the largest if there are fewer than 100) and the largest."""
    ordered = sorted(values)
    at = min(len(ordered) - 1, -(-99 * len(ordered) // 100) - 1)
    return {"p50": statistics.median(ordered), "p99": ordered[at], "max": ordered[-1]}


# --------------------------------------------------------------------------------------------------
# The takeover


def measure_takeover(count: int, rounds: int) -> Result:
    """Kill the coordinator `rounds` times among `count` spans, every other one free."""
    capacity = (count + 4096) * PAGE + (64 << 20)
    config = shmheap.Config(forced_gc_s=3600.0, scavenge_after_s=3600.0, gc_percent=-1)
    with shmheap.Heap.create(capacity=capacity, config=config) as heap:
        kept = make_spans(heap, count)
        with _worker(heap) as worker:
            steps = progress(range(rounds), f"takeover, {count:,} spans")
            found = [_one_takeover(heap) for _ in steps]
            asleep = [_one_asleep(heap) for _ in range(max(3, rounds // 10))]
        begin_ms = statistics.median(_begin_ms(heap) for _ in range(5))
        kept.clear()
        heap.unlink()
    serving, answered, cpu = zip(*found, strict=True)
    return {
        "spans": count,
        "rounds": rounds,
        "holds_ms": quantiles(serving),
        "answered_ms": quantiles(answered),
        "asked_before_it_was_dead_ms": quantiles(asleep),
        "begin_ms": begin_ms,
        "cpu_ms": statistics.median(cpu),
        "worker": worker,
    }


def make_spans(heap: shmheap.Heap, count: int) -> list[shmheap.Block]:
    """Fill `count` spans of one page and drop every other one; returns those that stay."""
    nbytes = PAGE - 64
    blocks = [heap.alloc(nbytes, zero=False) for _ in repeat(None, count)]
    return blocks[::2]


def _kill(heap: shmheap.Heap, observer: Observer) -> tuple[int, int]:
    """SIGKILL the coordinator that serves; returns a pidfd of it, and when, ns."""
    heap.scavenge(timeout=PATIENCE_S)
    pidfd = os.pidfd_open(observer.header()["coordinator_pid"])
    from_ns = time.monotonic_ns()
    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    return pidfd, from_ns


def _one_takeover(heap: shmheap.Heap) -> tuple[float, float, float]:
    """From SIGKILL until the next one holds the heap, until it answers, and its CPU time; ms."""
    observer = Observer(heap._fileno())
    pidfd, from_ns = _kill(heap, observer)
    select.select([pidfd], [], [], PATIENCE_S)
    os.close(pidfd)
    ticket = heap._request(ASK_SCAVENGE_AGED)
    holds_ns = 0
    while heap._await(ASK_SCAVENGE_AGED, ticket, 0.001) is None:
        if not holds_ns and observer.header()["coordinator_alive"]:
            holds_ns = time.monotonic_ns()
        if time.monotonic_ns() - from_ns > PATIENCE_S * 1e9:
            raise TimeoutError("no successor answers")
    answered_ns = time.monotonic_ns()
    cpu_ms = _cpu_ms(observer.header()["coordinator_pid"])
    return ((holds_ns or answered_ns) - from_ns) / MS, (answered_ns - from_ns) / MS, cpu_ms


def _one_asleep(heap: shmheap.Heap) -> float:
    """The same where the question is asked before the coordinator is dead: nobody tells us, ms."""
    observer = Observer(heap._fileno())
    pidfd, from_ns = _kill(heap, observer)
    os.close(pidfd)
    heap.scavenge(timeout=PATIENCE_S)
    return (time.monotonic_ns() - from_ns) / MS


def _cpu_ms(pid: int) -> float:
    with open(f"/proc/{pid}/schedstat") as file:
        return int(file.read().split()[0]) / MS


def _begin_ms(heap: shmheap.Heap) -> float:
    """What taking over costs without a process's start: Steward and begin, ms of CPU time."""
    while True:
        pidfd, _ = _kill(heap, Observer(heap._fileno()))
        select.select([pidfd], [], [], PATIENCE_S)
        os.close(pidfd)
        with suppress(BlockingIOError):  # a successor that somebody started before, and came late
            steward = Steward(heap._fileno())
            break
    from_ns = time.thread_time_ns()
    steward.begin()
    took_ms = (time.thread_time_ns() - from_ns) / MS
    steward.close()
    return took_ms


def measure_start(args: list[str], rounds: int) -> float:
    """Median of what it takes to run an interpreter, ms."""
    took = []
    for _ in range(rounds):
        from_ns = time.monotonic_ns()
        subprocess.run([sys.executable, "-P", *args], check=True)
        took.append((time.monotonic_ns() - from_ns) / MS)
    return statistics.median(took)


# --------------------------------------------------------------------------------------------------
# Who works meanwhile


@contextmanager
def _worker(heap: shmheap.Heap) -> Iterator[Result]:
    """A process that uses the heap all the while; its figures are there when it has ended."""
    figures: Result = {}
    argv = [sys.executable, "-P", "-c", WORK, heap._path, str(Path(__file__).parent)]
    with subprocess.Popen(
        argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.readline()
        try:
            yield figures
        finally:
            process.stdin.close()
            figures.update(json.loads(process.stdout.readline() or "{}"))


def work(path: str) -> None:
    """Allocate, free, lease and name until standard input ends; print the longest wait."""
    heap = shmheap.Heap._attach_path(path, "takeover")
    print("ready", flush=True)
    fd = open_schedstat("self")
    operations: dict[str, Callable[[], object]] = {
        "small": lambda: heap.alloc(500),
        "refill": lambda: [heap.alloc(4096) for _ in repeat(None, 20)],
        "large": lambda: heap.alloc(1 << 18),
        "lease": lambda: heap.put(b"x").lease().release(),
        "root": lambda: heap.roots.update(name=heap.put(b"x")),
    }
    longest = dict.fromkeys(operations, 0)
    n = 0
    os.set_blocking(0, False)
    while os.read(0, 1) if select.select([0], [], [], 0)[0] else True:
        for name, operation in operations.items():
            delay_ns, since_ns = run_delay_ns(fd), time.monotonic_ns()
            operation()
            now_ns = time.monotonic_ns()
            wait_ns = waited_ns(since_ns, now_ns, delay_ns, run_delay_ns(fd))
            longest[name] = max(longest[name], wait_ns)
            n += 1
        time.sleep(0.0005)  # it is not to take the CPU from who is being measured
    by = {name: ns / MS for name, ns in longest.items()}
    print(json.dumps({"longest_ms": max(by.values()), "by": by, "operations": n}), flush=True)


# --------------------------------------------------------------------------------------------------
# sh_begin alone, in C


def measure_begin_in_c(most: int) -> Result:
    """Build and run tests/c/bench_begin.c on the source tree this file lies in."""
    source, core = ROOT / "tests" / "c" / "bench_begin.c", ROOT / "shmheap" / "csrc"
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None or not source.exists() or not core.exists():
        return {"skipped": "it needs a C compiler and the source tree"}
    files = [str(file) for file in sorted(core.glob("*.c"))]
    flags = ["-std=c11", "-O2", "-D_GNU_SOURCE", "-pthread", "-Wl,--wrap=sh_os_commit"]
    with tempfile.TemporaryDirectory() as folder:
        program = str(Path(folder, "bench_begin"))
        build = [compiler, *flags, "-I", str(core), str(source), *files, "-o", program]
        subprocess.run(build, check=True)
        done = subprocess.run([program, str(most)], check=True, capture_output=True, text=True)
    runs = [line.split() for line in done.stdout.splitlines()]
    return {
        "runs": [
            {"spans": int(spans), "begin_us": float(begin), "reap_us": float(reap)}
            for spans, begin, reap in runs
        ]
    }


def _takeover_table(takeovers: Sequence[Result]) -> Table:
    table = Table("ms", title="a coordinator is killed")
    for found in takeovers:
        table.add_column(f"{found['spans']:,} spans", justify="right")
    for what, key in (
        ("until a successor holds the heap", "holds_ms"),
        ("until it answers", "answered_ms"),
        ("the same, asked before it was dead", "asked_before_it_was_dead_ms"),
    ):
        for name in ("p50", "p99", "max"):
            table.add_row(f"{what}, {name}", *(f"{f[key][name]:.1f}" for f in takeovers))
    table.add_row("of it the walk (begin)", *(f"{f['begin_ms']:.2f}" for f in takeovers))
    table.add_row("its CPU time until it answered", *(f"{f['cpu_ms']:.1f}" for f in takeovers))
    table.add_row(
        "a worker's longest wait meanwhile",
        *(f"{f['worker']['longest_ms']:.1f}" for f in takeovers),
    )
    return table


def _begin_table(runs: Sequence[Result]) -> Table:
    table = Table("us of CPU time", title="the walk in C")
    for run in runs:
        table.add_column(f"{run['spans']:,} spans", justify="right")
    table.add_row("sh_begin", *(f"{run['begin_us']:,.0f}" for run in runs))
    table.add_row("sh_reap of one who had none", *(f"{run['reap_us']:,.0f}" for run in runs))
    return table
