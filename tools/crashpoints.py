#!/usr/bin/env python3
"""Kill processes of a heap at every system call of what they do, and see that all goes on.

    crashpoints.py                          every point: some minutes
    crashpoints.py --share 1/40             every 40th, starting somewhere: for CI
    crashpoints.py --op create --who both   one operation; who dies there
    crashpoints.py --list                   the operations, and their system calls

What an operation is, who dies and what must hold afterwards: docs/reference/crash-points.md. The
exit status is 0 if all went on. tools/killpoints.py does the like at every instruction of the core.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))

from crash_points import WHO, Case, play, points_of, undisturbed
from crash_scenes import OPERATIONS
from rich.console import Console
from rich.progress import Progress
from rich.table import Table


@dataclass
class Row:
    """An operation: deaths tried and survived, by who died."""

    operation: str
    calls: int
    tried: Counter[str] = field(default_factory=Counter)
    survived: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    args = _parser().parse_args(argv)
    console = Console(stderr=args.json)
    began_s = time.monotonic()
    with Progress(console=console) as progress:
        rows = count_calls(args.op or list(OPERATIONS), args.processes)
        if not args.list:
            cases = chosen(rows, args.who or WHO, args.share, args.seed)
            task = progress.add_task("dying", total=len(cases))
            for case, outcome in play(cases, args.processes):
                progress.advance(task)
                if not outcome.nobody:
                    _note(rows[case.operation], case, outcome.call, outcome.failure)
                if outcome.failure:
                    console.print(f"{case}: {outcome.failure}", highlight=False, markup=False)
    found = summary(rows, args, time.monotonic() - began_s)
    if args.json:
        print(json.dumps(found))
    else:
        show(found, list(rows.values()), console)
    return 0 if found["ok"] else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--list", action="store_true", help="only count the system calls")
    parser.add_argument(
        "--op", action="append", metavar="NAME", choices=OPERATIONS, help="only this; repeatable"
    )
    parser.add_argument("--who", action="append", choices=WHO, help="only this; repeatable")
    parser.add_argument(
        "--share", type=_share, default=(1, 1), metavar="N/M", help="the N-th M-th of the points"
    )
    parser.add_argument("--seed", type=int, default=1, help="which points a share has (default 1)")
    parser.add_argument(
        "--processes", type=int, default=os.cpu_count() or 1, help="cases at a time (default: CPUs)"
    )
    return parser


def _share(text: str) -> tuple[int, int]:
    share, _, of = text.partition("/")
    if not (share.isdigit() and of.isdigit() and 1 <= int(share) <= int(of)):
        raise argparse.ArgumentTypeError("a share is N/M with 1 <= N <= M")
    return int(share), int(of)


def count_calls(operations: Sequence[str], at_a_time: int) -> dict[str, Row]:
    """A row for each, from a run in which nobody dies; that must go well."""
    rows = {name: Row(name, 0) for name in operations}
    for case, outcome in play(undisturbed(operations), at_a_time):
        row = rows[case.operation]
        row.calls = outcome.calls
        if outcome.failure:
            row.failures.append(f"{case.operation}, undisturbed: {outcome.failure}")
    return rows


def chosen(
    rows: dict[str, Row], who: Sequence[str], share: tuple[int, int], seed: int
) -> list[Case]:
    """The deaths to be tried, in an order of chance, so that long ones do not come together."""
    cases = [case for row in rows.values() for case in points_of(row.operation, row.calls)]
    random.Random(seed).shuffle(cases)
    nth, of = share
    return [case for case in cases[nth - 1 :: of] if case.who in who]


def _note(row: Row, case: Case, call: str, failure: str) -> None:
    row.tried[case.who] += 1
    if not failure:
        row.survived[case.who] += 1
        return
    then = ", another heap is opened next" if case.elsewhere else ""
    row.failures.append(
        f"{case.operation}: {case.who} died before call {case.at} ({call or 'the end'}){then}: "
        f"{failure}"
    )


def summary(rows: dict[str, Row], args: argparse.Namespace, took_s: float) -> dict[str, Any]:
    """What --json prints."""
    tried = sum((row.tried for row in rows.values()), Counter[str]())
    survived = sum((row.survived for row in rows.values()), Counter[str]())
    return {
        "ok": not any(row.failures for row in rows.values()),
        "machine": f"{os.cpu_count()}-CPU {platform.machine()}, Linux {platform.release()}",
        "python": platform.python_version(),
        "seed": args.seed,
        "share": "/".join(map(str, args.share)),
        "took_s": round(took_s, 1),
        "operations": len(rows),
        "calls": sum(row.calls for row in rows.values()),
        "tried": tried.total(),
        "survived": survived.total(),
        "by_who": {who: [survived[who], tried[who]] for who in WHO},
        "rows": [vars(row) for row in rows.values()],
    }


def show(found: dict[str, Any], rows: Sequence[Row], console: Console) -> None:
    """Draw the table."""
    table = Table(title="deaths survived of deaths tried, at system calls")
    table.add_column("operation", no_wrap=True)
    for name in ("calls", *(f"{who} dies" for who in ("the actor", "its peer")), "both die"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        cells = (f"{row.survived[who]} / {row.tried[who]}" if row.tried[who] else "" for who in WHO)
        table.add_row(row.operation, str(row.calls), *cells)
    console.print(table)
    console.print(
        f"{found['survived']:,} of {found['tried']:,} deaths survived, at {found['calls']:,} "
        f"system calls of {found['operations']} operations; {found['took_s']:.0f} s",
        highlight=False,
    )
    for row in rows:
        for failure in row.failures:
            console.print(f"[red]not survived[/red]: {failure}", highlight=False)


if __name__ == "__main__":
    sys.exit(main())
