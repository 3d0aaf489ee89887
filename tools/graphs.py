#!/usr/bin/env python3
"""Change a graph of blocks from several processes while it is collected, and mark it on paper.

    graphs.py                          10^7 mutations: some minutes
    graphs.py --mutations 300000       some seconds
    graphs.py --seed 7 --workers 2 --json
    graphs.py --control                only the build that must fail

Workers make nodes, store, replace and clear references, name them and send them to one another,
and drop them, while one collection follows another. Now and then all stand still, and what lives is
held against what a marker of its own says can be reached. The same is done with a build of the core
that has no barrier, which must fail. What happens in it, and what it does not show:
docs/reference/graphs.md. The exit status is 0 if nothing was wrong and the control failed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import secrets
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent / "soak"))  # also under python -P
sys.path.insert(0, str(Path(__file__).resolve().parent / "graphs"))

from graph_run import Plan, Run
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
CONTROL = "-DSH_NO_BARRIER"
CONTROL_MUTATIONS = 2_000_000

ROWS = {
    "mutations": "mutations",
    "looks": "nodes looked at before they were let go",
    "reopened": "opened again by a handle without a lease",
    "stale": "refused, for they were gone",
    "collections": "collections",
    "swept": "blocks that they freed",
    "rounds": "times that all stood still",
    "reached": "blocks that could be reached then, in all",
    "garbage": "blocks that lived then and could not",
    "seconds": "seconds",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    args = _parser().parse_args(argv)
    seed = secrets.randbits(32) if args.seed is None else args.seed
    plan = Plan(args.mutations, args.seconds, args.workers, seed)
    load = os.getloadavg()[0]
    run = None if args.control else play(plan)
    control = None if args.no_control else play_control(plan)
    found = {
        "ok": (run is None or not run["failures"])
        and (control is None or control["failures"] != []),
        "machine": f"{os.cpu_count()}-CPU {platform.machine()}, Linux {platform.release()}",
        "load": load,
        "seed": seed,
        "workers": args.workers,
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
    parser.add_argument("--mutations", type=int, default=10**7, help="how many (%(default)s)")
    parser.add_argument("--seconds", type=float, default=0, help="and for how long at most")
    parser.add_argument("--workers", type=int, default=3, help="at once (%(default)s)")
    parser.add_argument("--seed", type=int, help="of all that is random (default: a new one)")
    parser.add_argument("--control", action="store_true", help="only the build that must fail")
    parser.add_argument("--no-control", action="store_true", help="not the build that must fail")
    return parser


def play(plan: Plan) -> dict[str, Any]:
    """Do what is planned, with a bar on standard error where that is a terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    # No refresh of its own: that is a thread, and here is forked.
    progress = Progress(*columns, console=console, auto_refresh=False, transient=True)
    began_s = time.monotonic()
    with Run(plan) as run, progress:
        bar = progress.add_task("mutations", total=plan.mutations)
        try:
            for _ in run.rounds():
                progress.update(bar, completed=run.tally.counts["mutations"])
                progress.refresh()
        except Exception as error:  # whatever a broken heap makes of it
            run.tally.failures.append(f"{type(error).__name__}: {error}")
    return run.tally.as_json() | {"seconds": round(time.monotonic() - began_s, 1)}


# --------------------------------------------------------------------------------------------------
# The control


def play_control(plan: Plan) -> dict[str, Any]:
    """Do it with a build that has no barrier. RuntimeError: it did not come to an end."""
    mutations = min(plan.mutations, CONTROL_MUTATIONS)
    arguments = ["--json", "--no-control", f"--mutations={mutations}", f"--seed={plan.seed}"]
    arguments += [f"--workers={plan.workers}"]
    with tempfile.TemporaryDirectory() as folder:
        python = python_with(Path(folder), CONTROL)
        command = [str(python), "-P", str(Path(__file__).resolve()), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if not done.stdout:
        raise RuntimeError(f"the control itself failed ({done.returncode})\n{done.stderr}")
    run: dict[str, Any] = json.loads(done.stdout)["run"]
    return run


def python_with(folder: Path, flag: str) -> Path:
    """Make an environment that has all that ours has, but a core compiled with that flag.

    Returns its interpreter. Raises CalledProcessError.
    """
    venv.create(folder, symlinks=True)
    places = {"base": str(folder), "platbase": str(folder)}
    packages = Path(sysconfig.get_path("purelib", "venv", places))
    (packages / "ours.pth").write_text("\n".join(place for place in sys.path if place))
    package = packages / "shmheap"
    package.mkdir()
    for source in (ROOT / "shmheap").iterdir():
        if source.suffix == ".py" or (source / "__init__.py").exists():
            (package / source.name).symlink_to(source)
    build(package / "_core.abi3.so", flag)
    return folder / "bin" / "python"


def build(target: Path, flag: str) -> None:
    """Compile the core and what knows Python. Raises CalledProcessError."""
    core = ROOT / "shmheap" / "csrc"
    command = [os.environ.get("CC", "gcc"), "-std=gnu11", "-D_GNU_SOURCE", "-DNDEBUG", "-pthread"]
    command += ["-O0", "-fPIC", f"-I{core}", f"-I{sysconfig.get_path('include')}", flag]

    def compile_one(source: Path) -> str:
        made = target.with_name(f"{source.parent.name}_{source.stem}.o")
        subprocess.run([*command, "-c", str(source), "-o", str(made)], check=True)
        return str(made)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, [*core.glob("*.c"), *core.glob("py/*.c")]))
    subprocess.run([command[0], "-shared", "-pthread", "-o", str(target), *objects], check=True)


# --------------------------------------------------------------------------------------------------
# Showing


def show(found: dict[str, Any]) -> None:
    """Draw the table."""
    runs = {"as it is": found["run"], "without barrier": found["control"]}
    runs = {name: run for name, run in runs.items() if run is not None}
    table = Table("", title=f"{found['machine']}, load {found['load']:.1f}, seed {found['seed']}")
    for name in runs:
        table.add_column(name, justify="right")
    for key, what in ROWS.items():
        table.add_row(what, *(f"{run[key]:,}" for run in runs.values()))
    console = Console()
    console.print(table)
    for name, run in runs.items():
        for failure in run["failures"]:
            console.print(f"{name}: {failure}", markup=False, highlight=False)
    console.print("[green]as it must be[/]" if found["ok"] else "[red]NOT as it must be[/]")


if __name__ == "__main__":
    sys.exit(main())
