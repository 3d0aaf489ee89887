"""joblib over a pool of ours: what is large goes to its workers, and comes back, without copies.

register()
with joblib.parallel_config(backend="shmheap"):
    search.fit(x, y)          # scikit-learn, or any joblib.Parallel

Users of joblib expect what its own backends do, and this one does so too: functions that only
cloudpickle can pickle, and one read-only copy of a large array that many tasks have as an argument.
"""

from __future__ import annotations

import pickle
import sys
import weakref
from collections import ChainMap
from functools import partial
from typing import TYPE_CHECKING, Any

import joblib
from joblib._parallel_backends import FallbackToBackend, MultiprocessingBackend, SequentialBackend
from joblib.externals.loky.backend.context import get_context
from joblib.parallel import DEFAULT_MP_CONTEXT

from shmheap.payload import PROTOCOL, Packer, block_under, reducers
from shmheap.pool import Pool

try:
    import cloudpickle
except ImportError:  # before joblib 1.6 it was a part of that
    from joblib.externals import cloudpickle

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from shmheap.payload import Packing, Pieces

__all__ = ["ShmheapBackend", "register"]

SHARING_MODES = ("r", "r+", "w+")
"""Of joblib's mmap_mode: workers map one copy. With "c", and without a mode, each has its own."""


def register(*, make_default: bool = False) -> None:
    """Give joblib the backend "shmheap".

    Args:
        make_default: It is what joblib uses where no other backend is asked for.
    """
    joblib.register_parallel_backend("shmheap", ShmheapBackend, make_default=make_default)


class ShmheapBackend(MultiprocessingBackend):  # type: ignore[misc]
    """joblib's backend "multiprocessing", over a pool of ours that is kept.

    joblib.parallel_config(backend="shmheap", ...) takes what shmheap.Pool takes, but for the number
    of processes. Workers are started as loky's are, unless `context` or JOBLIB_START_METHOD says
    how: a forked one hangs if its parent has used OpenMP. They serve each Parallel that has as many
    jobs, and end with the parallel_config or, without one, with the Parallel.

    joblib's `max_nbytes` and `mmap_mode` say which arrays that lie in no heap are copied once for
    all tasks of a Parallel, and whether workers may write to them.
    """

    supports_return_generator = True

    def __init__(
        self,
        nesting_level: int | None = None,
        inner_max_num_threads: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(nesting_level=nesting_level, inner_max_num_threads=inner_max_num_threads)
        self._options = options
        self._n_jobs = 0
        self._shared = _Shared()
        self._end: Callable[[], object] = bool
        """Ends the pool, if there is one."""

    def configure(
        self,
        n_jobs: int = 1,
        parallel: Any = None,
        *,
        max_nbytes: int | None = None,
        mmap_mode: str | None = None,
        **_joblib: object,
    ) -> int:
        """Have workers ready; return how many they are."""
        n_jobs = self.effective_n_jobs(n_jobs)
        if n_jobs == 1:
            raise FallbackToBackend(SequentialBackend(nesting_level=self.nesting_level))
        self._shared.begin(max_nbytes, mmap_mode)
        if n_jobs != self._n_jobs:
            self._start(n_jobs)
        self.parallel = parallel
        return n_jobs

    def _start(self, n_jobs: int) -> None:
        self._end()
        self._shared.end()
        options = {"context": DEFAULT_MP_CONTEXT or get_context("loky")} | self._options
        self._pool = _Pool(n_jobs, shared=self._shared, **options)
        self._end = weakref.finalize(self, self._pool.terminate)
        self._n_jobs = n_jobs

    def terminate(self) -> None:
        """End a Parallel; the workers stay."""
        self._shared.end()
        self.reset_batch_stats()
        self.parallel = None  # or the two would keep each other, and the workers

    def abort_everything(self, ensure_ready: bool = True) -> None:
        """End what runs, and with it the workers."""
        n_jobs, self._n_jobs = self._n_jobs, 0
        self._end()
        if ensure_ready:
            self._start(n_jobs)


class _Pool(Pool):
    """A pool that pickles as joblib does."""

    def __init__(self, *args: Any, shared: _Shared, **options: Any) -> None:
        self._new_packer = partial(_Packer, shared=shared)
        super().__init__(*args, **options)


class _Packer(Packer):
    """Packs whatever cloudpickle can pickle.

    Args:
        shared: What is copied once; None: nothing.
    """

    def __init__(self, *args: Any, shared: _Shared | None = None, **options: Any) -> None:
        super().__init__(*args, **options)
        self._shared = shared

    def pickler(self, file: Pieces, packing: Packing) -> pickle.Pickler:
        """Return a cloudpickle that asks the packing about what is large."""
        table = reducers(packing)
        if self._shared is not None and (numpy := sys.modules.get("numpy")) is not None:
            table[numpy.ndarray] = partial(self._shared.reduce, packing)
        made: pickle.Pickler = _Pickler(file, PROTOCOL, packing.buffer)
        # By what the pickler in C looks at, which cloudpickle's own attribute of that name hides.
        in_c: Any = pickle.Pickler.dispatch_table
        in_c.__set__(made, ChainMap(table, cloudpickle.Pickler.dispatch_table))
        return made


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    """One that can be used again: cloudpickle's own keeps namespaces of functions by their id()."""

    def clear_memo(self) -> None:
        super().clear_memo()
        self.globals_ref.clear()


class _Shared:
    """Copies of large arrays: one of each for all tasks, as long as the array lives.

    As joblib's files that workers map: whoever changes the array later does not change the copy.
    """

    def __init__(self) -> None:
        self._min_bytes: int | None = None
        self._writable = False
        self._copies: dict[int, tuple[NDArray[Any], weakref.ref[Any]]] = {}
        """By the id() of an array that lives, with what forgets it when it does not."""

    def begin(self, max_nbytes: int | None, mode: str | None) -> None:
        """Start with a Parallel of these parameters."""
        self._min_bytes = max_nbytes if mode in SHARING_MODES else None
        self._writable = mode != "r"

    def end(self) -> None:
        """Forget all copies: what another Parallel sends may have changed."""
        self._copies.clear()

    def reduce(self, packing: Packing, array: NDArray[Any]) -> Any:
        """Reduce an exact array, or its copy."""
        large = self._min_bytes is not None and array.nbytes >= self._min_bytes
        if large and not array.dtype.hasobject and block_under(array) is None:
            array = self._copy_of(packing, array)
        return packing.array(array)

    def _copy_of(self, packing: Packing, array: NDArray[Any]) -> NDArray[Any]:
        key = id(array)
        if (known := self._copies.get(key)) is not None:
            return known[0]
        copy = packing.copy(array)
        if copy is None:  # no room
            return array
        copy.flags.writeable = self._writable
        self._copies[key] = copy, weakref.ref(array, lambda _: self._copies.pop(key, None))
        return copy
