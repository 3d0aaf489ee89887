"""Workers that die: their task fails at once, nobody else's does, and the pool goes on."""

from __future__ import annotations

import itertools
import logging
import multiprocessing
import os
import pickle
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import pool_work as work
import pytest

from shmheap import Heap, Pool, StaleHandle

METHODS = ("fork", "spawn", "forkserver")
MakePool = Callable[..., Pool]


@pytest.fixture
def make(heap: Heap) -> Iterator[MakePool]:
    """Make a pool that ends with the test, after which the heap is as it was."""
    pools: list[Pool] = []

    def make(processes: int = 2, *args: Any, method: str = "fork", **named: Any) -> Pool:
        context = multiprocessing.get_context(method)
        pools.append(Pool(processes, *args, context=context, heap=heap, **named))
        return pools[-1]

    yield make
    for pool in pools:
        pool.terminate()
        pool.join()
    pools.clear()
    assert_empty(heap)


@pytest.fixture
def pool(make: MakePool) -> Pool:
    return make()


def assert_empty(heap: Heap) -> None:
    heap.gc()
    stats = heap.stats()
    assert (stats.leases, stats.heap_objects) == (0, 0)


def busy(pool: Pool) -> tuple[Any, Connection, int]:
    """A task that a worker has begun: its result, how to talk to it, and the worker's pid."""
    here, there = multiprocessing.Pipe()
    result = pool.apply_async(work.block_on, (there,))
    return result, here, here.recv()


def pids(pool: Pool) -> set[int]:
    """Of workers that are ready: each has a task at the same time."""
    tasks = [busy(pool) for _ in range(pool._processes)]  # type: ignore[attr-defined]
    for result, here, _ in tasks:
        here.send("go on")
        result.get(work.PATIENCE_S)
    return {pid for _, _, pid in tasks}


@pytest.mark.parametrize("method", METHODS)
def test_the_task_of_a_worker_that_dies_fails(make: MakePool, method: str) -> None:
    pool = make(method=method)
    before = pids(pool)
    result, _, pid = busy(pool)
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(
        BrokenProcessPool, match=rf"the worker that ran this task \(process {pid}\)"
    ):
        result.get(work.PATIENCE_S)
    assert pool.map(work.square, range(100), 1) == [n * n for n in range(100)]
    assert len(pids(pool) - before) == 1, "there is a new one"
    assert pool.stats().lost == 1


@pytest.mark.parametrize(
    ("end", "args"), [(work.die, ()), (work.exit_with, (3,)), (work.leave_with, (4,))]
)
def test_however_it_dies(pool: Pool, end: Any, args: tuple[Any, ...]) -> None:
    with pytest.raises(BrokenProcessPool, match=r"died|SIGKILL|status [34]"):
        pool.apply_async(end, args).get(work.PATIENCE_S)
    assert pool.apply(work.square, (3,)) == 9


def test_an_idle_worker_that_dies_is_nobodys_loss(pool: Pool) -> None:
    for _ in range(5):
        for pid in pids(pool):
            os.kill(pid, signal.SIGKILL)
        assert pool.map(work.square, range(100), 1) == [n * n for n in range(100)]
    assert pool.stats().lost == 0


def test_a_map_while_there_are_no_workers(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """All have died, and none was started yet: chunks are those of a pool of that size."""
    monkeypatch.setattr(pool, "_pool", [])
    assert pool.map_async(work.square, range(10)).get(work.PATIENCE_S) == [n * n for n in range(10)]
    monkeypatch.undo()


def test_what_waits_behind_the_task_goes_to_others(make: MakePool) -> None:
    pool = make(1)
    result, _, pid = busy(pool)
    behind = [pool.apply_async(work.square, (n,)) for n in range(100)]
    with_array = pool.apply_async(work.total, (np.ones(30_000),))
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(BrokenProcessPool):
        result.get(work.PATIENCE_S)
    assert [one.get(work.PATIENCE_S) for one in behind] == [n * n for n in range(100)]
    assert with_array.get(work.PATIENCE_S) == 30_000
    assert pool.stats().lost == 1


def test_in_a_map_only_that_chunk_is_lost(pool: Pool) -> None:
    results = pool.imap(work.die_at_three, range(8))
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(BrokenProcessPool):
        next(results)
    assert list(results) == [4, 5, 6, 7]
    with pytest.raises(BrokenProcessPool):
        pool.map(work.die_at_three, range(8), 1)


def test_no_task_waits_while_a_worker_is_idle(pool: Pool) -> None:
    """Tasks are queued ahead in a worker's pipe; one that is busy for ever must not keep them."""
    result, here, _ = busy(pool)
    others = [pool.apply_async(work.square, (n,)) for n in range(300)]
    assert [one.get(work.PATIENCE_S) for one in others] == [n * n for n in range(300)]
    here.send("go on")
    assert result.get(work.PATIENCE_S) == "go on"


def test_tasks_that_wait_for_each_other(pool: Pool) -> None:
    """As long as there are as many workers, each runs, in whatever order they come free."""
    for _ in range(20):
        pool.map(work.square, range(50), 1)
        first, here, _ = busy(pool)
        second, there, _ = busy(pool)
        there.send("second")
        here.send("first")
        assert (first.get(work.PATIENCE_S), second.get(work.PATIENCE_S)) == ("first", "second")


# Memory


def test_what_a_dead_worker_had_is_back(pool: Pool, heap: Heap) -> None:
    array = heap.zeros(100_000)
    here, there = multiprocessing.Pipe()
    results = [
        pool.apply_async(work.tell_and_wait, (there, array, np.ones(50_000), b"x" * 100_000))
        for _ in range(2)
    ]
    for _ in results:
        os.kill(here.recv(), signal.SIGKILL)
    for result in results:
        with pytest.raises(BrokenProcessPool):
            result.get(work.PATIENCE_S)
    del results, result
    assert pids(pool)
    heap.gc()
    stats = heap.stats()
    assert (stats.leases, stats.heap_alloc) == (0, array.nbytes + 2 * 8), "8 bytes a worker"
    del array


def test_a_task_whose_handle_is_stale(pool: Pool, heap: Heap) -> None:
    block = heap.put(b"abc")
    message = pickle.dumps(block)
    assert bytes(pool.apply(work.same, (work.Stale(message),))) == b"abc"
    block.free()
    heap.gc()
    with pytest.raises(StaleHandle):
        pool.apply(work.same, (work.Stale(message),))
    assert pool.apply(work.square, (3,)) == 9


def test_a_handle_from_a_heap_that_is_gone(pool: Pool, new_heap_name: Callable[[], str]) -> None:
    with Heap.create(new_heap_name(), capacity="8MiB") as other:
        block = other.put(b"abc")
        message = pickle.dumps(block)
        del block
        other.unlink()
    with pytest.raises(StaleHandle, match="gone"):
        pool.apply(work.same, (work.Stale(message),))


def test_a_result_that_cannot_be_unpickled(pool: Pool) -> None:
    for _ in range(3):
        with pytest.raises(ValueError, match="no 1"):
            pool.apply(work.unpicklable)
    with pytest.raises(ValueError, match="no 1"):
        pool.apply(work.same, (work.Unpicklable(),))
    assert pool.apply(work.square, (3,)) == 9


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt])
def test_a_result_that_ends_whoever_unpickles_it(pool: Pool, error: type[BaseException]) -> None:
    with pytest.raises(error):
        pool.apply_async(work.raises_when_unpickled, (error,)).get(work.PATIENCE_S)
    assert pool.apply(work.square, (3,)) == 9


def test_a_callback_that_raises(pool: Pool, caplog: pytest.LogCaptureFixture) -> None:
    """It ends multiprocessing's own thread of results: all wait for ever."""
    for callback in (work.fail, sys.exit):
        with caplog.at_level(logging.ERROR, "shmheap"):
            result = pool.apply_async(work.square, (3,), callback=callback)
            assert result.get(work.PATIENCE_S) == 9
            failed = pool.map_async(work.fail, [1], error_callback=callback)
            with pytest.raises(ValueError, match="no 1"):
                failed.get(work.PATIENCE_S)
    assert caplog.messages == ["a pool's callback raised"] * 4
    assert pool.apply(work.square, (3,)) == 9


def test_terminate_in_the_middle_leaves_nothing(make: MakePool, heap: Heap) -> None:
    pool = make()
    here, there = multiprocessing.Pipe()
    shared = heap.zeros(100_000)
    for _ in range(50):
        pool.apply_async(work.tell_and_wait, (there, shared, np.ones(50_000)))
    results = pool.imap_unordered(work.ones, itertools.repeat(100_000))
    here.recv()
    here.recv()
    pool.terminate()
    pool.join()
    del shared, results
    assert_empty(heap)


def test_results_that_nobody_fetches(make: MakePool, heap: Heap) -> None:
    pool = make(allocator=False)
    for _ in range(20):
        pool.apply_async(work.ones, (20_000,))
    pool.map_async(work.ones, [20_000] * 20, 1)
    pool.close()
    pool.join()
    assert_empty(heap)


# Workers that cannot start


def test_workers_that_die_as_they_start(make: MakePool) -> None:
    """multiprocessing's own pool starts new ones for ever, and waits for ever."""
    pool = make(2, work.fail_to_start)
    with pytest.raises(BrokenProcessPool, match="before they can work"):
        pool.map(work.square, range(1000), 1)
    with pytest.raises(BrokenProcessPool, match='must stand under `if __name__ == "__main__":`'):
        pool.apply(work.square, (1,))


def test_workers_that_cannot_be_replaced(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """multiprocessing's thread that looks after workers ends of it, and the pool never does."""
    first, second = pids(pool)
    with monkeypatch.context() as no_fork:
        no_fork.setattr(os, "fork", lambda: work.raise_error(BlockingIOError("no process")))
        os.kill(first, signal.SIGKILL)
        work.gone(first)
        assert pool.map(work.square, range(50), 1) == [n * n for n in range(50)], "by the other one"
        os.kill(second, signal.SIGKILL)
        with pytest.raises(BrokenProcessPool, match="no process"):
            pool.apply_async(work.square, (3,)).get(work.PATIENCE_S)
    while True:  # whoever asks has it tried again
        with suppress(BrokenProcessPool):
            assert pool.apply(work.square, (3,)) == 9
            break
    assert len(pids(pool)) == 2


# The parent


PARENT = """
import multiprocessing, os, sys, shmheap, pool_work
if __name__ == "__main__":
    pool = shmheap.Pool(3, context=multiprocessing.get_context(sys.argv[1]))
    pipes = [multiprocessing.Pipe() for _ in range(3)]
    tasks = [pool.apply_async(pool_work.block_on, (there,)) for _, there in pipes]
    pool.heap.gc()  # so that the coordinator is there
    coordinator = shmheap._core.Observer(pool.heap._fileno()).header()["coordinator_pid"]
    print(pool.heap._path, coordinator, *(here.recv() for here, _ in pipes), flush=True)
    for here, _ in pipes:
        here.send("go on")
    [task.get() for task in tasks]
    print("idle", flush=True)
    if sys.argv[2] == "exit":
        sys.exit()
    sys.stdin.read()
"""


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("end", ["kill", "exit"])
def test_the_parent_ends(method: str, end: str, tmp_path: Any) -> None:
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    with work.parent(script, method, end) as parent:
        assert parent.stdout is not None
        path, *others = parent.stdout.readline().split()
        assert parent.stdout.readline() == "idle\n"
        if end == "kill":
            parent.kill()
        parent.wait(work.PATIENCE_S)
        for pid in others:
            work.gone(int(pid))
    assert not os.path.exists(path)
    assert parent.returncode == (-signal.SIGKILL if end == "kill" else 0)
