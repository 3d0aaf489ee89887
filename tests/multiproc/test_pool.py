"""Pool does what multiprocessing.Pool does: each test runs against both."""

from __future__ import annotations

import multiprocessing
import multiprocessing.pool
import pickle
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pool_work as work
import pytest

import shmheap

METHODS = ("fork", "spawn", "forkserver")
MakePool = Callable[..., multiprocessing.pool.Pool]


@pytest.fixture(params=["multiprocessing", "shmheap"])
def make(request: pytest.FixtureRequest, heap_name: str) -> Iterator[MakePool]:
    """Make a pool that ends with the test."""
    pools: list[multiprocessing.pool.Pool] = []
    with shmheap.Heap.create(heap_name, capacity="64MiB") as heap:

        def make(
            processes: int | None = 2, *args: Any, method: str = "fork", **named: Any
        ) -> multiprocessing.pool.Pool:
            context = multiprocessing.get_context(method)
            if request.param == "multiprocessing":
                pool = multiprocessing.pool.Pool(processes, *args, context=context, **named)
            else:
                pool = shmheap.Pool(processes, *args, context=context, heap=heap, **named)
            pools.append(pool)
            return pool

        yield make
        for pool in pools:
            pool.terminate()
            pool.join()
        heap.unlink()


@pytest.fixture
def pool(make: MakePool) -> multiprocessing.pool.Pool:
    return make()


# Calls


def test_apply(pool: multiprocessing.pool.Pool) -> None:
    assert pool.apply(work.add, (1, 2), {"extra": 3}) == 6
    assert pool.apply(work.add) == 0


def test_map(pool: multiprocessing.pool.Pool) -> None:
    squares = [n * n for n in range(1000)]
    assert pool.map(work.square, range(1000)) == squares
    assert pool.map(work.square, range(1000), chunksize=1) == squares
    assert pool.map(work.square, iter(range(1000)), chunksize=7) == squares
    assert pool.map(work.square, []) == []


def test_starmap(pool: multiprocessing.pool.Pool) -> None:
    pairs = [(n, n + 1) for n in range(100)]
    assert pool.starmap(work.add, pairs) == [2 * n + 1 for n in range(100)]
    assert pool.starmap_async(work.add, pairs, chunksize=3).get(work.PATIENCE_S)[99] == 199


@pytest.mark.parametrize("chunksize", [1, 7])
def test_imap(pool: multiprocessing.pool.Pool, chunksize: int) -> None:
    squares = [n * n for n in range(500)]
    assert list(pool.imap(work.square, range(500), chunksize)) == squares
    assert sorted(pool.imap_unordered(work.square, range(500), chunksize)) == squares


def test_imap_is_as_lazy_as_pipes_are(pool: multiprocessing.pool.Pool) -> None:
    def numbers() -> Iterator[int]:
        for number in range(10**9):
            taken.append(number)
            yield number

    taken: list[int] = []
    results = pool.imap(work.same, numbers())
    assert [next(results) for _ in range(10)] == list(range(10))
    assert len(taken) < 10**6


def test_imap_over_what_raises(pool: multiprocessing.pool.Pool) -> None:
    def numbers() -> Iterator[int]:
        yield 1
        raise KeyError("no more")

    results = pool.imap(work.square, numbers())
    assert next(results) == 1
    with pytest.raises(KeyError, match="no more"):
        next(results)


def test_chunks_of_less_than_one(pool: multiprocessing.pool.Pool) -> None:
    for imap in (pool.imap, pool.imap_unordered):
        with pytest.raises(ValueError, match="Chunksize"):
            imap(work.square, [1], chunksize=0)


# Results that come later


def test_asynchronous_results(pool: multiprocessing.pool.Pool) -> None:
    result = pool.map_async(work.square, range(10))
    result.wait(work.PATIENCE_S)
    assert result.ready()
    assert result.successful()
    assert result.get() == [n * n for n in range(10)]

    failed = pool.apply_async(work.fail, (4,))
    failed.wait(work.PATIENCE_S)
    assert not failed.successful()
    with pytest.raises(ValueError, match="no 4"):
        failed.get()


def test_a_result_that_is_not_there_yet(pool: multiprocessing.pool.Pool) -> None:
    here, there = multiprocessing.Pipe()
    result = pool.apply_async(work.block_on, (there,))
    here.recv()
    with pytest.raises(ValueError, match="not ready"):
        result.successful()
    with pytest.raises(multiprocessing.TimeoutError):
        result.get(timeout=0)
    here.send("go on")
    assert result.get(work.PATIENCE_S) == "go on"


def test_callbacks(pool: multiprocessing.pool.Pool) -> None:
    called = threading.Event()
    seen: list[Any] = []

    def callback(value: Any) -> None:
        seen.append(value)
        called.set()

    for start in (
        lambda: pool.apply_async(work.square, (3,), callback=callback),
        lambda: pool.map_async(work.square, [1, 2], callback=callback),
        lambda: pool.starmap_async(work.add, [(1, 2)], callback=callback),
        lambda: pool.apply_async(work.fail, (1,), error_callback=callback),
        lambda: pool.map_async(work.fail, [1], error_callback=callback),
    ):
        called.clear()
        start()
        assert called.wait(work.PATIENCE_S)
    assert seen[:3] == [9, [1, 4], [3]]
    assert [type(error) for error in seen[3:]] == [ValueError, ValueError]


# Errors


def test_errors_come_with_the_remote_traceback(pool: multiprocessing.pool.Pool) -> None:
    with pytest.raises(ValueError, match="no 5") as caught:
        pool.apply(work.fail, (5,))
    assert type(caught.value.__cause__) is multiprocessing.pool.RemoteTraceback
    assert "in fail" in str(caught.value.__cause__)


def test_a_map_fails_with_the_first_error_and_the_pool_goes_on(
    pool: multiprocessing.pool.Pool,
) -> None:
    with pytest.raises(ValueError, match="no 3"):
        pool.map(work.fail_at_three, range(10))
    results = pool.imap(work.fail_at_three, range(5))
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="no 3"):
        next(results)
    assert next(results) == 4


def test_arguments_that_cannot_be_pickled(pool: multiprocessing.pool.Pool) -> None:
    for call in (
        lambda: pool.apply(work.same, (lambda: None,)),
        lambda: pool.map(work.same, [1, lambda: None]),
        lambda: pool.apply(lambda: None),
        lambda: list(pool.imap(work.same, [lambda: None])),
    ):
        with pytest.raises((AttributeError, pickle.PicklingError), match="lambda"):
            call()
    assert pool.apply(work.same, (1,)) == 1


def test_results_that_cannot_be_pickled(pool: multiprocessing.pool.Pool) -> None:
    with pytest.raises(multiprocessing.pool.MaybeEncodingError, match="lambda"):
        pool.apply(work.lambda_of)
    assert pool.apply(work.same, (1,)) == 1


# Workers


@pytest.mark.parametrize("method", METHODS)
def test_start_methods_and_initializer(make: MakePool, method: str) -> None:
    pool = make(2, work.remember, ("a", 1), method=method)
    assert pool.map(work.square, range(100)) == [n * n for n in range(100)]
    assert pool.apply(work.what_was_remembered) == [("a", 1)]


@pytest.mark.parametrize(("method", "tasks"), [("fork", 20), ("forkserver", 5)])
def test_workers_are_replaced_after_so_many_tasks(make: MakePool, method: str, tasks: int) -> None:
    pool = make(2, maxtasksperchild=3, method=method)
    pids = pool.map(work.pid, range(tasks), chunksize=1)
    assert len(set(pids)) >= tasks / 3
    assert max(pids.count(pid) for pid in pids) <= 3
    pool.close()
    pool.join()


def test_as_many_workers_as_asked_for(make: MakePool) -> None:
    pool = make(3)
    pipes = [multiprocessing.Pipe() for _ in range(3)]
    results = [pool.apply_async(work.block_on, (there,)) for _, there in pipes]
    assert len({here.recv() for here, _ in pipes}) == 3, "all of them at once"
    for here, _ in pipes:
        here.send("go on")
    assert [result.get(work.PATIENCE_S) for result in results] == ["go on"] * 3


@pytest.mark.parametrize(
    ("error", "args", "named"),
    [
        (ValueError, (0,), {}),
        (TypeError, (1, "not callable"), {}),
        (ValueError, (1,), {"maxtasksperchild": 0}),
        (ValueError, (1,), {"maxtasksperchild": "1"}),
    ],
)
def test_bad_arguments(
    make: MakePool, error: type[Exception], args: tuple[Any, ...], named: dict[str, Any]
) -> None:
    with pytest.raises(error):
        make(*args, **named)


# The pool's life


def test_a_closed_pool_finishes_what_it_has(make: MakePool) -> None:
    pool = make()
    result = pool.map_async(work.square, range(1000), chunksize=1)
    pool.close()
    pool.join()
    assert result.get() == [n * n for n in range(1000)]
    for call in (
        lambda: pool.apply(work.same, (1,)),
        lambda: pool.map(work.same, [1]),
        lambda: pool.imap(work.same, [1]),
    ):
        with pytest.raises(ValueError, match="not running"):
            call()
    with pytest.raises(ValueError, match="not running"):
        pool.__enter__()


def test_a_pool_that_runs_cannot_be_joined(pool: multiprocessing.pool.Pool) -> None:
    with pytest.raises(ValueError, match="still running"):
        pool.join()


def test_terminate_does_not_wait_for_tasks(make: MakePool) -> None:
    pool = make()
    here, there = multiprocessing.Pipe()
    for _ in range(500):
        pool.apply_async(work.tell_and_wait, (there,))
    here.recv()
    pool.terminate()
    pool.join()
    pool.terminate()


def test_leaving_a_with_statement_terminates(make: MakePool) -> None:
    with make() as pool:
        assert pool.apply(work.square, (3,)) == 9
    with pytest.raises(ValueError, match="not running"):
        pool.apply(work.square, (3,))
    pool.join()


def test_pools_cannot_be_pickled(pool: multiprocessing.pool.Pool) -> None:
    with pytest.raises(NotImplementedError, match="cannot be passed"):
        pool.apply(work.same, (pool,))
    assert "state=RUN pool_size=2" in repr(pool)


def test_several_threads_use_it(pool: multiprocessing.pool.Pool) -> None:
    found: list[list[int]] = []
    threads = [
        threading.Thread(target=lambda: found.append(pool.map(work.square, range(300), 5)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(work.PATIENCE_S)
    assert found == [[n * n for n in range(300)]] * 4
