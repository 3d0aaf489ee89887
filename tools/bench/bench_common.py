"""What every benchmark shares: who ran it, loops timed in turns, rows against their limits.

Noise is the enemy on a small machine. So candidates take turns in short slices, a ratio is that of
two slices of the same round, and what is reported is the median over rounds. A slice of one process
is timed by its thread's CPU clock, which stands still while another process has the CPU.
"""

from __future__ import annotations

import importlib.metadata
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from itertools import repeat
from multiprocessing.connection import Connection
from pathlib import Path
from types import FunctionType
from typing import Any, Protocol

from rich.console import Console
from rich.progress import track
from rich.table import Table

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
Result = dict[str, Any]
Loop = Callable[[Any, Any, int], None]


class Command(Protocol):
    """A benchmark: `run` returns what --json prints, and the other two draw that.

    One that has further `options` gets them in `run`.
    """

    summary: str

    def run(self, *, quick: bool, **options: Any) -> Result: ...

    def show(self, result: Result) -> None: ...

    def plot(self, result: Result, file: Path) -> None: ...


# --------------------------------------------------------------------------------------------------
# Timing


def _call(f: Callable[..., object], n: int, times: int) -> None:
    for _ in repeat(None, times):
        f(n)


def _call_dirty(f: Callable[..., object], n: int, times: int) -> None:
    for _ in repeat(None, times):
        f(n, zero=False)


def new_loop(*, dirty: bool = False) -> Loop:
    """Make the loop that calls f(n), or f(n, zero=False), and drops what it gets.

    A code object of its own for each candidate: the interpreter specialises a call for what it
    calls there, so candidates that share one spoil each other's.
    """
    source = _call_dirty if dirty else _call
    made: Any = FunctionType(source.__code__.replace(), globals())
    return made  # type: ignore[no-any-return]


@dataclass(slots=True)
class Case:
    """A candidate: `ns` gets its nanoseconds per call, one number per round.

    `call` and `n` are the loop's; `clock` is one that only this candidate drives.
    """

    name: str
    call: Any
    n: Any
    loop: Loop = field(default_factory=new_loop)
    clock: Callable[[], int] = time.thread_time_ns
    times: int = 1
    ns: list[float] = field(default_factory=list)

    def slice_ns(self) -> int:
        """CPU time of `times` calls."""
        start = self.clock()
        self.loop(self.call, self.n, self.times)
        return self.clock() - start

    def calibrate(self, slice_ns: int, first: int = 10) -> None:
        """Choose `times` for a slice of about so long, after the first calls, which are slow."""
        self.loop(self.call, self.n, first)
        while (took := self.slice_ns()) < slice_ns / 2:
            self.times = max(self.times * 2, int(self.times * slice_ns / max(took, 1) / 2))

    def run(self) -> None:
        """Take one turn."""
        self.ns.append(self.slice_ns() / self.times)


def measure(cases: Sequence[Case], rounds: int, slice_ms: float, first: int = 10) -> None:
    """Let the cases take turns, each round starting with another one."""
    for case in cases:
        case.calibrate(int(slice_ms * 1e6), first)
    for i in range(rounds):
        for k in range(len(cases)):
            cases[(i + k) % len(cases)].run()


@contextmanager
def one_cpu() -> Iterator[None]:
    """Stay on one CPU, and what is started meanwhile, too."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Median over rounds of ours / theirs."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def progress(steps: Sequence[Any], what: str) -> Any:
    """Iterate with a bar on standard error, where that is a terminal."""
    console = Console(stderr=True)
    return track(steps, what, console=console, transient=True, disable=not console.is_terminal)


# --------------------------------------------------------------------------------------------------
# Two processes that work through the same window of time

Calls = dict[str, tuple[Any, Any, Loop]]
"""What a process can be told to do: call, n and loop, as a Case has them."""

Work = tuple[Callable[..., AbstractContextManager[Calls]], tuple[Any, ...]]
"""A function and its arguments, both pickled: it is called in the process that works."""


@contextmanager
def workers(cpus: Sequence[int], works: Sequence[Work]) -> Iterator[list[Connection]]:
    """Start a process on each CPU; they end with the context."""
    context = multiprocessing.get_context("spawn")
    ends: list[Connection] = []
    with ExitStack() as stack:
        for cpu, work in zip(cpus, works, strict=True):
            ours, theirs = context.Pipe()
            process = context.Process(target=_worker, args=(theirs, cpu, work))
            process.start()
            stack.callback(process.join)
            stack.callback(ours.send, None)
            theirs.close()
            ends.append(ours)
        for end in ends:
            end.recv()
        yield ends


def _worker(orders: Connection, cpu: int, work: Work) -> None:
    os.sched_setaffinity(0, {cpu})
    make, arguments = work
    with make(*arguments) as calls:
        for call, n, loop in calls.values():
            loop(call, n, 10_000)
        orders.send("ready")
        while (order := orders.recv()) is not None:
            name, start_ns, end_ns = order
            orders.send(_throughput(*calls[name], start_ns, end_ns))


def _throughput(call: Any, n: Any, loop: Loop, start_ns: int, end_ns: int) -> Result:
    while time.monotonic_ns() < start_ns:
        pass
    blocked = resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw
    times, cpu, start, now = 0, time.thread_time_ns(), time.monotonic_ns(), 0
    while now < end_ns:
        loop(call, n, 1000)
        times += 1000
        now = time.monotonic_ns()
    return {
        "wall": times / (now - start) * 1e9,
        "cpu": times / (time.thread_time_ns() - cpu) * 1e9,
        "blocked": resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw - blocked,
    }


def window(ends: Sequence[Connection], name: str, window_ms: int) -> Result:
    """Let these processes do one thing at the same time; sums of what they got done per second."""
    start = time.monotonic_ns() + 2_000_000  # all have the order by then
    for end in ends:
        end.send((name, start, start + window_ms * 1_000_000))
    answers = [end.recv() for end in ends]
    return {key: sum(answer[key] for answer in answers) for key in answers[0]}


def together(
    ends: Sequence[Connection], names: Sequence[str], rounds: int, window_ms: int
) -> Result:
    """Throughput of all processes together over that of one, each of them alone in turns."""
    found: dict[str, dict[str, list[float]]] = {name: {"wall": [], "cpu": []} for name in names}
    blocked = dict.fromkeys(names, 0)
    for i in progress(range(rounds), "two processes"):
        for name, ratios in found.items():
            alone = window([ends[i % len(ends)]], name, window_ms)
            both = window(ends, name, window_ms)
            blocked[name] += both["blocked"]
            for clock, values in ratios.items():
                values.append(both[clock] / alone[clock])
    return {
        name: {"blocked": blocked[name]}
        | {clock: statistics.median(values) for clock, values in ratios.items()}
        | {"ratios": ratios}
        for name, ratios in found.items()
    }


# --------------------------------------------------------------------------------------------------
# Rows against what must be reached


@dataclass(frozen=True, slots=True)
class Row:
    """A figure beside its limits. `must` and `aim` None: for information.

    `at_least`: larger is better.
    """

    what: str
    value: float
    must: float | None = None
    aim: float | None = None
    at_least: bool = False
    unit: str = "times"

    @property
    def reached(self) -> bool | None:
        """Whether the figure keeps to `must`."""
        if self.must is None:
            return None
        return self.value >= self.must if self.at_least else self.value <= self.must

    def as_json(self) -> Result:
        """All fields and `reached`."""
        return asdict(self) | {"reached": self.reached}


def show_rows(rows: Sequence[Result], title: str = "against what must be reached") -> None:
    """Print rows made by Row.as_json."""
    table = Table("what", title=title)
    for name in ("measured", "must", "aim", ""):
        table.add_column(name, justify="right")
    for row in rows:
        limit = ">= " if row["at_least"] else "<= "
        table.add_row(
            row["what"],
            f"{row['value']:.4g} {row['unit']}",
            "" if row["must"] is None else f"{limit}{row['must']:g}",
            "" if row["aim"] is None else f"{row['aim']:g}",
            {True: "[green]reached[/]", False: "[red]missed[/]", None: ""}[row["reached"]],
        )
    console().print(table)


def console() -> Console:
    """Standard output; wide enough for a table when it is a file."""
    found = Console()
    return found if found.is_terminal else Console(width=120)


# --------------------------------------------------------------------------------------------------
# Who ran it


def machine() -> Result:
    """Describe machine and versions, as they were before the benchmark loaded them."""
    return {
        "cpus": os.cpu_count(),
        "architecture": platform.machine(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "numpy": version("numpy"),
        "iceoryx2": version("iceoryx2"),
        "shmheap": version("shmheap"),
        "load": [round(load, 2) for load in os.getloadavg()],
    }


def version(distribution: str) -> str | None:
    """Return the installed version, None: not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def show_machine(found: Result) -> None:
    """Print the header line."""
    versions = ", ".join(f"{name} {found[name]}" for name in ("numpy", "shmheap") if found[name])
    console().print(
        f"{found['cpus']}-CPU {found['architecture']}, Linux {found['kernel']}, "
        f"{sys.implementation.name} {found['python']}, {versions}; load {found['load'][0]}"
    )


def figure_axes() -> tuple[Any, Any]:
    """Return (figure, axes). Raises ImportError, with the remedy, without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("--plot needs matplotlib: pip install 'shmheap[plot]'") from None
    figure = Figure(figsize=(8, 4), layout="constrained")
    return figure, figure.add_subplot()


def size_text(nbytes: float) -> str:
    """Say bytes in the largest unit that leaves a number of 1 or more."""
    for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if nbytes >= unit:
            return f"{nbytes / unit:.4g} {name}"
    return f"{nbytes:g} B"
