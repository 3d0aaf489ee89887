"""A process that was stopped inside an operation keeps its lock: what the core makes of it.

The lock is one word of the process's slot; the test takes it in that process's name.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from os import pread, pwrite

import pytest
from by_hand import HeapByHand
from processes import Worker

from shmheap import _core
from shmheap.coordinator import IDLE, MARK

MIB = 1 << 20
OS_PAGE = 4096
SLOTS = (_core.HEADER_BYTES + OS_PAGE - 1) // OS_PAGE * OS_PAGE
SLOT_BYTES = 256
PHASE = 64
"""Where things are in the file; see csrc/layout.h."""


@pytest.fixture
def hand(heap_name: str) -> Iterator[HeapByHand]:
    with HeapByHand(heap_name, 16 * MIB) as hand:
        hand.steward.set_patience(1)
        yield hand
        hand.assert_sound()


@contextmanager
def stopped(hand: HeapByHand, slot: int) -> Iterator[None]:
    """The process of that slot is inside an operation, and stays there."""
    (incarnation,) = (row[3] for row in hand.steward.slots() if row[0] == slot)
    holder = slot << 43 | (incarnation & 0x7FFF) << 28 | 1
    pwrite(hand.fd, struct.pack("<Q", holder), SLOTS + slot * SLOT_BYTES)
    try:
        yield
    finally:
        pwrite(hand.fd, struct.pack("<Q", 0), SLOTS + slot * SLOT_BYTES)


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
