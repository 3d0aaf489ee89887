"""No room: which limit it was, who waits for memory and gets it, and who is told that none comes.

Whatever happens the heap stays whole: nobody gets SIGBUS, nothing is lost, and it works again.
"""

from __future__ import annotations

import copy
import itertools
import json
import multiprocessing
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from by_hand import HeapByHand
from machine import cgroup_of, mounted
from processes import Worker

from shmheap import Block, Config, Heap, HeapFull, _core
from shmheap.verify import verify_quiet

MIB = 1 << 20


def assert_whole(heap: Heap) -> None:
    heap.check()
    report = verify_quiet(heap._fileno(), _core.Observer(heap._fileno()))
    assert report.agrees, [str(wrong) for wrong in report.mismatches[:8]]


@pytest.fixture
def make(heap_name: str) -> Iterator[Callable[..., Heap]]:
    """Makes a heap with a coordinator; looks at the end whether it is whole."""
    made: list[Heap] = []

    def create(capacity: int = 16 * MIB, **config: object) -> Heap:
        name = f"{heap_name}-{len(made)}"
        made.append(Heap.create(name, capacity=capacity, config=Config(**config)))  # type: ignore[arg-type]
        return made[-1]

    yield create
    for heap in made:
        assert_whole(heap)
        heap.close()


def fill(heap: Heap, nbytes: int) -> tuple[list[Block], HeapFull]:
    """Blocks until there is no room for another, each written from end to end."""
    blocks: list[Block] = []
    while True:
        try:
            block = heap.alloc(nbytes)
        except HeapFull as error:
            return blocks, error
        block[:] = bytes([len(blocks) % 255 + 1]) * nbytes
        blocks.append(block)


def assert_unharmed(blocks: list[Block]) -> None:
    for number, block in enumerate(blocks):
        assert bytes(block) == bytes([number % 255 + 1]) * len(block)


@pytest.mark.parametrize("nbytes", [200, 5000, 65536, 100_000, 3 * MIB])
def test_capacity(make: Callable[..., Heap], nbytes: int) -> None:
    heap = make()
    blocks, error = fill(heap, nbytes)
    assert error.limit in ("capacity", "fragmentation")
    assert error.requested_bytes == nbytes
    assert error.capacity_bytes == 16 * MIB
    assert error.in_use_bytes + error.free_bytes == 16 * MIB
    assert error.largest_free_bytes < max(nbytes, 65536) + 8192
    assert error.holders[0] == ("pin", os.getpid(), len(blocks) * nbytes)
    assert error.remedy in str(error)
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error)
    assert isinstance(error, MemoryError)
    assert_unharmed(blocks)
    assert_whole(heap)
    blocks.pop().free()
    blocks.append(heap.alloc(nbytes))
    assert bytes(blocks.pop()) == bytes(nbytes)
    assert len(blocks) * nbytes >= 0.7 * 16 * MIB
    blocks.clear()
    assert len(heap.alloc(15 * MIB)) == 15 * MIB, "all of it can be had again, in one piece"


def test_fragmentation(make: Callable[..., Heap]) -> None:
    heap = make()
    blocks, _ = fill(heap, 200_000)
    del blocks[::2]
    with pytest.raises(HeapFull) as caught:
        heap.alloc(4 * MIB)
    assert caught.value.limit == "fragmentation"
    assert caught.value.free_bytes >= 4 * MIB
    assert 200_000 <= caught.value.largest_free_bytes < 4 * MIB
    assert blocks


def holders(heap: Heap) -> dict[tuple[str, int | str], int]:
    """Whom an error names that is made now, and with how many bytes."""
    return {(kind, who): held for kind, who, held in heap._full(1, _core.FULL).holders}


def test_who_had_made_the_blocks_was_named_as_their_holder(make: Callable[..., Heap]) -> None:
    heap = make()
    own = [heap.alloc(100_000) for _ in range(3)]
    own += [heap.alloc(1000) for _ in range(50)]
    me = ("pin", os.getpid())
    with Worker() as worker:
        its = ("pin", worker.pid)
        worker.do("attach", heap.name)
        worker.do("alloc_many", "many", 20, 100_000)
        worker.do("keep", "sent", own)
        assert holders(heap) == {me: 175_000, its: 2_000_000 + 175_000}, "half of what both have"
        own.clear()
        held = {its: 2_000_000 + 350_000}
        assert holders(heap) == held
        block = heap.alloc(60_000)
        again = copy.copy(block)
        assert holders(heap) == held | {me: 60_000}, "two handles hold one block"
        lease = block.lease()
        sent = {("lease", os.getpid()): 20_000}
        assert holders(heap) == held | sent | {me: 40_000}, "what is on its way is told apart"
        again.free()
        heap.roots["named"] = block
        assert holders(heap) == held | {("root", "named"): 60_000}, "a name says most"
        del block, again
        lease.release()
        with pytest.raises(HeapFull) as caught:
            heap.alloc(15 * MIB)
        assert caught.value.holders == (
            ("pin", worker.pid, 2_350_000),
            ("root", "named", 60_000),
        )
        worker.end()
    assert len(heap.roots["named"]) == 60_000
    heap.gc()
    assert holders(heap) == {("root", "named"): 60_000}
    heap.roots.clear()


def test_what_a_shared_dict_leads_to_is_on_the_account_of_its_name(
    make: Callable[..., Heap],
) -> None:
    heap = make()
    cache = heap.dict("cache")
    cache["parts"] = [heap.alloc(100_000) for _ in range(20)]
    cache["more"] = {"part": heap.alloc(300_000)}
    views = [memoryview(part) for part in cache["parts"]]
    free = heap.list(value=[heap.alloc(50_000)])
    held = holders(heap)
    assert held.keys() == {("root", "cache"), ("pin", os.getpid())}
    assert 2_300_000 < held["root", "cache"] < 2_310_000
    assert 50_000 < held["pin", os.getpid()] < 52_000, "the list that has no name"
    assert len(views) == 20
    with Worker() as worker:
        worker.do("attach", heap.name)
        worker.do("keep", "cache", cache)
        assert holders(heap) == held, "who uses it does not hold what its name does"
        worker.end()
    with pytest.raises(HeapFull, match=r"largest holders: root 'cache' 2\.2 MiB, pid "):
        heap.alloc(15 * MIB)
    assert free


def test_the_five_that_hold_most_are_named(make: Callable[..., Heap]) -> None:
    heap = make()
    for n in range(1, 9):
        heap.roots[f"n{n}"] = heap.alloc(100_000 * n)
    block = heap.alloc(650_000)
    error = heap._full(1, _core.FULL)
    assert [who for _, who, _ in error.holders] == ["n8", "n7", os.getpid(), "n6", "n5"]
    heap.roots.clear()
    assert block


def test_put_and_ndarray_are_refused_alike(make: Callable[..., Heap]) -> None:
    heap = make()
    for use in (heap.ndarray, lambda n: heap.put(bytes(8 * n))):
        with pytest.raises(HeapFull):
            use(3 * MIB)
    assert heap.stats().heap_objects == 0


def test_fault_4_a_memory_limit_releases_at_once_and_then_refuses(
    make: Callable[..., Heap],
) -> None:
    heap = make(64 * MIB, memory_limit=8 * MIB, scavenge_after_s=10_000)
    small = [heap.alloc(1000) for _ in range(6000)]
    del small
    large = heap.alloc(7 * MIB)
    large[:] = b"x" * len(large)
    assert heap.stats().committed_bytes <= 8 * MIB
    with pytest.raises(HeapFull) as caught:
        heap.alloc(2 * MIB)
    assert caught.value.limit == "memory_limit"
    assert caught.value.limit_bytes == 8 * MIB
    assert "memory_limit" in caught.value.remedy
    assert bytes(large) == b"x" * len(large)
    assert_whole(heap)
    large.free()
    assert bytes(heap.alloc(7 * MIB)) == bytes(7 * MIB)


def test_small_blocks_meet_the_memory_limit_too(make: Callable[..., Heap]) -> None:
    heap = make(64 * MIB, memory_limit=4 * MIB)
    blocks, error = fill(heap, 500)
    assert error.limit == "memory_limit"
    assert 3.5 * MIB <= len(blocks) * 500 <= 4 * MIB
    assert_unharmed(blocks)
    assert heap.stats().committed_bytes <= 4 * MIB
    blocks.clear()
    assert len(fill(heap, 100_000)[0]) >= 36


# A full file system


@pytest.fixture
def tiny(tmp_path: Path) -> Iterator[str]:
    """A tmpfs of 6 MiB."""
    with mounted("tmpfs", tmp_path, "size=6m"):
        yield str(tmp_path)


def fill_up(directory: str) -> Path:
    """A file that takes all the room that is left."""
    hog = Path(directory) / "hog"
    with hog.open("wb", buffering=0) as file:
        room = os.statvfs(directory)
        assert file.write(bytes(room.f_bavail * room.f_frsize)) > 0
        with pytest.raises(OSError, match="No space"):
            file.write(b"x")
    return hog


@pytest.mark.parametrize("nbytes", [100, 3000, 40_000, 300_000, MIB])
def test_a_full_tmpfs(make: Callable[..., Heap], tiny: str, nbytes: int) -> None:
    heap = make(64 * MIB, directory=tiny)
    blocks, error = fill(heap, nbytes)
    assert error.limit == "tmpfs"
    assert error.limit_bytes == 6 * MIB
    assert "--shm-size" in error.remedy
    assert len(blocks) * nbytes >= 4 * MIB
    assert_unharmed(blocks)
    assert_whole(heap)
    with pytest.raises(HeapFull):
        heap.alloc(nbytes)
    kept = blocks.pop()
    kept.free()
    blocks.append(heap.alloc(nbytes))
    blocks.clear()
    assert heap.stats().heap_objects == 0
    heap.scavenge(all=True)
    assert len(heap.alloc(4 * MIB)) == 4 * MIB


def test_somebody_else_fills_the_tmpfs(make: Callable[..., Heap], tiny: str) -> None:
    heap = make(64 * MIB, directory=tiny)
    blocks = [heap.put(b"x" * 300_000)]
    blocks += [heap.put(b"y" * 100) for _ in range(1000)]
    hog = fill_up(tiny)
    more, error = fill(heap, 1000)
    assert error.limit == "tmpfs"
    for nbytes in (100_000, MIB):
        with pytest.raises(HeapFull):
            heap.alloc(nbytes)
    assert bytes(blocks[0]) == b"x" * 300_000
    assert all(bytes(block) == b"y" * 100 for block in blocks[1:])
    assert_unharmed(more)
    assert_whole(heap)
    with pytest.raises(HeapFull, match="full"):
        pickle.dumps(blocks[1])  # no room for a page of leases
    hog.unlink()
    assert bytes(pickle.loads(pickle.dumps(blocks[1]))) == b"y" * 100
    assert len(heap.alloc(MIB)) == MIB


SEQUENCE_PAGES = 120
"""What the sequence below takes of an empty file system, about."""


class PagesLeft:
    """The scripted sequence, in a file system that has so many pages left.

    The process is the coordinator, too; whatever fails must fail with HeapFull.
    """

    def __init__(self, directory: str, pages: int) -> None:
        self.directory, self.pages = directory, pages
        self.name = f"left-{pages}"
        self.kept: list[object] = []
        self.refused = 0

    def run(self) -> bool:
        """Whether all of it had room."""
        hog = Path(self.directory, "hog")
        with hog.open("wb") as file:
            room = os.statvfs(self.directory)
            os.posix_fallocate(file.fileno(), 0, (room.f_bfree - self.pages) * 4096)
        try:
            hand = HeapByHand(self.name, 8 * MIB, Config(directory=self.directory))
        except HeapFull as error:
            self._refuse(error)
        else:
            with hand:
                self._use(hand)
                hog.unlink()
                hand.assert_sound()
                before, self.refused = self.refused, 0
                self._use(hand)
                assert self.refused == 0, "what failed for want of room goes well with it"
                hand.assert_sound()
                self.refused = before
        hog.unlink(missing_ok=True)
        for left in Path(self.directory).iterdir():  # made, and then there was no room for a user
            left.unlink()
        return self.refused == 0

    def _use(self, hand: HeapByHand) -> None:
        heap = hand.heap
        heap._reclaim = lambda timeout_s=0.0: (hand.collect(), hand.release())  # type: ignore
        acts: list[Callable[[], object]] = [
            lambda: heap.alloc(64),
            lambda: heap.put(b"x" * 3000),
            lambda: heap.alloc(200_000),
            lambda: pickle.loads(pickle.dumps(self._block())),
            lambda: [copy.copy(self._block()) for _ in range(1100)],
            lambda: heap.roots.__setitem__("name", self._block()),
            lambda: Heap.attach(self.name, directory=self.directory).close(),
            lambda: (self.kept.clear(), hand.collect(), hand.release()),
            lambda: heap.put(bytes(300_000)),
            lambda: [heap.put(b"y" * 40) for _ in range(300)],
        ]
        for act in acts:
            try:
                self.kept.append(act())
            except HeapFull as error:
                self._refuse(error)
        assert heap._check() == []
        for block in self.kept:
            assert not isinstance(block, Block) or bytes(block)[:1] in (b"x", b"\0")
        self.kept.clear()

    def _refuse(self, error: HeapFull) -> None:
        assert error.limit == "tmpfs", str(error)
        self.refused += 1

    def _block(self) -> Block:
        found = [block for block in self.kept if isinstance(block, Block)]
        if not found:
            raise HeapFull("tmpfs")
        return found[0]


def run_pages_left(directory: str, pages: range) -> None:
    whole = [PagesLeft(directory, left).run() for left in pages]
    assert whole[-1], "the last of them has room for all of it"
    assert not any(whole[: len(whole) // 2])


def test_every_number_of_pages_left(tmp_path: Path) -> None:
    """Every tenth of them; every one with SH_TEST_SCALE=10."""
    step = max(1, 10 // int(os.environ.get("SH_TEST_SCALE", "1")))
    with mounted("tmpfs", tmp_path, "size=4m"):
        pages = range(0, SEQUENCE_PAGES + step, step)
        process = multiprocessing.get_context("fork").Process(
            target=run_pages_left, args=(str(tmp_path), pages)
        )
        process.start()
        process.join()
    assert process.exitcode == 0, "neither an error nor SIGBUS"


# Handles, leases and names take memory, too


def copies_without_end(block: Block) -> tuple[list[Block], HeapFull]:
    """Handles of one block until there is no room for another."""
    copies: list[Block] = []
    while True:
        try:
            copies.append(copy.copy(block))
        except HeapFull as error:
            return copies, error


def test_a_full_heap_gave_a_bare_error_where_a_handle_is_made(make: Callable[..., Heap]) -> None:
    heap = make(MIB)
    block = heap.put(b"x")
    heap.roots["a"] = block
    lease = block.lease()
    copies, error = copies_without_end(block)
    assert len(copies) > 100_000
    uses: list[Callable[[], object]] = [lease.take, lambda: heap.roots["a"]]
    for use in uses:
        with pytest.raises(HeapFull) as caught:
            use()
        for full in (caught.value, error):
            assert full.limit == "capacity"
            assert full.capacity_bytes == MIB
            assert str(full).startswith("no room for the books of a further handle, lease or name")
            assert str(pickle.loads(pickle.dumps(full))) == str(full)
    copies.clear()
    assert bytes(lease.take()) == bytes(heap.roots["a"]) == b"x"


def test_a_full_heap_gave_a_bare_error_where_a_lease_is_made(make: Callable[..., Heap]) -> None:
    heap = make(MIB)
    block = heap.put(b"x")
    blocks, _ = fill(heap, 5000)
    for use in (pickle.dumps, Block.lease):
        with pytest.raises(HeapFull) as caught:
            use(block)
        assert caught.value.limit == "capacity"
    blocks.clear()
    assert bytes(pickle.loads(pickle.dumps(block))) == b"x"


def test_a_full_tmpfs_gave_a_bare_error_where_a_name_is_made(
    make: Callable[..., Heap], tiny: str
) -> None:
    heap = make(64 * MIB, directory=tiny)
    block = heap.put(b"x")
    hog = fill_up(tiny)
    names = map(str, itertools.count())

    def name_it_again_and_again() -> None:
        for name in names:
            heap.roots[name] = block

    with pytest.raises(HeapFull) as caught:
        name_it_again_and_again()
    assert caught.value.limit == "tmpfs"
    with pytest.raises(HeapFull):  # a slot takes memory, too
        _ = [Heap.attach(heap.name, directory=tiny) for _ in range(32)]
    hog.unlink()
    heap.roots[next(names)] = block


def send(block: Block) -> Block:
    received: Block = pickle.loads(pickle.dumps(block))
    return received


@pytest.mark.parametrize("use", [send, copy.copy])
def test_memory_was_not_reclaimed_for_a_handle(
    make: Callable[..., Heap], monkeypatch: pytest.MonkeyPatch, use: Callable[[Block], Block]
) -> None:
    heap = make(MIB)
    block = heap.put(b"x")
    held = [copies_without_end(block)[0]]
    reclaim = Heap._reclaim

    def drop_and_reclaim(heap: Heap) -> None:
        held.clear()
        reclaim(heap)

    monkeypatch.setattr(Heap, "_reclaim", drop_and_reclaim)
    assert use(block) == block
    assert not held


def test_no_room_for_a_heap_at_all(heap_name: str, tiny: str) -> None:
    fill_up(tiny)
    with pytest.raises(HeapFull) as caught:
        Heap.create(heap_name, capacity=MIB, config=Config(directory=tiny))
    assert caught.value.limit == "tmpfs"
    assert [path.name for path in Path(tiny).iterdir()] == ["hog"], "nothing half-made is left"


# A cgroup

IN_A_CGROUP = """
import json, sys, shmheap
folder, name, nbytes = sys.argv[1], sys.argv[2], int(sys.argv[3])
open(folder + "/cgroup.procs", "w").write("0")
with shmheap.Heap.create(name, capacity="1GiB") as heap:
    blocks = []
    try:
        while True:
            blocks.append(heap.alloc(nbytes))
            for at in range(0, nbytes, 4096):
                blocks[-1][at] = 120
            if len(blocks) % 20_000 == 0:  # handles take memory, which the coordinator has to see
                heap.scavenge()
    except shmheap.HeapFull as error:
        full = error
    whole = all(block[at] == 120 for block in blocks for at in range(0, nbytes, 4096))
    said = [full.limit, full.limit_bytes, len(blocks) * nbytes, whole, str(full)]
    blocks.clear()
    heap.check()
    again = heap.put(bytes(32 << 20))
    heap.unlink()
print(json.dumps(said))
"""


@pytest.mark.parametrize("nbytes", [16, 20 * MIB])
def test_beyond_its_cgroups_limit_a_process_was_killed(heap_name: str, nbytes: int) -> None:
    with cgroup_of(128 * MIB) as folder:
        command = [sys.executable, "-P", "-c", IN_A_CGROUP, folder, heap_name, str(nbytes)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done
        limit, limit_bytes, got_bytes, whole, text = json.loads(done.stdout)
    assert limit == "cgroup"
    assert got_bytes <= limit_bytes < 128 * MIB
    assert got_bytes >= (40 if nbytes > 100 else 4) * MIB, "handles take memory, too"
    assert whole
    assert "its cgroup" in text


# Waiting


@pytest.fixture
def hand(heap_name: str) -> Iterator[HeapByHand]:
    """8 MiB, of which the test is the coordinator."""
    with HeapByHand(heap_name, 8 * MIB) as hand:
        yield hand
        hand.assert_sound()


@pytest.fixture
def two(hand: HeapByHand) -> Iterator[tuple[Worker, Worker]]:
    with Worker() as one, Worker() as another:
        for worker in (one, another):
            worker.do("attach", hand.heap.name)
        yield one, another


def answered(hand: HeapByHand, worker: Worker) -> object:
    """What a step returned, for which the coordinator is needed; raises what it raised."""
    hand.turns_until(worker.connection.poll)
    return worker.result()


@pytest.mark.parametrize("nbytes", [6 * MIB, 65536])
def test_who_waits_gets_what_another_frees(
    hand: HeapByHand, two: tuple[Worker, Worker], nbytes: int
) -> None:
    holder, waiter = two
    holder.do("alloc_many", "all", 7 * MIB // nbytes, nbytes)
    holder.do("alloc_many", "rest", 7 if nbytes < MIB else 0, nbytes)
    waiter.start("alloc_waiting", "block", 6 * MIB if nbytes == 6 * MIB else 900_000, None)
    hand.turns_until(lambda: hand.waiting == 1)
    for _ in range(20):
        hand.turn()
    assert not waiter.connection.poll(), "the holder does not wait: it may free something yet"
    holder.do("drop", "all")
    answered(hand, waiter)
    assert hand.waiting == 0
    waiter.do("drop", "block")
    waiter.end()
    holder.end()


def test_who_waits_gets_what_the_dead_held(hand: HeapByHand, two: tuple[Worker, Worker]) -> None:
    holder, waiter = two
    holder.do("alloc", "block", 6 * MIB)
    waiter.start("alloc_waiting", "block", 6 * MIB, None)
    hand.turns_until(lambda: hand.waiting == 1)
    holder.kill()
    answered(hand, waiter)
    assert hand.stats.heap_objects == 1
    waiter.end()


def test_s15_when_all_wait_each_is_refused(hand: HeapByHand, two: tuple[Worker, Worker]) -> None:
    for worker in two:
        worker.do("alloc", "mine", 3 * MIB)
    for worker in two:
        worker.start("alloc_waiting", "more", 4 * MIB, None)
    for worker in two:
        with pytest.raises(HeapFull) as caught:
            answered(hand, worker)
        assert caught.value.limit == "waiting"
        assert "waits for memory" in str(caught.value)
        assert {who for _, who, _ in caught.value.holders} >= {other.pid for other in two}
    assert hand.waiting == 0
    one, another = two
    one.do("drop", "mine")
    another.do("alloc", "more", 2 * MIB)
    assert one.do("check") == []
    one.end()
    another.end()


def test_s15_who_merely_sleeps_elsewhere_is_covered_by_the_timeout(
    hand: HeapByHand, two: tuple[Worker, Worker]
) -> None:
    holder, waiter = two
    holder.do("alloc", "mine", 6 * MIB)
    waiter.start("alloc_waiting", "more", 4 * MIB, 0.01)
    with pytest.raises(HeapFull) as caught:
        answered(hand, waiter)
    assert caught.value.limit == "capacity"
    assert hand.waiting == 0
    holder.end()
    waiter.end()


def test_s15_one_process_alone(hand: HeapByHand) -> None:
    with Worker() as worker:
        worker.do("attach", hand.heap.name)
        worker.do("alloc", "mine", 6 * MIB)
        worker.start("alloc_waiting", "more", 4 * MIB, None)
        with pytest.raises(HeapFull) as caught:
            answered(hand, worker)
        assert caught.value.limit == "waiting"
        worker.end()


def test_whoever_waits_and_is_killed_counts_no_more(
    hand: HeapByHand, two: tuple[Worker, Worker]
) -> None:
    holder, waiter = two
    holder.do("alloc", "mine", 6 * MIB)
    waiter.start("alloc_waiting", "more", 4 * MIB, None)
    hand.turns_until(lambda: hand.waiting == 1)
    waiter.kill()
    hand.turns_until(lambda: len(hand.steward.slots()) == 2)
    assert hand.waiting == 0
    holder.do("drop", "mine")
    holder.do("alloc", "mine", 6 * MIB)
    holder.end()


def test_garbage_is_found_for_who_waits(hand: HeapByHand, two: tuple[Worker, Worker]) -> None:
    """The sender of a handle died before anybody had read it; its grace is over."""
    sender, waiter = two
    sender.do("alloc", "block", 6 * MIB)
    sender.do("reduce", "block")
    sender.do("drop", "block")
    assert hand.stats.leases == 1
    waiter.start("alloc_waiting", "block", 6 * MIB, None)
    hand.turns_until(lambda: hand.waiting == 1)
    sender.kill()
    while not waiter.connection.poll():
        hand.reap()
        hand.turn()
    waiter.result()
    waiter.end()
