"""ProcessPoolExecutor does what concurrent.futures' does, and large buffers stay in the heap."""

from __future__ import annotations

import concurrent.futures
import concurrent.futures.process
import gc
import logging
import multiprocessing
import os
import pickle
import signal
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import numpy as np
import pool_work as work
import pytest

from shmheap import (
    Heap,
    HeapFull,
    PoolStats,
    ProcessPoolExecutor,
    StaleHandle,
    Traffic,
    readonly,
)

METHODS = ("fork", "spawn", "forkserver")
N = 50_000
"""Elements of an array that goes through the heap."""
Make = Callable[..., concurrent.futures.ProcessPoolExecutor]


@pytest.fixture(params=["concurrent.futures", "shmheap"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def make(kind: str, heap: Heap) -> Iterator[Make]:
    """Make an executor that ends with the test, after which the heap is as it was."""
    made: list[concurrent.futures.ProcessPoolExecutor] = []

    def make(
        workers: int | None = 2, method: str = "fork", **named: Any
    ) -> concurrent.futures.ProcessPoolExecutor:
        context = multiprocessing.get_context(method)
        executor = (
            concurrent.futures.ProcessPoolExecutor(workers, context, **named)
            if kind == "concurrent.futures"
            else ProcessPoolExecutor(workers, context, **{"heap": heap} | named)
        )
        made.append(executor)
        return executor

    yield make
    while made:
        made.pop().shutdown()
    gc.collect()
    heap.gc()
    stats = heap.stats()
    assert (stats.leases, stats.heap_objects) == (0, 0)


@pytest.fixture
def executor(make: Make) -> concurrent.futures.ProcessPoolExecutor:
    return make()


ours = pytest.mark.parametrize("kind", ["shmheap"], indirect=True)

# What the standard library's does


@pytest.mark.parametrize("method", METHODS)
def test_submit_and_map(make: Make, method: str) -> None:
    executor = make(2, method)
    assert executor.submit(work.add, 1, 2, extra=3).result(work.PATIENCE_S) == 6
    squares = [n * n for n in range(100)]
    assert list(executor.map(work.square, range(100), chunksize=7)) == squares
    assert list(executor.map(work.add, range(10), range(10))) == [2 * n for n in range(10)]


def test_errors(executor: concurrent.futures.ProcessPoolExecutor) -> None:
    future = executor.submit(work.fail, 5)
    error = future.exception(work.PATIENCE_S)
    assert type(error) is ValueError
    assert "in fail" in str(error.__cause__)
    with pytest.raises(ValueError, match="no 3"):
        list(executor.map(work.fail_at_three, range(10)))
    for call in (work.same, (lambda: None)), (lambda: None,):
        with pytest.raises((AttributeError, pickle.PicklingError), match="lambda"):
            executor.submit(*call).result(work.PATIENCE_S)
    with pytest.raises((AttributeError, pickle.PicklingError), match="lambda"):
        executor.submit(work.lambda_of).result(work.PATIENCE_S)
    assert executor.submit(work.square, 3).result(work.PATIENCE_S) == 9


def test_initializer(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    executor = make(1, initializer=work.remember, initargs=("a", 1))
    assert executor.submit(work.what_was_remembered).result(work.PATIENCE_S) == [("a", 1)]
    with caplog.at_level(logging.CRITICAL):
        broken = make(1, initializer=work.fail_to_start)
        with pytest.raises(BrokenProcessPool):
            broken.submit(work.square, 1).result(work.PATIENCE_S)


def test_workers_are_replaced(make: Make) -> None:
    executor = make(1, "forkserver", max_tasks_per_child=1)
    pids = list(executor.map(work.pid, range(3)))
    assert len(set(pids)) == 3


def test_workers_that_are_spawned_end_without_a_word(
    make: Make, heap: Heap, capfd: pytest.CaptureFixture[str]
) -> None:
    """The interpreter's end leaves the block in which NumPy's arrays lie in the heap."""
    with make(1, "spawn", initializer=work.remember, initargs=(heap.zeros(10),)) as executor:
        assert executor.submit(work.ones, N).result()[0] == 1
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("error", "named"),
    [
        (ValueError, {"workers": 0}),
        (TypeError, {"initializer": 1}),
        (TypeError, {"method": "spawn", "max_tasks_per_child": "1"}),
        (ValueError, {"method": "spawn", "max_tasks_per_child": 0}),
        (ValueError, {"max_tasks_per_child": 1}),
    ],
)
def test_bad_arguments(make: Make, error: type[Exception], named: dict[str, Any]) -> None:
    with pytest.raises(error):
        make(**named)


def test_cancelling(make: Make) -> None:
    executor = make(1)
    here, there = multiprocessing.Pipe()
    first = executor.submit(work.block_on, there)
    here.recv()
    futures = [executor.submit(work.total, np.ones(N)) for _ in range(10)]
    assert futures[-1].cancel()
    executor.shutdown(wait=False, cancel_futures=True)
    here.send("go on")
    assert first.result(work.PATIENCE_S) == "go on"
    for future in futures:
        with suppress(CancelledError):
            assert future.result(work.PATIENCE_S) == N
    assert futures[-1].cancelled()
    with pytest.raises(RuntimeError, match="after shutdown"):
        executor.submit(work.square, 1)


def test_a_worker_that_dies_breaks_it(make: Make) -> None:
    executor = make(2)
    here, there = multiprocessing.Pipe()
    futures = [executor.submit(work.tell_and_wait, there, np.ones(N)) for _ in range(5)]
    os.kill(here.recv(), signal.SIGKILL)
    for future in futures:
        with pytest.raises(BrokenProcessPool):
            future.result(work.PATIENCE_S)
    with pytest.raises(BrokenProcessPool):
        executor.submit(work.square, 1)


# What is ours


@ours
@pytest.mark.parametrize("method", METHODS)
def test_large_buffers_stay_where_they_are(make: Make, heap: Heap, method: str) -> None:
    executor = make(2, method)
    array = heap.full(N, 1.0)
    executor.submit(work.double, array).result(work.PATIENCE_S)
    assert array[0] == 2
    same = executor.submit(work.same, array[::2]).result(work.PATIENCE_S)
    assert np.shares_memory(same, array)
    plain = np.ones(N)
    assert executor.submit(work.try_to_write, plain).result(work.PATIENCE_S) == "written"
    results = list(executor.map(work.like, [plain] * 4, chunksize=2))
    assert all(heap._block_of(result) is not None for result in results)
    assert sum(result.sum() for result in results) == 4 * 7 * N
    data = b"abc" * N
    assert executor.submit(work.same, data).result(work.PATIENCE_S) == data
    del array, same, results


@ours
@pytest.mark.parametrize("method", METHODS)
def test_also_those_that_the_initializer_gets(make: Make, heap: Heap, method: str) -> None:
    array = heap.zeros(N)
    args = (readonly(array),)
    executor = make(1, method, initializer=work.remember, initargs=args)
    for value in range(2):
        array[1] = value
        [(found,)] = executor.submit(work.what_was_remembered).result(work.PATIENCE_S)
        assert (found[1], found.flags.writeable) == (value, False)


@ours
def test_memory_ends_with_the_task(make: Make, heap: Heap) -> None:
    executor = make(1, allocator=False)
    for _ in range(10):
        executor.submit(work.total, np.ones(N)).result(work.PATIENCE_S)
        assert type(executor.submit(work.fail_at_three, np.ones(N)).exception()) is ValueError
    executor.submit(work.square, 1).result(work.PATIENCE_S)
    stats = heap.stats()
    assert (stats.heap_objects, stats.leases) == (0, 0)


def test_who_keeps_the_future_does_not_keep_the_arguments(
    executor: concurrent.futures.ProcessPoolExecutor,
) -> None:
    argument = set("abc")
    kept = weakref.ref(argument)
    future = executor.submit(len, argument)
    del argument
    assert future.result(work.PATIENCE_S) == 3
    executor.submit(len, ()).result(work.PATIENCE_S)  # for its threads have their last one still
    gc.collect()
    assert kept() is None


@ours
@pytest.mark.parametrize("method", METHODS)
def test_stats(make: Make, heap: Heap, method: str) -> None:
    executor = cast("ProcessPoolExecutor", make(1, method, min_bytes="8KiB"))
    shared = heap.full(2000, 1.0)
    sent = [shared, np.ones(2000), np.ones(10)]
    executor.submit(work.total_of_list, sent).result()
    assert executor.submit(work.ones, 3000).result().size == 3000
    assert executor.stats() == PoolStats(
        arguments=Traffic(
            handle_bytes=16_000, copied_bytes=16_000, small_buffers=1, small_bytes=80
        ),
        results=Traffic(handle_bytes=24_000),
        tasks=2,
        lost=0,
    )
    with pytest.raises(BrokenProcessPool):
        executor.submit(os._exit, 1).result()
    assert executor.stats().lost == 1
    del shared, sent


@ours
def test_the_first_large_copy_is_told_once(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    large = np.ones(1 << 17)
    with caplog.at_level(logging.INFO, "shmheap"):
        list(make().map(work.total, [large] * 3))
        assert [record.levelname for record in caplog.records] == ["INFO"]
        assert "1048576 bytes of an argument" in caplog.text


@ours
def test_a_handle_that_is_stale_is_the_tasks_error(make: Make, heap: Heap) -> None:
    executor = make(1)
    block = heap.put(b"abc")
    message = pickle.dumps(block)
    pickle.loads(message).free()
    block.free()
    with pytest.raises(StaleHandle):
        executor.submit(work.same, work.Stale(message)).result(work.PATIENCE_S)
    assert executor.submit(work.square, 3).result(work.PATIENCE_S) == 9


@ours
@pytest.mark.parametrize("strict", [False, True])
def test_larger_than_the_heap(make: Make, strict: bool) -> None:
    executor = make(1, initializer=work.quiet, strict=strict)
    argument = np.ones(10**7)
    if strict:
        for call in (work.total, argument), (work.ones, 10**7):
            with pytest.raises(HeapFull):
                executor.submit(*call).result(work.PATIENCE_S)
    else:
        assert executor.submit(work.ones, 10**7).result(work.PATIENCE_S).sum() == 10**7
    assert executor.submit(work.square, 3).result(work.PATIENCE_S) == 9


@pytest.mark.parametrize("end", ["with", "shutdown", "not waiting", "collect"])
def test_a_heap_of_its_own_ends_with_it(end: str) -> None:
    executor = ProcessPoolExecutor(1)
    path, heap = executor.heap._path, weakref.ref(executor.heap)
    future = executor.submit(work.like, np.ones(N))
    thread = executor._executor_manager_thread  # type: ignore[attr-defined]
    assert os.path.exists(path)
    if end == "with":
        with executor:
            pass
    elif end == "shutdown":
        executor.shutdown()
        executor.shutdown()
        with pytest.raises(ValueError, match="shut down"):
            _ = executor.heap
        with pytest.raises(RuntimeError):
            executor.submit(work.square, 1)
    elif end == "not waiting":
        executor.shutdown(wait=False)
    result = future.result(work.PATIENCE_S)
    if end in ("not waiting", "collect"):
        del executor, future
        gc.collect()
        thread.join(work.PATIENCE_S)  # it has the call until the result is told to all
        del thread
        gc.collect()
    assert result.sum() == 7 * N
    assert not os.path.exists(path)
    assert heap() is None


def test_bad_arguments_leave_no_heap(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    create = Heap.create
    monkeypatch.setattr(Heap, "create", lambda: made.append((heap := create())._path) or heap)
    with pytest.raises(ValueError, match="max_workers"):
        ProcessPoolExecutor(0)
    with pytest.raises(ValueError, match="size"):
        ProcessPoolExecutor(1, min_bytes="many")
    with pytest.raises(ValueError, match="min_bytes is at least 1"):
        ProcessPoolExecutor(1, min_bytes=0)
    gc.collect()
    assert made
    assert not any(map(os.path.exists, made))


@ours
def test_shutdown_while_a_call_fails_to_pickle(make: Make) -> None:
    """With the standard library's own, up to 3.13 at least, shutdown then waits for ever."""
    begun, go_on = threading.Event(), threading.Event()

    class Unpicklable:
        def __reduce__(self) -> str:
            begun.set()
            go_on.wait(work.PATIENCE_S)
            raise LookupError

    executor = make(1)
    failing = executor.submit(work.same, Unpicklable())
    begun.wait(work.PATIENCE_S)
    waiting = [executor.submit(work.same, n) for n in range(5)]
    end = threading.Thread(target=executor.shutdown, kwargs={"cancel_futures": True}, daemon=True)
    end.start()
    while not waiting[-1].cancelled():
        assert end.is_alive()
    go_on.set()
    assert isinstance(failing.exception(work.PATIENCE_S), LookupError)
    end.join(work.PATIENCE_S)
    assert not end.is_alive()


PARENT = """
import multiprocessing, os, sys, shmheap, pool_work
if __name__ == "__main__":
    context = multiprocessing.get_context(sys.argv[1])
    executor = shmheap.ProcessPoolExecutor(2, context)
    here, there = multiprocessing.Pipe()
    executor.submit(pool_work.write_when_told, there, *sys.argv[2:])
    busy = here.recv()
    idle = executor.submit(os.getpid).result()
    other = os.fork()  # which has all that we have, and lives on
    if other == 0:
        sys.stdin.read()
        os._exit(0)
    executor.heap.gc()  # so that the coordinator is there
    coordinator = shmheap._core.Observer(executor.heap._fileno()).header()["coordinator_pid"]
    print(executor.heap._path, busy, idle, coordinator, flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("method", METHODS)
def test_workers_end_when_their_parent_is_killed(method: str, tmp_path: Path) -> None:
    """One is idle; the other one finishes its task first."""
    script, fifo, marker = (tmp_path / name for name in ("parent.py", "fifo", "marker"))
    script.write_text(PARENT)
    os.mkfifo(fifo)
    with work.parent(script, method, fifo, marker) as parent:
        assert parent.stdout is not None
        path, busy, idle, coordinator = parent.stdout.readline().split()
        parent.kill()
        work.gone(int(idle))
        assert not marker.exists()
        fifo.write_text("go on")
        work.gone(int(busy))
        assert marker.exists()
    work.gone(int(coordinator))
    assert not os.path.exists(path)
