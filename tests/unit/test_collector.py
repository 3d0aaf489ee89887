from __future__ import annotations

import pytest
from fake_steward import UNIT, FakeSteward

from shmheap.config import Config
from shmheap.coordinator import FINAL, IDLE, MARK, SWEEP
from shmheap.coordinator.collector import collect, resume
from shmheap.coordinator.pacing import NEVER
from shmheap.testing import FakeClock

WHOLE = ["start_cycle", "mark", "finish_mark", "sweep", "stamp", "end_cycle"]


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock(start_s=1000)


@pytest.fixture
def heap(clock: FakeClock) -> FakeSteward:
    return FakeSteward(clock, Config())


def test_the_steps_come_in_the_protocol_s_order(heap: FakeSteward, clock: FakeClock) -> None:
    collect(heap, clock, "asked", 100)
    assert heap.calls == WHOLE
    assert heap.phase == IDLE


def test_it_frees_what_nobody_holds_and_says_so(heap: FakeSteward, clock: FakeClock) -> None:
    process = heap.attach()
    kept, lost, leased = (heap.alloc(process, units) for units in (1, 2, 4))
    heap.lease(process, leased)
    heap.drop(process, leased)
    heap.lose(process, lost)
    report = collect(heap, clock, "heap", 100, freed_dead_bytes=7, freed_lease_bytes=9)
    assert heap.blocks == {kept, leased}
    assert (report.trigger, report.cycle) == ("heap", 1)
    assert (report.marked, report.swept, report.freed_bytes) == (2, 1, 2 * UNIT)
    assert (report.freed_dead_bytes, report.freed_lease_bytes) == (7, 9)


def test_cycles_are_numbered(heap: FakeSteward, clock: FakeClock) -> None:
    assert [collect(heap, clock, "asked", 100).cycle for _ in range(3)] == [1, 2, 3]
    assert heap.stats()["num_gc"] == 3
    assert heap.stats()["last_gc"] == clock.monotonic_ns()


def test_only_forced_ones_count_as_forced(heap: FakeSteward, clock: FakeClock) -> None:
    for trigger in ("asked", "heap", "memory", "forced"):
        collect(heap, clock, trigger, 100)
    assert heap.num_forced == 1


def test_pages_are_dated_by_the_collection_that_saw_them_idle(  # S2, S4
    heap: FakeSteward, clock: FakeClock
) -> None:
    process = heap.attach()
    first, second, kept = (heap.alloc(process) for _ in range(3))
    heap.drop(process, first)
    assert [unit.stamp for unit in first.units] == [0]  # free, not seen yet
    clock.advance(5)
    collect(heap, clock, "asked", 100)
    seen_at = heap.now_stamp()
    clock.advance(7)
    heap.drop(process, second)
    collect(heap, clock, "asked", 100)
    assert [unit.stamp for unit in first.units] == [seen_at]  # the first look counts
    assert [unit.stamp for unit in second.units] == [seen_at + 70]
    assert [unit.stamp for unit in kept.units] == [0]


def test_the_next_one_depends_on_what_is_left(heap: FakeSteward, clock: FakeClock) -> None:
    process = heap.attach()
    heap.alloc(process, 10)
    heap.lose(process, heap.alloc(process, 20))
    collect(heap, clock, "asked", 50)
    assert heap.next_gc == 15 * UNIT
    collect(heap, clock, "asked", -1)
    assert heap.next_gc == NEVER


def test_the_longest_pause_of_any_step_is_reported(heap: FakeSteward, clock: FakeClock) -> None:
    assert collect(heap, clock, "asked", 100).pause_max_ns == 30  # of 10, 20, 30, 25, 15
    assert heap.pauses == [30]


def test_its_duration_is_the_clock_s(
    heap: FakeSteward, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = heap.sweep

    def slow_sweep() -> tuple[int, int, int]:
        clock.advance(0.25)
        return sweep()

    monkeypatch.setattr(heap, "sweep", slow_sweep)
    assert collect(heap, clock, "asked", 100).duration_ns == 250_000_000


@pytest.mark.parametrize(
    ("phase", "steps"), [(IDLE, []), (MARK, WHOLE), (FINAL, WHOLE), (SWEEP, WHOLE[3:])]
)
def test_a_successor_ends_the_cycle_that_it_finds(
    heap: FakeSteward, clock: FakeClock, phase: int, steps: list[str]
) -> None:
    heap.phase = phase
    resume(heap, clock, heap.begin(), 100)
    assert heap.calls == ["begin", *steps]
    assert heap.phase == IDLE


def test_a_resumed_sweep_uses_the_marks_that_it_finds(heap: FakeSteward, clock: FakeClock) -> None:
    process = heap.attach()
    marked, lost = heap.alloc(process), heap.alloc(process)
    heap.lose(process, lost)
    for step in (heap.start_cycle, heap.mark, heap.finish_mark):
        step()
    resume(heap, clock, heap.begin(), 100)
    assert heap.blocks == {marked}
    assert heap.stats()["num_gc"] == 1
