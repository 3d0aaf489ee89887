"""Heaps in one process: made, found, closed, unlinked; and what lives on when one is closed."""

from __future__ import annotations

import copy
import gc
import mmap
import os
import pickle
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from by_hand import HeapByHand

import shmheap
from shmheap import (
    Config,
    Heap,
    HeapExists,
    HeapFull,
    HeapNotFound,
    HeapStats,
    StaleHandle,
    _core,
    arena,
)

MIB = 1 << 20


@pytest.fixture
def hand(heap_name: str) -> Iterator[HeapByHand]:
    with HeapByHand(heap_name) as hand:
        yield hand
        hand.assert_sound()


def mappings(path: str) -> list[str]:
    """Lines of /proc/self/maps of the arena at that path."""
    maps = Path("/proc/self/maps").read_text().splitlines()
    return [line for line in maps if path in line]


# Making and finding


def test_create_makes_a_private_file_and_says_what_it_is(heap: Heap, heap_name: str) -> None:
    file = Path(arena.file_path(heap_name))
    status = file.stat()
    assert status.st_mode == 0o100600
    assert status.st_uid == os.geteuid()
    assert status.st_blocks * 512 < MIB, "capacity costs nothing until touched"
    assert heap.name == heap_name
    assert heap.capacity == 64 * MIB
    assert heap.config == Config()
    assert heap_name in repr(heap)
    assert isinstance(heap.stats(), HeapStats)
    assert heap.stats().processes == 1


def test_create_refuses_a_name_that_is_taken(heap: Heap) -> None:
    block = heap.put(b"abc")
    with pytest.raises(HeapExists) as caught:
        Heap.create(heap.name)
    assert isinstance(caught.value, FileExistsError)
    assert bytes(block) == b"abc"
    with Heap.attach(heap.name) as again:
        assert again.nonce == heap.nonce


def test_create_finds_a_name_of_its_own() -> None:
    with Heap.create(capacity=MIB) as one, Heap.create(capacity=MIB) as two:
        assert one.name != two.name
        one.unlink()
        two.unlink()


def test_attach_finds_the_same_heap(heap: Heap) -> None:
    with Heap.attach(heap.name) as again:
        assert again is not heap
        assert again.nonce == heap.nonce
        assert (again.capacity, again.config) == (heap.capacity, heap.config)
        again.roots["a"] = again.put(b"abc")
        assert heap.stats().processes == 2
    assert bytes(heap.roots["a"]) == b"abc"


def test_attach_to_nothing(heap_name: str) -> None:
    with pytest.raises(HeapNotFound) as caught:
        Heap.attach(heap_name)
    assert isinstance(caught.value, FileNotFoundError)
    assert caught.value.filename == arena.file_path(heap_name)


def test_open_creates_then_attaches(heap_name: str) -> None:
    config = Config(gc_percent=50)
    with shmheap.open(heap_name, capacity="1MiB", config=config) as one:
        assert (one.capacity, one.config) == (MIB, config)
        with shmheap.open(heap_name) as two:
            assert two.nonce == one.nonce
        with shmheap.open(heap_name, capacity=MIB, config=Config(gc_percent=50)) as three:
            assert three.nonce == one.nonce
        one.unlink()


@pytest.mark.parametrize(
    ("capacity", "config"),
    [
        ("64MiB", Config(gc_percent=50)),
        ("65MiB", None),
        (63 * MIB, None),
        (None, Config(keep=True)),
    ],
)
def test_open_with_other_values_is_refused(
    heap: Heap, capacity: int | str | None, config: Config | None
) -> None:
    with pytest.raises(ValueError, match="exists and"):
        shmheap.open(heap.name, capacity=capacity, config=config)
    assert heap.stats().processes == 1, "and leaves nothing behind"
    heap.alloc(10)


def test_open_names_what_is_not_as_asked_for(heap: Heap) -> None:
    with pytest.raises(ValueError, match="exists") as caught:
        shmheap.open(heap.name, config=Config(keep=True, gc_percent=50))
    assert str(caught.value).endswith("made with gc_percent=100, not 50, keep=False, not True")


@pytest.mark.parametrize("capacity", [8192, 10_000, MIB - 1, "1.5MiB"])
def test_capacity_is_whole_pages(heap_name: str, capacity: int | str) -> None:
    with HeapByHand(heap_name, shmheap.config.parse_size(capacity)) as hand:
        assert 0 < hand.heap.capacity <= shmheap.config.parse_size(capacity)
        assert hand.heap.capacity % mmap.PAGESIZE == 0


def test_a_tebibyte_costs_nothing_until_touched(heap_name: str) -> None:
    with HeapByHand(heap_name, 1 << 40) as hand:
        assert hand.heap.capacity == 1 << 40
        assert bytes(hand.heap.put(b"abc")) == b"abc"
        assert os.fstat(hand.fd).st_blocks * 512 < MIB
        hand.assert_sound()


def test_default_capacity_is_the_file_system() -> None:
    with Heap.create() as heap:
        size = os.statvfs("/dev/shm")
        assert 0 <= size.f_blocks * size.f_frsize - heap.capacity < 8192
        heap.unlink()


def test_a_heap_in_another_directory(heap_name: str, folder: str) -> None:
    config = Config(directory=folder)
    with Heap.create(heap_name, capacity=MIB, config=config) as heap:
        assert Path(f"{folder}/shmheap.{os.geteuid()}.{heap_name}").exists()
        with pytest.raises(HeapNotFound):
            Heap.attach(heap_name)
        with Heap.attach(heap_name, directory=folder) as again:
            block = pickle.loads(pickle.dumps(again.put(b"abc")))
        assert bytes(heap.put(b"x" * 100_000)[:1]) == b"x"
        assert heap.gc().trigger == "asked"
        del block
        heap.unlink()
        assert not Path(f"{folder}/shmheap.{os.geteuid()}.{heap_name}").exists()


# Closing


def test_close_is_for_this_object_and_idempotent(heap: Heap) -> None:
    again = Heap.attach(heap.name)
    assert not again.closed
    again.close()
    again.close()
    assert again.closed
    assert "closed" in repr(again)
    assert not heap.closed
    heap.alloc(10)


USES: list[Callable[[Heap], object]] = [
    lambda heap: heap.alloc(10),
    lambda heap: heap.put(b"abc"),
    lambda heap: heap.ndarray(3),
    lambda heap: heap.stats(),
    lambda heap: heap.check(),
    lambda heap: heap.gc(),
    lambda heap: heap.scavenge(),
    lambda heap: heap.roots["a"],
    lambda heap: list(heap.roots),
    lambda heap: heap.capacity,
    pickle.dumps,
]


@pytest.mark.parametrize("use", USES)
def test_use_after_close(hand: HeapByHand, use: Callable[[Heap], object]) -> None:
    again = Heap.attach(hand.heap.name)
    again.close()
    with pytest.raises(ValueError, match="closed"):
        use(again)


def test_a_heap_that_was_never_attached_is_closed() -> None:
    bare = Heap()
    assert bare.closed
    with pytest.raises(ValueError, match="closed"):
        bare.alloc(10)
    bare.close()


def test_repr_raised_where_the_heap_was_closed_meanwhile(
    hand: HeapByHand, monkeypatch: pytest.MonkeyPatch
) -> None:
    again = Heap.attach(hand.heap.name)

    def stats(heap: Heap) -> HeapStats:
        heap.close()  # as another thread may
        return original(heap)

    original = Heap.stats
    monkeypatch.setattr(Heap, "stats", stats)
    assert repr(again) == f"<shmheap.Heap {hand.heap.name!r}: closed>"


def test_with_closes_also_after_an_error_and_never_unlinks(hand: HeapByHand) -> None:
    name = hand.heap.name

    def use() -> None:
        with Heap.attach(name) as again:
            again.put(b"abc")
            raise KeyError(again)

    with pytest.raises(KeyError) as caught:
        use()
    assert caught.value.args[0].closed
    Heap.attach(name).close()


def test_blocks_of_a_closed_heap(hand: HeapByHand) -> None:
    again = Heap.attach(hand.heap.name)
    block, other = again.put(b"abc"), again.put(b"abd")
    again.close()
    for use in (bytes, len, memoryview, copy.copy, pickle.dumps):
        with pytest.raises(ValueError, match="closed"):
            use(block)
    assert "closed" in repr(block)
    assert block == block
    assert block != other
    block.free()
    block.free()
    del other


def test_close_with_live_views_is_logical(hand: HeapByHand) -> None:
    again = Heap.attach(hand.heap.name)
    path = hand.path
    others = len(mappings(path))
    block = again.put(b"abc")
    view = memoryview(block)
    second = view[1:]
    again.close()
    with pytest.raises(ValueError, match="closed"):
        again.alloc(10)
    hand.reap()
    hand.collect()
    assert bytes(view) == b"abc"
    view[0] = ord("x")
    assert bytes(second) == b"bc"
    assert hand.stats.heap_objects == 1
    view.release()
    assert bytes(second) == b"bc"
    assert len(mappings(path)) == others
    second.release()
    assert len(mappings(path)) < others, "unmapped with the last view"
    assert hand.reap() == 1
    assert hand.stats.heap_objects == 0
    del block


def test_a_dropped_heap_lives_as_long_as_its_blocks(hand: HeapByHand) -> None:
    again = Heap.attach(hand.heap.name)
    seen = weakref.ref(again)
    block = again.put(b"abc")
    del again
    gc.collect()
    assert seen() is None
    assert bytes(block) == b"abc"
    assert bytes(copy.copy(block)) == b"abc"
    del block
    assert hand.reap() == 1


def test_closing_drops_what_this_object_held(hand: HeapByHand) -> None:
    again = Heap.attach(hand.heap.name)
    kept = [again.alloc(size) for size in (16, 1000, 100_000)]
    shared = hand.heap._adopt(*_place(kept[0]))
    again.close()
    assert hand.reap() == 1
    assert hand.stats.heap_objects == 1
    assert bytes(shared) == bytes(16)
    shared.free()
    hand.collect()
    assert hand.stats.heap_objects == 0
    assert hand.stats.processes == 1


def test_two_heaps_in_one_process(hand: HeapByHand, heap_name: str) -> None:
    with HeapByHand(f"{heap_name}-b") as other:
        one, two = hand.heap.put(b"one"), other.heap.put(b"two")
        assert one != two
        assert hash(one) != hash(two) or one != two
        data = pickle.dumps([one, two])
        del one, two
        one, two = pickle.loads(data)
        assert (bytes(one), bytes(two)) == (b"one", b"two")
        assert (hand.stats.heap_objects, other.stats.heap_objects) == (1, 1)
        del one, two


def test_two_objects_of_one_heap_share_blocks(hand: HeapByHand) -> None:
    with Heap.attach(hand.heap.name) as again:
        hand.heap.roots["a"] = mine = hand.heap.put(b"abc")
        theirs = again.roots["a"]
        assert theirs == mine
        assert hash(theirs) == hash(mine)
        again.roots["b"] = mine
        del again.roots["a"]
        mine.free()
        assert bytes(theirs) == b"abc"
        theirs.free()
        assert bytes(hand.heap.roots["b"]) == b"abc"


def test_freeing_what_another_object_allocated(hand: HeapByHand) -> None:
    """The owner of a span finds what others freed in it, and does not grow the heap."""
    with Heap.attach(hand.heap.name) as again:
        for _ in range(20):
            blocks = [hand.heap.alloc(100) for _ in range(2000)]
            theirs = [again._adopt(*_place(block)) for block in blocks]
            del blocks
            gc.collect()
            assert hand.stats.heap_objects == len(theirs)
            del theirs
        assert hand.stats.heap_objects == 0
        assert hand.stats.heap_sys < 2 * MIB
        hand.assert_sound()


def _place(block: shmheap.Block) -> tuple[int, int, int, int]:
    return block.offset, block.generation, 0, 0


# Unlinking


def test_unlink_removes_the_name_and_nothing_else(hand: HeapByHand) -> None:
    block = hand.heap.put(b"abc")
    hand.heap.unlink()
    hand.heap.unlink()
    assert not Path(hand.path).exists()
    with pytest.raises(HeapNotFound):
        Heap.attach(hand.heap.name)
    assert bytes(block) == b"abc"
    assert len(hand.heap.alloc(1 << 20)) == 1 << 20
    hand.collect()
    hand.release()


def test_unlink_after_close_leaves_a_new_heap_of_that_name_alone(
    hand: HeapByHand,
) -> None:
    again = Heap.attach(hand.heap.name)
    again.close()
    hand.heap.unlink()
    with HeapByHand(hand.heap.name) as new:
        again.unlink()
        assert Path(new.path).exists(), "it was another heap's name"
        hand.heap.unlink()
        assert Path(new.path).exists(), "it was another heap's name"


def test_unlink_after_close(hand: HeapByHand) -> None:
    again = Heap.attach(hand.heap.name)
    again.close()
    again.unlink()
    assert not Path(hand.path).exists()
    again.unlink()


def test_unlink_by_name(hand: HeapByHand) -> None:
    shmheap.unlink(hand.heap.name)
    assert not Path(hand.path).exists()
    with pytest.raises(HeapNotFound):
        shmheap.unlink(hand.heap.name)
    hand.heap.alloc(10)


def test_a_name_can_be_used_again_at_once(hand: HeapByHand) -> None:
    hand.heap.roots["a"] = hand.heap.put(b"old")
    hand.heap.unlink()
    with HeapByHand(hand.heap.name) as new:
        assert "a" not in new.heap.roots
        assert new.heap.nonce != hand.heap.nonce
    assert bytes(hand.heap.roots["a"]) == b"old"


def test_a_handle_of_another_heap_of_that_name_is_stale(hand: HeapByHand) -> None:
    block = hand.heap.put(b"old")
    with Heap.attach(hand.heap.name) as again:
        lease = again._adopt(*_place(block)).lease()
    foreign = shmheap.Lease(lease.handle._replace(nonce=hand.heap.nonce ^ 2))
    with pytest.raises(StaleHandle, match="another one"):
        foreign.take()
    assert lease.release()


def test_the_last_user_of_all_takes_the_name_along(heap_name: str) -> None:
    with HeapByHand(heap_name) as hand:
        other = Heap.attach(heap_name)
        other.close()
        assert Path(hand.path).exists()
        assert hand.reap() == 1
        hand.heap.close()
        assert not Path(hand.path).exists()


def test_what_is_to_be_kept_stays(heap_name: str) -> None:
    with HeapByHand(heap_name, config=Config(keep=True)) as hand:
        hand.heap.roots["a"] = hand.heap.put(b"abc")
        hand.heap.close()
        hand.reap()
        hand.collect()
        with Heap.attach(heap_name) as again:
            assert bytes(again.roots["a"]) == b"abc"


def test_a_heap_that_is_closing_cannot_be_attached_to(heap_name: str) -> None:
    with HeapByHand(heap_name, config=Config(keep=True)) as hand:
        hand.heap.close()
        hand.reap()
        assert hand.steward.users() == 0
        assert hand.steward.try_close()
        with pytest.raises(HeapNotFound, match="being unlinked"):
            Heap.attach(heap_name)
        assert Path(hand.path).exists(), "its coordinator will remove it"


def test_what_a_coordinator_left_closing_does_not_block_the_name(heap_name: str) -> None:
    """It was killed after it had closed the heap and before it had removed the name."""
    with HeapByHand(heap_name, config=Config(keep=True)) as hand:
        hand.heap.close()
        hand.reap()
        assert hand.steward.try_close()
        hand.steward.close()
        assert Path(hand.path).exists()
        with shmheap.open(heap_name, capacity=MIB) as new:
            assert new.capacity == MIB
            new.unlink()


def test_nobody_closes_a_heap_that_has_users(hand: HeapByHand) -> None:
    assert not hand.steward.try_close()
    Heap.attach(hand.heap.name).close()


# Pickling heaps


def test_a_heap_pickles_as_itself(hand: HeapByHand) -> None:
    assert pickle.loads(pickle.dumps(hand.heap)) is hand.heap
    assert copy.copy(hand.heap) is hand.heap
    assert copy.deepcopy(hand.heap) is hand.heap


def test_a_handle_finds_its_heap_though_this_process_has_closed_it(heap: Heap) -> None:
    """As in a receiver that never attached by name: it does so when a handle comes."""
    lease = heap.put(b"abc").lease()
    keeper = Heap.attach(heap.name)
    data = pickle.dumps(lease)
    heap.close()
    keeper.close()
    with Heap.attach(lease.handle.path.rsplit(".", 1)[-1]) as _:
        pass
    block = pickle.loads(data)
    assert bytes(block) == b"abc"


# Threads


def test_threads_share_a_heap(hand: HeapByHand) -> None:
    start = threading.Barrier(8)
    wrong: list[int] = []

    def use(number: int) -> None:
        start.wait()
        held: list[shmheap.Block] = []
        for turn in range(300):
            size = (16, 100, 3000, 20_000, 100_000)[(number + turn) % 5]
            block = hand.heap.alloc(size)
            if bytes(block) != bytes(size):
                wrong.append(turn)
            block[:] = bytes([number + 1]) * size
            held.append(block)
            if len(held) > 10:
                old = held.pop(turn % 10)
                if bytes(old) != bytes([number + 1]) * len(old):
                    wrong.append(turn)
                if turn % 2:
                    old.free()
            if turn % 20 == 0:
                held.append(pickle.loads(pickle.dumps(block)))
                hand.heap.roots[f"{number}"] = block

    threads = [threading.Thread(target=use, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for turn in range(20):
        hand.collect(turn + 1)
        hand.release(turn)
    for thread in threads:
        thread.join()
    assert wrong == []
    hand.heap.roots.clear()
    assert hand.stats.heap_objects == 0
    hand.collect(100)
    hand.assert_sound()


def test_a_thread_frees_what_another_allocates(hand: HeapByHand) -> None:
    blocks: list[shmheap.Block] = []
    some = threading.Semaphore(0)
    room = threading.Semaphore(100)

    def consume() -> None:
        for _ in range(3000):
            some.acquire()
            blocks.pop().free()
            room.release()

    consumer = threading.Thread(target=consume)
    consumer.start()
    for number in range(3000):
        room.acquire()
        blocks.append(hand.heap.alloc(number % 5000 + 1))
        some.release()
    consumer.join()
    assert hand.stats.heap_objects == 0


@pytest.fixture
def short_slices() -> Iterator[None]:
    """Threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def test_closing_while_threads_are_inside(hand: HeapByHand) -> None:
    again = Heap.attach(hand.heap.name)
    started = threading.Barrier(5)
    ends: list[type[Exception]] = []

    def use() -> None:
        started.wait()
        try:
            while True:
                again.alloc(100_000).free()
                again.alloc(100).free()
        except ValueError as error:
            ends.append(type(error))

    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    started.wait()
    for _ in range(200):
        hand.heap.alloc(100_000).free()
    again.close()
    for thread in threads:
        thread.join()
    assert ends == [ValueError] * 4
    assert hand.reap() == 1
    hand.collect()
    assert hand.stats.heap_objects == 0


def test_a_heap_that_a_thread_closed_was_read_by_those_inside(
    hand: HeapByHand, short_slices: None
) -> None:
    """Most often, in a hundred rounds, by one that was about to say why there is no memory."""
    for _ in range(100):
        again = Heap.attach(hand.heap.name)
        inside = threading.Barrier(4)

        def say_why(heap: Heap = again, inside: threading.Barrier = inside) -> None:
            inside.wait()
            with suppress(ValueError):  # the heap is closed
                while True:
                    heap._full(MIB, _core.FULL)

        threads = [threading.Thread(target=say_why) for _ in range(3)]
        for thread in threads:
            thread.start()
        inside.wait()
        for _ in range(20):
            hand.heap.alloc(100_000).free()
        again.close()
        for thread in threads:
            thread.join()
        assert hand.reap() == 1


# Asking the coordinator


def test_gc_and_scavenge_report(heap: Heap) -> None:
    blocks = [heap.alloc(MIB) for _ in range(4)]
    del blocks
    report = heap.gc()
    assert (report.trigger, report.cycle) == ("asked", 1)
    assert heap.stats().num_gc >= 1
    assert heap.scavenge().released_bytes == 0, "too young"
    report = heap.scavenge(all=True)
    assert report.trigger == "asked"
    assert report.released_bytes >= 4 * MIB
    stats = heap.stats()
    assert stats.heap_released >= 4 * MIB
    assert stats.heap_sys - stats.heap_released == stats.committed_bytes
    heap.check()


def test_gc_can_wait_for_ever(heap: Heap) -> None:
    assert heap.gc(timeout=None).trigger == "asked"
    assert heap.scavenge(timeout=None).trigger == "asked"


def test_gc_without_an_answer(hand: HeapByHand) -> None:
    with pytest.raises(shmheap.CoordinatorLost, match="did not answer"):
        hand.heap.gc(timeout=0)


@pytest.mark.parametrize("bad", [-1, float("nan"), -0.5])
def test_a_senseless_timeout_was_taken_where_it_was_not_needed(
    hand: HeapByHand, bad: float
) -> None:
    for ask in (lambda: hand.heap.alloc(1, timeout=bad), lambda: hand.heap.gc(timeout=bad)):
        with pytest.raises(ValueError, match="timeout"):
            ask()
    with pytest.raises(TypeError):
        hand.heap.alloc(1, timeout="1")  # type: ignore[arg-type]


def test_what_is_larger_than_the_heap_is_said_to_be(hand: HeapByHand) -> None:
    with pytest.raises(HeapFull, match="more than the whole heap"):
        hand.heap.alloc(hand.heap.capacity + 1)
