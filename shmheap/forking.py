"""install(): plain multiprocessing sends what lies in a heap as handles.

Its queues, pipes, pools and managers pickle with ForkingPickler, which asks a table of reducers, by
type. Blocks and shared collections pickle as handles anyway; NumPy's arrays and memoryviews are
added to that table here. What lies in no open heap is pickled as ever.
"""

from __future__ import annotations

from multiprocessing.reduction import ForkingPickler
from typing import TYPE_CHECKING, Any

from shmheap import arrays
from shmheap.heap import ask_open_heaps
from shmheap.payload import rebuild_array, rebuild_memoryview, slice_under

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from shmheap.block import Block

    Reducer = Callable[[Any], tuple[Any, ...]]

__all__ = ["install", "uninstall"]

PROTOCOL = 4
"""multiprocessing's."""

_before: dict[type, Reducer | None] = {}
"""What is installed for, and what was there before."""


def install() -> None:
    """Have plain multiprocessing send arrays and views that lie in a heap as handles: shared.

    In this process, and in those that are forked from it. Who receives needs no call of this; who
    sends back, in a process that was spawned, does. Undone by uninstall(). Idempotent.

    Cost: the import of NumPy, if there is one; of sending an array then that of a lease, and
    a microsecond for one that lies in no heap.
    """
    _install(memoryview, _reduce_memoryview)
    try:
        import numpy
    except ImportError:
        return
    _install(numpy.ndarray, _reduce_array)


def uninstall() -> None:
    """Undo install(). Idempotent."""
    while _before:
        kind, reducer = _before.popitem()
        if reducer is None:
            _reducers().pop(kind, None)
        else:
            ForkingPickler.register(kind, reducer)


def _install(kind: type, reducer: Reducer) -> None:
    if kind not in _before:
        _before[kind] = _reducers().get(kind)
        ForkingPickler.register(kind, reducer)


def _reducers() -> dict[type, Reducer]:
    found: dict[type, Reducer] = ForkingPickler._extra_reducers  # type: ignore[attr-defined]
    return found


def _reduce_array(array: NDArray[Any]) -> Any:
    if array.nbytes and not array.dtype.hasobject:
        span = arrays.extent(array)
        block = ask_open_heaps(lambda heap: heap._block_at(*span))
        if block is not None:
            raw, form = slice_under(array, block)
            return _array, (*_slice(raw), *form)
    return array.__reduce_ex__(PROTOCOL)


def _reduce_memoryview(view: memoryview) -> tuple[Any, ...]:
    found = ask_open_heaps(lambda heap: heap._block_of(view))
    if found is None:
        raise TypeError("cannot pickle a memoryview that lies in no open heap")
    return _memoryview, (*_slice(view), view.format, view.shape)


def _slice(raw: memoryview) -> tuple[Block, int, int, bool]:
    """Where a view lies, in what can be pickled."""
    found = ask_open_heaps(lambda heap: heap._block_of(raw))
    assert found is not None
    return *found, raw.nbytes, raw.readonly


def _array(block: Block, start: int, nbytes: int, readonly: bool, *form: Any) -> NDArray[Any]:
    return rebuild_array(_view(block, start, nbytes, readonly), *form)


def _memoryview(block: Block, start: int, nbytes: int, readonly: bool, *form: Any) -> memoryview:
    return rebuild_memoryview(_view(block, start, nbytes, readonly), *form)


def _view(block: Block, start: int, nbytes: int, readonly: bool) -> memoryview:
    view = memoryview(block)[start : start + nbytes]
    return view.toreadonly() if readonly else view
