#!/usr/bin/env python3
"""Kill a process at every instruction of every operation of the core, and see who goes on.

    killpoints.py                       everything: some minutes
    killpoints.py --share 1/20          every 20th point, starting somewhere: for CI
    killpoints.py --op root-set --op pin
    killpoints.py --list                the operations
    killpoints.py --controls            only the builds that must fail

Builds the core without Python (gcc, -O2 -DNDEBUG, no crash points) with tests/c/killpoints, which
does the work, one process per operation and stage of the heap. How, and what it does not show:
docs/reference/killpoints.md. The exit status is 0 if every death was survived and each control
found wanting.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
FLAGS = ["-std=gnu11", "-D_GNU_SOURCE", "-DNDEBUG", "-O2", "-pthread", "-Ishmheap/csrc"]
LIMIT_S = 900  # for one operation at one stage: it takes seconds

# A step of `rep stosb` writes one byte: glibc is told to fill memory by vector stores.
ENVIRONMENT = {
    **os.environ,
    "GLIBC_TUNABLES": "glibc.cpu.x86_rep_stosb_threshold=1000000000"
    ":glibc.cpu.x86_rep_movsb_threshold=1000000000",
}


@dataclass(frozen=True)
class Row:
    """An operation at a stage of the heap; points and deaths are counts, times are ns."""

    operation: str
    stage: str
    instructions: int
    tried: int
    states: int
    survived: int
    double_tried: int
    double_survived: int
    kills_tried: int
    kills_survived: int
    kills_like_copy: int
    mutex_ns: list[int] = field(repr=False)
    process_lock_ns: list[int] = field(repr=False)
    failures: list[str]


@dataclass(frozen=True)
class Control:
    """A build that breaks an invariant on purpose: a tool that finds nothing in it is blind."""

    name: str
    flag: str
    operations: tuple[str, ...]
    """Where it must show."""


CONTROLS = (
    Control("no undo log (I-3)", "-DSH_NO_UNDO", ("root-set", "pages-split", "span-refill")),
    Control("count down, then clear the pin (I-6)", "-DSH_I6_REVERSED", ("free-small", "unpin")),
)


@dataclass(frozen=True)
class Plan:
    """What is tried of each operation."""

    share: int
    of: int
    seed: int
    doubles: int
    kills: int
    stop: bool = False

    def arguments(self) -> list[str]:
        """The harness's, behind operation and stage."""
        numbers = (self.share, self.of, self.seed, self.doubles, self.kills, int(self.stop))
        return [str(number) for number in numbers]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    args = _parser().parse_args(argv)
    console = Console(stderr=args.json)
    console = Console(stderr=args.json, width=max(console.width, 112))
    share, of = args.share
    plan = Plan(share - 1, of, args.seed, args.doubles, args.kills)
    with tempfile.TemporaryDirectory() as folder:
        program = build(Path(folder) / "killpoints")
        cases = [case for case in list_cases(program) if not args.op or case[0] in args.op]
        if args.list:
            console.print("\n".join(dict.fromkeys(name for name, _ in cases)))
            return 0
        if not cases:
            print("killpoints: there is no such operation, see --list", file=sys.stderr)
            return 2
        rows = [] if args.controls else run_all(program, cases, plan, console)
        controls = [] if args.op else [run_control(Path(folder), control) for control in CONTROLS]
    found = summary(rows, controls, plan)
    if args.json:
        print(json.dumps(found))
    else:
        show(found, rows, console)
    return 0 if found["ok"] else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--list", action="store_true", help="print the operations")
    parser.add_argument("--op", action="append", metavar="NAME", help="only this one; repeatable")
    parser.add_argument("--controls", action="store_true", help="only the builds that must fail")
    parser.add_argument(
        "--share", type=_share, default=(1, 1), metavar="N/M", help="the N-th M-th of the points"
    )
    parser.add_argument("--seed", type=int, default=1, help="which points are sampled (default 1)")
    parser.add_argument(
        "--doubles", type=int, default=1, help="first deaths that get a second one, per row"
    )
    parser.add_argument("--kills", type=int, default=6, help="real SIGKILLs, per row")
    return parser


def _share(text: str) -> tuple[int, int]:
    share, _, of = text.partition("/")
    if not (share.isdigit() and of.isdigit() and 1 <= int(share) <= int(of)):
        raise argparse.ArgumentTypeError("a share is N/M with 1 <= N <= M")
    return int(share), int(of)


# --------------------------------------------------------------------------------------------------
# Running


def build(program: Path, *flags: str) -> Path:
    """Compile core and harness; returns the program. Raises CalledProcessError."""
    core = list((ROOT / "shmheap/csrc").glob("*.c"))  # all but what knows Python
    harness = [ROOT / "tests/c/support.c", *(ROOT / "tests/c/killpoints").glob("*.c")]
    compiler = os.environ.get("CC", "gcc")
    command = [compiler, *FLAGS, *flags, "-o", str(program), *map(str, core + harness)]
    subprocess.run(command, cwd=ROOT, check=True)
    return program


def list_cases(program: Path) -> list[tuple[str, str]]:
    """Operation and stage (its number) of each row."""
    lines = subprocess.run([program, "--list"], capture_output=True, text=True, check=True).stdout
    return [(name, stage) for name, stage in map(str.split, lines.splitlines())]


def run_case(program: Path, case: tuple[str, str], plan: Plan) -> Row:
    """Try the points of a row. RuntimeError: the harness itself failed. Cost: seconds."""
    done = subprocess.run(
        [program, *case, *plan.arguments()],
        capture_output=True,
        text=True,
        check=False,
        env=ENVIRONMENT,
        timeout=LIMIT_S,
    )
    if not done.stdout:
        raise RuntimeError(f"{case[0]}: the harness failed\n{done.stderr}")
    return Row(**json.loads(done.stdout), failures=done.stderr.splitlines())


def run_all(
    program: Path, cases: Sequence[tuple[str, str]], plan: Plan, console: Console
) -> list[Row]:
    """All rows, as many at a time as there are CPUs."""

    def run(case: tuple[str, str]) -> Row:
        return run_case(program, case, plan)

    with ThreadPoolExecutor(os.cpu_count()) as pool, Progress(console=console) as progress:
        return list(progress.track(pool.map(run, cases), total=len(cases), description="dying"))


def run_control(folder: Path, control: Control) -> dict[str, Any]:
    """Try its operations until one death is not survived."""
    program = build(folder / "control", control.flag)
    plan = Plan(0, 1, seed=1, doubles=0, kills=0, stop=True)
    points = 0
    for operation in control.operations:
        row = run_case(program, (operation, "1"), plan)
        points += row.tried
        if row.failures:
            return {"name": control.name, "found": True, "points": points, "in": row.operation}
    return {"name": control.name, "found": False, "points": points, "in": None}


# --------------------------------------------------------------------------------------------------
# Showing


def summary(rows: Sequence[Row], controls: Sequence[dict[str, Any]], plan: Plan) -> dict[str, Any]:
    """What --json prints."""
    counts = [name for name in Row.__annotations__ if name.partition("_")[0] in COUNTED]
    total = {name: sum(getattr(row, name) for row in rows) for name in counts}
    survived = all(
        total[f"{kind}tried"] == total[f"{kind}survived"] for kind in ("", "double_", "kills_")
    )
    return {
        "ok": survived and all(control["found"] for control in controls),
        "machine": f"{os.cpu_count()}-CPU {platform.machine()}, Linux {platform.release()}",
        "load": os.getloadavg()[0],
        "seed": plan.seed,
        "share": f"{plan.share + 1}/{plan.of}",
        "operations": len({row.operation for row in rows}),
        "total": total,
        "recovery_us": {
            "mutex": quantiles(ns for row in rows for ns in row.mutex_ns),
            "process lock": quantiles(ns for row in rows for ns in row.process_lock_ns),
        },
        "controls": list(controls),
        "rows": [asdict(row) for row in rows],
    }


COUNTED = {"instructions", "tried", "states", "survived", "double", "kills"}


def quantiles(times_ns: Iterable[int]) -> dict[str, float]:
    """Quantiles of times, in us."""
    times = sorted(times_ns)
    if not times:
        return {"n": 0}

    def at(q: float) -> float:
        return times[min(int(q * len(times)), len(times) - 1)] / 1e3

    return {"n": len(times), "p50": at(0.5), "p99": at(0.99), "max": at(1)}


def show(found: dict[str, Any], rows: Sequence[Row], console: Console) -> None:
    """Draw the tables."""
    if rows:
        console.print(_table(rows, found["total"]))
    for line in _lines(found):
        console.print(line, highlight=False)
    for row in rows:
        for failure in row.failures:
            console.print(f"[red]not survived[/red]: {failure}", highlight=False)


def _table(rows: Sequence[Row], total: dict[str, int]) -> Table:
    table = Table(title="deaths survived of deaths tried")
    for name in ("operation", "heap"):
        table.add_column(name, no_wrap=True)
    for name in ("instructions", "points", "states", "survived", "double", "real"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(row.operation, row.stage, *_cells(asdict(row)))
    table.add_section()
    table.add_row("total", "", *_cells(total))
    return table


def _cells(counts: dict[str, Any]) -> Iterator[str]:
    for name in ("instructions", "tried", "states", "survived"):
        yield f"{counts[name]:,}"
    for kind in ("double", "kills"):
        yield f"{counts[f'{kind}_survived']:,} / {counts[f'{kind}_tried']:,}"


def _lines(found: dict[str, Any]) -> Iterator[str]:
    total = found["total"]
    if found["rows"]:
        yield (
            f"kill points: {total['survived']:,} of {total['tried']:,} survived, "
            f"{found['operations']} operations, {total['states']:,} distinct states recovered"
        )
        yield f"real deaths that left what the copy had, byte by byte: {total['kills_like_copy']}"
    for lock, times in found["recovery_us"].items():
        if times["n"]:
            yield (
                f"{lock} recovered after p50 {times['p50']:.0f} us, p99 {times['p99']:.0f} us "
                f"({times['n']} real deaths; load {found['load']:.1f})"
            )
    for control in found["controls"]:
        outcome = f"found after {control['points']:,} points, in {control['in']}"
        yield f"control, {control['name']}: {outcome if control['found'] else 'NOT FOUND'}"


if __name__ == "__main__":
    sys.exit(main())
