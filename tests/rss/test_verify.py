"""Books against witness, on real files: every lie is found and named, every truth is left alone."""

from __future__ import annotations

import json
import mmap
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from shmheap import rss
from shmheap.verify import (
    Books,
    Mismatch,
    RawBooks,
    UnitState,
    VerifyReport,
    verify,
    verify_quiet,
)

PAGE = rss.PAGE_BYTES
RELEASED, COMMITTED, RESERVED, RELEASING = UnitState
HEADER_PAGES = 3


class Arena:
    """A file laid out like a heap's, whose books are written by the test: true or false."""

    def __init__(self, fd: int, units: int, *, unit_bytes: int = PAGE) -> None:
        self.fd = fd
        self.unit_bytes = unit_bytes
        self.data_offset = HEADER_PAGES * PAGE
        self.capacity_bytes = units * unit_bytes
        os.ftruncate(fd, self.data_offset + self.capacity_bytes)
        os.posix_fallocate(fd, 0, self.data_offset)
        self.memory = mmap.mmap(fd, 0)

    def offset(self, unit: int) -> int:
        return self.data_offset + unit * self.unit_bytes

    def commit(self, *units: int) -> None:
        for unit in units:
            os.posix_fallocate(self.fd, self.offset(unit), self.unit_bytes)

    def punch(self, *units: int) -> None:
        for unit in units:
            self.memory.madvise(mmap.MADV_REMOVE, self.offset(unit), self.unit_bytes)

    def books(self, states: Sequence[int]) -> Books:
        return Books(bytes(states), self.data_offset, self.unit_bytes, self.capacity_bytes)

    def verify(self, states: Sequence[int]) -> VerifyReport:
        return verify(self.fd, self.books(states))


@pytest.fixture
def fd() -> Iterator[int]:
    file = os.open("/dev/shm", os.O_TMPFILE | os.O_RDWR, 0o600)
    yield file
    os.close(file)


@pytest.fixture
def exact(fd: int) -> None:
    """Skips a test of what only cachestat can see."""
    if not rss.witness_for(fd).exact:
        pytest.skip("this kernel has no cachestat")


@pytest.fixture
def arena(fd: int, exact: None) -> Iterator[Arena]:
    arena = Arena(fd, 64)
    yield arena
    arena.memory.close()


def named(report: VerifyReport) -> list[tuple[int, str, str]]:
    return [(wrong.unit, wrong.books, wrong.kernel) for wrong in report.mismatches]


# --------------------------------------------------------------------------------------------------
# One look


def test_honest_books_agree_and_the_totals_are_right(arena: Arena) -> None:
    arena.commit(0, 1, 5, 9)
    arena.memory[arena.offset(1)] = 1  # touched or not is all one
    states = [1, 1, 0, 0, 0, 1, 2, 3, 0, 3]
    report = arena.verify(states)
    assert report.agrees
    assert report.exact
    assert report.books_held_bytes == 3 * PAGE
    assert report.kernel_held_bytes == 4 * PAGE
    assert report.in_transit_held_bytes == PAGE
    assert (report.checked_units, report.in_transit_units, report.unjudged_units) == (7, 3, 0)
    assert report.metadata_bytes == HEADER_PAGES * PAGE
    assert rss.held_bytes(arena.fd) == report.kernel_held_bytes + report.metadata_bytes


def test_each_kind_of_lie_is_named(arena: Arena) -> None:
    arena.commit(1, 3, 20)
    report = arena.verify([RELEASED, RELEASED, COMMITTED, COMMITTED, RELEASED])
    assert report.mismatches == (
        Mismatch(1, arena.offset(1), "released", "held", PAGE),
        Mismatch(2, arena.offset(2), "committed", "absent", 0),
        Mismatch(20, arena.offset(20), "beyond the high-water mark", "held", PAGE),
    )
    assert str(report.mismatches[1]) == (
        f"unit 2 at file offset {arena.offset(2):#x}: books say committed, kernel says absent"
    )


@pytest.mark.parametrize("seed", range(4))
def test_every_single_lie_in_a_random_pattern_is_found_and_named(arena: Arena, seed: int) -> None:
    dice = random.Random(seed)
    states = [dice.choice((RELEASED, COMMITTED, RESERVED, RELEASING)) for _ in range(64)]
    arena.commit(*(unit for unit, state in enumerate(states) if state == COMMITTED))
    arena.commit(*(unit for unit, state in enumerate(states) if state > 1 and dice.random() < 0.5))
    assert arena.verify(states).agrees
    for unit, state in enumerate(states):
        if state in (RELEASED, COMMITTED):
            lie: list[int] = [*states]
            lie[unit] = COMMITTED - state
            kernel = "held" if state == COMMITTED else "absent"
            says = "committed" if state == RELEASED else "released"
            assert named(arena.verify(lie)) == [(unit, says, kernel)]


@pytest.mark.parametrize("seed", range(20))
def test_any_number_of_lies_is_found_exactly(arena: Arena, seed: int) -> None:
    """Books and file are two independent random patterns; the slow oracle compares unit by unit."""
    dice = random.Random(seed)
    high_water = dice.randint(0, 64)
    bias = dice.choice((0.05, 0.5, 0.95))
    truth = [dice.random() < bias for _ in range(64)]
    arena.commit(*(unit for unit, held in enumerate(truth) if held))
    states = [dice.choice((0, 0, 1, 1, 2, 3)) for _ in range(high_water)]
    beyond = [RELEASED] * (64 - high_water)
    wrong = [
        unit
        for unit, (state, held) in enumerate(zip([*states, *beyond], truth, strict=True))
        if state <= COMMITTED and held != (state == COMMITTED)
    ]
    report = arena.verify(states)
    assert [mismatch.unit for mismatch in report.mismatches] == wrong
    assert report.kernel_held_bytes == sum(truth) * PAGE


def test_units_in_transit_are_never_judged(arena: Arena) -> None:
    arena.commit(0, 2)
    assert arena.verify([RESERVED, RESERVED, RELEASING, RELEASING]).agrees


def test_a_whole_data_area_below_the_high_water_mark_has_nothing_beyond(arena: Arena) -> None:
    arena.commit(*range(64))
    report = arena.verify([COMMITTED] * 64)
    assert report.agrees
    assert report.kernel_held_bytes == arena.capacity_bytes


@pytest.mark.usefixtures("exact")
def test_large_units_held_in_part_are_wrong_either_way(fd: int) -> None:
    unit, part = 16 * PAGE, 5 * PAGE
    arena = Arena(fd, 4, unit_bytes=unit)
    arena.commit(1, 2)
    os.posix_fallocate(fd, arena.offset(0), part)
    arena.memory.madvise(mmap.MADV_REMOVE, arena.offset(2), unit - part)
    says = f"{part} bytes of it held"
    assert named(arena.verify([0, 1, 1])) == [(0, "released", says), (2, "committed", says)]
    arena.memory.close()


def test_dontneed_does_not_fool_the_report(arena: Arena) -> None:
    """Judged by RSS, as in 2012, these pages would count as released; the kernel holds them all."""
    arena.commit(*range(8))
    for unit in range(8):
        arena.memory[arena.offset(unit)] = 1
    arena.memory.madvise(mmap.MADV_DONTNEED, 0, len(arena.memory))
    assert rss.mapping_memory(os.getpid(), arena.fd).rss == 0
    assert len(arena.verify([RELEASED] * 8).mismatches) == 8
    arena.punch(*range(8))
    assert arena.verify([RELEASED] * 8).agrees


def test_verifying_touches_nothing(arena: Arena) -> None:
    arena.commit(*range(0, 64, 3))
    before = (rss.held_bytes(arena.fd), rss.resident_runs(arena.fd, 0, len(arena.memory)))
    for states in ([RELEASED] * 64, [COMMITTED] * 64, []):
        arena.verify(states)
        verify(arena.fd, arena.books(states), witness_of=rss.SeekWitness)
    after = (rss.held_bytes(arena.fd), rss.resident_runs(arena.fd, 0, len(arena.memory)))
    assert after == before


@pytest.mark.usefixtures("exact")
def test_a_terabyte_of_capacity_costs_one_question(fd: int) -> None:
    questions: list[tuple[int, int]] = []

    class Asked(rss.CachestatWitness):
        def held(self, offset: int, nbytes: int) -> int:
            questions.append((offset, nbytes))
            return super().held(offset, nbytes)

    capacity = 1 << 40
    os.ftruncate(fd, capacity)
    assert verify(fd, (b"", 0, PAGE, capacity), witness_of=Asked).agrees
    assert questions == [(0, PAGE), (0, capacity)], "the first: does cachestat answer at all?"


def test_without_cachestat_what_cannot_be_seen_is_not_judged(arena: Arena) -> None:
    arena.commit(0, 1, 2)
    arena.memory[arena.offset(1)] = 1
    arena.memory[arena.offset(4)] = 1
    books = arena.books([COMMITTED, COMMITTED, COMMITTED, RELEASED, RELEASED])
    report = verify(arena.fd, books, witness_of=rss.SeekWitness)
    assert (report.witness, report.exact) == ("seek", False)
    assert named(report) == [(4, "released", "held")]
    assert (report.checked_units, report.unjudged_units) == (3, 2)


@pytest.mark.parametrize(
    ("books", "message"),
    [
        ((b"\x04", 0, PAGE, PAGE), "unknown unit states.*4"),
        ((b"\x00\x00", 0, PAGE, PAGE), "2 units"),
        ((b"", 0, PAGE, PAGE + 1), "0 units"),
        ((b"", 1, PAGE, PAGE), "data_offset=1"),
        ((b"", -PAGE, PAGE, PAGE), "data_offset=-"),
        ((b"", 0, 0, PAGE), "unit_bytes=0"),
        ((b"", 0, PAGE // 2, PAGE), "unit_bytes="),
    ],
)
def test_books_that_make_no_sense_are_refused(fd: int, books: RawBooks, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        verify(fd, books)


def test_as_json_has_everything_and_is_json(arena: Arena) -> None:
    arena.commit(0)
    found = json.loads(json.dumps(arena.verify([RELEASED]).as_json()))
    assert found["agrees"] is False
    assert found["mismatched_pages"] == 1
    assert found["mismatches"] == [
        {
            "unit": 0,
            "offset": arena.data_offset,
            "books": "released",
            "kernel": "held",
            "held_bytes": PAGE,
        }
    ]


# --------------------------------------------------------------------------------------------------
# A heap that moves


class Script:
    """A bookkeeper that does one step of a script before each reading, then reads its books."""

    def __init__(self, arena: Arena, states: list[int], *steps: Callable[[], object]) -> None:
        self.arena = arena
        self.states = states
        self.steps = list(steps)
        self.readings = 0

    def books(self) -> RawBooks:
        if self.readings < len(self.steps):
            self.steps[self.readings]()
        self.readings += 1
        return self.arena.books(self.states)


def nothing() -> None:
    """A step in which the heap stands still."""


def test_a_quiet_heap_that_agrees_costs_one_look(arena: Arena) -> None:
    arena.commit(0)
    report = verify_quiet(arena.fd, Script(arena, [COMMITTED]))
    assert (report.agrees, report.looks, report.quiet) == (True, 1, True)


def test_a_lie_that_lasts_is_reported(arena: Arena) -> None:
    arena.commit(2)
    report = verify_quiet(arena.fd, Script(arena, [COMMITTED, RELEASED]), retries=1)
    assert named(report) == [
        (0, "committed", "absent"),
        (2, "beyond the high-water mark", "held"),
    ]
    assert (report.looks, report.quiet) == (2, True)


def test_a_unit_that_moved_during_the_look_is_not_reported(arena: Arena) -> None:
    """The books are read, then the heap commits unit 0: its state is another after the look."""
    states: list[int] = [RELEASED, RELEASED]

    def tell() -> None:
        states[0] = COMMITTED

    keeper = Script(arena, states, lambda: arena.commit(0), tell)
    report = verify_quiet(arena.fd, keeper)
    assert report.agrees
    assert not report.quiet


def test_a_heap_that_grew_during_the_look_is_not_reported(arena: Arena) -> None:
    states: list[int] = []
    keeper = Script(arena, states, lambda: arena.commit(0), lambda: states.append(COMMITTED))
    assert verify_quiet(arena.fd, keeper).agrees


def test_a_unit_that_agrees_once_is_not_reported(arena: Arena) -> None:
    """Away and back between two readings: the same state, but at the next look the truth."""
    keeper = Script(arena, [COMMITTED], nothing, lambda: arena.commit(0))
    report = verify_quiet(arena.fd, keeper)
    assert (report.agrees, report.looks, report.quiet) == (True, 2, True)


def test_only_what_was_wrong_in_every_look_is_reported(arena: Arena) -> None:
    """Unit 0 lies throughout, unit 1 in the first look, unit 2 from the second on."""
    arena.commit(2)

    def trade() -> None:
        arena.commit(1)
        arena.punch(2)

    keeper = Script(arena, [COMMITTED] * 3, nothing, trade)
    report = verify_quiet(arena.fd, keeper)
    assert named(report) == [(0, "committed", "absent")]
    assert report.looks == 4


def test_each_look_of_a_blind_witness_is_a_new_one(arena: Arena) -> None:
    arena.memory[arena.offset(0)] = 1
    keeper = Script(arena, [RELEASED], nothing, lambda: arena.punch(0))
    report = verify_quiet(arena.fd, keeper, witness_of=rss.SeekWitness)
    assert (report.agrees, report.looks) == (True, 2)


def test_fewer_than_two_looks_prove_nothing(arena: Arena) -> None:
    with pytest.raises(ValueError, match="retries"):
        verify_quiet(arena.fd, Script(arena, []), retries=0)


# --------------------------------------------------------------------------------------------------
# The tool

TOOL = Path(__file__).parents[2] / "tools" / "verify_rss.py"


def run_tool(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_tools_self_test_passes() -> None:
    done = run_tool("--self-test", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    checks = json.loads(done.stdout)["checks"]
    assert len(checks) >= 5
    assert all(check["passed"] for check in checks)


def test_the_tool_says_what_it_cannot_look_at() -> None:
    done = run_tool("there-is-no-such-heap")
    assert done.returncode == 2
    assert "there-is-no-such-heap" in done.stderr
    assert run_tool().returncode == 2
