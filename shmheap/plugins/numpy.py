"""Arrays that NumPy makes itself, in a heap: its results are where every process can see them.

with allocator(heap):
    result = a * 2 + b        # NumPy asks the heap for its memory (csrc/numpy/handler.c)
shared["result"] = result     # not copied: it lies in the heap already
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from shmheap.config import parse_size
from shmheap.payload import MIN_BYTES
from shmheap.plugins import _numpy

if TYPE_CHECKING:
    from shmheap.heap import Heap

__all__ = ["allocator"]


@contextlib.contextmanager
def allocator(
    heap: Heap, *, min_bytes: int | str = MIN_BYTES, zeros: bool = False
) -> Iterator[None]:
    """Have the arrays that NumPy makes in the block lie in the heap.

    In this context only: not in other threads, nor in tasks that were started before. Such an
    array is as any other, keeps its memory as long as it lives, also after the block and after
    heap.close(), and is freed as soon as no process holds it. What the heap cannot serve, because
    it is full or closed, is made as outside the block. A forked child shares these arrays with its
    parent: each sees what the other writes.

    Args:
        heap: Where they are to lie.
        min_bytes: Smaller arrays are made as outside the block; pools do not copy them to a heap.
        zeros: Whether this is also for what NumPy asks for zeroed. That is numpy.zeros, and every
            array of objects: do not fork then while such arrays live, for parent and child would
            share pointers.

    Raises ImportError without a NumPy that this version knows, and ValueError if the heap is
    closed.

    Cost: two microseconds; of an array heap.alloc's, with zero=False.
    """
    api = _array_api()
    leave = _numpy.leave  # a block that the interpreter's end leaves finds this module empty
    outside = _numpy.enter(api, heap, parse_size(min_bytes), zeros)
    try:
        yield
    finally:
        leave(api, outside)


@functools.cache
def _array_api() -> object:
    """NumPy's C API, of NumPy 2 or 1."""
    try:
        found = importlib.import_module("numpy._core._multiarray_umath")
    except ModuleNotFoundError:
        found = importlib.import_module("numpy.core._multiarray_umath")
    return found._ARRAY_API
