#!/usr/bin/env python3
"""Hold a heap's books against the kernel, page by page, from outside.

    verify_rss.py NAME                  one report; exit status 1 if a page disagrees
    verify_rss.py PATH --json           the same, by path, as one JSON object
    verify_rss.py NAME --watch 30 --plot held.png
                                        follow what is held for 30 seconds
    verify_rss.py --self-test           is the witness to be trusted on this machine?

Never a user of the heap: it takes no slot and no lock, and touches no page of the data area.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import random
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from shmheap import rss
from shmheap._core import Observer
from shmheap.errors import HeapError
from shmheap.verify import Bookkeeper, Books, UnitState, VerifyReport, verify, verify_quiet

MISMATCHES_SHOWN = 40
MIB = 1 << 20


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 0 agrees, 1 disagrees, 2 could not look."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.self_test == (args.heap is not None):
        parser.error("give a heap, or --self-test")
    if args.plot and not args.watch:
        parser.error("--plot needs --watch SECONDS")
    try:
        if args.self_test:
            return _show_checks(list(self_test(args.directory)), args.json)
        with _observed(args.heap, args.directory) as (fd, keeper):
            if args.watch:
                return _watch(fd, keeper, args)
            return _show_report(verify_quiet(fd, keeper, args.retries), args.json)
    except (HeapError, OSError, ValueError, ImportError) as error:
        print(f"verify_rss: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        epilog="Exit status: 0 books and kernel agree, 1 they do not, 2 could not look.",
    )
    parser.add_argument("heap", nargs="?", help="name of a heap, or path of its file")
    parser.add_argument("--directory", default="/dev/shm", help="where heaps lie (%(default)s)")
    parser.add_argument(
        "--retries", type=int, default=3, help="looks after the first (%(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--self-test", action="store_true", help="test the witness on a scratch file"
    )
    parser.add_argument("--watch", type=float, metavar="SECONDS", help="follow for so long")
    parser.add_argument("--every", type=float, default=0.2, metavar="SECONDS", help="(%(default)s)")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw what --watch saw")
    return parser


@contextmanager
def _observed(heap: str, directory: str) -> Iterator[tuple[int, Bookkeeper]]:
    path = Path(heap) if "/" in heap else Path(directory, f"shmheap.{os.getuid()}.{heap}")
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        yield fd, Observer(fd)
    finally:
        os.close(fd)


# --------------------------------------------------------------------------------------------------
# One report


def _show_report(report: VerifyReport, as_json: bool) -> int:
    if as_json:
        print(json.dumps(report.as_json()))
    else:
        console = Console()
        console.print(_report_table(report))
        if report.mismatches:
            console.print(_mismatch_table(report))
    return 0 if report.agrees else 1


def _report_table(report: VerifyReport) -> Table:
    verdict = "agree" if report.agrees else f"disagree on {len(report.mismatches)} units"
    table = Table(title=f"books and kernel {verdict}", show_header=False)
    table.add_column("what")
    table.add_column("value", justify="right")
    trust = "exact" if report.exact else "lower bound: pages committed but not touched are not seen"
    for what, value in (
        ("witness", f"{report.witness} ({trust})"),
        ("books: committed", _size(report.books_held_bytes)),
        ("kernel: holds of the data area", _size(report.kernel_held_bytes)),
        ("of it in transit", _size(report.in_transit_held_bytes)),
        ("kernel: holds of the metadata", _size(report.metadata_bytes)),
        (f"units of {report.unit_bytes} bytes checked", f"{report.checked_units:,}"),
        ("units in transit, not judged", f"{report.in_transit_units:,}"),
        ("units the witness cannot judge", f"{report.unjudged_units:,}"),
        ("looks", f"{report.looks}"),
        ("books stood still", "yes" if report.quiet else "no: totals mix two moments"),
    ):
        table.add_row(what, value)
    return table


def _mismatch_table(report: VerifyReport) -> Table:
    hidden = len(report.mismatches) - MISMATCHES_SHOWN
    caption = f"and {hidden:,} more: --json has them all" if hidden > 0 else None
    table = Table("unit", "file offset", "books say", "kernel says", caption=caption)
    for wrong in report.mismatches[:MISMATCHES_SHOWN]:
        table.add_row(str(wrong.unit), f"{wrong.offset:#x}", wrong.books, wrong.kernel)
    return table


def _size(nbytes: int) -> str:
    return f"{nbytes / MIB:,.2f} MiB"


# --------------------------------------------------------------------------------------------------
# Following a heap


@dataclass(frozen=True, slots=True)
class Sample:
    """What was held at a moment: `at_s` seconds after the first sample, the rest as in reports."""

    at_s: float
    books_held_bytes: int
    kernel_held_bytes: int
    metadata_bytes: int
    mismatched_pages: int


def _watch(fd: int, keeper: Bookkeeper, args: argparse.Namespace) -> int:
    samples = _followed(fd, keeper, args)
    if args.plot:
        plot(samples, args.plot)
    if args.json:
        print(json.dumps({"samples": [asdict(sample) for sample in samples]}))
    else:
        Console().print(_watch_table(samples))
    return 1 if any(sample.mismatched_pages for sample in samples) else 0


def _followed(fd: int, keeper: Bookkeeper, args: argparse.Namespace) -> list[Sample]:
    samples: list[Sample] = []
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("", total=args.watch)
        start = time.monotonic()
        while not samples or samples[-1].at_s < args.watch:
            report = verify_quiet(fd, keeper, args.retries)
            samples.append(_sample(report, time.monotonic() - start))
            held = f"kernel holds {_size(report.kernel_held_bytes)}"
            progress.update(bar, completed=samples[-1].at_s, description=held)
            time.sleep(min(args.every, max(0.0, args.watch - samples[-1].at_s)))
    return samples


def _sample(report: VerifyReport, at_s: float) -> Sample:
    return Sample(
        at_s=round(at_s, 3),
        books_held_bytes=report.books_held_bytes,
        kernel_held_bytes=report.kernel_held_bytes,
        metadata_bytes=report.metadata_bytes,
        mismatched_pages=len(report.mismatches),
    )


def _watch_table(samples: list[Sample]) -> Table:
    held = [sample.kernel_held_bytes for sample in samples]
    wrong = sum(1 for sample in samples if sample.mismatched_pages)
    table = Table(title=f"{len(samples)} samples in {samples[-1].at_s:.1f} s", show_header=False)
    table.add_row("kernel held first", _size(held[0]))
    table.add_row("most", _size(max(held)))
    table.add_row("least", _size(min(held)))
    table.add_row("last", _size(held[-1]))
    table.add_row("samples in which a page disagreed", str(wrong))
    return table


def plot(samples: Sequence[Sample], file: Path) -> None:
    """Draw held bytes over time. Raises ImportError, with the remedy, without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("--plot needs matplotlib: pip install 'shmheap[plot]'") from None
    seconds = [sample.at_s for sample in samples]
    kernel = [sample.kernel_held_bytes / MIB for sample in samples]
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.fill_between(seconds, kernel, step="post", alpha=0.25)
    axes.step(seconds, kernel, where="post", label="the kernel holds")
    books = [sample.books_held_bytes / MIB for sample in samples]
    axes.step(seconds, books, where="post", linestyle="--", label="the books say committed")
    axes.set(xlabel="seconds", ylabel="MiB of the data area", ylim=(0, None))
    axes.legend()
    figure.savefig(file, dpi=120)


# --------------------------------------------------------------------------------------------------
# Is the witness to be trusted here?


@dataclass(frozen=True, slots=True)
class Check:
    """One thing tried on a scratch file."""

    name: str
    passed: bool
    detail: str


class Scratch:
    """A file without a name, its mapping, and honest books of what was done to it."""

    HEADER_UNITS = 4
    UNITS = 512

    def __init__(self, fd: int) -> None:
        unit = rss.PAGE_BYTES
        self.fd = fd
        self.base = self.HEADER_UNITS * unit
        os.ftruncate(fd, self.base + self.UNITS * unit)
        self.map = mmap.mmap(fd, 0)
        self.states = bytearray(self.UNITS)

    def books(self) -> Books:
        """The books as they are now."""
        unit = rss.PAGE_BYTES
        return Books(bytes(self.states), self.base, unit, self.UNITS * unit)

    def commit(self, first: int, units: int = 1, *, touch: bool = False) -> None:
        """Commit units as a heap does, by fallocate; `touch` also writes into each."""
        unit = rss.PAGE_BYTES
        os.posix_fallocate(self.fd, self.base + first * unit, units * unit)
        self.states[first : first + units] = bytes([UnitState.COMMITTED]) * units
        if touch:
            for number in range(first, first + units):
                self.map[self.base + number * unit] = 1

    def advise(self, advice: int, first: int, units: int) -> None:
        """Call madvise on units; the books are not told."""
        unit = rss.PAGE_BYTES
        self.map.madvise(advice, self.base + first * unit, units * unit)


def self_test(directory: str) -> Iterator[Check]:
    """Try the witness on a scratch file in `directory`: 2 MiB, which disappears with the fd."""
    fd = os.open(directory, os.O_TMPFILE | os.O_RDWR, 0o600)
    try:
        witness = rss.witness_for(fd)
        yield Check("a witness answers", True, f"{witness.name}, exact: {witness.exact}")
        scratch = Scratch(fd)
        if witness.exact:
            yield _check_untouched(scratch)
        yield _check_pattern(scratch)
        yield _check_flips(scratch, witness.exact)
        yield _check_dontneed(scratch)
        yield _check_remove(scratch)
        scratch.map.close()
    finally:
        os.close(fd)


def _check_untouched(scratch: Scratch) -> Check:
    scratch.commit(0, 8)
    report = verify(scratch.fd, scratch.books())
    held = report.kernel_held_bytes // rss.PAGE_BYTES
    return Check("pages committed but not touched are seen", held == 8, f"{held} of 8")


def _check_pattern(scratch: Scratch) -> Check:
    chosen = random.Random(2012).sample(range(scratch.UNITS), scratch.UNITS // 2)
    for unit in chosen:
        scratch.commit(unit, touch=True)
    before = rss.held_bytes(scratch.fd)
    report = verify(scratch.fd, scratch.books())
    untouched = rss.held_bytes(scratch.fd) == before
    detail = (
        f"{len(report.mismatches)} disagree, the look touched {'nothing' if untouched else 'pages'}"
    )
    return Check("a random pattern agrees with honest books", report.agrees and untouched, detail)


def _check_flips(scratch: Scratch, exact: bool) -> Check:
    """A lie about any one unit must be found and named; a blind witness cannot miss a held one."""
    missed = []
    lies = 0
    for unit, state in enumerate(bytes(scratch.states)):
        if state == UnitState.COMMITTED or exact:
            scratch.states[unit] = UnitState.COMMITTED - state
            report = verify(scratch.fd, scratch.books())
            scratch.states[unit] = state
            lies += 1
            missed += [unit] if [wrong.unit for wrong in report.mismatches] != [unit] else []
    return Check(
        "every single lie is found and named", not missed, f"{lies - len(missed)} of {lies}"
    )


def _check_dontneed(scratch: Scratch) -> Check:
    scratch.commit(0, scratch.UNITS, touch=True)
    before = rss.mapping_memory(os.getpid(), scratch.fd).rss
    scratch.advise(mmap.MADV_DONTNEED, 0, scratch.UNITS)
    after = rss.mapping_memory(os.getpid(), scratch.fd).rss
    report = verify(scratch.fd, scratch.books())
    held = report.kernel_held_bytes
    passed = report.agrees and after < before and held == scratch.UNITS * rss.PAGE_BYTES
    detail = f"RSS {_size(before)} to {_size(after)}, held {_size(held)}"
    return Check("MADV_DONTNEED lowers RSS, frees nothing, fools nobody", passed, detail)


def _check_remove(scratch: Scratch) -> Check:
    scratch.advise(mmap.MADV_REMOVE, 0, scratch.UNITS)
    scratch.states[:] = bytes(scratch.UNITS)
    report = verify(scratch.fd, scratch.books())
    held = report.kernel_held_bytes
    return Check("MADV_REMOVE frees", report.agrees and not held, f"held {_size(held)}")


def _show_checks(checks: list[Check], as_json: bool) -> int:
    passed = all(check.passed for check in checks)
    if as_json:
        print(json.dumps({"passed": passed, "checks": [asdict(check) for check in checks]}))
    else:
        table = Table("check", "", "detail", title="the witness on this machine")
        for check in checks:
            table.add_row(check.name, "ok" if check.passed else "[red]FAILED", check.detail)
        Console().print(table)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
