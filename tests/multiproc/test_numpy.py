"""Arrays that NumPy makes in a heap, between processes: handed over, forked, left by the dead."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import array_work
import numpy as np
import pytest
from array_work import ITEMS, lies_in
from processes import METHODS, Worker

from shmheap import Heap
from shmheap.plugins.numpy import allocator


@pytest.fixture(autouse=True)
def nothing_is_left(heap: Heap) -> Iterator[None]:
    yield
    gc.collect()
    heap.gc()
    assert heap.stats().heap_objects == 0
    heap.check()


@pytest.mark.parametrize("method", METHODS)
def test_a_result_is_where_the_caller_sees_it(heap: Heap, method: str) -> None:
    source = heap.roots["source"] = heap.array(np.arange(ITEMS))
    before = heap.stats().heap_alloc
    with Worker(method, heap=heap) as worker:
        worker.do("work", "heap", "array_work:compute", "source", "result")
        assert heap.stats().heap_alloc - before < source.nbytes + 4096, "one array, and its name"
        result = heap.roots["result"]
        worker.end()
    np.testing.assert_array_equal(result, (np.arange(ITEMS) * 2 + 1)[::-1])
    assert result.strides == (-8,)
    heap.roots.clear()
    source[:] = result


def test_a_forked_child_shares_arrays_with_its_parent(heap: Heap) -> None:
    with allocator(heap):
        array = np.arange(ITEMS)
    with Worker("fork", array=array) as worker:
        worker.do("attempt", "array:fill", 7)
        assert (array == 7).all()
        array[:] = 8
        assert worker.do("attempt", "array:max") == f"returned {np.int64(8)!r}"
        worker.do("drop", "array")
        worker.end()
    assert (array == 8).all(), "the child's hold was its own"
    with Worker("fork", array=array) as worker:
        del array
        with allocator(heap):
            others = [np.zeros(ITEMS) + 1 for _ in range(5)]
        assert worker.do("attempt", "array:min") == f"returned {np.int64(8)!r}"
        worker.kill()
    assert all((other == 1).all() for other in others)


def test_the_arrays_of_the_dead_are_taken_back(heap: Heap) -> None:
    with Worker("spawn", heap=heap) as worker:
        worker.do("work", "heap", "array_work:hold", 20)
        assert heap.stats().heap_objects == 20
        worker.kill()


def test_a_child_goes_on_where_its_parent_was(heap: Heap) -> None:
    with allocator(heap), Worker("fork", heap=heap) as worker:
        assert worker.do("work", "heap", "array_work:makes_in")
        worker.end()
    with allocator(heap), Worker("spawn", heap=heap) as worker:
        assert not worker.do("work", "heap", "array_work:makes_in")
        worker.end()


def test_forks_amid_threads_that_make_arrays(heap: Heap) -> None:
    with Worker("spawn", heap=heap) as worker:
        assert worker.do("work", "heap", "array_work:fork_amid", 10) == [0] * 10
        worker.end()


def test_a_child_past_all_hooks_holds_nothing(heap: Heap) -> None:
    with Worker("spawn", heap=heap) as worker:
        assert worker.do("work", "heap", "array_work:fork_raw") == 0
        worker.end()


def test_array_work_sees_what_lies_where(heap: Heap) -> None:
    assert lies_in(heap, heap.zeros(ITEMS))
    assert not lies_in(heap, np.zeros(ITEMS))
    assert not array_work.makes_in(heap)
