"""Books against witness: do the heap's own records and the kernel agree, page by page? (I-10)

The books are one state per unit (an OS page; 2 MiB on a tmpfs of huge pages) up to the high-water
mark of the data area. The kernel is asked through `rss`, which knows nothing of the books:

    ===========================  ==========================================
    the books say                the kernel must say
    ===========================  ==========================================
    RELEASED                     absent
    COMMITTED                    held
    RESERVED, RELEASING          nothing: in transit, counted, not judged
    beyond the high-water mark   absent
    ===========================  ==========================================

Each maximal run of one kind is asked for with one system call. Only a run whose answer is wrong is
searched for the units that are wrong in it, so a heap that agrees costs one call a run. Nothing is
read or touched.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from enum import IntEnum
from typing import NamedTuple, Protocol, TypeAlias

from shmheap.rss import PAGE_BYTES, Run, Witness, held_bytes, resident_runs, witness_for

RawBooks: TypeAlias = tuple[bytes, int, int, int]


class UnitState(IntEnum):
    """State of one unit in the books; the numbers are those of the arena."""

    RELEASED = 0
    COMMITTED = 1
    RESERVED = 2
    RELEASING = 3


class Books(NamedTuple):
    """What the heap's records say.

    `states` has one byte, a `UnitState`, for each unit from 0 to the high-water mark. Unit 0 is at
    `data_offset` in the file; that, `unit_bytes` and `capacity_bytes` (of the data area) are bytes.
    """

    states: bytes
    data_offset: int
    unit_bytes: int
    capacity_bytes: int


class Bookkeeper(Protocol):
    """Whoever can read the books of a heap without being a user of it, such as `_core.Observer`."""

    def books(self) -> RawBooks:
        """A copy of the books as they are now, in the order of `Books`."""


@dataclass(frozen=True, slots=True)
class Mismatch:
    """A unit on which books and kernel disagree; `offset` in the file and `held_bytes` in bytes."""

    unit: int
    offset: int
    books: str
    kernel: str
    held_bytes: int

    def __str__(self) -> str:
        where = f"unit {self.unit} at file offset {self.offset:#x}"
        return f"{where}: books say {self.books}, kernel says {self.kernel}"


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What a look at books and kernel found; `_bytes` are bytes, `_units` counts of units.

    `books_held_bytes` are the units that the books call COMMITTED; `kernel_held_bytes` is what the
    kernel holds for the data area, `in_transit_held_bytes` the part of it that is RESERVED or
    RELEASING; `metadata_bytes` is what it holds for the rest of the file. With `exact` False (no
    cachestat: see `rss`) the kernel's number is a lower bound, that of the metadata an upper one,
    and COMMITTED units that look absent are `unjudged_units`, not mismatches. `looks` is how often
    books and kernel were compared; `quiet` says that the books did not move during the last look,
    so that its totals belong to one moment.
    """

    witness: str
    exact: bool
    unit_bytes: int
    checked_units: int
    in_transit_units: int
    unjudged_units: int
    books_held_bytes: int
    kernel_held_bytes: int
    in_transit_held_bytes: int
    metadata_bytes: int
    looks: int
    quiet: bool
    mismatches: tuple[Mismatch, ...]

    @property
    def agrees(self) -> bool:
        """True if no unit disagrees."""
        return not self.mismatches

    def as_json(self) -> dict[str, object]:
        """All fields, with `agrees` and the count `mismatched_pages`; json.dumps takes it."""
        return asdict(self) | {"agrees": self.agrees, "mismatched_pages": len(self.mismatches)}


def verify(
    fd: int, books: RawBooks, *, witness_of: Callable[[int], Witness] = witness_for
) -> VerifyReport:
    """Hold one copy of the books against the kernel.

    `fd` is open on the arena's file; `books` is a `Books` or the same four values; `witness_of`
    makes the witness of a file. On a heap in use, what moved between the copy and the look shows up
    as a mismatch: `verify_quiet` is for that. Raises ValueError if the books make no sense, OSError
    if the kernel does not answer. Cost: about 4 us a run of equal state, and 34 ns a page held:
    1 GiB takes 10 ms full, 7 ms with one block of 16 KiB in 64 alive, 0.4 s with every fourth page
    held at random.
    """
    books = _sound(Books(*books))
    witness = witness_of(fd)
    answers = [(run, witness.held(*_place(books, run))) for run in _runs(books)]
    kernel_held = sum(held for _, held in answers)
    in_transit = [(run, held) for run, held in answers if run.state in _IN_TRANSIT]
    transit_units = sum(run.units for run, _ in in_transit)
    unjudged = 0 if witness.exact else _unseen_units(answers, books.unit_bytes)
    return VerifyReport(
        witness=witness.name,
        exact=witness.exact,
        unit_bytes=books.unit_bytes,
        checked_units=len(books.states) - transit_units - unjudged,
        in_transit_units=transit_units,
        unjudged_units=unjudged,
        books_held_bytes=books.states.count(UnitState.COMMITTED) * books.unit_bytes,
        kernel_held_bytes=kernel_held,
        in_transit_held_bytes=sum(held for _, held in in_transit),
        metadata_bytes=max(0, held_bytes(fd) - kernel_held),
        looks=1,
        quiet=True,
        mismatches=tuple(_mismatches(fd, books, answers, witness)),
    )


def verify_quiet(
    fd: int,
    keeper: Bookkeeper,
    retries: int = 3,
    *,
    witness_of: Callable[[int], Witness] = witness_for,
) -> VerifyReport:
    """Hold the books against the kernel on a heap that may be busy.

    The books are read before and after each look, and a unit is reported only if it disagreed in
    every look while its state in the books was the same before, between and after all of them: at
    least two looks, at most `retries` + 1 (`retries` >= 1, else ValueError). Ends at the first look
    that leaves no suspect, so a heap that agrees costs one. A unit is RESERVED or RELEASING in the
    books from before the kernel is asked for it until after; what is dropped here is a unit that
    moved on between the reading of the books and the look.

    The totals are those of the last look. Never waits, takes no lock. Cost: `verify`'s for each.
    """
    if retries < 1:
        raise ValueError(f"retries must be at least 1, not {retries}")
    suspects: set[tuple[int, str]] | None = None
    before = Books(*keeper.books())
    for look in range(1, retries + 2):
        report = verify(fd, before, witness_of=witness_of)
        after = Books(*keeper.books())
        found = [
            wrong
            for wrong in report.mismatches
            if _state(before, wrong.unit) == _state(after, wrong.unit)
            and (suspects is None or (wrong.unit, wrong.books) in suspects)
        ]
        report = replace(report, looks=look, quiet=before == after, mismatches=tuple(found))
        if not found:
            break
        suspects = {(wrong.unit, wrong.books) for wrong in found}
        before = after
    return report


# --------------------------------------------------------------------------------------------------


_BEYOND = len(UnitState)  # stands for the state of what lies beyond the high-water mark
_IN_TRANSIT = (UnitState.RESERVED, UnitState.RELEASING)
_SAYS = {
    UnitState.RELEASED: "released",
    UnitState.COMMITTED: "committed",
    _BEYOND: "beyond the high-water mark",
}
_EQUAL_STATES = re.compile(rb"\x00+|\x01+|\x02+|\x03+")  # groupby takes ten times as long


class _Run(NamedTuple):
    """A maximal run of units of one state."""

    state: int
    first: int
    end: int

    @property
    def units(self) -> int:
        return self.end - self.first


def _sound(books: Books) -> Books:
    states, data_offset, unit_bytes, capacity_bytes = books
    if unit_bytes <= 0 or unit_bytes % PAGE_BYTES or data_offset < 0 or data_offset % PAGE_BYTES:
        raise ValueError(f"not whole OS pages: {data_offset=}, {unit_bytes=}")
    if capacity_bytes % unit_bytes or len(states) * unit_bytes > capacity_bytes:
        raise ValueError(f"{len(states)} units of {unit_bytes} bytes in {capacity_bytes=}")
    unknown = states.translate(None, bytes(UnitState))
    if unknown:
        raise ValueError(f"unknown unit states in the books: {sorted(set(unknown))}")
    return books


def _runs(books: Books) -> Iterator[_Run]:
    """The whole data area in file order."""
    states = books.states
    for match in _EQUAL_STATES.finditer(states):
        first, end = match.span()
        yield _Run(states[first], first, end)
    yield _Run(_BEYOND, len(states), books.capacity_bytes // books.unit_bytes)


def _place(books: Books, run: _Run) -> tuple[int, int]:
    """(file offset, bytes) of a run."""
    unit = books.unit_bytes
    return books.data_offset + run.first * unit, (run.end - run.first) * unit


def _unseen_units(answers: Iterable[tuple[_Run, int]], unit_bytes: int) -> int:
    """Units that must be held, of which a witness with a blind spot saw nothing."""
    committed = ((run, held) for run, held in answers if run.state == UnitState.COMMITTED)
    return sum(run.units - held // unit_bytes for run, held in committed)


def _mismatches(
    fd: int, books: Books, answers: Iterable[tuple[_Run, int]], witness: Witness
) -> Iterator[Mismatch]:
    """Each unit that is not as it must be, in file order; looks into the wrong runs only."""
    unit = books.unit_bytes
    for run, held in answers:
        right = unit if run.state == UnitState.COMMITTED else 0
        if held == run.units * right or run.state in _IN_TRANSIT or (right and not witness.exact):
            continue
        offset, nbytes = _place(books, run)
        found = resident_runs(fd, offset, nbytes, unit, witness=witness)
        for at, has in _wrong_units(found, offset, offset + nbytes, unit, right):
            kernel = "absent" if not has else "held" if has == unit else f"{has} bytes of it held"
            number = (at - books.data_offset) // unit
            yield Mismatch(number, at, _SAYS[run.state], kernel, has)


def _wrong_units(
    found: list[Run], start: int, end: int, unit: int, right: int
) -> Iterator[tuple[int, int]]:
    """(offset, bytes held) of each unit in [start, end) that does not hold what is right."""
    for run in (*found, Run(end, 0, 0)):
        if right:
            yield from ((offset, 0) for offset in range(start, run.offset, unit))
        held = min(run.held_bytes, unit)  # a run of several units is full
        if held != right:
            yield from ((offset, held) for offset in range(run.offset, run.end, unit))
        start = run.end


def _state(books: Books, unit: int) -> int:
    return books.states[unit] if unit < len(books.states) else _BEYOND
