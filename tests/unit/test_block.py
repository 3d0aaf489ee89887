"""Blocks as a program sees them: bytes, handles, exports, and what is left when one is gone."""

from __future__ import annotations

import copy
import gc
import itertools
import os
import pickle
import re
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from by_hand import PAGE, HeapByHand

import shmheap
from shmheap import Block, Heap, StaleHandle, _core

ROOT = Path(__file__).resolve().parents[2]
HEADER = (ROOT / "shmheap" / "csrc" / "size_classes.h").read_text()
CLASS_SIZES = [int(size) for size in re.findall(r"^    \{ *(\d+),", HEADER, re.MULTILINE)]
EDGES = sorted({1, *(size + step for size in CLASS_SIZES for step in (-1, 0, 1))})
LARGE = [PAGE * 8 + 1, 9 * PAGE - 1, 9 * PAGE, 9 * PAGE + 1, 100_000, 1 << 20, (1 << 20) + 1]


@pytest.fixture
def heap(hand: HeapByHand) -> Heap:
    return hand.heap


def pattern(nbytes: int, seed: int = 0) -> bytes:
    return bytes((seed + 7 * i) % 255 + 1 for i in range(min(nbytes, 1021))) * (nbytes // 1021 + 1)


# Bytes


def test_the_table_was_read() -> None:
    assert len(CLASS_SIZES) > 50
    assert CLASS_SIZES[-1] == _core.MAX_SMALL_BYTES


def test_a_block_is_a_writable_buffer_of_its_bytes(heap: Heap) -> None:
    block = heap.alloc(100)
    with memoryview(block) as view:
        assert (view.format, view.itemsize, view.nbytes, view.readonly) == ("B", 1, 100, False)
        assert view.contiguous
        view[:5] = b"hello"
    assert bytes(block[:6]) == b"hello\0"


def test_every_size_is_kept_exactly(heap: Heap) -> None:
    for nbytes in (*EDGES, *LARGE):
        data = pattern(nbytes)[:nbytes]
        blocks = [heap.put(data) for _ in range(3)]
        for block in blocks:
            assert block.nbytes == len(block) == nbytes
            assert bytes(block) == data
            assert pickle.loads(pickle.dumps(block)).nbytes == nbytes, "found again from the heap"
        assert len({block.offset for block in blocks}) == 3


def test_neighbours_do_not_overlap(heap: Heap) -> None:
    sizes = [size for size in EDGES if size < 5000] * 2
    blocks = [heap.put(pattern(size, seed)[:size]) for seed, size in enumerate(sizes)]
    for seed, (size, block) in enumerate(zip(sizes, blocks, strict=True)):
        assert bytes(block) == pattern(size, seed)[:size]
    spans = sorted((block.offset, block.offset + len(block)) for block in blocks)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))


def test_what_was_used_before_comes_back_zeroed(heap: Heap) -> None:
    for size in [*CLASS_SIZES, *LARGE]:
        places = set()
        for block in [heap.alloc(size) for _ in range(3)]:
            block[:] = b"\xaa" * size
            places.add(block.offset)
            block.free()
        again = [heap.alloc(size) for _ in range(3)]
        assert all(bytes(block) == bytes(size) for block in again), size
        assert places & {block.offset for block in again}, f"{size}: nothing was used again"
        del again, block


@pytest.mark.parametrize("size", [64, 3000, 65536, 1 << 20])
def test_what_a_smaller_block_left_is_zeroed_for_a_larger_one(heap: Heap, size: int) -> None:
    block = heap.alloc(size)
    block[:] = b"\xaa" * size
    block.free()
    assert bytes(heap.alloc(size - size // 3)) == bytes(size - size // 3)
    assert bytes(heap.alloc(size)) == bytes(size)


def test_pages_of_small_blocks_are_zeroed_for_large_ones(hand: HeapByHand) -> None:
    blocks = [hand.heap.put(b"\xaa" * 4096) for _ in range(64)]
    low = min(block.offset for block in blocks)
    del blocks
    hand.collect()
    large = hand.heap.alloc(128 << 10)
    assert low <= large.offset + len(large)
    assert bytes(large) == bytes(128 << 10)


def test_zeroing_can_be_left_out(heap: Heap) -> None:
    for size in (64, 1 << 20):
        block = heap.alloc(size, zero=False)
        block[:] = b"\xaa" * size
        place = block.offset
        block.free()
        again = heap.alloc(size, zero=False)
        assert again.offset == place
        assert bytes(again) == b"\xaa" * size, "it took the time to zero"
        del again, block


PUTS: list[object] = [
    b"bytes",
    bytearray(b"bytearray"),
    memoryview(b"some bytes")[2:7],
    memoryview(b"every other")[::2],
    memoryview(b"backwards")[::-1],
    np.arange(1000, dtype="f8"),
    np.arange(24, dtype="i4").reshape(2, 3, 4),
    np.arange(24, dtype="i2").reshape(4, 6).T,
    np.arange(100, dtype="u1").reshape(10, 10)[1:9:3, ::2],
    np.float32(1.5),
    b"x" * 200_000,
]


@pytest.mark.parametrize("data", PUTS, ids=range(len(PUTS)))
def test_put_copies_any_buffer_in_c_order(heap: Heap, data: object) -> None:
    assert bytes(heap.put(data)) == memoryview(data).tobytes()  # type: ignore[arg-type]


def test_put_takes_another_block(heap: Heap) -> None:
    one = heap.put(b"abc")
    two = heap.put(one)
    one[:] = b"xyz"
    assert bytes(two) == b"abc"
    assert bytes(heap.put(two[1:])) == b"bc"


def test_items_and_slices(heap: Heap) -> None:
    block = heap.put(b"0123456789")
    assert block[0] == ord("0")
    assert block[-1] == ord("9")
    assert bytes(block[2:5]) == b"234"
    assert bytes(block[::-3]) == b"9630"
    block[1] = 65
    block[2:4] = b"BC"
    block[-1:] = bytearray(b"Z")
    assert bytes(block) == b"0ABC45678Z"


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda block: block[10], IndexError),
        (lambda block: block["x"], TypeError),
        (lambda block: block.__setitem__(slice(0, 3), b"too long"), ValueError),
        (lambda block: block.__setitem__(0, 256), ValueError),
        (lambda block: block.__setitem__(0, "x"), TypeError),
        (lambda block: block.__delitem__(0), TypeError),
    ],
)
def test_bad_items_change_nothing(
    heap: Heap, change: Callable[[Block], object], error: type[Exception]
) -> None:
    block = heap.put(b"0123456789")
    with pytest.raises(error):
        change(block)
    assert bytes(block) == b"0123456789"


def test_ndarray_is_a_view_of_a_block(hand: HeapByHand) -> None:
    array = hand.heap.ndarray((100, 30), "f8")
    assert array.shape == (100, 30)
    assert array.flags.writeable
    assert array.flags.c_contiguous
    assert not array.any()
    array[:] = 2.5
    assert array.sum() == 7500
    assert hand.stats.heap_objects == 1
    half = array[:50]
    del array
    assert hand.stats.heap_objects == 1, "a view keeps it"
    assert half.sum() == 3750
    del half
    assert hand.stats.heap_objects == 0


# Handles


def test_repr_tells_size_place_and_heap(heap: Heap) -> None:
    block = heap.alloc(123)
    assert "123 bytes" in repr(block)
    assert f"offset {block.offset}" in repr(block)
    assert heap.name in repr(block)
    with memoryview(block):
        assert "exported" in repr(block)
    block.free()
    assert "freed" in repr(block)


def test_equal_means_the_same_block(heap: Heap) -> None:
    one, two = heap.put(b"same"), heap.put(b"same")
    again = copy.copy(one)
    assert one == again
    assert hash(one) == hash(again)
    assert one is not again
    assert one != two
    assert one != b"same"
    assert len({one, again, two}) == 2
    with pytest.raises(TypeError):
        one < two  # noqa: B015
    known = {again}
    again.free()
    known.discard(again)
    assert not known, "the hash is the handle's for life"


def test_a_copy_is_another_hold_on_the_same_bytes(hand: HeapByHand) -> None:
    block = hand.heap.put(b"abc")
    again = copy.copy(block)
    block.free()
    assert bytes(again) == b"abc"
    again[:] = b"xyz"
    third = copy.copy(again)
    del again
    assert bytes(third) == b"xyz"
    del third
    assert hand.stats.heap_objects == 0


def test_a_deep_copy_is_a_block_of_its_own(hand: HeapByHand) -> None:
    block = hand.heap.put(b"abc")
    nested = copy.deepcopy({"a": block, "again": block})
    assert nested["a"] is nested["again"]
    assert nested["a"] != block
    nested["a"][:] = b"xyz"
    assert bytes(block) == b"abc"
    assert hand.stats.heap_objects == 2


def test_weak_references_see_it_go(heap: Heap) -> None:
    block = heap.alloc(10)
    seen: list[object] = []
    reference = weakref.ref(block, seen.append)
    assert reference() is block
    del block
    assert reference() is None
    assert seen == [reference]


def test_blocks_are_only_made_by_heaps() -> None:
    with pytest.raises(TypeError):
        Block()


# By address


def address_of(buffer: object) -> int:
    array = np.frombuffer(buffer, "u1")  # type: ignore[call-overload]
    return int(array.__array_interface__["data"][0])


@pytest.mark.parametrize("size", [1, 16, 100, 3000, 65536, 65537, 1 << 20, (1 << 20) + 1])
def test_a_block_is_found_by_the_address_of_its_bytes(hand: HeapByHand, size: int) -> None:
    blocks = [hand.heap.alloc(size) for _ in range(3)]
    for block in blocks:
        first = address_of(block)
        for start, end in ((0, size), (0, 1), (size // 2, size), (size - 1, size)):
            assert hand.heap._block_at(first + start, end - start) == block
        for start, end in ((0, size + 1), (size // 2, size + 1), (size, size + 1), (-1, size)):
            assert hand.heap._block_at(first + start, end - start) != block
        assert hand.heap._block_at(first, 0) is None
        assert hand.heap._block_at(first, -1) is None
        assert hand.heap._block_at(first, (1 << 63) - 1) is None


def test_a_block_is_found_by_a_buffer_of_its_bytes(hand: HeapByHand) -> None:
    block = hand.heap.alloc(70_000)
    for start, end in ((0, 70_000), (0, 1), (69_999, 70_000), (100, 60_000)):
        part = memoryview(block)[start:end]
        assert hand.heap._block_of(part) == (block, start)
        assert hand.heap._block_of(part.toreadonly()) == (block, start)
        part.release()
    for none in (b"", b"abc", bytearray(100), memoryview(block)[5:5]):
        assert hand.heap._block_of(none) is None
    with pytest.raises(TypeError, match="bytes-like"):
        hand.heap._block_of(1)  # type: ignore[arg-type]
    with pytest.raises((BufferError, ValueError)):
        hand.heap._block_of(memoryview(block)[::2])


@pytest.mark.parametrize("size", [1000, 65_535, 65_536, 1 << 22])
def test_put_copies_what_is_contiguous_and_what_is_not(hand: HeapByHand, size: int) -> None:
    data = bytes(range(256)) * (size // 256 + 1)
    for view in (memoryview(data)[:size], memoryview(data)[::-1][:size], memoryview(data)[::2]):
        assert bytes(hand.heap.put(view)) == bytes(view)


def test_what_is_found_by_address_holds_the_block(hand: HeapByHand) -> None:
    block = hand.heap.put(b"abc")
    found = hand.heap._block_at(address_of(block), 3)
    assert found is not None
    block.free()
    assert bytes(found) == b"abc"
    found.free()
    assert hand.stats.heap_objects == 0


def test_addresses_of_no_block(hand: HeapByHand) -> None:
    block, large, shared = hand.heap.alloc(100), hand.heap.alloc(1 << 20), hand.heap.dict()
    first = address_of(block)
    data = first - block.offset
    for address in (0, -1, 1, data - 1, data - 4096, data + (64 << 20), (1 << 63) - 1, -(1 << 63)):
        assert hand.heap._block_at(address, 1) is None
    assert hand.heap._block_at(address_of(bytearray(100)), 1) is None
    assert hand.heap._block_at(data + shared._block.offset, 1) is None, "a collection has no bytes"
    for gone in (block, large):
        place = data + gone.offset
        gone.free()
        assert hand.heap._block_at(place, 1) is None
    for address in (1 << 63, -(1 << 63) - 1):
        with pytest.raises(OverflowError):
            hand.heap._block_at(address, 1)
    with pytest.raises(TypeError):
        hand.heap._block_at(1.0, 1)  # type: ignore[arg-type]


def test_each_mapping_of_a_heap_has_its_addresses(hand: HeapByHand, heap_name: str) -> None:
    block = hand.heap.put(b"abc")
    again = Heap._attached(os.dup(hand.fd), hand.path, heap_name)
    assert again is not None
    found = again._block_at(address_of(block), 3)
    assert found == block
    assert address_of(found) == address_of(block)
    there = pickle.loads(pickle.dumps(again.put(b"xyz")))
    assert hand.heap._block_at(address_of(there), 3) == there
    del found, there
    again.close()
    with pytest.raises(ValueError, match="closed"):
        again._block_at(address_of(block), 3)
    assert hand.heap._block_at(address_of(block), 3) == block


def test_nobody_is_saved_by_address_from_a_sweep(hand: HeapByHand) -> None:
    kept, lost = hand.heap.put(b"kept"), hand.heap.put(b"lost")
    place = address_of(lost)
    circle = hand.heap._node_new(2)
    hand.heap._node_store(circle, 0, circle)
    hand.heap._node_store(circle, 1, lost)
    del circle, lost
    hand.steward.start_cycle()
    hand.steward.mark()
    hand.steward.finish_mark()
    assert hand.heap._block_at(place, 4) is None
    assert hand.heap._block_at(address_of(kept), 4) == kept
    assert hand.steward.sweep()[0] == 2
    hand.steward.end_cycle(1 << 40, True, 0)


def test_pages_beside_blocks_ask_for_a_collection_once(hand: HeapByHand) -> None:
    hand.steward.set_next_gc(1 << 20)
    small = [hand.heap.alloc(64 << i) for i in range(7)]  # each has a page, and hardly uses it
    size = (1 << 20) - hand.heap.stats().heap_alloc - PAGE
    asked = []
    for _ in range(3):
        block = hand.heap.alloc(size)
        asked.append(bool(hand.steward.take_wants() & _core.WANT_GC))
        hand.steward.set_next_gc(1 << 20)  # as the coordinator does, for none is due
        block.free()
    assert asked == [True, False, False]
    kept = [hand.heap.alloc(size) for _ in range(2)]
    assert hand.steward.take_wants() & _core.WANT_GC
    del small, kept


# Free


def test_free_twice_is_free_once(hand: HeapByHand) -> None:
    block = hand.heap.alloc(100)
    other = hand.heap.alloc(100)
    block.free()
    third = hand.heap.alloc(100)
    block.free()
    assert block.freed
    assert not other.freed
    assert hand.stats.heap_objects == 2
    third[:] = b"t" * 100
    del block
    assert bytes(third) == b"t" * 100


AFTER_FREE: list[Callable[[Block], object]] = [
    len,
    bytes,
    memoryview,
    copy.copy,
    copy.deepcopy,
    pickle.dumps,
    lambda block: block[0],
    lambda block: block.__setitem__(0, 1),
    lambda block: block.nbytes,
    lambda block: block.offset,
    lambda block: block.generation,
    lambda block: block.lease(),
]


@pytest.mark.parametrize("use", AFTER_FREE)
def test_use_after_free_is_a_stale_handle(heap: Heap, use: Callable[[Block], object]) -> None:
    block = heap.alloc(100)
    block.free()
    with pytest.raises(StaleHandle):
        use(block)


def test_a_freed_block_equals_only_itself(heap: Heap) -> None:
    one, two = heap.alloc(10), heap.alloc(10)
    one.free()
    two.free()
    assert one == one
    assert one != two


def test_a_freed_block_cannot_be_a_root(heap: Heap) -> None:
    block = heap.alloc(10)
    block.free()
    with pytest.raises(StaleHandle):
        heap.roots["x"] = block
    assert "x" not in heap.roots


def test_what_is_exported_cannot_be_freed(hand: HeapByHand) -> None:
    block = hand.heap.put(b"abc")
    one, two = memoryview(block), np.frombuffer(block, "u1")
    with pytest.raises(BufferError, match="2 exported"):
        block.free()
    one.release()
    with pytest.raises(BufferError, match="1 exported"):
        block.free()
    assert bytes(two) == b"abc"
    del two
    block.free()
    assert hand.stats.heap_objects == 0


def test_an_export_keeps_the_block(hand: HeapByHand) -> None:
    view = memoryview(hand.heap.put(b"abc"))[1:]
    gc.collect()
    others = [hand.heap.put(b"xyz") for _ in range(1000)]
    hand.collect()
    assert bytes(view) == b"bc"
    assert hand.stats.heap_objects == 1 + len(others)
    view.release()
    assert hand.stats.heap_objects == len(others)


def test_another_handle_can_be_freed_while_one_is_exported(heap: Heap) -> None:
    block = heap.put(b"abc")
    again = copy.copy(block)
    with memoryview(block) as view:
        again.free()
        assert bytes(view) == b"abc"


def test_a_generation_never_comes_twice_at_one_place(hand: HeapByHand) -> None:
    seen: set[tuple[int, int]] = set()
    for size in (64, 48, 1 << 16, 64, 100_000, 16, 9000, 48, 1 << 20, 64):
        for _ in range(3):
            blocks = [hand.heap.alloc(size) for _ in range(200 if size < 10_000 else 3)]
            names = {(block.offset, block.generation) for block in blocks}
            assert len(names) == len(blocks)
            assert not names & seen
            seen |= names
            del blocks
            hand.collect()
        hand.release()  # and the pages are cut anew


# Pickles and leases


def test_a_pickle_is_the_same_block(hand: HeapByHand) -> None:
    block = hand.heap.put(b"abc")
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        again = pickle.loads(pickle.dumps(block, protocol))
        assert again == block
        assert bytes(again) == b"abc"
    assert hand.stats.leases == 0


def test_a_pickle_is_small_and_has_no_bytes(heap: Heap) -> None:
    assert len(pickle.dumps(heap.alloc(1 << 20))) < 400


def test_bytes_on_their_way_keep_the_block(hand: HeapByHand) -> None:
    data = pickle.dumps(hand.heap.put(b"abc"))
    assert hand.stats.leases == 1
    hand.collect()
    assert hand.stats.heap_objects == 1
    assert bytes(pickle.loads(data)) == b"abc"
    assert hand.stats.leases == 0
    assert hand.stats.heap_objects == 0, "the lease became the pin that was just dropped"


def test_one_pickle_can_be_read_by_many(hand: HeapByHand) -> None:
    data = pickle.dumps(hand.heap.put(b"abc"))
    readers = [pickle.loads(data) for _ in range(10)]
    assert all(bytes(reader) == b"abc" for reader in readers)
    assert hand.stats.heap_objects == 1
    del readers
    assert hand.stats.heap_objects == 0


def test_a_handle_whose_block_is_gone_is_stale(hand: HeapByHand) -> None:
    for size in (64, 5000, 1 << 20):
        data = pickle.dumps(hand.heap.alloc(size))
        pickle.loads(data)
        with pytest.raises(StaleHandle):
            pickle.loads(data)
        others = [hand.heap.alloc(size) for _ in range(20)]  # somebody else's, in its place
        with pytest.raises(StaleHandle):
            pickle.loads(data)
        del others
        hand.collect()
        hand.release()
        with pytest.raises(StaleHandle):
            pickle.loads(data)


def test_a_lease_by_hand(hand: HeapByHand) -> None:
    block = hand.heap.put(b"abc")
    lease = block.lease()
    block.free()
    assert hand.stats.leases == 1
    assert "offset" in repr(lease)
    taken = lease.take()
    assert hand.stats.leases == 0
    assert bytes(taken) == b"abc"
    assert bytes(lease.take()) == b"abc", "while it lives"
    assert not lease.release()
    taken.free()
    with pytest.raises(StaleHandle):
        lease.take()


def test_leases_of_a_living_sender_can_be_ended(hand: HeapByHand) -> None:
    kept = hand.heap.put(b"kept")
    data = [pickle.dumps(hand.heap.put(bytes(100))) for _ in range(1500)]  # some pages of leases
    old = pickle.dumps(kept)
    taken = pickle.loads(data.pop())
    cutoff_ns = time.monotonic_ns()
    young = pickle.dumps(hand.heap.put(b"young"))
    leases, nbytes, _ = hand.steward.expire_leases(cutoff_ns)
    assert (leases, nbytes) == (1500, 1499 * 100)
    assert (hand.stats.leases, hand.stats.heap_objects) == (1, 3)
    for gone in data[::100]:
        with pytest.raises(StaleHandle):
            pickle.loads(gone)
    assert bytes(pickle.loads(old)) == b"kept", "it was kept by somebody else"
    assert bytes(pickle.loads(young)) == b"young"
    assert bytes(taken) == bytes(100)
    again = [pickle.dumps(kept) for _ in range(1500)]  # in the cells that were cleared
    assert [bytes(pickle.loads(one)) for one in again] == [b"kept"] * 1500
    assert hand.stats.leases == 0


def test_a_released_lease_lets_the_block_go(hand: HeapByHand) -> None:
    block = hand.heap.put(b"abc")
    lease = block.lease()
    block.free()
    assert lease.release()
    assert not lease.release()
    assert (hand.stats.heap_objects, hand.stats.leases) == (0, 0)
    with hand.heap.put(b"x").lease():
        assert hand.stats.heap_objects == 1
    assert hand.stats.heap_objects == 0


def test_a_lease_of_a_large_block(hand: HeapByHand) -> None:
    with hand.heap.alloc(1 << 20).lease() as lease:
        assert len(pickle.loads(pickle.dumps(lease))) == 1 << 20
    assert (hand.stats.heap_objects, hand.stats.leases) == (0, 0)


def test_a_lease_in_the_first_page(hand: HeapByHand) -> None:
    with Heap.attach(hand.heap.name) as other:
        hand.heap.roots["a"] = hand.heap.put(b"abc")
        block = other.roots["a"]
        hand.collect()  # the page of pins is empty and goes back
        lease = block.lease()
        assert lease.handle.cell == 0
        assert lease.take() == block
        assert hand.stats.leases == 0
        hand.heap.roots.clear()


def test_a_pickled_lease_makes_no_further_ones(hand: HeapByHand) -> None:
    block = hand.heap.put(b"abc")
    lease = block.lease()
    data = [pickle.dumps(lease) for _ in range(5)]
    assert hand.stats.leases == 1
    assert all(pickle.loads(one) == block for one in data)
    assert hand.stats.leases == 0


def test_thousands_of_leases(hand: HeapByHand) -> None:
    block = hand.heap.put(b"abc")
    data = [pickle.dumps(block) for _ in range(5000)]
    assert hand.stats.leases == 5000
    hand.collect()
    again = [pickle.loads(one) for one in reversed(data)]
    assert hand.stats.leases == 0
    assert all(one == block for one in again)
    before = hand.stats.heap_sys
    for _ in range(5):
        for one in [pickle.dumps(block) for _ in range(5000)]:
            pickle.loads(one)
    assert hand.stats.heap_sys - before <= 64 * PAGE, "cells of leases are used again"


def test_a_count_that_is_full_sticks_until_a_collection(hand: HeapByHand) -> None:
    block = hand.heap.put(b"abc")
    handles = [copy.copy(block) for _ in range(70_000)]
    assert all(bytes(handle) == b"abc" for handle in handles[::1000])
    del handles
    assert bytes(block) == b"abc"
    hand.collect()
    assert bytes(block) == b"abc"
    del block
    assert hand.stats.heap_objects == 1
    assert hand.collect()[0] == 1
    assert hand.stats.heap_objects == 0


FORGED = [
    ("offset", 1),
    ("offset", 0),
    ("offset", 33 * PAGE),
    ("offset", 1 << 40),
    ("offset", (1 << 64) - 8),
    ("generation", 999),
    ("generation", (1 << 64) - 1),
]


@pytest.mark.parametrize(("field", "value"), FORGED)
def test_a_handle_that_names_nothing_is_stale(heap: Heap, field: str, value: int) -> None:
    block = heap.put(b"abc")
    lease = block.lease()
    wrong = shmheap.Lease(lease.handle._replace(**{field: value}))
    with pytest.raises(StaleHandle):
        wrong.take()
    assert lease.release()


@pytest.mark.parametrize("cell", [1, 8, 16, PAGE, PAGE + 16, 3 * PAGE, 1 << 45, (1 << 64) - 16])
def test_a_handle_with_a_wrong_lease_does_no_harm(hand: HeapByHand, cell: int) -> None:
    block = hand.heap.put(b"abc")
    lease = block.lease()
    wrong = shmheap.Lease(lease.handle._replace(cell=cell))
    assert bytes(wrong.take()) == b"abc", "the block lives"
    assert not wrong.release() or cell == lease.handle.cell
    assert hand.stats.leases in (0, 1)
    lease.release()
