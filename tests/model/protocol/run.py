#!/usr/bin/env python3
"""Check the protocol's models with spin: exhaustively, one run at a time.

    run.py quick               what CI runs: small instances, and every negative control (under a minute)
    run.py long [PATTERN]      every run of the table in docs/explanation/model.md, each a few minutes
    run.py one MODEL -DX ...   one run, for instance: one pages.pml -DKILLS=1 -DINIT=3
    run.py trace MODEL -DX ... the shortest counterexample, step by step

A run counts as passed only if spin finished its whole search: running out of time, memory or search depth is a failure.
A negative control breaks one rule on purpose (-DBUG_x) and must end in a violated assertion; one that passes is a failure.
Needs spin 6.5 and a C compiler ($CC, default gcc). Writes to a temporary folder only.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
MEMORY_MIB = 5800
SEARCH_DEPTH = 400_000


@dataclass(frozen=True, slots=True)
class Run:
    """One model with its flags. `fails`: it breaks a rule, so an assertion must not hold."""

    model: str
    flags: str
    fails: bool = False


@dataclass(frozen=True, slots=True)
class Outcome:
    states: int
    verdict: str  # "holds", "violated", or why there is no verdict
    seconds: float
    detail: str


def gc(flags: str) -> Run:
    return Run("gc.pml", flags)


def pages(flags: str) -> Run:
    return Run("pages.pml", flags)


def broken(model: str, *controls: str) -> list[Run]:
    return [Run(model, f"-DBUG_{control}", fails=True) for control in controls]


CONTROLS = [
    *broken(
        "gc.pml",
        "GLOBALPHASE -DOPS=1 -DINIT=2",
        "TOUCH_LATE -DOPS=1 -DINIT=3",
        "NO_INC_TOUCH -DOPS=1 -DINIT=3",
        "SWEEP_RESURRECT -DOPS=1 -DINIT=2",
        "NO_FINAL -DOPS=1 -DINIT=2",
        "NAIVE_REPAIR -DOPS=1 -DINIT=3",
        "I6 -DOPS=1 -DINIT=3 -DKILLS=1",
        "SPLIT_W -DOPS=2 -DCYC=0 -DINIT=3",
        "SPEC_TOUCH -DOPS=1 -DINIT=2",
        "GENWRAP -DOPS=1 -DINIT=2",
        "BITCLEAR -DOPS=1 -DINIT=3",
        "LEASE_ORDER -DOPS=1 -DINIT=4 -DKILLS=1",
        "SKIP_DEAD -DOPS=1 -DINIT=3 -DKILLS=1",
        "NO_IDLE_ROUND -DOPS=1 -DINIT=2 -DCKILLS=1",
        "PRIVATE_MARKS -DOPS=1 -DINIT=5 -DCKILLS=1",
    ),
    *broken(
        "pages.pml",
        "LARGE_FIRST -DINIT=6",
        "LOST_WORD_FIRST -DINIT=6",
        "LOST_NO_HANDSHAKE -DINIT=1",
        "LIST_FIRST -DINIT=6",
        "PUNCH_NO_HANDSHAKE -DINIT=1",
        "GEN_RESTART -DINIT=6",
        "ALLOC_NO_CHECK -DINIT=2",
        "ADOPT_RESTORES -DINIT=5",
        "NO_URESERVED -DINIT=3",
        "TAKE_BUSY -DINIT=3",
        "PUNCH_NOT_ASIDE -DINIT=2",
        "STAMP_PLAIN -DINIT=3",
        "ASIDE_NO_LOCK -DINIT=4 -DOPS=2 -DOPS1=0",
        "ORPHAN_NO_LOCK -DINIT=5 -DOPS=3 -DOPS1=0",
        "STRADDLE -DINIT=3 -DOPS=2 -DGEOM=1",
        "HOLE_NO_HANDSHAKE -DINIT=7 -DACTS=2",
        "DEAD_NO_HANDSHAKE -DINIT=7 -DACTS=2 -DCKILLS=1",
        "LOOK_UNLOCKED -DINIT=5 -DKILLS=1",
        "REAP_UNRECOVERED -DINIT=1 -DKILLS=1",
        "REAP_NO_PUNCH -DINIT=3 -DKILLS=1",
        "BEGIN_UNRECOVERED -DINIT=1 -DCKILLS=1",
        "NO_REDO -DINIT=5 -DCKILLS=1",
    ),
]

QUICK = [
    *(gc(f"-DOPS=1 -DINIT={start}") for start in range(6)),
    *(pages(f"-DINIT={start}") for start in range(8)),
    pages("-DINIT=3 -DGEOM=1"),
    pages("-DINIT=1 -DKILLS=1"),
    pages("-DINIT=1 -DCKILLS=1"),
    *CONTROLS,
]

LONG = [
    *(gc(f"-DOPS=1 -DINIT={start}") for start in range(6)),
    *(gc(f"-DOPS=1 -DINIT={start} -DKILLS=1") for start in (2, 3, 4)),
    *(gc(f"-DOPS=1 -DINIT={start} -DCKILLS=1") for start in (2, 3, 4)),
    gc("-DOPS=1 -DINIT=2 -DKILLS=1 -DCKILLS=1"),
    gc("-DOPS=2 -DINIT=2"),
    *(pages(knobs) for knobs in ("", "-DGEOM=1", "-DTHREADS", "-DNOSPC", "-DPLOG")),
    *(pages(f"-DKILLS=1 {knobs}".strip()) for knobs in ("", "-DGEOM=1", "-DTHREADS", "-DPLOG")),
    *(pages(f"-DCKILLS=1 {knobs}".strip()) for knobs in ("", "-DGEOM=1", "-DTHREADS", "-DPLOG")),
    *(pages(f"-DINIT={start} -DKILLS=1 -DCKILLS=1") for start in range(8)),
    *(pages(f"-DINIT={start} -DKILLS=2") for start in range(1, 8)),
    *(pages(f"-DINIT={start} -DOPS=2") for start in range(1, 8)),
    *(pages(f"-DINIT={start} -DACTS=2") for start in range(8)),
    *(pages(f"-DINIT={start} -DACTS=2 -DCKILLS=1") for start in (4, 5, 7)),
]

def build(run: Run, folder: Path, *, optimise: str, shortest: bool) -> Path:
    model = HERE / run.model
    flags = run.flags.split()
    subprocess.run(["spin", *flags, "-a", str(model)], cwd=folder, check=True, stdout=subprocess.PIPE)
    search = ["-DSAFETY", "-DCOLLAPSE", f"-DMEMLIM={MEMORY_MIB}", "-DVECTORSZ=4096"]
    compiler = [os.environ.get("CC", "gcc"), optimise, "-w", "-o", "pan", "pan.c"]
    subprocess.run([*compiler, *search, *(["-DBFS"] if shortest else [])], cwd=folder, check=True)
    return folder / "pan"


def judge(output: str) -> tuple[str, str]:
    """The verdict of one search, and spin's own words where there is something to say."""
    said = re.search(r"^pan:1: (.*?) \(at depth", output, re.MULTILINE)
    if said:
        ours = said.group(1).startswith("assertion violated")
        return ("violated" if ours else "stuck"), said.group(1)
    errors = re.search(r"errors: (\d+)$", output, re.MULTILINE)
    cut = re.search(r"^.*(Search not completed|max search depth|MEMLIM|out of memory).*$", output, re.MULTILINE)
    if errors is None or cut is not None:
        return "not finished", cut.group(0).strip() if cut else ""
    return ("holds" if errors.group(1) == "0" else "stuck"), ""


def check(run: Run, folder: Path, *, limit_s: float, optimise: str = "-O2", shortest: bool = False) -> Outcome:
    pan = build(run, folder, optimise=optimise, shortest=shortest)
    start = time.monotonic()
    try:
        output = subprocess.run(
            [str(pan), f"-m{SEARCH_DEPTH}", "-w25"], cwd=folder, timeout=limit_s, capture_output=True, text=True
        ).stdout
    except subprocess.TimeoutExpired:
        return Outcome(0, "not finished", time.monotonic() - start, f"stopped after {limit_s:.0f} s")
    states = re.search(r"^ *(\d[\d.e+]*) states, stored", output, re.MULTILINE)
    verdict, detail = judge(output)
    return Outcome(int(float(states.group(1))) if states else 0, verdict, time.monotonic() - start, detail)


def check_all(runs: list[Run], *, limit_s: float, optimise: str) -> int:
    """Prints one line a run; returns how many did not end as they should."""
    wrong = 0
    for run in runs:
        with tempfile.TemporaryDirectory(prefix="model-") as folder:
            outcome = check(run, Path(folder), limit_s=limit_s, optimise=optimise)
        as_expected = outcome.verdict == ("violated" if run.fails else "holds")
        wrong += not as_expected
        print(
            f"{'ok   ' if as_expected else 'WRONG'} {outcome.verdict:12} {outcome.states:>11,} states"
            f" {outcome.seconds:6.1f} s  {run.model} {run.flags}  {outcome.detail[:90]}",
            flush=True,
        )
    print(f"{len(runs)} runs, {wrong} wrong")
    return wrong


def trace(run: Run) -> int:
    """Prints the shortest counterexample: process, source line, statement and the values it changed."""
    with tempfile.TemporaryDirectory(prefix="model-") as name:
        folder = Path(name)
        outcome = check(run, folder, limit_s=600, shortest=True)
        print(f"{outcome.verdict}: {outcome.detail}")
        if outcome.verdict not in ("violated", "stuck"):
            return 1
        trail = next(folder.glob("*.trail"))
        replay = ["spin", *run.flags.split(), "-p", "-g", "-k", str(trail), str(HERE / run.model)]
        steps = subprocess.run(replay, cwd=folder, capture_output=True, text=True).stdout
    for line in steps.splitlines():
        if line.strip() and not re.search(r"goto|\[else\]|:init:", line):
            short = re.sub(r"^ *\d+:\tproc +|\(state \d+\)", "", line)
            print(short.replace(str(HERE) + "/", "")[:130])
    return 0


def main(arguments: list[str]) -> int:
    match arguments:
        case ["quick"]:
            return min(check_all(QUICK, limit_s=60, optimise="-O0"), 1)
        case ["long"]:
            return min(check_all(LONG, limit_s=400, optimise="-O2"), 1)
        case ["long", pattern]:
            chosen = [run for run in LONG if re.search(pattern, f"{run.model} {run.flags}")]
            return min(check_all(chosen, limit_s=400, optimise="-O2"), 1)
        case ["one", model, *flags]:
            return min(check_all([Run(model, " ".join(flags))], limit_s=400, optimise="-O2"), 1)
        case ["trace", model, *flags]:
            return trace(Run(model, " ".join(flags)))
        case _:
            print(__doc__)
            return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
