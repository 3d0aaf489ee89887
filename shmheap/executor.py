"""ProcessPoolExecutor: concurrent.futures' own, whose arguments and results stay where they are.

    submit(fn, a)     the standard library's submit(run, Call)
                      its thread pickles the Call     --bytes-->  unpickled as Arrived, bytes still
                                                                  run: unpack them, fn(a), Outcome
    future.result()   the value itself                <--bytes--  its worker pickles the Outcome

Only its public interface is used: pickle asks Call and Outcome what they are made of.
"""

from __future__ import annotations

import concurrent.futures
from concurrent.futures.process import BrokenProcessPool
from typing import TYPE_CHECKING, Any, NamedTuple, ParamSpec, TypeVar
from weakref import WeakValueDictionary

from shmheap.config import parse_size
from shmheap.heap import Heap, temporary
from shmheap.lifeline import Lifeline, reading_end
from shmheap.payload import MIN_BYTES, NONE, Carried, Packer, Parcel, unpack
from shmheap.tally import ARGUMENTS, RESULTS, Tally
from shmheap.wires import Allocation

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future
    from multiprocessing.context import BaseContext

    from shmheap.stats import PoolStats

__all__ = ["ProcessPoolExecutor"]

P = ParamSpec("P")
T = TypeVar("T")


class ProcessPoolExecutor(concurrent.futures.ProcessPoolExecutor):
    """concurrent.futures.ProcessPoolExecutor, as Pool is multiprocessing.Pool.

    Has its whole interface and behaviour: as there, the death of a worker breaks it, and all that
    was submitted fails with BrokenProcessPool.

    Args:
        max_workers: Number of workers; None: one for each CPU.
        mp_context: From multiprocessing.get_context: how workers are started.
        initializer: Called in each worker as it starts, with initargs.
        initargs: Its arguments; what is large in them goes as that of a task does, to each worker.
        max_tasks_per_child: Tasks after which a worker is replaced; None: never.
        heap: Where arguments and results are copied to; None: the executor makes one, and removes
            it when it is shut down. Results stay valid as long as somebody has them.
        min_bytes: Buffers of fewer bytes go through a pipe.
        strict: Raise HeapFull where the heap has no room, instead of using the pipe with a warning.
        allocator: In workers, arrays that NumPy makes are made in the heap.

    Raises what the standard library's and Heap.create raise.

    Cost: that of the standard library's, and a heap's, if it makes one.
    """

    def __init__(
        self,
        max_workers: int | None = None,
        mp_context: BaseContext | None = None,
        initializer: Callable[..., object] | None = None,
        initargs: tuple[Any, ...] = (),
        *,
        max_tasks_per_child: int | None = None,
        heap: Heap | None = None,
        min_bytes: int | str = MIN_BYTES,
        strict: bool = False,
        allocator: bool = True,
    ) -> None:
        if initializer is not None and not callable(initializer):
            raise TypeError("initializer must be a callable")
        packer = Packer(heap or temporary(), parse_size(min_bytes), strict=strict)
        self._tally = Tally()
        _tallies[id(self._tally)] = self._tally
        self._terms = _Terms(packer, allocator, initializer, initargs, id(self._tally))
        self._own = heap is None
        self._undone: set[Future[Any]] = set()
        super().__init__(
            max_workers, mp_context, _start, (self._terms,), max_tasks_per_child=max_tasks_per_child
        )

    @property
    def heap(self) -> Heap:
        """The heap of arguments and results. ValueError after shutdown, if it was its own."""
        if self._terms.packer is None:
            raise ValueError("the executor was shut down, and the heap that it made with it")
        return self._terms.packer.heap

    def stats(self) -> PoolStats:
        """Return what became of the buffers of arguments and results so far. Cost: O(1)."""
        return self._tally.stats()

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Have a worker call fn(*args, **kwargs); see concurrent.futures."""
        call = _Call(self._terms, self._tally, (fn, args, kwargs))
        future: Future[T] = super().submit(_run, call)  # type: ignore[arg-type]
        future.add_done_callback(call.end)
        self._undone.add(future)
        future.add_done_callback(self._undone.discard)
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """End; see concurrent.futures. A heap of its own is unlinked when the last task has ended.

        Args:
            wait: Return only then.
            cancel_futures: Cancel what has not begun.
        """
        if cancel_futures:  # the standard library's waits for ever if a call then fails to pickle
            for future in list(self._undone):
                future.cancel()
        super().shutdown(wait)
        if wait:
            self._terms.initargs.release()
        if self._own and wait and self._terms.packer is not None:
            self.heap.unlink()
            self._terms.packer.close()
            self._terms.packer = None  # and the heap with it; results keep what they need of it


class _Terms:
    """What a worker is told when it starts."""

    def __init__(
        self,
        packer: Packer,
        allocator: bool,
        initializer: Callable[..., object] | None,
        initargs: tuple[Any, ...],
        tally: int,
    ) -> None:
        self.packer: Packer | None = packer
        self.allocator = allocator
        self.initializer = initializer
        self.initargs = Carried(initargs, packer)
        self.lifeline = reading_end()
        self.tally = tally
        """Whose results they are: the id() of their executor's."""


class _Call:
    """A call on its way, and what its arguments hold until it has ended."""

    def __init__(self, terms: _Terms, tally: Tally, call: tuple[Any, ...]) -> None:
        self._terms = terms
        self._tally = tally
        self._call: tuple[Any, ...] | None = call
        """None: it has ended."""
        self._parcel: Parcel | None = None

    def __reduce__(self) -> tuple[type[_Arrived], tuple[bytes]]:
        assert self._terms.packer is not None, "it is there until all calls have ended"
        self._parcel = parcel = self._terms.packer.pack(self._call)
        self._tally.tasks += 1
        if parcel.counts is not NONE:
            self._tally.add(ARGUMENTS, parcel.counts)
        if self._call is None:  # it has ended meanwhile
            parcel.release()
        return _Arrived, (parcel.body,)

    def end(self, future: Future[Any]) -> None:
        self._call = None  # the future keeps us, and would keep the arguments
        if self._parcel is not None:
            self._parcel.release()
            self._parcel = None
            if not future.cancelled() and isinstance(future.exception(), BrokenProcessPool):
                self._tally.lost += 1


class _Arrived(NamedTuple):
    """A call in its worker. It is unpacked where an error is its own, not the worker's."""

    body: bytes


class _Outcome:
    """A result on its way: there is none at either end."""

    def __init__(self, value: Any, terms: _Terms) -> None:
        self._value = value
        self._terms = terms

    def __reduce__(self) -> tuple[Callable[[bytes, int], Any], tuple[bytes, int]]:
        assert self._terms.packer is not None, "a worker keeps it"
        return _opened, (self._terms.packer.pack(self._value).body, self._terms.tally)


_tallies: WeakValueDictionary[int, Tally] = WeakValueDictionary()
"""Those of the executors of this process."""


def _opened(body: bytes, whose: int) -> Any:
    value, counts = unpack(body)
    tally = _tallies.get(whose)
    if tally is not None and counts is not NONE:
        tally.add(RESULTS, counts)
    return value


# In a worker

_worker: list[tuple[_Terms, Allocation, Lifeline]] = []
"""What this one was told, what it allocates by, and what it lives by."""


def _start(terms: _Terms) -> None:
    """A worker's initializer."""
    assert terms.packer is not None
    terms.packer.views = False  # what it packs are results
    lifeline = Lifeline(terms.lifeline)
    _worker[:] = [(terms, Allocation(terms.packer, terms.allocator), lifeline)]
    if terms.initializer is not None:
        terms.initializer(*terms.initargs.value)
    lifeline.idle()


def _run(arrived: _Arrived) -> _Outcome:
    terms, allocation, lifeline = _worker[0]
    lifeline.busy()
    try:
        (fn, args, kwargs), _ = unpack(arrived.body)
        allocation.begin()
        return _Outcome(fn(*args, **kwargs), terms)
    finally:
        lifeline.idle()
