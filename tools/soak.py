#!/usr/bin/env python3
"""Kill processes of a heap at random, for as long as you like, and see that nothing comes of it.

    soak.py --seconds 60                     exit status 1 if anything is not as it must be
    soak.py --seconds 60 --seed 7 --json     the same deeds again, as one JSON object
    soak.py --kills 50                       until so many are dead

Workers allocate, free, send handles to one another, lease, name, fork, leave and come again, and
look at every byte that they may know; others are killed, and the coordinator too. What each row
means: docs/reference/soak.md.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent / "soak"))  # also under python -P

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from soak_end import Left, finish, keep_arena
from soak_run import Plan, Soak
from soak_worker import STALL_NS

from shmheap.verify import verify_quiet

MS = 1_000_000
SHOWN_EVERY_S = 0.2


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 0 all is well, 1 something is not."""
    args = _parser().parse_args(argv)
    seed = secrets.randbits(32) if args.seed is None else args.seed
    plan = Plan(args.seconds, args.workers, seed, args.rate, args.kills)
    began_s = time.monotonic()
    with Soak(plan) as soak:
        _follow(soak)
        took_s = time.monotonic() - began_s
        left = Left() if soak.tally.failures else finish(soak)
        if soak.tally.failures or left.total:
            soak.tally.failures = soak.tally.failures or [{"seed": seed, "error": "memory is left"}]
            kept = keep_arena(
                soak, Path(args.keep, f"shmheap.{os.geteuid()}.soak-{seed}-{os.getpid()}")
            )
            wrong = len(verify_quiet(soak.arena_fd, soak.observer, 3).mismatches)
            for failure in soak.tally.failures:
                failure["disagreeing_pages"] = wrong
                failure["arena"] = str(kept)
    found = _found(soak, left, took_s, judge_stalls=not args.stalls_are_news)
    if args.json:
        print(json.dumps(found))
    else:
        _show(found)
    return 0 if found["ok"] else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        epilog="Exit status: 0 nothing failed, stalled or was left; 1 something did.",
    )
    parser.add_argument("--seconds", type=float, default=60.0, help="for how long (%(default)s)")
    parser.add_argument("--kills", type=int, default=0, help="until so many kills, instead")
    parser.add_argument("--workers", type=int, default=5, help="at once (%(default)s)")
    parser.add_argument("--rate", type=float, default=22.0, help="kills per second (%(default)s)")
    parser.add_argument(
        "--seed", type=int, help="of all that is done at random (default: a new one)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--stalls-are-news",
        action="store_true",
        help="print stalls, and do not fail because of them: for machines that others use, too",
    )
    parser.add_argument(
        "--keep",
        default=tempfile.gettempdir(),
        metavar="DIR",
        help="where the arena is copied to if something fails (%(default)s)",
    )
    return parser


def _follow(soak: Soak) -> None:
    """Run it, with a bar on standard error where that is a terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    plan = soak.plan
    # No refresh of its own: that is a thread, and here is forked.
    progress = Progress(
        *columns,
        console=console,
        transient=True,
        auto_refresh=False,
        disable=not console.is_terminal,
    )
    with progress:
        bar = progress.add_task("", total=plan.kills or plan.seconds)
        began_s = shown_s = time.monotonic()
        for _ in soak.turns():
            now_s = time.monotonic()
            if now_s - shown_s >= SHOWN_EVERY_S:
                shown_s = now_s
                done = soak.tally.kills.total() if plan.kills else now_s - began_s
                progress.update(bar, completed=done, description=_live(soak))
                progress.refresh()


def _live(soak: Soak) -> str:
    tally = soak.tally
    return (
        f"{tally.kills['worker']} workers and {tally.kills['coordinator']} coordinators killed, "
        f"{tally.kills_inside.total()} inside; longest {tally.longest_ns / MS:.1f} ms; "
        f"{len(tally.failures)} failures"
    )


def _found(soak: Soak, left: Left, took_s: float, *, judge_stalls: bool) -> dict[str, Any]:
    tally = soak.tally
    judged = judge_stalls and tally.control_ns <= STALL_NS
    kills, inside = tally.kills.total(), tally.kills_inside.total()
    return {
        "seed": soak.plan.seed,
        "seconds": round(took_s, 1),
        "workers": soak.plan.workers,
        "kills": kills,
        "killed": dict(tally.kills),
        "kills_per_s": round(kills / took_s, 1),
        "inside": inside,
        "inside_percent": round(100 * inside / max(kills, 1), 1),
        "inside_by_role": dict(tally.kills_inside),
        "inside_by_lock": dict(tally.inside),
        "started": dict(tally.started),
        **tally.figures,
        "longest_ms": round(tally.longest_ns / MS, 2),
        "longest_operation": tally.longest_op,
        "control_longest_ms": round(tally.control_ns / MS, 2),
        "victim_held_still_ms": round(tally.stopped_ns / MS, 2),
        "checks": tally.checks,
        "failures": tally.failures,
        "left": left.as_json(),
        "judged": judged,
        "ok": not tally.failures and not left.total and not (judged and tally.figures["stalls"]),
    }


def _show(found: dict[str, Any]) -> None:
    console = Console()
    table = Table(title="all is well" if found["ok"] else "something is wrong", show_header=False)
    table.add_column("what")
    table.add_column("value", justify="right")
    killed, left = found["killed"], found["left"]
    for what, value in (
        ("seed", found["seed"]),
        ("kills", f"{found['kills']:,} in {found['seconds']} s ({found['kills_per_s']} per s)"),
        ("of workers, of coordinators", _pair(killed, "worker", "coordinator")),
        ("inside a critical section", f"{found['inside']:,} ({found['inside_percent']} %)"),
        ("which lock they held", _counts(found["inside_by_lock"])),
        ("workers started", _counts(found["started"])),
        ("steps", f"{found.get('steps', 0):,}"),
        ("blocks whose bytes were looked at", f"{found.get('checked', 0):,}"),
        ("letters opened, stale", f"{found.get('opened', 0):,}, {found.get('stale', 0):,}"),
        ("refused for want of memory", f"{found.get('full', 0):,}"),
        ("longest step", f"{found['longest_ms']} ms ({found['longest_operation']})"),
        ("longest step that touches no heap", f"{found['control_longest_ms']} ms"),
        (
            "stalls over 100 ms",
            f"{found.get('stalls', 0)}{'' if found['judged'] else ' (not judged)'}",
        ),
        ("check() walked", found["checks"]),
        ("failed checks", len(found["failures"])),
        ("left: blocks, bytes, leases", f"{left['blocks']}, {left['bytes']}, {left['leases']}"),
        ("left: pages, bytes in the kernel", f"{left['pages']}, {left['kernel_bytes']}"),
        ("pages on which books and kernel disagree", left["disagreeing_pages"]),
        ("files left", left["files"]),
    ):
        table.add_row(what, str(value))
    console.print(table)
    for failure in found["failures"]:
        for name, text in failure.items():
            console.print(f"[red]{name}[/]: {text}", markup=True, highlight=False)


def _pair(counts: dict[str, int], *names: str) -> str:
    return ", ".join(f"{counts.get(name, 0):,}" for name in names)


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {n:,}" for name, n in sorted(counts.items())) or "-"


if __name__ == "__main__":
    sys.exit(main())
