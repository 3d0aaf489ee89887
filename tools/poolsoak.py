#!/usr/bin/env python3
"""Use pools in every way while their workers are killed, for as long as you like, and look closely.

    poolsoak.py --seconds 60                     exit status 1 if anything is not as it must be
    poolsoak.py --seconds 60 --seed 7 --json     the same deeds again, as one JSON object
    poolsoak.py --seed 7 --first 41 --rounds 1   that round alone

Each round makes a pool or an executor of random terms, sends values of all kinds through it, kills
who serves it, ends it, and sees that every byte came right, every error has a reason, and nothing
is left. What each row means: docs/reference/poolsoak.md.
"""

from __future__ import annotations

import argparse
import json
import secrets
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent / "soak"))  # also under python -P

from poolsoak_run import Plan, PoolSoak
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

ERRORS = ("BrokenProcessPool", "HeapFull", "StaleHandle")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 0 all is well, 1 something is not."""
    args = _parser().parse_args(argv)
    seed = secrets.randbits(32) if args.seed is None else args.seed
    began_s = time.monotonic()
    with PoolSoak(Plan(args.seconds, seed, args.first, args.rounds)) as soak:
        _follow(soak)
    found = _found(soak, time.monotonic() - began_s)
    if args.json:
        print(json.dumps(found))
    else:
        _show(found)
    return 0 if found["ok"] else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        epilog="Exit status: 0 all was right and nothing was left; 1 something was not.",
    )
    parser.add_argument("--seconds", type=float, default=60.0, help="for how long (%(default)s)")
    parser.add_argument(
        "--rounds", type=int, default=0, help="so many rounds instead, and no player is killed"
    )
    parser.add_argument("--first", type=int, default=0, help="the first round (%(default)s)")
    parser.add_argument(
        "--seed", type=int, help="of all that is done at random (default: a new one)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _follow(soak: PoolSoak) -> None:
    """Run it, with a bar on standard error where that is a terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    plan, tally = soak.plan, soak.tally
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as progress:
        bar = progress.add_task("", total=plan.rounds or plan.seconds)
        began_s = time.monotonic()
        for _ in soak.turns():
            done = tally.rounds if plan.rounds else time.monotonic() - began_s
            progress.update(bar, completed=done, description=f"{tally.rounds} rounds")


def _found(soak: PoolSoak, took_s: float) -> dict[str, Any]:
    tally = soak.tally
    return {
        "seed": soak.plan.seed,
        "seconds": round(took_s, 1),
        "rounds": tally.rounds,
        "players": tally.players,
        "players_killed": tally.players_killed,
        **tally.figures,
        "failures": tally.failures,
        "ok": not tally.failures,
    }


def _show(found: dict[str, Any]) -> None:
    console = Console()
    table = Table(title="all is well" if found["ok"] else "something is wrong", show_header=False)
    table.add_column("what")
    table.add_column("value", justify="right")
    killed = [found.get(f"killed_{who}", 0) for who in ("worker", "coordinator")]
    for what, value in (
        ("seed", found["seed"]),
        ("rounds", f"{found['rounds']:,} in {found['seconds']} s"),
        ("players, of them killed", f"{found['players']}, {found['players_killed']}"),
        ("workers, coordinators killed", f"{killed[0]:,}, {killed[1]:,}"),
        ("tasks sent", f"{found.get('tasks', 0):,}"),
        ("results compared", f"{found.get('right', 0):,}"),
        ("tasks lost with a worker", f"{found.get('lost', 0):,}"),
        *((name, f"{found.get(name, 0):,}") for name in ERRORS),
        ("failures", len(found["failures"])),
    ):
        table.add_row(what, str(value))
    console.print(table)
    for failure in found["failures"]:
        for name, text in failure.items():
            console.print(f"{name}: {text}", markup=False, highlight=False)


if __name__ == "__main__":
    sys.exit(main())
