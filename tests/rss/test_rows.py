"""What became of the 2012 commit, row by row (S1 to S13, S16), and its five faults.

On a real heap whose coordinator is the test: stamps are numbers that the test chooses, and after
each step the books must agree with the kernel page by page. When to do what is policy, and has its
tests on fake time (tests/unit/test_pacing.py, test_loop.py); S14 and S15 need processes
(tests/multiproc).
"""

from __future__ import annotations

import dataclasses
import mmap
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from by_hand import EVERYTHING, PAGE, HeapByHand
from processes import Worker
from stepper import Stepped, pause

from shmheap import Block, HeapStats, rss
from shmheap.verify import UnitState

KIB, MIB = 1 << 10, 1 << 20
ROOT = Path(__file__).resolve().parents[2]
CLASSES = (ROOT / "shmheap" / "csrc" / "size_classes.h").read_text()
SPANS = {
    int(npages): (int(size), int(nblocks))
    for size, npages, nblocks in re.findall(r"^    \{ *(\d+), *(\d+), *(\d+),", CLASSES, re.M)
}
"""By their pages, some class of such spans: bytes of a block, and blocks."""

LATE = 1 << 20
"""A stamp later than all that the tests give, and not `EVERYTHING`."""


@pytest.fixture
def hand(heap_name: str) -> Iterator[HeapByHand]:
    with HeapByHand(heap_name) as hand:
        pinned = hand.heap.alloc(1)  # so that the page of pins stays where it is
        hand.collect()
        hand.release()
        yield hand
        hand.assert_sound()
        pinned.free()


def row_of_blocks(hand: HeapByHand, nbytes: int, count: int) -> list[Block]:
    """Large blocks, in order of their place; neighbours if the heap is new."""
    return sorted((hand.heap.alloc(nbytes) for _ in range(count)), key=lambda block: block.offset)


def released(hand: HeapByHand) -> int:
    hand.assert_sound()
    return hand.stats.heap_released


# S1, S16: the numbers


def test_s1_s16_the_numbers_have_their_names_and_meanings(heap_name: str) -> None:
    with HeapByHand(heap_name) as hand:
        assert dataclasses.is_dataclass(HeapStats)
        empty = hand.stats
        assert (empty.heap_sys, empty.heap_inuse, empty.heap_idle, empty.heap_released) == (0,) * 4
        assert (empty.last_gc, empty.num_gc, empty.pause_ns) == (0, 0, ())
        with pytest.raises(dataclasses.FrozenInstanceError):
            empty.heap_sys = 1  # type: ignore[misc]

        blocks = row_of_blocks(hand, MIB, 4)
        full = hand.stats
        assert full.heap_alloc == 4 * MIB
        assert (full.heap_objects, full.mallocs, full.frees) == (4, 4, 0)
        assert 4 * MIB <= full.heap_inuse <= 4 * MIB + 4 * PAGE
        assert full.heap_sys == full.heap_idle + full.heap_inuse

        blocks.pop(1).free()
        less = hand.stats
        assert less.heap_sys == full.heap_sys, "a high-water mark"
        assert less.heap_idle - full.heap_idle == full.heap_inuse - less.heap_inuse == MIB
        assert less.heap_alloc == 3 * MIB
        assert (less.heap_objects, less.mallocs, less.frees) == (3, 4, 1)
        assert less.heap_released == full.heap_released

        hand.collect()
        hand.release()
        assert hand.stats.heap_released - less.heap_released >= MIB
        hand.assert_sound()


def test_s1_collections_are_counted(hand: HeapByHand) -> None:
    before = hand.stats
    for number in range(300):
        for step in ("start_cycle", "mark", "finish_mark", "sweep"):
            getattr(hand.steward, step)()
        hand.steward.end_cycle(1000 + number, number % 3 == 0, number)
    after = hand.stats
    assert after.num_gc - before.num_gc == 300
    assert after.num_forced_gc - before.num_forced_gc == 100
    assert after.next_gc == 1299
    assert after.last_gc > before.last_gc
    assert len(after.pause_ns) == 256
    assert all(
        pause >= number for pause, number in zip(after.pause_ns, range(44, 300), strict=True)
    )
    assert after.pause_total_ns - before.pause_total_ns >= sum(after.pause_ns)


def test_s1_what_lies_below_the_mark_and_was_never_touched_counts_as_released(
    hand: HeapByHand,
) -> None:
    before = hand.stats
    block = hand.heap.alloc(300)  # a span of two pages, of which the first units are filled
    after = hand.stats
    assert after.heap_inuse - before.heap_inuse == 2 * PAGE
    assert after.heap_sys - after.heap_released == hand.verify().kernel_held_bytes
    assert len(block) == 300


def test_s1_released_may_include_holes_in_spans_in_use(hand: HeapByHand) -> None:
    blocks = [hand.heap.alloc(256) for _ in range(64 * 32)]
    blocks.sort(key=lambda block: block.offset)
    kept = blocks[::32]  # one in every other OS page
    del blocks
    hand.collect()
    in_use = hand.stats.heap_inuse
    assert hand.release() >= 60 * 4 * KIB
    assert hand.stats.heap_inuse == in_use, "the spans are in use as before"
    assert hand.stats.heap_released > hand.stats.heap_idle
    assert len(kept) == 64
    hand.assert_sound()


# S2, S4: when a page was first seen unused


def test_s2_what_no_collection_has_seen_unused_has_no_age(hand: HeapByHand) -> None:
    hand.heap.alloc(MIB).free()
    assert hand.release(LATE) == 0
    hand.collect(3)
    assert hand.release(2) == 0
    assert hand.release(3) == MIB


def test_s2_the_first_sight_counts(hand: HeapByHand) -> None:
    hand.heap.alloc(MIB).free()
    for stamp in (5, 6, 100, 1000):
        hand.collect(stamp)
    assert hand.release(4) == 0
    assert hand.release(5) == MIB


def test_s4_the_sweep_stamps_what_is_newly_free_and_no_more(hand: HeapByHand) -> None:
    first, second = row_of_blocks(hand, MIB, 2)
    first.free()
    hand.collect(5)
    second.free()
    assert hand.steward.stamp(9) == MIB // mmap.PAGESIZE
    assert hand.steward.stamp(10) == 0
    assert hand.release(5) == MIB
    assert hand.release(9) == MIB


# S3, S7, S9, S10, S11: giving back


def test_s3_s10_only_what_is_not_released_yet_is_released(hand: HeapByHand) -> None:
    blocks = row_of_blocks(hand, MIB, 4)
    before = released(hand)
    blocks[1].free()
    hand.collect(1)
    assert hand.release(1) == MIB
    assert released(hand) - before == MIB
    for number in (0, 2, 3):
        blocks[number].free()
    hand.collect(2)
    assert released(hand) - before == MIB, "a span of 4 MiB, of which one is released"
    assert hand.release(2) == 3 * MIB
    assert released(hand) - before == 4 * MIB
    assert hand.release(EVERYTHING) == 0


def test_s7_the_age_rule_takes_the_old_and_leaves_the_young(hand: HeapByHand) -> None:
    blocks = row_of_blocks(hand, MIB, 8)
    for stamp, block in enumerate(blocks[::2], start=1):
        block.free()
        hand.collect(stamp)
    for stamp in range(1, 5):
        before = released(hand)
        assert hand.release(stamp) == MIB
        assert released(hand) - before == MIB


def test_s9_every_free_list_is_walked(hand: HeapByHand) -> None:
    """Free spans of each length from 1 to 80 pages, and of some long ones."""
    lengths = [*range(9, 81), 100, 127, 128, 129, 200, 255, 256, 300, 511, 700, 1000]
    spans, walls = [], [hand.heap.alloc(9 * PAGE)]
    for length in lengths:
        spans.append(hand.heap.alloc(length * PAGE))
        walls.append(hand.heap.alloc(9 * PAGE))
    low = hand.stats.heap_released
    del spans
    hand.collect()
    assert hand.release(1) == sum(lengths) * PAGE
    assert hand.stats.heap_released - low == sum(lengths) * PAGE
    hand.assert_sound()


@pytest.mark.parametrize("npages", range(1, 9))
def test_s9_short_free_spans_are_walked_too(hand: HeapByHand, npages: int) -> None:
    """Every other one of 20 spans of small blocks is empty: runs of 1 to 8 pages."""
    size, nblocks = SPANS[npages]
    blocks = [hand.heap.alloc(size) for _ in range(20 * nblocks)]
    blocks.sort(key=lambda block: block.offset)
    empty = [block.offset for block in blocks[:: 2 * nblocks]]
    kept = blocks[nblocks :: 2 * nblocks]
    del blocks
    hand.collect()
    assert hand.stats.heap_idle == 10 * npages * PAGE
    assert len(kept) == 10
    hand.release(1)
    assert [hand.held(offset, npages * PAGE) for offset in empty] == [0] * 10


def test_s11_fault_5_releasing_frees_the_memory_and_not_only_the_mapping(hand: HeapByHand) -> None:
    """RSS falls on MADV_DONTNEED, and nothing is free."""
    block = hand.heap.put(b"x" * (8 * MIB))
    with mmap.mmap(hand.fd, 0, prot=mmap.PROT_READ) as window:
        start = hand.observer.books()[1] + block.offset
        assert window[start : start + 8 * MIB].count(b"x") == 8 * MIB
        touched = rss.mapping_memory(os.getpid(), hand.fd).rss
        window.madvise(mmap.MADV_DONTNEED)
        assert rss.mapping_memory(os.getpid(), hand.fd).rss <= touched - 8 * MIB
        assert hand.held(block.offset, 8 * MIB) == 8 * MIB, "to the kernel it is as it was"
        hand.assert_sound()
        place = block.offset
        block.free()
        assert window[start] == ord("x")
        machine = rss.held_bytes(hand.fd)
        hand.collect()
        assert hand.release() >= 8 * MIB
        assert hand.held(place, 8 * MIB) == 0
        assert machine - rss.held_bytes(hand.fd) >= 8 * MIB
        assert rss.mapping_memory(os.getpid(), hand.fd).rss <= touched - 8 * MIB


def test_a_walk_in_small_steps_comes_to_its_end(hand: HeapByHand) -> None:
    blocks = row_of_blocks(hand, 256 * KIB, 64)
    del blocks[::2]
    hand.collect(1)
    steps = []
    page = 0
    while not steps or page:
        nbytes, _, page = hand.steward.release(1, MIB, page)
        steps.append(nbytes)
        hand.assert_sound()
    assert sum(steps) == 32 * 256 * KIB
    assert len(steps) > 4
    assert all(step <= 2 * MIB for step in steps)


# S12, S13: taking and freeing again


@pytest.mark.parametrize("share", [1, 2, 3, 8])
def test_s12_fault_2_taking_part_of_a_released_span_is_exact(hand: HeapByHand, share: int) -> None:
    hand.heap.alloc(8 * MIB).free()
    hand.collect()
    hand.release()
    before = released(hand)
    part = hand.heap.alloc(8 * MIB // share // PAGE * PAGE)
    assert before - released(hand) == part.nbytes, "what it had, and no more"
    assert hand.release() == 0, "the tail is not released twice"
    assert released(hand) == before - part.nbytes
    assert bytes(part) == bytes(part.nbytes)
    part.free()
    assert released(hand) == before - 8 * MIB // share // PAGE * PAGE
    hand.collect()
    hand.release()
    assert released(hand) == before


def test_s12_taking_part_of_a_partly_released_span_is_exact(hand: HeapByHand) -> None:
    blocks = row_of_blocks(hand, 512 * KIB, 16)
    for block in blocks[::2]:
        block.free()
    hand.collect(1)
    hand.release(1)
    for block in blocks[1::2]:
        block.free()
    striped = released(hand)
    lows = []
    held: list[Block] = []
    for nbytes in (100 * KIB, 512 * KIB, 700 * KIB, 3 * MIB):
        held.append(hand.heap.alloc(nbytes))
        lows.append(released(hand))
    assert striped >= lows[0] >= lows[1] >= lows[2] > lows[3]
    for block in held:
        assert hand.held(block.offset, -(-block.nbytes // 4096) * 4096) >= block.nbytes
    del held, block
    hand.collect(2)
    hand.release()
    assert released(hand) == striped + 4 * MIB


def test_s12_small_blocks_take_only_what_they_need_of_a_released_span(hand: HeapByHand) -> None:
    hand.heap.alloc(8 * MIB).free()
    hand.collect()
    hand.release()
    before = released(hand)
    blocks = [hand.heap.alloc(64) for _ in range(100)]
    assert 0 < before - released(hand) <= 4 * PAGE
    del blocks
    hand.collect()
    hand.release()
    assert before - released(hand) <= PAGE, "pins"


def test_s13_use_takes_the_age(hand: HeapByHand) -> None:
    hand.heap.alloc(MIB).free()
    hand.collect(1)
    hand.heap.alloc(MIB).free()  # the same place
    assert hand.release(LATE) == 0, "not seen idle since"
    hand.collect(7)
    assert hand.release(6) == 0
    assert hand.release(7) == MIB


def test_s13_use_takes_the_age_of_what_was_used_and_of_nothing_else(hand: HeapByHand) -> None:
    hand.heap.alloc(8 * MIB).free()
    hand.collect(1)
    hand.heap.alloc(MIB).free()
    hand.collect(5)
    assert hand.release(1) == 7 * MIB
    assert hand.release(5) == MIB


def test_s13_merging_adds_what_is_released(hand: HeapByHand) -> None:
    blocks = row_of_blocks(hand, MIB, 5)
    base = released(hand)
    for number in (0, 2, 4):
        blocks[number].free()
    hand.collect(1)
    hand.release(1)
    assert released(hand) - base == 3 * MIB
    for number in (1, 3):
        blocks[number].free()
        assert released(hand) - base == 3 * MIB
    merged = hand.heap.alloc(5 * MIB)
    assert released(hand) == base
    assert bytes(merged) == bytes(5 * MIB), "the mark that it needs zeroing was kept, too"


def test_s13_merged_spans_are_zeroed_where_they_are_dirty(hand: HeapByHand) -> None:
    blocks = row_of_blocks(hand, MIB, 6)
    for number, block in enumerate(blocks):
        block[:] = bytes([number + 1]) * MIB
    places = [block.offset for block in blocks]
    blocks[1].free()
    blocks[4].free()
    hand.collect(1)
    hand.release(1)
    del blocks, block
    again = hand.heap.alloc(6 * MIB)
    assert again.offset == places[0]
    assert bytes(again) == bytes(6 * MIB)


# The five faults


def churn_nothing(_hand: HeapByHand, _wall: list[Block]) -> None:
    pass


def churn_large(hand: HeapByHand, _wall: list[Block]) -> None:
    hand.heap.alloc(9 * PAGE).free()


def churn_small(hand: HeapByHand, _wall: list[Block]) -> None:
    blocks = [hand.heap.alloc(500) for _ in range(300)]
    del blocks


def churn_wall(hand: HeapByHand, wall: list[Block]) -> None:
    """The block just below the huge span is freed, which merges, and another taken there."""
    wall.pop().free()
    wall.append(hand.heap.alloc(9 * PAGE))


@pytest.mark.parametrize("churn", [churn_nothing, churn_large, churn_small, churn_wall])
def test_fault_1_churn_at_an_edge_does_not_keep_a_huge_idle_neighbour_young(
    hand: HeapByHand, churn: Callable[[HeapByHand, list[Block]], None]
) -> None:
    wall = [hand.heap.alloc(9 * PAGE)]
    hand.heap.alloc(16 * MIB).free()
    hand.collect(1)
    for stamp in range(2, 40):
        churn(hand, wall)
        hand.collect(stamp)
    assert hand.release(1) >= 16 * MIB - 32 * PAGE


def test_fault_1_splitting_keeps_the_age_of_both_parts(hand: HeapByHand) -> None:
    hand.heap.alloc(16 * MIB).free()
    hand.collect(1)
    low = hand.heap.alloc(MIB)
    hand.collect(2)
    assert hand.release(1) == 15 * MIB
    low.free()
    hand.collect(3)
    assert hand.release(2) == 0
    assert hand.release(3) == MIB


def test_fault_1_merging_the_old_with_the_young_keeps_both_ages(hand: HeapByHand) -> None:
    old, young, older = row_of_blocks(hand, MIB, 3)
    older.free()
    hand.collect(1)
    old.free()
    hand.collect(2)
    young.free()
    hand.collect(3)
    assert [hand.release(stamp) for stamp in (1, 2, 3)] == [MIB, MIB, MIB]


def test_fault_1_in_spans_of_small_blocks_ages_are_those_of_pages(hand: HeapByHand) -> None:
    blocks = sorted((hand.heap.alloc(1024) for _ in range(4096)), key=lambda block: block.offset)
    kept = blocks[::64]
    del blocks
    hand.collect(1)
    for stamp in range(2, 20):
        for _ in range(10):
            hand.heap.alloc(1024).free()
        hand.collect(stamp)
    assert hand.release(1) >= (4096 - 64 * 8) * 1024 - 32 * PAGE
    assert len(kept) == 64


def test_fault_3_no_lock_is_held_while_memory_is_given_back(hand: HeapByHand) -> None:
    """The coordinator stands before the system call, and another takes pages."""

    def on_the_way() -> bool:
        return UnitState.RELEASING in hand.observer.books()[0]

    def give_back() -> None:
        hand.succeed()
        pause()
        hand.release()

    hand.heap.alloc(48 * MIB).free()
    hand.collect()
    with Worker() as worker:
        worker.do("attach", hand.heap.name)
        giving = Stepped(give_back)
        hand.steward.close()  # now: whoever finds no coordinator starts one
        try:
            assert giving.to_marker()
            while not on_the_way():
                assert giving.step() is not None, "it gave nothing back"
            worker.do("alloc", "block", MIB)  # a run of pages: the heap lock
            assert on_the_way()
            assert giving.end() == 0
        finally:
            giving.kill()
            hand.succeed()
        worker.end()
    assert hand.reap() == 2


def test_fault_4_under_pressure_age_does_not_matter(hand: HeapByHand) -> None:
    hand.heap.alloc(4 * MIB).free()  # no collection has seen it idle
    before = hand.stats.heap_sys - hand.stats.heap_released
    hand.release(EVERYTHING)
    assert before - (hand.stats.heap_sys - hand.stats.heap_released) >= 4 * MIB
