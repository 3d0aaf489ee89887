"""A process that was stopped inside an operation keeps its lock: what the core makes of it.

The lock is one word of the process's slot; the test takes it in that process's name.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from os import pread, sched_yield

import pytest
from by_hand import SLOT_BYTES, SLOTS, HeapByHand, stopped
from processes import Worker

from shmheap import Block, Heap
from shmheap.coordinator import IDLE, MARK
from shmheap.errors import StaleHandle

MIB = 1 << 20
PHASE = 64
"""Where it is in a slot; see csrc/layout.h."""


@pytest.fixture
def hand(heap_name: str) -> Iterator[HeapByHand]:
    with HeapByHand(heap_name, 16 * MIB) as hand:
        hand.steward.set_patience(1)
        yield hand
        hand.assert_sound()


def phase(hand: HeapByHand, slot: int) -> int:
    return pread(hand.fd, 1, SLOTS + slot * SLOT_BYTES + PHASE)[0]


def test_reaping_beside_a_stopped_process_can_be_repeated(hand: HeapByHand) -> None:
    with Worker("spawn") as worker:
        worker.do("attach", hand.heap.name)
        worker.do("alloc", "block", MIB)
        worker.kill()
    with stopped(hand, 1):
        with pytest.raises(TimeoutError, match="stopped"):
            hand.steward.reap(2, 0)
        assert hand.stats.heap_objects == 0, "what it held went before that"
    assert hand.steward.reap(2, 0)[-1]
    assert [row[0] for row in hand.steward.slots()] == [1]


def test_a_stopped_process_kept_those_behind_it_in_the_last_phase(hand: HeapByHand) -> None:
    with Worker("spawn") as worker:
        worker.do("attach", hand.heap.name)
        hand.steward.start_cycle()
        hand.steward.mark()
        with stopped(hand, 1):
            with pytest.raises(TimeoutError, match="stopped"):
                hand.steward.finish_mark()
            assert phase(hand, 1) == MARK
            assert phase(hand, 2) == IDLE, "the cycle is off for who can be told"
        hand.collect()
        worker.end()


def test_a_stalled_sweep_loses_nothing(hand: HeapByHand) -> None:
    blocks = [hand.heap.alloc(100) for _ in range(5000)]
    del blocks
    for call in (hand.steward.start_cycle, lambda: hand.steward.release(2**29 - 1, MIB, 0)):
        with stopped(hand, 1), pytest.raises(TimeoutError, match="stopped"):
            call()
    hand.collect()
    hand.release()
    assert hand.stats.heap_objects == 0


def both_at_once(hand: HeapByHand, slot: int, block: Block, first: Callable[[], object]) -> None:
    """Have a thread do that and another free the block while the process's lock is taken."""
    threads = [threading.Thread(target=call) for call in (first, block.free)]
    with stopped(hand, slot):
        for thread in threads:
            thread.start()
        for _ in range(1000):  # until they wait for the lock: not sure, and most often so
            sched_yield()
    for thread in threads:
        thread.join()


def test_a_block_freed_by_two_threads_was_dropped_twice(hand: HeapByHand) -> None:
    for _ in range(20):
        block = hand.heap.put(b"named")
        hand.heap.roots["kept"] = block
        both_at_once(hand, 1, block, block.free)
        assert bytes(hand.heap.roots["kept"]) == b"named"


def test_a_heap_went_away_under_a_thread_that_leased_its_last_block(hand: HeapByHand) -> None:
    for _ in range(20):
        block = Heap.attach(hand.heap.name).put(b"last")

        def lease(block: Block = block) -> None:
            with suppress(StaleHandle):  # the other was first
                block.lease()

        both_at_once(hand, 2, block, lease)
        hand.reap()
