"""Blocks between processes: handed over, shared, outlived, under every way to start a process."""

from __future__ import annotations

import contextlib
import copy
import fcntl
import hashlib
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager

import pytest
from by_hand import HeapByHand
from processes import METHODS, Worker, rehash

from shmheap import Heap, HeapFull, StaleHandle, _core

MIB = 1 << 20
SIZES = [1, 100, 5000, 65536, 3 * MIB]


@pytest.fixture
def hand(heap_name: str) -> Iterator[HeapByHand]:
    with HeapByHand(heap_name) as hand:
        yield hand
        hand.reap()
        hand.collect()
        assert hand.stats.heap_objects == 0, "nothing that a test made is left"
        hand.assert_sound()


def gone(hand: HeapByHand, worker: Worker) -> None:
    """The worker has ended: the coordinator notices."""
    hand.turns_until(lambda: all(slot[2] != worker.pid for slot in hand.steward.slots()))


@pytest.mark.parametrize("method", METHODS)
def test_blocks_go_there_and_back(hand: HeapByHand, method: str) -> None:
    with Worker(method) as worker:
        for size in SIZES:
            data = os.urandom(size)
            block = hand.heap.put(data)
            worker.do("keep", "block", block)
            assert worker.do("digest", "block") == hashlib.sha256(data).hexdigest()
            worker.do("write", "block", 0, b"!")
            assert block[0] == ord("!"), "the same bytes, not a copy"
            back = worker.do("get", "block")
            assert back == block
            block.free()
            assert bytes(back)[1:] == data[1:]
            back.free()
            assert hand.stats.heap_objects == 1, "the worker has it"
            worker.do("drop", "block")
            assert hand.stats.heap_objects == 0
        worker.end()


@pytest.mark.parametrize("method", METHODS)
def test_heap_and_blocks_as_arguments_of_a_process(hand: HeapByHand, method: str) -> None:
    block = hand.heap.put(b"abc")
    with Worker(method, heap=hand.heap, block=block) as worker:
        assert worker.do("read", "block") == b"abc"
        worker.do("put", "mine", b"from there")
        theirs = worker.do("get", "mine")
        worker.do("drop", "mine")
        assert bytes(theirs) == b"from there"
        block.free()
        hand.collect()
        assert worker.do("read", "block") == b"abc"
        worker.do("free", "block")
        assert hand.stats.heap_objects == 1
        theirs.free()
        worker.end()


@pytest.mark.parametrize("method", METHODS)
def test_what_one_allocates_another_frees(hand: HeapByHand, method: str) -> None:
    with Worker(method) as worker:
        for _ in range(5):
            blocks = [
                hand.heap.alloc(size) for size in SIZES for _ in range(50 if size < MIB else 2)
            ]
            worker.do("keep", "blocks", blocks)
            del blocks
            worker.do("drop", "blocks")
            assert hand.stats.heap_objects == 0
        grown = hand.stats.heap_sys
        worker.do("attach", hand.heap.name)
        for _ in range(5):
            worker.do("alloc_many", "mine", 500, 5000)
            mine = worker.do("get", "mine")
            worker.do("drop", "mine")
            del mine
        assert hand.stats.heap_objects == 0
        assert hand.stats.heap_sys <= grown + 10 * MIB, "spans are used again"
        worker.end()


def test_one_pickle_for_many(hand: HeapByHand) -> None:
    data = pickle.dumps(hand.heap.put(b"abc"))
    with Worker() as one, Worker() as two, Worker() as three:
        workers = (one, two, three)
        for worker in workers:
            worker.do("keep", "handle", data)
            worker.do("attach", hand.heap.name)
        for worker in workers:
            worker.do("rebuild", "block", tuple(pickle.loads(data).__reduce__()[1]))
        assert hand.stats.heap_objects == 1
        for worker in workers:
            assert worker.do("read", "block") == b"abc"
            worker.do("drop", "block")
        assert hand.stats.heap_objects == 0
        with pytest.raises(StaleHandle):
            pickle.loads(data)
        for worker in workers:
            worker.end()


def test_the_first_taker_of_a_broadcast_frees_the_sender(hand: HeapByHand) -> None:
    with Worker() as worker:
        worker.do("attach", hand.heap.name)
        worker.do("put", "block", b"abc")
        handle = worker.do("reduce", "block")
        worker.do("drop", "block")
        assert hand.stats.leases == 1
        with Worker() as taker:
            taker.do("rebuild", "a", handle)
            taker.do("rebuild", "b", handle)
            assert hand.stats.leases == 0
            taker.do("drop", "a")
            assert taker.do("read", "b") == b"abc"
            taker.do("drop", "b")
            with pytest.raises(StaleHandle):
                taker.do("rebuild", "c", handle)
            with pytest.raises(StaleHandle):
                worker.do("rebuild", "c", handle)
            taker.end()
        worker.end()


def test_roots_are_seen_by_all(hand: HeapByHand) -> None:
    with Worker() as one, Worker() as two:
        for worker in (one, two):
            worker.do("attach", hand.heap.name)
        one.do("put", "block", b"abc")
        one.do("root_set", "name", "block")
        one.kill()
        gone(hand, one)
        hand.collect()
        two.do("root_get", "found", "name")
        assert two.do("read", "found") == b"abc"
        del hand.heap.roots["name"]
        assert two.do("read", "found") == b"abc"
        two.do("drop", "found")
        two.end()


def test_a_child_outlives_its_parent(hand: HeapByHand) -> None:
    for by_signal in (signal.SIGKILL, 0):
        with Worker("fork", heap=hand.heap, block=hand.heap.put(b"abc")) as worker:
            parent = worker.pid
            child = worker.do("fork_and_leave", by_signal)
            assert child != parent
            worker.process.join()
            gone(hand, worker)
            hand.collect()
            assert worker.do("read", "block") == b"abc"
            worker.do("put", "mine", b"orphan")
            back = worker.do("get", "mine")
            assert bytes(back) == b"orphan"
            assert worker.do("check") == []
            pidfd = os.pidfd_open(child)
            worker.connection.send(None)
            multiprocessing.connection.wait([pidfd])
            os.close(pidfd)
        hand.turns_until(lambda: len(hand.steward.slots()) == 1)
        assert bytes(back) == b"orphan"
        back.free()


def test_a_parent_outlives_its_child(hand: HeapByHand) -> None:
    block = hand.heap.put(b"abc")
    for _ in range(3):
        with Worker("fork", heap=hand.heap, block=block) as worker:
            worker.do("alloc_many", "more", 100, 3000)
            worker.kill()
            gone(hand, worker)
    hand.collect()
    assert bytes(block) == b"abc"
    assert hand.stats.heap_objects == 1


def test_grandchildren(hand: HeapByHand) -> None:
    block = hand.heap.put(b"abc")
    with Worker("fork", heap=hand.heap, block=block, expected=b"abc") as worker:
        for _ in range(3):
            assert worker.do("fork_twice", "block") == [0, 0]
            assert worker.do("read", "block") == b"abc"
        worker.end()
    hand.turns_until(lambda: len(hand.steward.slots()) == 1)
    assert bytes(block) == b"abc"


def test_a_child_has_every_handle_of_its_parent(hand: HeapByHand) -> None:
    blocks = [hand.heap.put(number.to_bytes(4, "big")) for number in range(5000)]
    with Worker("fork", heap=hand.heap, blocks=blocks) as worker:
        del blocks
        hand.collect()
        assert hand.stats.heap_objects == 5000
        back = worker.do("get", "blocks")
        assert [bytes(block) for block in back[::97]] == [
            number.to_bytes(4, "big") for number in range(0, 5000, 97)
        ]
        worker.do("free", "blocks")
        del back
        assert hand.stats.heap_objects == 0
        worker.end()


def test_views_are_inherited_too(hand: HeapByHand) -> None:
    view = memoryview(hand.heap.put(b"abc"))
    with Worker("fork", heap=hand.heap, block=view) as worker:
        view.release()
        hand.collect()
        worker.do("write", "block", 0, b"x")
        assert worker.do("read", "block") == b"xbc"
        worker.do("drop", "block")
        worker.end()


def test_a_fork_without_hooks_is_refused_and_harms_nobody(hand: HeapByHand) -> None:
    with Worker("spawn", heap=hand.heap, block=hand.heap.put(b"abc")) as worker:
        worker.do("alloc_many", "more", 10, 100)
        *uses, freed, dropped, closed = worker.do("fork_raw", "_Fork")
        assert all(said.startswith("HeapError: this process was forked") for said in uses), uses
        assert freed.startswith(("HeapError", "returned None")), freed
        assert dropped.startswith("returned"), dropped
        assert closed == "returned None"
        states = {slot[2]: slot[1] for slot in hand.steward.slots()}
        assert states[worker.pid] == 1, "its parent still is a user"
        hand.turn()
        hand.collect()
        assert worker.do("read", "block") == b"abc"
        worker.do("alloc", "another", 100)
        assert worker.do("check") == []
        worker.end()


def test_a_fork_by_a_library_in_c_takes_the_heap_along(hand: HeapByHand) -> None:
    with Worker("spawn", heap=hand.heap, block=hand.heap.put(b"abc")) as worker:
        hand.heap.roots["a"] = hand.heap.put(b"name")
        *uses, freed, dropped, closed = worker.do("fork_raw", "fork")
        assert uses[1] == f"returned {ord('a')}"
        assert all(said.startswith("returned") for said in (*uses, freed, dropped, closed)), uses
        hand.turns_until(lambda: len(hand.steward.slots()) == 2)
        assert worker.do("read", "block") == b"abc", "the child freed its own hold only"
        del hand.heap.roots["a"]
        assert worker.do("check") == []
        worker.end()


@contextlib.contextmanager
def every_slot_taken(hand: HeapByHand) -> Iterator[None]:
    """The liveness locks of all the slots that are free are held by somebody else."""
    slots = -(-_core.HEADER_BYTES // 4096) * 4096
    with open(hand.path, "r+b") as file:
        lock = struct.pack(
            "hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, slots + 512, _core.MAX_PROCESSES * 256, 0
        )
        fcntl.fcntl(file, fcntl.F_OFD_SETLK, lock)
        yield


@contextlib.contextmanager
def no_descriptor(hand: HeapByHand) -> Iterator[None]:
    kept, fd = os.dup(hand.heap._fileno()), hand.heap._fileno()
    os.close(fd)
    yield
    os.dup2(kept, fd, inheritable=False)
    os.close(kept)


def said_in_a_child(heap: Heap) -> str:
    """What a forked child is told when it uses the heap."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            heap.alloc(1)
        except BaseException as error:
            os.write(writer, f"{type(error).__name__}: {error}".encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as said:
        told = said.read().decode()
    os.waitpid(child, 0)
    return told


@pytest.mark.parametrize(
    ("obstacle", "said"),
    [(every_slot_taken, "no free slot"), (no_descriptor, "closed the heap's descriptor")],
)
def test_a_child_without_a_slot_was_told_of_missing_hooks(
    hand: HeapByHand, obstacle: Callable[[HeapByHand], AbstractContextManager[None]], said: str
) -> None:
    with obstacle(hand):
        told = said_in_a_child(hand.heap)
    assert told.startswith("HeapError: this process was forked while it could not be given a place")
    assert said in told
    assert said_in_a_child(hand.heap) == "", "the next one has one"
    hand.turns_until(lambda: len(hand.steward.slots()) == 1)


def test_a_child_of_a_full_heap_was_told_of_missing_hooks(
    heap_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Heap, "_reclaim", lambda *_: None)
    with HeapByHand(heap_name, MIB) as small:
        block = small.heap.put(b"x")
        copies = []
        with contextlib.suppress(HeapFull):
            while True:
                copies.append(copy.copy(block))
        assert "while it could not be given a place in the heap: the heap is full" in (
            said_in_a_child(small.heap)
        )
        copies.clear()
        small.reap()  # what was reserved for the child
        small.collect()
        assert said_in_a_child(small.heap) == ""
        small.turns_until(lambda: len(small.steward.slots()) == 1)


HOOKED_BEFORE = """
import os, threading
def wait_for_a_thread_that_allocates():
    thread = threading.Thread(target=lambda: allocated.append(heap.alloc(100)))
    thread.start()
    thread.join()
os.register_at_fork(before=wait_for_a_thread_that_allocates)
import shmheap
allocated = []
with shmheap.Heap.create(capacity="1MiB") as heap:
    child = os.fork()
    if child == 0:
        heap.alloc(100)
        os._exit(len(allocated))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_hook_from_before_the_import_waited_for_a_thread_that_waited_for_the_heap() -> None:
    """Such hooks run last: the heap must not be locked before them."""
    ran = subprocess.run([sys.executable, "-Pc", HOOKED_BEFORE], capture_output=True, text=True)
    assert (ran.stdout, ran.stderr) == ("1\n", "")


def test_a_fork_takes_every_heap_along(new_heap_name: Callable[[], str]) -> None:
    with contextlib.ExitStack() as stack:
        hands = [stack.enter_context(HeapByHand(new_heap_name(), MIB)) for _ in range(65)]
        assert said_in_a_child(hands[0].heap) == said_in_a_child(hands[-1].heap) == ""


def test_a_handle_of_a_heap_that_is_gone(new_heap_name: object) -> None:
    with Heap.create(capacity=MIB) as heap:
        data = pickle.dumps(heap.put(b"abc"))
        heap.unlink()
    with pytest.raises(StaleHandle, match="gone"):
        pickle.loads(data)


def test_handles_of_an_unlinked_heap_reach_whoever_has_it(hand: HeapByHand) -> None:
    with Worker(heap=hand.heap) as worker:
        assert worker.do("check") == []
        hand.heap.unlink()
        worker.do("keep", "block", hand.heap.put(b"abc"))
        assert worker.do("read", "block") == b"abc"
        worker.do("put", "mine", b"back")
        assert bytes(worker.do("get", "mine")) == b"back"
        worker.do("drop", "mine")
        worker.end()


@pytest.mark.parametrize("method", METHODS)
def test_a_pool_of_processes(hand: HeapByHand, method: str) -> None:
    context = multiprocessing.get_context(method)
    blocks = [hand.heap.put(os.urandom(3200)) for _ in range(60)]
    expected = [hashlib.sha256(block).digest() * 100 for block in blocks]
    with ProcessPoolExecutor(2, mp_context=context) as pool:
        done = list(pool.map(rehash, blocks, chunksize=7))
    assert [bytes(block) for block in done] == expected
    assert [bytes(block) for block in blocks] == expected
    del done, blocks
    hand.turns_until(lambda: len(hand.steward.slots()) == 1)


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_processes_at_once(hand: HeapByHand, method: str) -> None:
    workers = [Worker(method) for _ in range(3)]
    try:
        for worker in workers:
            worker.do("attach", hand.heap.name)
        for size in (16, 700, 9000, 100_000):
            for worker in workers:
                worker.start("churn", 400, size)
            for stamp in range(1, 6):
                hand.collect(stamp)
                hand.release()
            assert [worker.result() for worker in workers] == [0, 0, 0]
        hand.collect()
        hand.assert_sound()
        for worker in workers:
            worker.end()
    finally:
        for worker in workers:
            worker.__exit__(None, None, None)
    hand.turns_until(lambda: len(hand.steward.slots()) == 1)
