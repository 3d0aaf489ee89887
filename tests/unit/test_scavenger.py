from __future__ import annotations

import pytest
from fake_steward import UNIT, FakeSteward

from shmheap.config import Config
from shmheap.coordinator import pacing, scavenger
from shmheap.coordinator.collector import collect
from shmheap.coordinator.scavenger import BATCH_BYTES, scavenge
from shmheap.testing import FakeClock


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def heap(clock: FakeClock) -> FakeSteward:
    return FakeSteward(clock, Config(), units=256)


def fill_and_drop(heap: FakeSteward, units: int) -> None:
    process = heap.attach()
    heap.drop(process, heap.alloc(process, units))


def test_it_gives_back_in_bounded_batches_until_there_is_no_more(
    heap: FakeSteward, clock: FakeClock
) -> None:
    fill_and_drop(heap, 200)
    report = scavenge(heap, clock, "asked", stamp_le=pacing.EVERYTHING, goal_bytes=1 << 40)
    assert report.released_bytes == 200 * UNIT
    assert heap.held_bytes == 0
    assert heap.calls.count("release") == -(-200 * UNIT // BATCH_BYTES)
    assert report.runs == 4
    assert report.trigger == "asked"


def test_it_stops_at_the_goal(heap: FakeSteward, clock: FakeClock) -> None:
    fill_and_drop(heap, 200)
    report = scavenge(heap, clock, "asked", stamp_le=pacing.EVERYTHING, goal_bytes=70 * UNIT)
    assert report.released_bytes == 70 * UNIT
    assert heap.held_bytes == 130 * UNIT


def test_a_walk_that_met_its_goal_does_not_hide_the_first_pages_from_the_next(
    heap: FakeSteward, clock: FakeClock
) -> None:
    fill_and_drop(heap, 200)
    scavenge(heap, clock, "asked", stamp_le=pacing.EVERYTHING, goal_bytes=70 * UNIT)
    fill_and_drop(heap, 70)  # where the first walk has been
    scavenge(heap, clock, "asked", stamp_le=pacing.EVERYTHING, goal_bytes=1 << 40)
    assert heap.held_bytes == 0


def test_it_ends_although_the_workers_free_as_fast_as_it_gives_back(
    heap: FakeSteward, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scavenger, "BATCH_BYTES", 4 * UNIT)
    fill_and_drop(heap, 64)
    release = heap.release

    def release_and_churn(stamp_le: int, max_bytes: int, page: int) -> tuple[int, int, int]:
        result = release(stamp_le, max_bytes, page)
        fill_and_drop(heap, 64)
        return result

    monkeypatch.setattr(heap, "release", release_and_churn)
    report = scavenge(heap, clock, "asked", stamp_le=pacing.EVERYTHING, goal_bytes=64 * UNIT)
    assert report.released_bytes == 64 * UNIT


def test_only_what_is_old_enough_goes(heap: FakeSteward, clock: FakeClock) -> None:
    process = heap.attach()
    blocks = [heap.alloc(process) for _ in range(3)]
    heap.drop(process, blocks[0])
    collect(heap, clock, "asked", 100)
    old = heap.now_stamp()
    clock.advance(1)
    heap.drop(process, blocks[1])
    collect(heap, clock, "asked", 100)
    heap.drop(process, blocks[2])  # nobody has seen that yet
    report = scavenge(heap, clock, "aged", stamp_le=old, goal_bytes=1 << 40)
    assert report.released_bytes == UNIT
    assert [block.units[0].held for block in blocks] == [False, True, True]
    everything = scavenge(heap, clock, "asked", stamp_le=pacing.EVERYTHING, goal_bytes=1 << 40)
    assert everything.released_bytes == 2 * UNIT


def test_blocks_in_use_never_go(heap: FakeSteward, clock: FakeClock) -> None:
    process = heap.attach()
    heap.alloc(process, 5)
    report = scavenge(heap, clock, "memory", stamp_le=pacing.EVERYTHING, goal_bytes=1 << 40)
    assert (report.released_bytes, report.runs) == (0, 0)
    assert heap.held_bytes == 5 * UNIT


def test_what_is_gone_does_not_go_twice(heap: FakeSteward, clock: FakeClock) -> None:  # S10
    fill_and_drop(heap, 8)
    goal = {"stamp_le": pacing.EVERYTHING, "goal_bytes": 1 << 40}
    reports = [scavenge(heap, clock, "asked", **goal) for _ in range(2)]
    assert [report.released_bytes for report in reports] == [8 * UNIT, 0]


@pytest.mark.parametrize(("stamp_le", "goal_bytes"), [(0, 1 << 40), (-3000, 1 << 40), (5, 0)])
def test_with_nothing_to_do_the_heap_is_left_alone(
    heap: FakeSteward, clock: FakeClock, stamp_le: int, goal_bytes: int
) -> None:
    report = scavenge(heap, clock, "aged", stamp_le=stamp_le, goal_bytes=goal_bytes)
    assert report.released_bytes == 0
    assert heap.calls == []


def test_its_duration_is_the_clock_s(
    heap: FakeSteward, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow_release(_stamp_le: int, _max_bytes: int, _page: int) -> tuple[int, int, int]:
        clock.advance(0.5)
        return 0, 0, 0

    monkeypatch.setattr(heap, "release", slow_release)
    report = scavenge(heap, clock, "asked", stamp_le=pacing.EVERYTHING, goal_bytes=1)
    assert report.duration_ns == 500_000_000
