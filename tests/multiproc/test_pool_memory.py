"""Whose memory it is: what goes to tasks and comes back, who can write to it, when it is free."""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pool_work as work
import pytest

import shmheap
from shmheap import Heap, HeapFull, Pool, PoolStats, ProcessPoolExecutor, readonly
from shmheap.plugins.numpy import allocator

METHODS = ("fork", "spawn", "forkserver")
MakePool = Callable[..., Pool]
N = 50_000
"""Elements of an array that goes through the heap."""


@pytest.fixture
def make(heap: Heap) -> Iterator[MakePool]:
    """Make a pool that ends with the test, after which the heap is as it was."""
    pools: list[Pool] = []

    def make(processes: int = 2, *args: Any, method: str = "fork", **named: Any) -> Pool:
        context = multiprocessing.get_context(method)
        pools.append(Pool(processes, *args, context=context, **{"heap": heap} | named))
        return pools[-1]

    yield make
    while pools:  # and no name for the last one: a pool keeps what its initializer gets
        pools[-1].terminate()
        pools.pop().join()
    gc.collect()
    heap.gc()
    stats = heap.stats()
    assert (stats.leases, stats.heap_objects) == (0, 0)


@pytest.fixture
def pool(make: MakePool) -> Pool:
    return make()


# Arguments


@pytest.mark.parametrize("method", METHODS)
def test_what_lies_in_the_heap_is_shared(make: MakePool, heap: Heap, method: str) -> None:
    pool = make(method=method)
    array = heap.full(N, 1.0)
    pool.apply(work.double, (array,))
    pool.map(work.double, [array[: N // 2], array[N // 2 :: 2]])
    assert array.sum() == N * 2 + N * 2 * 3 / 4
    stats = pool.stats()
    assert stats.arguments.handle_bytes > array.nbytes * 1.9
    assert stats.arguments.copied_bytes == 0
    for result in pool.map(work.same, [array, array.T, array[::-1]]):
        assert np.shares_memory(result, array)
    del result, array


@pytest.mark.parametrize("method", METHODS)
def test_also_what_the_initializer_gets(make: MakePool, heap: Heap, method: str) -> None:
    array = heap.zeros(N)
    pool = make(2, work.remember, (readonly(array), "else"), method=method, maxtasksperchild=1)
    for value in range(3):  # each time by a worker that has just been started
        array[1] = value
        [(found, rest)] = pool.apply(work.what_was_remembered)
        assert (found[1], found.flags.writeable, rest) == (value, False, "else")
    assert pool.stats().results.copied_bytes == 0


def test_also_when_it_is_small(pool: Pool, heap: Heap) -> None:
    array = heap.full(10, 1)
    pool.map(work.double, [array[n : n + 1] for n in range(5)])
    assert array.tolist() == [2] * 5 + [1] * 5
    del array


def test_also_when_numpy_made_it(pool: Pool, heap: Heap) -> None:
    with allocator(heap):
        array = np.ones(N) * 3
    pool.apply(work.double, (array,))
    assert array[0] == 6
    del array


def test_what_is_read_only_is_so_there(pool: Pool, heap: Heap) -> None:
    array = heap.zeros(N)
    assert pool.apply(work.try_to_write, (array,)) == "written"
    assert "read-only" in pool.apply(work.try_to_write, (readonly(array),))
    del array


def test_what_does_not_lie_there_is_the_tasks_own(pool: Pool) -> None:
    array = np.ones(N)
    assert pool.map(work.try_to_write, [array] * 4, 1) == ["written"] * 4
    assert pool.apply(work.try_to_write, (readonly(array),)) == "written"
    assert array.sum() == N
    assert pool.stats().arguments.copied_bytes == 5 * array.nbytes
    assert pool.apply(work.total_of_list, ([array, array, np.ones(3)],)) == 2 * N + 3


def test_bytes_and_text(pool: Pool) -> None:
    for data in (b"abc" * 99_999, bytearray(b"abc" * 99_999), "abc" * 99_999):
        found = pool.apply(work.same, (data,))
        assert (found, type(found)) == (data, type(data))
    assert pool.stats().arguments.copied_bytes > 800_000
    assert pool.stats().results.copied_bytes > 800_000


def test_blocks_and_collections(pool: Pool, heap: Heap) -> None:
    block, shared = heap.alloc(1000), heap.dict()
    same = pool.apply(work.fill, (block, 7))
    assert same == block
    assert bytes(block) == bytes([7]) * 1000
    assert bytes(pool.apply(work.same, (memoryview(block)[3:5],))) == b"\7\7"
    pool.starmap(work.set_key, [(shared, key, [key]) for key in "abc"])
    assert sorted(shared) == ["a", "b", "c"]
    del same, block, shared


def test_views_of_bytes(pool: Pool) -> None:
    table = np.arange(12.0).reshape(3, 4)
    for sent in (memoryview(table), memoryview(b"abc"), memoryview(b""), memoryview(table[:0, 0])):
        found = pool.apply(work.same, (sent,))
        assert (found.tolist(), found.ndim) == (sent.tolist(), sent.ndim)
    for bad in (memoryview(table.T), memoryview(table[:, 1]), memoryview(b"abc")[::2]):
        with pytest.raises(BufferError, match="not contiguous"):
            pool.apply(work.same, (bad,))


def test_arrow_tables(pool: Pool, heap: Heap) -> None:
    """Columns that Arrow made are copied once; those that lie in the heap come and go by handle."""
    pa = pytest.importorskip("pyarrow")
    names = pa.array([f"name {n % 7}" for n in range(N)])
    table = pa.table({"n": np.arange(N), "name": names})
    half = pool.apply(work.upper_half, (table,))
    assert half.equals(table.slice(N // 2))
    copied = pool.stats()
    assert table.nbytes <= copied.arguments.copied_bytes <= table.nbytes * 1.01
    assert (copied.arguments.handle_bytes, copied.results.copied_bytes) == (0, 0)
    assert half.nbytes <= copied.results.handle_bytes

    shared = heap.array(np.arange(N))
    there = pa.table({"n": pa.array(shared)})
    back = pool.apply(work.upper_half, (there,))
    assert pool.stats().arguments.copied_bytes == copied.arguments.copied_bytes
    assert pool.stats().results.copied_bytes == 0
    shared[-1] = 0
    assert back["n"][-1].as_py() == 0  # the same memory
    del half, shared, there, back


def test_objects_with_arrays_in_them(pool: Pool, heap: Heap) -> None:
    """A dataclass of one array in the heap, one of NumPy's own, and a frame."""
    pd = pytest.importorskip("pandas")
    shared, own = heap.zeros((100, N // 100)), np.arange(N)
    about = pd.DataFrame({"mean": np.ones(N), "kind": pd.Categorical(["a", "b"] * (N // 2))})
    back = pool.apply(work.brighter, (work.Batch(shared, {"class": own}, about),))
    assert (shared == 1).all()
    assert (back.pixels == 2).all()
    assert (back.labels["class"] == own).all()
    assert (about["mean"].sum(), back.about["mean"].sum()) == (N, 2 * N)
    assert (back.about["kind"] == about["kind"]).all()
    stats = pool.stats()
    assert stats.arguments.handle_bytes == shared.nbytes
    frame_bytes = N * 8 + N  # a category is a byte
    assert stats.arguments.copied_bytes == own.nbytes + frame_bytes
    assert stats.results.handle_bytes == shared.nbytes + own.nbytes + frame_bytes
    assert stats.results.copied_bytes == 0
    del shared, back


def test_memory_of_arguments_ends_with_the_task(pool: Pool, heap: Heap) -> None:
    pool.map(work.total, [np.ones(N) for _ in range(20)], 1)
    for _ in range(4):
        with pytest.raises(ValueError, match="truth value"):
            pool.apply(work.fail_at_three, (np.ones(N),))
    while heap.stats().leases:  # of a worker that was not needed and is still starting
        os.sched_yield()
    assert heap.stats().heap_alloc == 2 * 8


# Results


@pytest.mark.parametrize("method", METHODS)
def test_what_numpy_makes_in_a_worker_is_where_we_see_it(
    make: MakePool, heap: Heap, method: str
) -> None:
    pool = make(method=method)
    first, second = pool.map(work.like, [np.ones(N), np.ones((100, N // 100)).T])
    assert first.sum() == 7 * N
    assert second.flags.f_contiguous
    assert pool.stats().results == shmheap.Traffic(handle_bytes=2 * N * 8)
    assert heap._block_of(first) is not None
    del first, second


def test_a_switch_turns_that_off(make: MakePool) -> None:
    pool = make(allocator=False)
    result = pool.apply(work.like, (np.ones(N),))
    assert result.sum() == 7 * N
    assert pool.stats().results == shmheap.Traffic(copied_bytes=N * 8)
    del result


def test_results_are_free_when_they_are_dropped(make: MakePool, heap: Heap) -> None:
    pool = make(1)
    before = heap.stats().heap_alloc
    results = pool.map(work.ones, [N] * 3, 1)
    pool.apply(work.square, (1,))  # after which the worker holds none of them any more
    assert heap.stats().heap_alloc - before == 3 * N * 8
    results.pop()
    assert heap.stats().heap_alloc - before == 2 * N * 8
    results.clear()
    assert heap.stats().heap_alloc == before


def test_a_small_part_of_a_result_does_not_keep_the_rest(pool: Pool, heap: Heap) -> None:
    parts = pool.map(work.first_ten, [N] * 10)
    assert np.sum(parts) == 100
    in_hand = 2 * 8 + 2 * N * 8
    for _ in range(100):  # NumPy's memory is freed later where a lock was not to be had at once
        if heap.stats().heap_alloc <= in_hand:
            break
        pool.map(work.first_ten, [N] * 2, 1)
    assert heap.stats().heap_alloc <= in_hand, "at most what workers have in hand"
    del parts


def test_results_of_workers_that_end(make: MakePool) -> None:
    """A worker waits with its end until its last result was taken: handles need their sender."""
    pool = make(1, maxtasksperchild=1)
    arrays = list(pool.imap(work.ones, [N] * 5))
    assert sum(array.sum() for array in arrays) == 5 * N
    arrays.clear()


# The pool's own heap


def is_unlinked(heap: Heap) -> bool:
    return not os.path.exists(heap._path)


@pytest.mark.parametrize("end", ["with", "join", "terminate", "collect"])
@pytest.mark.filterwarnings("ignore:unclosed running multiprocessing pool:ResourceWarning")
def test_a_heap_of_its_own_ends_with_the_pool(end: str) -> None:
    pool = Pool(2)
    heap, path = weakref.ref(pool.heap), pool.heap._path
    result = pool.apply(work.like, (np.ones(N),))
    shared = pool.heap.full(10, 5)
    assert os.path.exists(path)
    if end == "with":
        with pool:
            pass
    elif end == "join":
        pool.close()
        pool.join()
    elif end == "terminate":
        pool.terminate()
    if end == "collect":
        thread = pool._result_handler  # type: ignore[attr-defined]
        del pool  # which is collected by whoever lets go of it last: that thread, perhaps
        gc.collect()
        thread.join(work.PATIENCE_S)
        work.wait_for_ends()
    else:
        with pytest.raises(ValueError, match="ended"):
            _ = pool.heap
        assert pool.stats().tasks == 1
    assert not os.path.exists(path)
    gc.collect()
    assert heap() is None
    assert result.sum() == 7 * N, "it is valid as long as somebody has it"
    assert shared.tolist() == [5] * 10


def test_an_ended_pool_needs_no_garbage_collection(heap: Heap) -> None:
    """Its pipes are closed when it is dropped, not when one has made so many pools."""
    pool = Pool(2, heap=heap)
    pool.map(work.square, range(10))
    pool.terminate()
    pool.join()
    gc.collect()  # what the test runner has left
    gc.disable()
    try:
        open_before, dispatcher = len(os.listdir("/proc/self/fd")), weakref.ref(pool._inqueue)
        del pool
        assert dispatcher() is None
        assert len(os.listdir("/proc/self/fd")) <= open_before - 4
    finally:
        gc.enable()


@pytest.mark.filterwarnings("ignore:unclosed running multiprocessing pool:ResourceWarning")
def test_a_pool_that_its_thread_of_tasks_is_the_last_to_know() -> None:
    def numbers() -> Iterator[int]:
        yield 1
        forgotten.wait(work.PATIENCE_S)

    forgotten = threading.Event()
    pool = Pool(1)
    thread = pool._task_handler  # type: ignore[attr-defined]
    results = pool.imap(work.same, numbers())
    assert next(results) == 1
    del pool, results
    gc.collect()
    forgotten.set()
    thread.join(work.PATIENCE_S)
    assert not thread.is_alive()


def test_a_heap_that_was_given_stays(make: MakePool, heap: Heap) -> None:
    pool = make()
    assert pool.heap is heap
    pool.terminate()
    assert pool.heap is heap
    assert not heap.closed
    assert not is_unlinked(heap)


@pytest.mark.parametrize("kind", [Pool, ProcessPoolExecutor])
def test_what_is_no_open_heap_is_refused(kind: type[Pool | ProcessPoolExecutor]) -> None:
    with pytest.raises(TypeError, match=r"shmheap.Heap or None, not 'str'"):
        kind(1, heap="a name")  # type: ignore[arg-type]
    with Heap.create(capacity="8MiB") as heap:
        heap.unlink()
    with pytest.raises(ValueError, match="the heap is closed"):
        kind(1, heap=heap)


def test_bad_arguments_leave_no_heap(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    create = Heap.create
    monkeypatch.setattr(Heap, "create", lambda: made.append((heap := create())._path) or heap)
    for args, named in (((0,), {}), ((1, "no function"), {}), ((1,), {"maxtasksperchild": 0})):
        with pytest.raises((ValueError, TypeError)):
            Pool(*args, **named)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="size"):
        Pool(1, min_bytes="many")
    with pytest.raises(ValueError, match="min_bytes is at least 1"):
        Pool(1, min_bytes=0)
    gc.collect()
    assert len(made) == 4
    assert not any(map(os.path.exists, made))


@pytest.mark.parametrize("working", [0, 1, 2])
def test_ctrl_c_while_a_pool_is_made(working: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As each of its threads starts, when its workers run already."""
    start, made = threading.Thread.start, list[threading.Thread]()

    def interrupted(thread: threading.Thread) -> None:
        start(thread)
        made.append(thread)
        if len(made) > working:
            raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Pool(2)
    monkeypatch.undo()
    assert not any(thread.is_alive() for thread in made)
    assert multiprocessing.active_children() == []


# A heap that is full


@pytest.mark.parametrize("strict", [False, True])
def test_an_argument_that_is_larger_than_the_heap(make: MakePool, strict: bool) -> None:
    pool = make(strict=strict)
    array = np.ones(10**7)
    with pytest.raises(HeapFull) if strict else pytest.warns(RuntimeWarning, match="pipe"):
        assert pool.apply_async(work.total, (array,)).get(work.PATIENCE_S) == 10**7
    assert pool.apply(work.square, (3,)) == 9
    assert pool.stats().arguments.refused_bytes == (0 if strict else array.nbytes)


@pytest.mark.parametrize("strict", [False, True])
def test_a_result_that_is_larger_than_the_heap(make: MakePool, strict: bool) -> None:
    pool = make(2, work.quiet, strict=strict)
    result = pool.apply_async(work.ones, (10**7,))
    if strict:
        with pytest.raises(HeapFull):
            result.get(work.PATIENCE_S)
    else:
        assert result.get(work.PATIENCE_S).sum() == 10**7
        assert pool.stats().results.refused_bytes == 8 * 10**7
    assert pool.apply(work.square, (3,)) == 9


def test_tasks_wait_for_the_memory_of_those_that_run(make: MakePool) -> None:
    """Three arguments that fill the heap by two thirds each, one after the other."""
    pool = make(1, strict=True)
    arrays = [np.full(5 * 10**6, n, "f8") for n in range(3)]
    assert pool.map(work.total, arrays, 1) == [0, 5e6, 1e7]
    assert pool.stats().arguments.copied_bytes == 3 * 40 * 10**6


# Insight


def test_stats(make: MakePool, heap: Heap) -> None:
    pool = make(1, min_bytes="8KiB")
    shared = heap.full(2000, 1.0)
    pool.apply(work.total_of_list, ([shared, np.ones(2000), np.ones(10), np.ones(20)],))
    stats = pool.stats()
    assert isinstance(stats, PoolStats)
    assert stats.arguments == shmheap.Traffic(
        handle_bytes=16_000, copied_bytes=16_000, small_buffers=2, small_bytes=240
    )
    assert stats.results == shmheap.Traffic()
    assert (stats.tasks, stats.lost) == (1, 0)
    with pytest.raises(AttributeError):
        stats.tasks = 2  # type: ignore[misc]
    del shared


def test_the_first_large_copy_is_told_once(
    make: MakePool, heap: Heap, caplog: pytest.LogCaptureFixture
) -> None:
    large = np.ones(1 << 17)
    with caplog.at_level(logging.INFO, "shmheap"):
        pool = make()
        pool.apply(work.total, (np.ones(1000),))
        pool.apply(work.total, (heap.full(1 << 17, 1.0),))
        assert caplog.messages == []
        pool.map(work.total, [large] * 3, 1)
        assert [record.levelname for record in caplog.records] == ["INFO"]
        assert "1048576 bytes of an argument" in caplog.text
        assert "pool.heap.empty()" in caplog.text
        caplog.clear()
        pool = make(allocator=False)
        assert pool.apply(work.ones, (1 << 17,)).sum() == 1 << 17
        assert "of a result" in caplog.text
        assert "allocator=True" in caplog.text


def test_progress(pool: Pool, capsys: pytest.CaptureFixture[str]) -> None:
    numbers = iter(range(50))
    assert pool.map(work.square, numbers, 3, progress=True) == [n * n for n in range(50)]
    assert "50/50" in capsys.readouterr().err
    assert pool.starmap(work.add, [(1, 2)], progress=True) == [3]
    assert pool.map(work.square, [], progress=True) == []
    with pytest.raises(ValueError, match="no 3"):
        pool.map(work.fail_at_three, range(10), 1, progress=True)


# Ctrl-C


CTRL_C = """
import os, signal, sys, threading, multiprocessing, shmheap, pool_work, numpy
if __name__ == "__main__":
    heap = shmheap.Heap.create(sys.argv[1], capacity="64MiB")
    here, there = multiprocessing.Pipe()
    try:
        with shmheap.Pool(2, heap=heap) as pool:
            def interrupt():
                here.recv(), here.recv()
                os.killpg(0, signal.SIGINT)
            threading.Thread(target=interrupt).start()
            pool.starmap(pool_work.tell_and_wait, [(there, numpy.ones(50_000))] * 50, 1)
    except KeyboardInterrupt:
        pool.join()
        del pool
        heap.gc()
        print(heap.stats().heap_objects, heap.stats().leases)
    heap.unlink()
"""


def test_ctrl_c_in_the_middle(heap_name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-c", CTRL_C, heap_name],
        capture_output=True,
        text=True,
        start_new_session=True,
        timeout=work.PATIENCE_S,
        env=os.environ | {"PYTHONPATH": os.path.dirname(work.__file__)},
        check=False,
    )
    assert done.stdout == "0 0\n", done.stderr
    assert done.returncode == 0


# Forks of others


def test_a_forked_child_leaves_the_pool_alone(pool: Pool) -> None:
    pool.map(work.square, range(10))
    child = os.fork()
    if child == 0:
        try:
            with pytest.raises(ValueError, match="not running"):
                pool.apply(work.square, (1,))
            pool.close()
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert pool.map(work.square, range(10)) == [n * n for n in range(10)]


def test_the_heap_stays_usable_by_handles(pool: Pool) -> None:
    """What is pickled by others' picklers is as ever."""
    assert pickle.loads(pickle.dumps(pool.heap)) is pool.heap
