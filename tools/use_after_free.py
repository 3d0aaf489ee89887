#!/usr/bin/env python3
"""Pin and read what others free, punch and allocate anew, and count the bytes that are wrong.

    use_after_free.py                   10^9 pins: some minutes
    use_after_free.py --pins 3000000    a second or two
    use_after_free.py --control         only the build that must fail

Builds the core without Python (gcc, -O2 -DNDEBUG, no crash points) with tests/c/use_after_free.c,
which does the work, once as it is and once with the generation check and the count apart. What
happens in it, and what it does not show: docs/reference/use-after-free.md. The exit status is 0 if
no byte was wrong and the control found one.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
FLAGS = ["-std=gnu11", "-D_GNU_SOURCE", "-DNDEBUG", "-O2", "-pthread", "-Ishmheap/csrc"]
CONTROL = "-DSH_SPLIT_CAS"
CONTROL_PINS = 20_000_000
"""Of 150 seeds the slowest needed 750,000."""

ROWS = {
    "pins": "pins checked",
    "wrong_bytes": "wrong bytes",
    "stale": "stale handles refused",
    "renewed": "blocks freed and made anew",
    "punched_bytes": "bytes punched meanwhile",
    "cycles": "collections meanwhile",
    "kills": "processes killed",
    "killed_pinning": "readers killed in a pin",
    "killed_reading": "readers killed with a pin",
    "killed_dropping": "readers killed in an unpin",
    "seconds": "seconds",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    args = _parser().parse_args(argv)
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        program, broken = build(Path(folder))
        run = None if args.control else play(program, args.pins, args.seed)
        control = play(broken, CONTROL_PINS, args.seed)
    found = {
        "ok": control["wrong_bytes"] > 0 and (run is None or run["wrong_bytes"] == 0),
        "machine": f"{os.cpu_count()}-CPU {platform.machine()}, Linux {platform.release()}",
        "load": load,
        "seed": args.seed,
        "run": run,
        "control": control,
    }
    if args.json:
        print(json.dumps(found))
    else:
        show(found)
    return 0 if found["ok"] else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--pins", type=int, default=10**9, help="pins to check (default 10^9)")
    parser.add_argument("--seed", type=int, default=1, help="of all that is random (default 1)")
    parser.add_argument("--control", action="store_true", help="only the build that must fail")
    return parser


def build(folder: Path) -> tuple[Path, Path]:
    """Compile core and test; returns the program and its control. Raises CalledProcessError."""
    core = list((ROOT / "shmheap/csrc").glob("*.c"))  # all but what knows Python
    sources = [*core, ROOT / "tests/c/support.c", ROOT / "tests/c/use_after_free.c"]
    compiler = os.environ.get("CC", "gcc")

    def compile_one(job: tuple[Path, str, list[str]]) -> str:
        source, name, flags = job
        target = str(folder / f"{name}.o")
        subprocess.run(
            [compiler, *FLAGS, *flags, "-c", str(source), "-o", target], cwd=ROOT, check=True
        )
        return target

    def link(name: str, objects: Sequence[str]) -> Path:
        program = folder / name
        subprocess.run([compiler, "-pthread", "-o", str(program), *objects], check=True)
        return program

    word = ROOT / "shmheap/csrc/word.c"
    others = [source for source in sources if source != word]
    jobs = [(word, "word", []), (word, "split", [CONTROL])]
    jobs += [(source, source.stem, []) for source in others]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        whole, split, *rest = pool.map(compile_one, jobs)
    return link("use_after_free", [whole, *rest]), link("control", [split, *rest])


def play(program: Path, pins: int, seed: int) -> dict[str, Any]:
    """Run it until so many pins were checked. RuntimeError: anything but a byte was wrong."""
    done = subprocess.run(
        [program, str(pins), str(seed)], capture_output=True, text=True, check=False
    )
    if done.returncode not in (0, 1):
        raise RuntimeError(f"{program.name} failed ({done.returncode})\n{done.stderr}")
    return {**json.loads(done.stdout), "said": done.stderr.strip()}


def show(found: dict[str, Any]) -> None:
    """Draw the table."""
    runs = [run for run in (found["run"], found["control"]) if run is not None]
    table = Table("", title=f"{found['machine']}, load {found['load']:.1f}, seed {found['seed']}")
    for name in ("as it is", "check and count apart")[-len(runs) :]:
        table.add_column(name, justify="right")
    for key, what in ROWS.items():
        table.add_row(what, *(f"{run[key]:,}" for run in runs))
    console = Console()
    console.print(table)
    for run in runs:
        console.print(run["said"], highlight=False)
    console.print("[green]as it must be[/]" if found["ok"] else "[red]NOT as it must be[/]")


if __name__ == "__main__":
    sys.exit(main())
