"""The promise, in small: what a heap still holds of the machine after its blocks are gone.

The kernel is asked, not the books; and books and kernel must agree on every page. The same at
full size, with what other allocators keep beside it, is `tools/verify_rss.py`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import pytest
from by_hand import HeapByHand
from processes import Worker

from shmheap import Heap, rss

KIB, MIB = 1 << 10, 1 << 20
TOTAL = 64 * MIB


@pytest.fixture
def hand(heap_name: str) -> Iterator[HeapByHand]:
    with HeapByHand(heap_name, 128 * MIB) as hand:
        yield hand


def held_share(hand: HeapByHand) -> float:
    """What the kernel holds of the data area, of the bytes that the blocks had together."""
    hand.assert_sound()
    return hand.verify().kernel_held_bytes / TOTAL


def give_back(hand: HeapByHand) -> float:
    hand.collect()
    hand.release()
    return held_share(hand)


@pytest.mark.parametrize("nbytes", [64, 256, 1000, 4 * KIB, 16 * KIB, 40_000, 300_000, MIB])
def test_everything_dropped_is_given_back(hand: HeapByHand, nbytes: int) -> None:
    blocks = [hand.heap.alloc(nbytes) for _ in range(TOTAL // nbytes // 4)]
    assert held_share(hand) > 0.2
    del blocks
    assert give_back(hand) <= 0.001


def test_scattered_survivors_of_16_kib_keep_only_themselves(hand: HeapByHand) -> None:
    blocks = [hand.heap.alloc(16 * KIB) for _ in range(TOTAL // (16 * KIB))]
    blocks.sort(key=lambda block: block.offset)
    kept = blocks[::64]
    assert held_share(hand) >= 1
    del blocks
    assert give_back(hand) <= 0.025
    assert len(kept) == TOTAL // MIB


@pytest.mark.parametrize("seed", [1, 2])
def test_random_survivors_of_256_bytes_keep_their_os_pages(hand: HeapByHand, seed: int) -> None:
    blocks = [hand.heap.alloc(256) for _ in range(TOTAL // 256)]
    kept = random.Random(seed).sample(blocks, len(blocks) // 64)
    assert held_share(hand) >= 1
    del blocks
    assert give_back(hand) <= 0.30  # 1 - (63/64) ** 16 = 22 % have a survivor; and pins
    assert len(kept) == TOTAL // 256 // 64


def test_what_survives_is_unharmed(hand: HeapByHand) -> None:
    blocks = [hand.heap.put(number.to_bytes(4, "little") * 64) for number in range(40_000)]
    numbers = sorted(random.Random(3).sample(range(40_000), 900))
    kept = {number: blocks[number] for number in numbers}
    del blocks
    hand.collect()
    hand.release()
    filler = [hand.heap.put(b"\xff" * 256) for _ in range(40_000)]  # the holes are filled again
    hand.assert_sound()
    assert all(bytes(block) == number.to_bytes(4, "little") * 64 for number, block in kept.items())
    assert all(bytes(block) == b"\xff" * 256 for block in filler[::97])
    sys_before = hand.stats.heap_sys
    assert sys_before <= (40_000 + 900) * 256 * 1.1, "the holes were used, not new pages"


def test_holes_that_are_filled_come_back_zeroed(hand: HeapByHand) -> None:
    blocks = [hand.heap.put(b"\xaa" * 1024) for _ in range(4096)]
    blocks.sort(key=lambda block: block.offset)
    kept = blocks[::32]
    del blocks
    hand.collect()
    hand.release()
    again = [hand.heap.alloc(1024) for _ in range(4000)]
    assert all(bytes(block) == bytes(1024) for block in again)
    assert all(bytes(block) == b"\xaa" * 1024 for block in kept)
    hand.assert_sound()


def waves(hand: HeapByHand) -> None:
    """Sizes change from wave to wave; a few blocks of each survive for a while."""
    rng = random.Random(7)
    kept: list[object] = []
    for wave in range(12):
        size = rng.choice([48, 200, 900, 5000, 20_000, 70_000, 400_000])
        blocks = [hand.heap.alloc(size) for _ in range(8 * MIB // size)]
        kept += rng.sample(blocks, 3)
        del blocks
        hand.collect(wave + 1)
        hand.release(wave)
        if len(kept) > 9:
            del kept[:5]
    hand.assert_sound()


def idle_neighbour(hand: HeapByHand) -> None:
    """Another user of the heap has spans that are empty, and does nothing any more."""
    other = Heap.attach(hand.heap.name)
    hand.heap.roots["other"] = other.put(b"x")
    blocks = [other.alloc(500) for _ in range(20_000)]
    del blocks
    hand.heap.roots.clear()
    hand.collect()
    hand.release()
    assert held_share(hand) <= 0.002
    other.close()
    hand.reap()


@pytest.mark.parametrize("use", [waves, idle_neighbour])
def test_nothing_is_kept_after(hand: HeapByHand, use: Callable[[HeapByHand], None]) -> None:
    use(hand)
    assert give_back(hand) <= 0.001


def test_tables_are_small_and_mostly_given_back(hand: HeapByHand) -> None:
    empty = hand.verify().metadata_bytes
    blocks = [hand.heap.alloc(4 * KIB) for _ in range(TOTAL // (4 * KIB))]
    full = hand.verify().metadata_bytes
    assert full - empty <= 0.02 * TOTAL
    del blocks
    hand.collect()
    hand.release()
    assert hand.verify().metadata_bytes <= full


def test_a_bystander_that_touched_everything_loses_it_too(hand: HeapByHand) -> None:
    hand.heap.roots["all"] = hand.heap.put(b"x" * (32 * MIB))
    with Worker() as bystander:
        bystander.do("attach", hand.heap.name)
        bystander.do("root_get", "block", "all")
        bystander.do("digest", "block")
        assert rss.process_memory(bystander.pid).rss_shmem >= 32 * MIB
        bystander.do("drop", "block")
        del hand.heap.roots["all"]
        hand.collect()
        hand.release()
        assert rss.mapping_memory(bystander.pid, hand.fd).rss < MIB
        assert held_share(hand) <= 0.001
        bystander.end()
