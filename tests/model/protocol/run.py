#!/usr/bin/env python3
"""Check the protocol's models with spin, exhaustively.

    run.py --quick [--json]    what CI runs: small instances, and every negative control (about a minute on 2 cores)
    run.py --full [--json]     every run of the tables in docs/explanation/model.md: half an hour; --only PATTERN picks some
    run.py --one MODEL -DX ...     one run, for instance: --one pages.pml -DKILLS=1 -DINIT=3
    run.py --trace MODEL -DX ...   the shortest counterexample, step by step

A run holds only if spin finished its whole search: running out of time, memory or search depth is a failure, not a verdict.
A negative control breaks one rule on purpose (-DBUG_x) and must end in a violated assertion; one that holds is a failure.
Exit status: 0 all as expected, 1 a surprise, 2 spin or a C compiler ($CC, or clang, or gcc) is missing.
Writes to a temporary folder only.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
CC = os.environ.get("CC") or ("clang" if shutil.which("clang") else "gcc")  # builds in half the time of gcc
SEARCH_DEPTH = 400_000


@dataclass(frozen=True, slots=True)
class Effort:
    """How much a run may cost; seconds of CPU. Quick runs are over before an optimising compiler would be."""

    limit_s: int
    memory_mib: int
    optimise: str
    at_once: int


QUICK_EFFORT = Effort(limit_s=150, memory_mib=2000, optimise="-O0", at_once=2)
FULL_EFFORT = Effort(limit_s=1800, memory_mib=9000, optimise="-O2", at_once=1)
ONE_EFFORT = dataclasses.replace(FULL_EFFORT, optimise="-O0")


@dataclass(frozen=True, slots=True)
class Run:
    """One model with its flags. `fails`: it breaks a rule, so an assertion must not hold."""

    model: str
    flags: str
    fails: bool = False

    @property
    def expected(self) -> str:
        return "violated" if self.fails else "holds"


@dataclass(frozen=True, slots=True)
class Outcome:
    model: str
    flags: str
    states: int
    depth: int
    seconds: float  # of CPU, without building
    memory_mib: int
    expected: str
    verdict: str  # "holds", "violated", "stuck" (a deadlock), "broken" (spin or the compiler), or "not finished"
    detail: str

    @property
    def as_expected(self) -> bool:
        return self.verdict == self.expected


def gc(flags: str) -> Run:
    return Run("gc.pml", flags)


def pages(flags: str) -> Run:
    return Run("pages.pml", flags)


def broken(model: str, *controls: str) -> list[Run]:
    return [Run(model, f"-DBUG_{control}", fails=True) for control in controls]


CONTROLS = [
    *broken(
        "gc.pml",
        "GLOBALPHASE -DOPS=1 -DINIT=2",  # each process reads the global phase, not its slot's
        "NO_INC_TOUCH -DOPS=1 -DINIT=3",  # counting up does not touch
        "SWEEP_RESURRECT -DOPS=1 -DINIT=2",  # a condemned block is pinned again
        "NO_FINAL -DOPS=1 -DINIT=2",  # from MARK to SWEEP at once
        "NAIVE_REPAIR -DOPS=1 -DINIT=3",  # counts of touched blocks are lowered, too
        "I6 -DOPS=1 -DINIT=3 -DKILLS=1",  # count down before the holder is cleared
        "SPLIT_W -DOPS=2 -DCYC=0 -DINIT=3",  # state and count are two words
        "SPEC_TOUCH -DOPS=1 -DINIT=2",  # touches what bytes alone name
        "GENWRAP -DOPS=1 -DINIT=2",  # generations repeat
        "BITCLEAR -DOPS=1 -DINIT=3",  # a bit that is cleared in place of an epoch
        "LEASE_ORDER -DOPS=1 -DINIT=4 -DKILLS=1",  # the pin before the lease is cleared
        "SKIP_DEAD -DOPS=1 -DINIT=3 -DKILLS=1",  # pins of the unreaped dead are no roots
        "NO_IDLE_ROUND -DOPS=1 -DINIT=2 -DGIVEUP=1",  # two epochs in use at once
        "PASS_OVER -DOPS=1 -DINIT=2 -DGIVEUP=1",  # a cycle goes on without who could not be flipped
        "RESURRECT_BLINDLY -DOPS=1 -DINIT=8",  # a process that missed a cycle's end trusts its phase
        "SWEEP_ANEW -DOPS=1 -DINIT=7 -DGIVEUP=1",  # a sweep that was given up is not gone on with
        "SLICE_NO_ROOT -DOPS=1 -DINIT=6 -DSLICED",  # what is dropped in slices is no root of what it names
        "ATTACH_IDLE -DATTACH -DOPS=1 -DINIT=3",  # a new slot begins in IDLE
        "ATTACH_UNLOCKED -DATTACH -DOPS=1 -DINIT=3",  # the phase is read before the slot is in use
        "FORK_UNCOUNTED -DFORK -DOPS=1 -DINIT=3",  # the child's pins are not counted
        "FORK_PIN_FIRST -DFORK -DOPS=1 -DINIT=3 -DKILLS=1",  # the child's pin before its count
    ),
    *broken(
        "pages.pml",
        "PUBLISH_BLINDLY -DINIT=5",  # an adopted orphan's record is written again without looking
        "ALLOC_NO_CHECK -DINIT=2",  # the fast path does not look at the record
        "FILL_NO_LOOK -DINIT=4 -DACTS=2",  # nor does a refill after its system call
        "LARGE_FIRST -DINIT=6",  # the record LARGE before the word LIVE
        "JUDGE_WORD_FIRST -DINIT=6",  # suspects judged word before record
        "JUDGE_NO_HANDSHAKE -DINIT=1",  # suspects judged at once
        "JUDGE_KEEP_LATE -DINIT=6 -DKILLS=1 -DCKILLS=1",  # a lost run is taken before its generation is kept
        "LIST_FIRST -DINIT=6",  # on the free list before it is RESERVED
        "GEN_RESTART -DINIT=6",  # generations die with the span
        "NO_URESERVED -DINIT=3",  # commits without saying so
        "TAKE_BUSY -DINIT=3",  # a span is given up while a unit is on its way
        "PUNCH_NOT_ASIDE -DINIT=2",  # a unit without living blocks is punched, FREE or not
        "STAMP_PLAIN -DINIT=3",  # units stamped by load and store, nobody locked out
        "ASIDE_NO_LOCK -DINIT=4 -DOPS=2 -DOPS1=0",  # the owner is not locked out
        "ORPHAN_NO_LOCK -DINIT=5 -DOPS=3 -DOPS1=0",  # nor is who may adopt
        "STRADDLE -DINIT=3 -DGEOM=1 -DOPS=2 -DOPS1=1",  # a block over two units needs both
        "CELLS_UNSEEN -DINIT=8",  # cells given back without looking under the lock
        "PUNCH_NO_HANDSHAKE -DINIT=8 -DACTS=2",  # a free run is punched at once
        "REAP_NO_HANDSHAKE -DINIT=8 -DKILLS=1",  # a dead process's run is
        "BEGIN_NO_HANDSHAKE -DINIT=8 -DACTS=2 -DCKILLS=1 -DOPS=0 -DOPS1=1",  # a dead coordinator's run is
        "LOOK_UNLOCKED -DINIT=5 -DKILLS=1",  # records are read without the heap lock
        "NO_ROLLBACK -DINIT=1 -DKILLS=1",  # a dead holder's log is ignored
        "END_NO_PUNCH -DINIT=3 -DKILLS=1",  # a dead owner's half committed units are left so
        "NO_REDO -DINIT=1 -DCKILLS=1",  # half done releases are not done again
        "NO_BEGIN -DINIT=5 -DCKILLS=1",  # a successor finishes nothing
    ),
]

EXPENSIVE_CONTROLS = broken(
    "gc.pml",
    "NO_IDLE_ROUND -DOPS=1 -DINIT=2 -DCKILLS=1",  # two epochs in use at once, after a death
    "PRIVATE_MARKS -DOPS=1 -DINIT=5 -DCKILLS=1",  # marks die with the coordinator
    "TAKE_UNSEEN -DOPS=2 -DINIT=2",  # a lease that appeared between looking and taking is taken
) + broken(
    "pages.pml",
    "HOLE_NO_HANDSHAKE -DINIT=8 -DACTS=3",  # a hole in a small span is punched at once
)

QUICK = [
    gc("-DOPS=1 -DINIT=9"),
    gc("-DOPS=1 -DINIT=3 -DATTACH"),
    gc("-DOPS=1 -DINIT=3 -DFORK"),
    gc("-DOPS=1 -DINIT=6 -DSLICED"),
    gc("-DOPS=1 -DINIT=2 -DGIVEUP=1"),
    gc("-DOPS=1 -DINIT=7 -DGIVEUP=1"),
    pages("-DINIT=9"),
    pages("-DINIT=8"),
    pages("-DINIT=3 -DGEOM=1 -DOPS=2 -DOPS1=1"),
    pages("-DINIT=3 -DNOSPC"),
    pages("-DINIT=1 -DKILLS=1"),
    pages("-DINIT=1 -DCKILLS=1"),
    *CONTROLS,
]

FULL = [
    *QUICK,
    gc("-DOPS=1 -DINIT=9 -DATTACH"),
    *(gc(f"-DOPS=1 -DINIT={start} -DFORK -DKILLS=1") for start in (3, 4)),
    gc("-DOPS=1 -DINIT=6 -DSLICED -DKILLS=1"),
    *(gc(f"-DOPS=1 -DINIT={start} -DGIVEUP=1 -DCKILLS=1") for start in (2, 7)),
    *(gc(f"-DOPS=1 -DINIT={start} -DKILLS=1 -DREAPIN") for start in (2, 3, 4)),
    *(gc(f"-DOPS=1 -DINIT={start} -DKILLS=1 -DCKILLS=1") for start in (2, 3, 4)),
    *(gc(f"-DOPS=2 -DINIT={start}") for start in (2, 3)),
    *(pages(f"-DINIT={start} -DKILLS=1 -DCKILLS=1") for start in range(9)),
    *(pages(f"-DINIT=9 {knob}") for knob in ("-DGEOM=1", "-DTHREADS", "-DNOSPC", "-DACTS=2", "-DOPS=2")),
    *EXPENSIVE_CONTROLS,
]


def build(run: Run, folder: Path, effort: Effort, *, shortest: bool) -> Path:
    """Raises CalledProcessError with what spin or the compiler said."""

    def call(*command: str) -> None:
        subprocess.run(command, cwd=folder, check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    call("spin", *run.flags.split(), "-a", str(HERE / run.model))
    search = ["-DSAFETY", "-DCOLLAPSE", f"-DMEMLIM={effort.memory_mib}", "-DVECTORSZ=4096"]
    call(*shlex.split(CC), effort.optimise, "-w", "-o", "pan", "pan.c", *search, *(["-DBFS"] if shortest else []))
    return folder / "pan"


def judge(output: str) -> tuple[str, str]:
    """The verdict of one search, and spin's own words where there is something to say."""
    said = re.search(r"^pan:1: (.*?) \(at depth", output, re.MULTILINE)
    if said:
        ours = said[1].startswith("assertion violated")
        return ("violated" if ours else "stuck"), re.sub(r"\s+", " ", said[1])
    errors = re.search(r"errors: (\d+)$", output, re.MULTILINE)
    cut = re.search(r"^.*(Search not completed|max search depth|MEMLIM|out of memory).*$", output, re.MULTILINE)
    if errors is None or cut is not None:
        return "not finished", cut[0].strip() if cut else "no result: out of time"
    return ("holds" if errors[1] == "0" else "stuck"), ""


def number(pattern: str, output: str) -> int:
    found = re.search(pattern, output, re.MULTILINE)
    return int(float(found[1])) if found else 0


def explore(pan: Path, limit_s: int) -> tuple[str, float]:
    """What the search says, and the seconds of CPU that it took: they do not depend on what else goes on here."""
    said = pan.with_name("said")
    command = f"ulimit -t {limit_s}; exec ./pan -m{SEARCH_DEPTH} -w24"
    with said.open("w") as file:
        process = subprocess.Popen(["sh", "-c", command], cwd=pan.parent, stdout=file, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return said.read_text(), usage.ru_utime + usage.ru_stime


def search(run: Run, folder: Path, effort: Effort, *, shortest: bool = False) -> Outcome:
    try:
        output, took = explore(build(run, folder, effort, shortest=shortest), effort.limit_s)
        verdict, detail = judge(output)
    except subprocess.CalledProcessError as error:
        output, took, verdict, detail = "", 0.0, "broken", str(error.output)
    states = number(r"^ *(\d[\d.e+]*) states, stored", output)
    depth = number(r"depth reached (\d+)", output)
    memory = number(r"^ *(\d[\d.e+]*)\ttotal actual memory usage", output)
    return Outcome(run.model, run.flags, states, depth, round(took, 1), memory, run.expected, verdict, detail[:120])


def check(run: Run, effort: Effort) -> Outcome:
    with tempfile.TemporaryDirectory(prefix="model-") as folder:
        return search(run, Path(folder), effort)


def check_undo() -> Outcome:
    done = subprocess.run([sys.executable, str(HERE / "undo.py")], capture_output=True, text=True)
    wrong = [line for line in done.stdout.splitlines() if not line.startswith("ok")]
    verdict = "holds" if done.returncode == 0 else "violated"
    return Outcome("undo.py", "", 0, 0, 0.0, 0, "holds", verdict, "; ".join(wrong)[:120])


def check_all(runs: Iterable[Run], effort: Effort) -> Iterator[Outcome]:
    yield check_undo()
    with ThreadPoolExecutor(effort.at_once) as pool:
        yield from pool.map(lambda run: check(run, effort), runs)


def report(outcomes: Iterable[Outcome], *, as_json: bool) -> int:
    """Prints the table; returns how many did not end as they should."""
    rows = []
    if not as_json:
        print(f"      {'states':>11}  {'depth':>6}  {'CPU s':>6}  {'MiB':>5}  {'expected':8}  {'got':12}  configuration")
    for row in outcomes:
        rows.append(row)
        if not as_json:
            mark = "ok   " if row.as_expected else "WRONG"
            print(
                f"{mark} {row.states:>11,}  {row.depth:>6,}  {row.seconds:>6.1f}  {row.memory_mib:>5,}  {row.expected:8}  {row.verdict:12}"
                f"  {row.model} {row.flags}" + ("" if row.as_expected else f"  {row.detail}"),
                flush=True,
            )
    wrong = sum(not row.as_expected for row in rows)
    if as_json:
        print(json.dumps([dataclasses.asdict(row) | {"as_expected": row.as_expected} for row in rows], indent=1))
    else:
        print(f"{len(rows)} runs, {wrong} wrong")
    return wrong


def trace(run: Run) -> int:
    """Prints the shortest counterexample: process, source line, statement and the values it changed."""
    with tempfile.TemporaryDirectory(prefix="model-") as name:
        folder = Path(name)
        outcome = search(run, folder, ONE_EFFORT, shortest=True)
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


def what_is_missing() -> list[str]:
    """What to install, a line each."""
    tools = {"spin": "spin 6.5 (Debian and Ubuntu: apt install spin)", shlex.split(CC)[0]: "a C compiler, or set $CC"}
    return [f"{tool} is not on PATH: install {what}" for tool, what in tools.items() if shutil.which(tool) is None]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--quick", action="store_true")
    what.add_argument("--full", action="store_true")
    what.add_argument("--one", metavar="MODEL")
    what.add_argument("--trace", metavar="MODEL")
    parser.add_argument("--only", metavar="PATTERN", default="", help="of the runs, those whose text this matches")
    parser.add_argument("--json", action="store_true")
    chosen, flags = parser.parse_known_args(arguments)
    if flags and (chosen.quick or chosen.full or any(not flag.startswith("-D") for flag in flags)):
        parser.error(f"not understood: {' '.join(flags)}")
    missing = what_is_missing()
    if missing:
        print(*missing, sep="\n", file=sys.stderr)
        return 2
    one = Run(chosen.one or chosen.trace or "", " ".join(flags), fails="-DBUG_" in " ".join(flags))
    if chosen.trace:
        return trace(one)
    if chosen.one:
        return min(report([check(one, ONE_EFFORT)], as_json=chosen.json), 1)
    runs = [run for run in (QUICK if chosen.quick else FULL) if re.search(chosen.only, f"{run.model} {run.flags}")]
    effort = QUICK_EFFORT if chosen.quick else FULL_EFFORT
    return min(report(check_all(runs, effort), as_json=chosen.json), 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
