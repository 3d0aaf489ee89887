"""install(): queues, pipes, pools and managers of plain multiprocessing send handles."""

from __future__ import annotations

import multiprocessing
import multiprocessing.managers  # which registers reducers of its own, once
import multiprocessing.pool
import pickle
from collections.abc import Iterator
from multiprocessing.reduction import ForkingPickler
from typing import Any

import numpy as np
import pool_work as work
import pytest

import shmheap
from shmheap import Heap, readonly

METHODS = ("fork", "spawn", "forkserver")


@pytest.fixture
def installed() -> Iterator[None]:
    before = dict(ForkingPickler._extra_reducers)  # type: ignore[attr-defined]
    shmheap.install()
    shmheap.install()
    yield
    shmheap.uninstall()
    shmheap.uninstall()
    assert before == ForkingPickler._extra_reducers  # type: ignore[attr-defined]


def sent(value: Any) -> Any:
    here, there = multiprocessing.Pipe()
    here.send(value)
    return there.recv()


@pytest.mark.usefixtures("installed")
def test_what_lies_in_the_heap_goes_as_a_handle(heap: Heap) -> None:
    array = heap.full((10, 20), 1.0)
    for view in (array, array[::2, ::-1], array.T, array[3:4], array.view("M8[s]"), array[0, 0:1]):
        found = sent({"it": view})["it"]
        assert np.shares_memory(found, view)
        assert np.array_equal(found, view)
        assert found.dtype == view.dtype
        assert found.flags.writeable
    assert not sent(readonly(array)).flags.writeable
    assert np.shares_memory(sent(readonly(array)), array)
    block = heap.put(b"abcdef")
    view = sent(memoryview(block)[2:4])
    assert (bytes(view), view.readonly) == (b"cd", False)
    assert sent(readonly(block)).readonly
    assert sent(block) == block
    del array, view, found, block
    assert heap.stats().leases == 0


@pytest.mark.usefixtures("installed")
def test_anything_else_goes_as_ever(heap: Heap) -> None:
    for here in (
        np.arange(1000).reshape(10, 100).T,
        np.array([1, None], object),
        heap.zeros((0, 3)),
        np.array([]),
    ):
        there = sent(here)
        assert np.array_equal(there, here)
        assert not np.shares_memory(there, here)
    with pytest.raises(TypeError, match="memoryview"):
        sent(memoryview(b"abc"))
    array = heap.zeros(10)
    assert not np.shares_memory(pickle.loads(pickle.dumps(array)), array), "pickle is as ever"
    del array


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("method", METHODS)
def test_pools_and_queues(heap: Heap, method: str) -> None:
    context = multiprocessing.get_context(method)
    array = heap.full(1000, 1.0)
    queue = context.Queue()
    queue.put(array)
    assert np.shares_memory(queue.get(), array)
    queue.close()
    queue.join_thread()
    with context.Pool(1) as pool:
        pool.map(work.double, [array[:500], array[500:]])
        pool.apply(work.double, (array,))
    assert array.tolist() == [4] * 1000
    del array


@pytest.mark.usefixtures("installed")
def test_managers(heap: Heap) -> None:
    array = heap.full(1000, 1.0)
    with multiprocessing.get_context("fork").Manager() as manager:  # which has it installed, too
        kept = manager.dict(it=array)
        found = kept["it"]
        assert np.shares_memory(found, array)
        array[:] = 2
        assert kept["it"].tolist() == [2] * 1000
        del array, found
        assert kept["it"].tolist() == [2] * 1000, "the manager holds it"
        assert kept.pop("it").tolist() == [2] * 1000
    assert heap.stats().leases == 0


def test_undone(heap: Heap) -> None:
    shmheap.install()
    shmheap.uninstall()
    array = heap.zeros(10)
    assert not np.shares_memory(sent(array), array)
    del array


def test_what_was_registered_before_comes_back(heap: Heap) -> None:
    ForkingPickler.register(np.ndarray, lambda _: (int, (7,)))
    try:
        shmheap.install()
        array = heap.zeros(10)
        assert np.shares_memory(sent(array), array)
        shmheap.uninstall()
        assert sent(array) == 7
    finally:
        ForkingPickler._extra_reducers.pop(np.ndarray)  # type: ignore[attr-defined]
    del array
