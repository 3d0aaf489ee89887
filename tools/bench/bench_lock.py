"""What locks and undo log cost of an allocation: against a build of the core without them."""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench_common import (
    MIB,
    Result,
    Row,
    console,
    figure_axes,
    new_loop,
    one_cpu,
    progress,
    show_rows,
)
from rich.table import Table

import shmheap

ROOT = Path(__file__).resolve().parents[2]
CORE = ROOT / "shmheap" / "csrc"
WITHOUT = ["-DSH_NO_LOCKS", "-DSH_NO_UNDO"]
IN_PYTHON = ("heap.alloc(64) and drop, in Python",)
IN_C = ("64 B, alloc and drop", "64 B, alloc", "64 B, drop", "80 KiB, alloc and drop")
"""What tests/c/bench_lock.c prints, in its order."""

WORK = "import sys; sys.path.insert(0, sys.argv[1]); import bench_lock; bench_lock.work()"
TIMES = 20_000
COUNTED = (1_000, 11_000)
"""Runs whose difference is the instructions of 10,000 pairs."""


class Lock:
    """The command `lock`."""

    summary = "what locks and undo log cost of an allocation, against a build without"

    def run(self, *, quick: bool) -> Result:
        """Build both and measure; about a minute, `quick` some seconds."""
        compiler = shutil.which(os.environ.get("CC", "cc"))
        if compiler is None or not CORE.exists():
            return {"skipped": "it needs a C compiler and the source tree", "rows": []}
        with tempfile.TemporaryDirectory() as folder, one_cpu():
            flags = ["-O0"] if quick else ["-O2", "-flto=auto"]  # else as the wheel has it
            whole, without = build(Path(folder), compiler, flags)
            rounds = 5 if quick else 401
            cases = compare(IN_PYTHON, _python(whole), _python(without), rounds)
            cases |= compare(IN_C, _c(whole), _c(without), rounds)
            counted = {} if quick else count_instructions(whole.program, without.program)
        rows = [row.as_json() for row in _rows(cases)]
        return {"cases": cases, "instructions": counted, "rows": rows}

    def show(self, result: Result) -> None:
        """Print tables."""
        if "skipped" in result:
            console().print(f"skipped, {result['skipped']}")
            return
        table = Table("ns of CPU time, median", title="one pinned process")
        for name in ("as it is", "without", "difference"):
            table.add_column(name, justify="right")
        for what, case in result["cases"].items():
            table.add_row(what, *(f"{ns:.1f}" for ns in case.values()))
        if result["instructions"]:
            counts = result["instructions"].values()
            table.add_row("instructions of the pair in C", *(f"{n:.0f}" for n in counts))
        console().print(table)
        show_rows(result["rows"])

    def plot(self, result: Result, file: Path) -> None:
        """Draw both builds beside each other."""
        figure, axes = figure_axes()
        for shift, key in ((0.2, "whole_ns"), (-0.2, "without_ns")):
            values = [case[key] for case in result.get("cases", {}).values()]
            places = [place + shift for place in range(len(values))]
            axes.barh(places, values, height=0.4, label=key.removesuffix("_ns"))
        axes.set_yticks(range(len(result.get("cases", {}))), list(result.get("cases", {})))
        axes.set(xlabel="ns")
        axes.legend()
        figure.savefig(file, dpi=120)


def _rows(cases: Result) -> Iterator[Row]:
    what = "locks and log, of"
    python, pair, alloc, drop, large = (case["difference_ns"] for case in cases.values())
    yield Row(f"{what} heap.alloc(64) and drop", python, 10.0, unit="ns")
    yield Row(f"{what} an allocation of 64 B in C", alloc, 10.0, unit="ns")
    yield Row(f"{what} its drop in C", drop, 10.0, unit="ns")
    yield Row(f"{what} both in C, back to back", pair, unit="ns")
    yield Row(f"{what} 80 KiB in C, alloc and drop", large, unit="ns")


# --------------------------------------------------------------------------------------------------
# Building


@dataclass(frozen=True, slots=True)
class Build:
    """The C benchmark, and a folder with the package."""

    program: Path
    packages: Path


def build(folder: Path, compiler: str, flags: Sequence[str]) -> tuple[Build, Build]:
    """Compile the core as it is, and without locks and log. Raises CalledProcessError."""
    common = ["-std=c11", "-D_GNU_SOURCE", "-DNDEBUG", "-pthread", "-fPIC", "-fvisibility=hidden"]
    common += ["-DPy_LIMITED_API=0x030b0000", f"-I{sysconfig.get_path('include')}"]
    common += [f"-I{CORE}", *flags]
    module, core = sorted((CORE / "py").glob("*.c")), sorted(CORE.glob("*.c"))
    bench = [ROOT / "tests" / "c" / "bench_lock.c"]

    def compile_one(job: tuple[Path, str, list[str]]) -> str:
        source, variant, options = job
        target = str(folder / f"{variant}_{source.stem}.o")
        command = [compiler, *common, *options, "-c", str(source), "-o", target]
        subprocess.run(command, check=True)
        return target

    def objects(files: Iterable[Path], variant: str, options: list[str]) -> list[str]:
        return list(pool.map(compile_one, [(file, variant, options) for file in files]))

    def link(variant: str, core: list[str]) -> Build:
        made = Build(folder / f"bench_{variant}", folder / variant)
        package = made.packages / "shmheap"
        ignored = shutil.ignore_patterns("csrc", "__pycache__", "*.so")
        shutil.copytree(ROOT / "shmheap", package, ignore=ignored)
        for target, options, others in (
            (made.program, [], main),
            (package / "_core.abi3.so", ["-shared"], python),
        ):
            command = [compiler, "-pthread", *flags, *options, "-o", str(target), *others, *core]
            subprocess.run(command, check=True)
        return made

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        python, main = objects(module, "module", []), objects(bench, "main", [])
        whole, without = objects(core, "whole", []), objects(core, "without", WITHOUT)
        jobs = [pool.submit(link, "whole", whole), pool.submit(link, "without", without)]
        return jobs[0].result(), jobs[1].result()


# --------------------------------------------------------------------------------------------------
# Measuring


@contextmanager
def _c(build: Build) -> Iterator[subprocess.Popen[str]]:
    with coprocess([str(build.program)], None) as process:
        yield process


@contextmanager
def _python(build: Build) -> Iterator[subprocess.Popen[str]]:
    environment = {**os.environ, "PYTHONPATH": str(build.packages)}
    command = [sys.executable, "-P", "-c", WORK, str(Path(__file__).parent)]
    with coprocess(command, environment) as process:
        yield process


@contextmanager
def coprocess(
    command: list[str], environment: dict[str, str] | None
) -> Iterator[subprocess.Popen[str]]:
    """Start what answers a line with a line of figures, and ends with its input."""
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()


def compare(
    names: Sequence[str],
    whole: AbstractContextManager[subprocess.Popen[str]],
    without: AbstractContextManager[subprocess.Popen[str]],
    rounds: int,
) -> Result:
    """Let both take turns; medians, and the median of the rounds' differences."""
    found: list[list[tuple[float, ...]]] = [[], []]
    with ExitStack() as stack:
        both = [stack.enter_context(whole), stack.enter_context(without)]
        for i in progress(range(rounds), "in turns"):
            for k in (i % 2, 1 - i % 2):
                found[k].append(_turn(both[k]))
    cases: Result = {}
    for name, ours, theirs in zip(
        names, *(zip(*turns, strict=True) for turns in found), strict=True
    ):
        cases[name] = {
            "whole_ns": statistics.median(ours),
            "without_ns": statistics.median(theirs),
            "difference_ns": statistics.median(a - b for a, b in zip(ours, theirs, strict=True)),
        }
    return cases


def _turn(process: subprocess.Popen[str]) -> tuple[float, ...]:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("\n")
    process.stdin.flush()
    return tuple(map(float, process.stdout.readline().split()))


def work() -> None:
    """Be one of the two: for each line of input, ns of heap.alloc(64) and drop."""
    loop = new_loop()
    with shmheap.Heap.create(capacity=64 * MIB) as heap:
        loop(heap.alloc, 64, TIMES)
        for _ in sys.stdin:
            start = time.thread_time_ns()
            loop(heap.alloc, 64, TIMES)
            print((time.thread_time_ns() - start) / TIMES, flush=True)
        heap.unlink()


def count_instructions(whole: Path, without: Path) -> Result:
    """Instructions of alloc and drop of 64 B, by valgrind; empty where that is not installed."""
    if shutil.which("valgrind") is None:
        return {}
    counts = [instructions(program) for program in (whole, without)]
    return {"whole": counts[0], "without": counts[1], "difference": counts[0] - counts[1]}


def instructions(program: Path, *arguments: str) -> float:
    """Count those of one of what the program does as often as its last argument says."""
    total = []
    for pairs in COUNTED:
        command = ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null"]
        command += [str(program), *arguments, str(pairs)]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stderr
        total.append(int(said.partition("Collected :")[2].split()[0]))
    return (total[1] - total[0]) / (COUNTED[1] - COUNTED[0])
