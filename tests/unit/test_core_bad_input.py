"""The border between Python and C, fed with what it should not get. Nothing changes; all live."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from by_hand import HeapByHand

from shmheap import Block, Heap, HeapFull, StaleHandle, _core

MIB = 1 << 20


@pytest.fixture
def hand(heap_name: str) -> Iterator[HeapByHand]:
    with HeapByHand(heap_name, 16 * MIB) as hand:
        sentinel = hand.heap.put(b"sentinel")
        yield hand
        assert bytes(sentinel) == b"sentinel"
        hand.assert_sound()


@pytest.fixture
def heap(hand: HeapByHand) -> Heap:
    return hand.heap


class Index:
    def __init__(self, value: int) -> None:
        self.value = value

    def __index__(self) -> int:
        return self.value


class BadIndex:
    def __index__(self) -> int:
        raise RuntimeError("no number today")


@pytest.mark.parametrize("nbytes", [0, -1, -(1 << 63), Index(0), False])
def test_a_block_has_at_least_one_byte(heap: Heap, nbytes: int) -> None:
    with pytest.raises(ValueError, match="at least 1 byte"):
        heap.alloc(nbytes)


@pytest.mark.parametrize("nbytes", [1.0, "1", None, b"1", [1], object(), np.float64(3)])
def test_a_size_is_an_integer(heap: Heap, nbytes: int) -> None:
    with pytest.raises(TypeError):
        heap.alloc(nbytes)


@pytest.mark.parametrize("nbytes", [-(1 << 64), -(1 << 200)])
def test_a_size_far_below_zero(heap: Heap, nbytes: int) -> None:
    with pytest.raises(ValueError, match="at least 1 byte"):
        heap.alloc(nbytes)


@pytest.mark.parametrize(
    "nbytes", [16 * MIB + 1, 1 << 40, (1 << 63) - 1, 1 << 63, 1 << 64, 1 << 200]
)
@pytest.mark.parametrize("timeout", [0, None, 1e9])
def test_more_than_the_capacity_is_refused_at_once(
    heap: Heap, nbytes: int, timeout: float | None
) -> None:
    with pytest.raises(HeapFull) as caught:
        heap.alloc(nbytes, timeout=timeout)
    assert caught.value.limit == "capacity"
    assert caught.value.requested_bytes >= min(nbytes, (1 << 63) - 1)
    assert caught.value.capacity_bytes == 16 * MIB


def test_what_counts_like_an_integer_is_a_size(heap: Heap) -> None:
    for nbytes in (True, Index(7), np.int64(7), np.uint8(7)):
        assert len(heap.alloc(nbytes)) == int(nbytes)  # type: ignore[arg-type]


def test_an_error_of_the_caller_passes(heap: Heap) -> None:
    with pytest.raises(RuntimeError, match="no number today"):
        heap.alloc(BadIndex())  # type: ignore[arg-type]


CALLS: list[Callable[[Heap], object]] = [
    lambda heap: heap.alloc(),  # type: ignore[call-arg]
    lambda heap: heap.alloc(1, 2),  # type: ignore[call-arg]
    lambda heap: heap.alloc(1, size=2),  # type: ignore[call-arg]
    lambda heap: heap.alloc(nbytes=1),  # type: ignore[call-arg]
    lambda heap: heap.put(),  # type: ignore[call-arg]
    lambda heap: heap.put("text"),  # type: ignore[arg-type]
    lambda heap: heap.put(3),  # type: ignore[arg-type]
    lambda heap: heap.put(None),  # type: ignore[arg-type]
    lambda heap: heap._adopt(1),  # type: ignore[call-arg]
    lambda heap: heap._root_set("text", heap.alloc(1)),  # type: ignore[arg-type]
    lambda heap: heap._root_set(b"a", b"no block"),  # type: ignore[arg-type]
    lambda heap: heap._await("x", 1, 1.0),  # type: ignore[arg-type]
    lambda heap: heap.ndarray("x"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize("call", CALLS)
def test_wrong_arguments(heap: Heap, call: Callable[[Heap], object]) -> None:
    with pytest.raises(TypeError):
        call(heap)


def test_nothing_to_put(heap: Heap) -> None:
    for data in (b"", bytearray(), memoryview(b"abc")[:0], np.zeros((3, 0))):
        with pytest.raises(ValueError, match="at least 1 byte"):
            heap.put(data)


@pytest.mark.parametrize("kind", [-1, 3, 1 << 30])
def test_requests_that_there_are_not(hand: HeapByHand, kind: int) -> None:
    with pytest.raises(ValueError, match="no such request"):
        hand.heap._request(kind)
    with pytest.raises(ValueError, match="no such request"):
        hand.heap._await(kind, 1, 0.0)
    with pytest.raises(ValueError, match="no such request"):
        hand.steward.pending(kind)
    with pytest.raises(ValueError, match="no such request"):
        hand.steward.finish(kind, 1, [1])


def test_reports_that_are_too_long_or_no_numbers(hand: HeapByHand) -> None:
    with pytest.raises(ValueError, match="too many"):
        hand.steward.finish(0, 1, [1] * 100)
    with pytest.raises(OverflowError):
        hand.steward.finish(0, 1, [-1])
    with pytest.raises(TypeError):
        hand.steward.finish(0, 1, ["x"])  # type: ignore[list-item]


@pytest.mark.parametrize("slot", [0, 500, 1024, (1 << 32) - 1])
def test_slots_that_there_are_not(hand: HeapByHand, slot: int) -> None:
    assert hand.steward.reap(slot, 0)[:3] == (0, 0, 0)
    assert hand.steward.alive(slot) is (slot == 0)


def test_who_lives_cannot_be_reaped(hand: HeapByHand) -> None:
    (slot,) = hand.steward.slots()
    block = hand.heap.put(b"abc")
    assert hand.steward.reap(slot[0], 1 << 62)[:3] == (0, 0, 0)
    assert bytes(block) == b"abc"
    assert hand.stats.processes == 1


@pytest.mark.parametrize("kind", [_core.Steward, _core.Observer])
def test_descriptors_that_are_no_arena(kind: Callable[[int], object]) -> None:
    reader, writer = os.pipe()
    try:
        for fd in (reader, writer):
            with pytest.raises((_core_error(), OSError)):
                kind(fd)
    finally:
        os.close(reader)
        os.close(writer)
    with pytest.raises(OSError, match="Bad file descriptor"):
        kind(-1)
    with pytest.raises(TypeError):
        kind("x")  # type: ignore[arg-type]


def _core_error() -> type[Exception]:
    from shmheap import UntrustedArena

    return UntrustedArena


def test_there_is_one_steward(hand: HeapByHand) -> None:
    with pytest.raises(BlockingIOError, match="another coordinator"):
        _core.Steward(hand.fd)
    hand.steward.close()
    hand.steward = _core.Steward(hand.fd)
    hand.steward.begin()


STEWARD_CALLS = [
    "begin", "slots", "users", "try_close", "refuse_waiters", "take_wants", "start_cycle", "mark",
    "finish_mark", "sweep", "stats", "closing", "check", "unlinked", "now_stamp",
]  # fmt: skip


@pytest.mark.parametrize("call", STEWARD_CALLS)
def test_a_closed_steward_says_so(hand: HeapByHand, call: str) -> None:
    hand.steward.close()
    try:
        with pytest.raises(ValueError, match="closed"):
            getattr(hand.steward, call)()
    finally:
        hand.steward = _core.Steward(hand.fd)


@pytest.mark.parametrize("call", ["books", "stats", "processes", "header"])
def test_a_closed_observer_says_so(hand: HeapByHand, call: str) -> None:
    hand.observer.close()
    with pytest.raises(ValueError, match="closed"):
        getattr(hand.observer, call)()
    hand.observer = _core.Observer(hand.fd)


def test_an_observer_needs_no_right_to_write(hand: HeapByHand) -> None:
    fd = os.open(hand.path, os.O_RDONLY)
    try:
        observer = _core.Observer(fd)
        assert observer.stats()["capacity"] == 16 * MIB
        assert observer.processes()[0][0] == os.getpid()
        assert hand.stats.processes == 1, "it is no user"
    finally:
        os.close(fd)


def test_handles_of_random_numbers_find_nothing(hand: HeapByHand) -> None:
    kept = [hand.heap.put(bytes([n]) * (n * 37 + 1)) for n in range(100)]
    random = np.random.default_rng(1)
    found: list[Block] = []
    for shift in (24, 24, 24, 40, 63):
        for off, gen, cell in random.integers(0, 1 << shift, (2000, 3), dtype="u8").tolist():
            with contextlib.suppress(StaleHandle):
                found.append(hand.heap._adopt(off, gen % 4, cell, cell & 0xFFFFFF))
            hand.heap._drop_lease(off, gen % 4, cell, gen & 0xFFFFFF)
    places = {block.offset for block in kept}
    assert {block.offset for block in found} <= places | {0, 8192}
    assert all(bytes(block) == bytes([n]) * (n * 37 + 1) for n, block in enumerate(kept))


def test_every_page_of_the_tables_as_a_handle(hand: HeapByHand) -> None:
    """Pages of pins and leases, free pages and the inside of large blocks are no blocks."""
    large = hand.heap.alloc(MIB)
    lease = hand.heap.alloc(16).lease()
    sys_bytes = hand.stats.heap_sys
    hits = set()
    for off in range(0, sys_bytes, 16):
        for gen in (0, 1):
            with contextlib.suppress(StaleHandle):
                hits.add(hand.heap._adopt(off, gen, 0, 1).offset)
    assert large.offset in hits
    assert len(hits) <= 3, "the large one, the sentinel, the leased one"
    assert lease.release()
