#!/usr/bin/env python3
"""Make every system call of every operation fail, one at a time, and see what becomes of the heap.

    syscalls.py                      everything: some minutes
    syscalls.py --share 1/20         every 20th of them, starting somewhere: for CI
    syscalls.py --op attach --op put
    syscalls.py --op attach --call fstat --error EINTR
    syscalls.py --list               the operations
    syscalls.py --controls           operations that are broken on purpose must be found out

Whoever meets the error must get an error of a type that is documented, or manage; no signal, no
hang, no descriptor left open; the heap is whole, the same process goes on, and another process
takes over and goes on. What is tried and what is not: docs/reference/syscalls.md. The exit status
is 0 if that held N of N times. Linux on x86-64 only.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import platform
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tools" / "syscalls"))
sys.path.append(str(ROOT / "tests" / "support"))

from syscalls_scene import (  # noqa: E402
    CONTROLS,
    ENDING,
    OF_CHILD,
    OPENING,
    TYPED,
    after_in_another,
    fds,
    names,
    prepare,
    quiet,
)
from syscalls_trace import (  # noqa: E402
    BEGIN,
    END,
    Traced,
    be_traced,
    can_fail_with,
    mark,
    name_of,
    trace,
)

ERRORS = ("ENOSPC", "ENOMEM", "EINTR", "EMFILE", "EACCES")
LIMIT_S = 20
"""How long a try may take until it hangs. It takes milliseconds."""


@dataclass
class Row:
    """An operation; `tried` are pairs of a call and an error."""

    operation: str
    calls: int
    tried: int = 0
    passed: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)  # of the operation
    failures: list[str] = field(default_factory=list)


@dataclass
class Tried:
    """One try: how the operation ended, and what was found wrong."""

    outcome: str
    wrong: str
    traced: Traced


class Breaker:
    """Tries; each has a heap of its own name."""

    def __init__(self) -> None:
        self._number = 0

    def attempt(self, operation: str, index: int, error: int) -> Tried:
        """Make call number `index` fail with that errno; -1: none of them."""
        self._number += 1
        name = f"syscalls-{os.getpid()}-{self._number}"
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reader)
            _be_victim(operation, name, writer)
        os.close(writer)

        def wanted(number: int, call: int) -> int:
            return error if number == index and can_fail_with(call, error) else 0

        traced = trace(pid, child=operation in OF_CHILD, wanted=wanted)
        with os.fdopen(reader, "rb") as said:
            outcome, wrong = _outcome(said.read(), traced.status)
        with quiet():
            try:
                after_in_another(name)
            except BaseException as fault:
                wrong = wrong or f"another process: {_last(fault)}"
        return Tried(outcome, wrong, traced)


def _outcome(said: bytes, status: int) -> tuple[str, str]:
    if said:
        outcome, wrong = json.loads(said)
        return outcome, wrong
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        outcome = "hang" if number == signal.SIGALRM else signal.Signals(number).name
        return outcome, outcome
    return f"exit {status >> 8}", f"it ended with {status >> 8} and said nothing"


def _be_victim(operation: str, name: str, writer: int) -> None:
    """What the process does that meets the error; does not return."""
    try:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        scene, act = prepare(operation, name)
        before = fds()
        signal.alarm(LIMIT_S)
        be_traced()
        with quiet():
            outcome, wrong = _act(act)
            if not wrong and operation not in ENDING:
                wrong = _after(scene, before, allowed=operation in OPENING)
        os.write(writer, json.dumps((outcome, wrong)).encode())
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)


def _act(act: Any) -> tuple[str, str]:
    """How it ended, and what is wrong about that."""
    fault: BaseException | None = None
    mark(BEGIN)
    try:
        act()
    except BaseException as caught:
        fault = caught
    mark(END)
    if fault is None:
        return "done", ""
    wrong = "" if isinstance(fault, TYPED) else f"not typed: {_last(fault)}"
    fault.__traceback__ = None  # it would keep what the operation held
    return type(fault).__name__, wrong


def _after(scene: Any, before: set[str], *, allowed: bool) -> str:
    try:
        left = fds() - before
        assert allowed or not left, f"descriptors left open: {left}"
        scene.after()
    except BaseException as fault:
        return f"the same process: {_last(fault)}"
    return ""


def _last(fault: BaseException) -> str:
    frames = traceback.extract_tb(fault.__traceback__)[-2:]
    where = " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in reversed(frames))
    return f"{type(fault).__name__}: {fault} ({where})"


def try_operation(operation: str, options: argparse.Namespace) -> Row:
    """Every call of an operation with every error, or those that were asked for."""
    breaker = Breaker()
    whole = breaker.attempt(operation, -1, 0)
    calls = whole.traced.calls
    row = Row(operation, len(calls))
    if whole.outcome != "done" or whole.wrong:
        row.failures.append(f"without any error: {whole.outcome} {whole.wrong}")
    taken, of = (int(part) for part in options.share.split("/"))
    for number, (index, error) in enumerate(_pairs(calls, options)):
        if (number * taken) % of < taken:
            _count(row, breaker.attempt(operation, index, getattr(errno, error)), index, error)
    return row


def _pairs(calls: list[int], options: argparse.Namespace) -> list[tuple[int, str]]:
    return [
        (index, error)
        for index, call in enumerate(calls)
        for error in options.error or ERRORS
        if can_fail_with(call, getattr(errno, error))
        and (not options.call or name_of(call) in options.call)
    ]


def _count(row: Row, one: Tried, index: int, error: str) -> None:
    row.tried += 1
    row.outcomes[one.outcome if one.traced.injected else "not reached"] += 1
    if not one.wrong:
        row.passed += 1
        return
    call = name_of(one.traced.calls[index]) if index < len(one.traced.calls) else "?"
    row.failures.append(f"{call} (number {index}) {error}: {one.outcome}; {one.wrong}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what was asked for; 0: nothing failed."""
    options = _parser().parse_args(arguments)
    if platform.machine() != "x86_64":
        print("syscalls.py: x86-64 only", file=sys.stderr)
        return 2
    if options.list:
        print("\n".join(names()))
        return 0
    if options.controls:
        return _controls(options)
    rows = [try_operation(name, options) for name in options.op or names()]
    total = sum(row.tried for row in rows)
    passed = sum(row.passed for row in rows)
    ok = total > 0 and not any(row.failures for row in rows)
    if options.json:
        found = {"ok": ok, "tried": total, "passed": passed, "rows": [vars(row) for row in rows]}
        print(json.dumps(found))
    else:
        _show(rows, total, passed)
    return 0 if ok else 1


def _controls(options: argparse.Namespace) -> int:
    options.error = ["EACCES"]
    blind = 0
    for name in CONTROLS:
        row = try_operation(name, options)
        found = any(name.split(", ")[1] in failure for failure in row.failures)
        print(f"{name}: {'found' if found else 'NOT FOUND'}")
        blind += not found
    return 1 if blind else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--op", action="append", choices=names(), metavar="NAME")
    parser.add_argument("--call", action="append", metavar="NAME")
    parser.add_argument("--error", action="append", choices=ERRORS)
    parser.add_argument("--controls", action="store_true")
    parser.add_argument("--share", default="1/1", metavar="N/M")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--list", action="store_true")
    return parser


def _show(rows: list[Row], total: int, passed: int) -> None:
    console = Console()
    table = Table("operation", "calls", "tried", "passed", "outcomes")
    for row in rows:
        outcomes = ", ".join(f"{n} {name}" for name, n in row.outcomes.most_common())
        table.add_row(row.operation, str(row.calls), str(row.tried), str(row.passed), outcomes)
    console.print(table)
    for row in rows:
        for failure in row.failures:
            console.print(f"{row.operation}: {failure}", markup=False)
    console.print(f"{passed} of {total} system calls that failed did no harm")


if __name__ == "__main__":
    sys.exit(main())
