"""What other processes do with arrays in a heap."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

import shmheap
from shmheap.plugins.numpy import allocator

ITEMS = 20_000
"""Of 8 bytes: more than the allocator's least."""

held: list[np.ndarray[Any, Any]] = []
"""Until the process ends."""


def lies_in(heap: shmheap.Heap, array: np.ndarray[Any, Any]) -> bool:
    return heap.asarray(array) is array


def compute(heap: shmheap.Heap, source: str, result: str) -> None:
    with allocator(heap):
        heap.roots[result] = (heap.roots[source] * 2 + 1)[::-1]


def hold(heap: shmheap.Heap, count: int) -> None:
    with allocator(heap):
        held.extend(np.arange(ITEMS) for _ in range(count))


def makes_in(heap: shmheap.Heap) -> bool:
    """Whether a new array lies in the heap, as the process is now."""
    return lies_in(heap, np.empty(ITEMS))


def fork_amid(heap: shmheap.Heap, children: int) -> list[int]:
    """Fork while threads make and drop arrays; how the children ended that did the same."""
    over = threading.Event()

    def churn() -> None:
        with allocator(heap):
            while not over.is_set():
                [np.arange(ITEMS) for _ in range(3)]

    threads = [threading.Thread(target=churn) for _ in range(2)]
    for thread in threads:
        thread.start()
    with allocator(heap):
        arrays = [np.arange(ITEMS) for _ in range(3)]
        codes = [in_child(lambda: use_and_drop(heap, arrays)) for _ in range(children)]
    over.set()
    for thread in threads:
        thread.join()
    assert all((array == np.arange(ITEMS)).all() for array in arrays)
    return codes


def use_and_drop(heap: shmheap.Heap, arrays: list[np.ndarray[Any, Any]]) -> bool:
    own = arrays[0] + arrays[1]
    right = bool((own == np.arange(ITEMS) * 2).all()) and lies_in(heap, own)
    arrays.clear()
    del own
    return right and makes_in(heap)


def fork_raw(heap: shmheap.Heap) -> int:
    """How a child ended that was forked past all hooks: it holds nothing, and makes nothing."""
    with allocator(heap):
        arrays = [np.arange(ITEMS) for _ in range(3)]

        def use() -> bool:
            right = bool((arrays[0] == np.arange(ITEMS)).all())
            arrays.clear()
            return right and np.arange(ITEMS).sum() == sum(range(ITEMS))

        code = in_child(use, ctypes.PyDLL(None)._Fork)
    assert all((array == np.arange(ITEMS)).all() for array in arrays)
    return code


def in_child(use: Callable[[], bool], fork: Callable[[], int] = os.fork) -> int:
    child = fork()
    if child == 0:
        try:
            os._exit(0 if use() else 1)
        finally:
            os._exit(2)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
