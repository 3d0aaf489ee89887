"""Who carries an array to a worker and one of its size back: the candidates of `bench.py pool`.

Each is a context manager that starts workers and yields what can be asked of them. Workers import
this module, too.
"""

from __future__ import annotations

import concurrent.futures
import importlib.util
import logging
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import resource_tracker
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any, TypeAlias
from unittest import mock

import numpy as np
from numpy.typing import NDArray

import shmheap
from shmheap._core import Observer

Array: TypeAlias = NDArray[np.uint8]
Send: TypeAlias = Callable[[], Array]


@dataclass(frozen=True, slots=True)
class Workers:
    """What can be asked of a candidate's workers.

    `sender(array)` makes ready whatever the candidate reuses, and returns what sends the array to a
    worker and returns its `answer`. `on_each(function, array)` calls that in all workers at once;
    None: nothing new would be seen. `servants` are processes that it needs and that this one did
    not start.
    """

    sender: Callable[[Array], Send]
    on_each: Callable[[Callable[[Array], object], Array], object] | None = None
    servants: tuple[int, ...] = ()


Candidate: TypeAlias = Callable[[int], AbstractContextManager[Workers]]
"""Called with the number of workers."""


def answer(array: Array) -> Array:
    """Return another array of that size: every worker's task. Its first byte is one higher."""
    found = np.empty_like(array)
    found[:1] = array[:1] + 1
    return found


def bump(number: int) -> int:
    """Return the next number: a small task."""
    return number + 1


def mark_done(record: dict[str, Any]) -> dict[str, Any]:
    """Return a small record, done: a task that takes some more pickling."""
    return record | {"done": True}


# --------------------------------------------------------------------------------------------------
# The standard library


@contextmanager
def multiprocessing_pool(workers: int) -> Iterator[Workers]:
    """Send by multiprocessing.Pool."""
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        yield Workers(
            lambda array: partial(pool.apply, answer, (array,)),
            lambda function, array: pool.map(function, [array] * workers, chunksize=1),
        )


@contextmanager
def executor(workers: int) -> Iterator[Workers]:
    """Send by concurrent.futures.ProcessPoolExecutor."""
    context = multiprocessing.get_context("fork")
    with concurrent.futures.ProcessPoolExecutor(workers, context) as pool:
        yield Workers(
            lambda array: lambda: pool.submit(answer, array).result(),
            lambda function, array: list(pool.map(function, [array] * workers)),
        )


def _bytes(memory: SharedMemory, nbytes: int) -> Array:
    return np.ndarray(nbytes, np.uint8, memory.buf)  # as Python's documents have it


@contextmanager
def by_hand_reused(workers: int) -> Iterator[Workers]:
    """Copy into a SharedMemory that stays, as does the one of the answer."""
    resource_tracker.ensure_running()  # or each worker has one of its own
    with ExitStack() as stack:
        pool = stack.enter_context(multiprocessing.get_context("fork").Pool(workers))

        def segment(nbytes: int) -> tuple[str, Array]:
            made = SharedMemory(create=True, size=nbytes)
            stack.callback(made.unlink)
            stack.callback(made.close)
            return made.name, _bytes(made, nbytes)

        def sender(array: Array) -> Send:
            (name, there), (answers, back) = segment(array.nbytes), segment(array.nbytes)

            def send() -> Array:
                there[:] = array
                pool.apply(_answer_in_place, (name, answers, array.nbytes))
                return back

            return send

        def on_each(function: Callable[[Array], object], array: Array) -> None:
            name, there = segment(array.nbytes)
            there[:] = array
            pool.starmap(_call_on, [(function, name, array.nbytes)] * workers, chunksize=1)

        yield Workers(sender, on_each)


_attached: dict[str, SharedMemory] = {}
"""What this worker has attached and will use again."""


def _in(name: str, nbytes: int) -> Array:
    if name not in _attached:
        _attached[name] = SharedMemory(name)
    return _bytes(_attached[name], nbytes)


def _answer_in_place(there: str, back: str, nbytes: int) -> None:
    _in(back, nbytes)[:1] = _in(there, nbytes)[:1] + 1


def _call_on(function: Callable[[Array], object], there: str, nbytes: int) -> None:
    function(_in(there, nbytes))


@contextmanager
def by_hand_fresh(workers: int) -> Iterator[Workers]:
    """Copy into a new SharedMemory each time; the worker makes the one of the answer."""
    resource_tracker.ensure_running()
    with ExitStack() as stack:
        pool = stack.enter_context(multiprocessing.get_context("fork").Pool(workers))
        held = stack.enter_context(ExitStack())  # the last answer, until it is not needed any more

        def send(array: Array) -> Array:
            held.close()
            there = SharedMemory(create=True, size=array.nbytes)
            _bytes(there, array.nbytes)[:] = array
            name = pool.apply(_answer_in_new, (there.name, array.nbytes))
            there.close()
            there.unlink()
            back = SharedMemory(name)
            held.callback(back.unlink)
            held.callback(back.close)
            return _bytes(back, array.nbytes)

        yield Workers(lambda array: partial(send, array))


def _answer_in_new(there: str, nbytes: int) -> str:
    sent, made = SharedMemory(there), SharedMemory(create=True, size=nbytes)
    array, found = _bytes(sent, nbytes), _bytes(made, nbytes)
    found[:1] = array[:1] + 1
    sent.close()
    made.close()
    return made.name


# --------------------------------------------------------------------------------------------------
# Others


@contextmanager
def joblib_loky(workers: int) -> Iterator[Workers]:
    """Send by joblib's own backend, which keeps arrays above 1 MB in a file that workers map."""
    with _joblib(workers, "loky") as found:
        yield found
    from joblib.externals.loky import get_reusable_executor

    get_reusable_executor().shutdown(wait=True)


@contextmanager
def _joblib(workers: int, backend: str) -> Iterator[Workers]:
    from joblib import Parallel, delayed

    with Parallel(workers, backend=backend) as parallel:
        yield Workers(
            lambda array: lambda: parallel([delayed(answer)(array)])[0],
            lambda function, array: parallel([delayed(function)(array)] * workers),
        )


@contextmanager
def ray_put(workers: int) -> Iterator[Workers]:
    """Put into Ray's object store, from which the worker maps it."""
    import ray

    with mock.patch.dict(os.environ, PYTHONPATH=str(Path(__file__).parent)):
        ray.init(
            num_cpus=workers,
            include_dashboard=False,
            logging_level=logging.ERROR,
            log_to_driver=False,
        )
    try:
        remote: Any = ray.remote(answer)

        def on_each(function: Callable[[Array], object], array: Array) -> None:
            call: Any = ray.remote(lambda there: function(there))
            there = ray.put(array)
            ray.get([call.remote(there) for _ in range(workers)])

        yield Workers(lambda array: lambda: ray.get(remote.remote(ray.put(array))), on_each)
    finally:
        ray.shutdown()


@contextmanager
def dask_scatter(workers: int) -> Iterator[Workers]:
    """Scatter to Dask's workers."""
    from distributed import Client, LocalCluster

    cluster = LocalCluster(
        n_workers=workers, threads_per_worker=1, dashboard_address=None, silence_logs=logging.ERROR
    )
    with cluster, Client(cluster) as client:

        def send(array: Array) -> Array:
            there = client.scatter(array, hash=False)
            found: Array = client.submit(answer, there, pure=False).result()
            return found

        yield Workers(
            lambda array: partial(send, array),
            lambda function, array: client.run(function, array),
        )


# --------------------------------------------------------------------------------------------------
# shmheap


@contextmanager
def heap_arrays(workers: int) -> Iterator[Workers]:
    """Send what lies in the heap; the answer is made there, too."""
    with shmheap.Pool(workers, context=multiprocessing.get_context("fork")) as pool:
        yield Workers(
            lambda array: partial(pool.apply, answer, (pool.heap.array(array),)),
            lambda function, array: pool.map(
                function, [pool.heap.array(array)] * workers, chunksize=1
            ),
            (_coordinator(pool.heap),),
        )


def _coordinator(heap: shmheap.Heap) -> int:
    heap.gc()  # once it answers, it is there
    with open(heap._path, "rb") as file, closing(Observer(file.fileno())) as observer:
        pid: int = observer.header()["coordinator_pid"]
        return pid


@contextmanager
def plain_arrays(workers: int) -> Iterator[Workers]:
    """Send an array of NumPy's own: it is copied in. The answer is made in the heap."""
    with shmheap.Pool(workers, context=multiprocessing.get_context("fork")) as pool:
        yield Workers(lambda array: partial(pool.apply, answer, (array,)))


@contextmanager
def plain_both_ways(workers: int) -> Iterator[Workers]:
    """Send an array of NumPy's own, and have one back that the worker has: both are copied in."""
    with shmheap.Pool(workers, context=multiprocessing.get_context("fork")) as pool:
        yield Workers(lambda array: partial(pool.apply, _answer_of_its_own, (array,)))


_own: dict[int, Array] = {}
"""Answers that this worker has in memory of its own."""


def _answer_of_its_own(array: Array) -> Array:
    if array.nbytes not in _own:
        _own[array.nbytes] = np.frombuffer(bytearray(array.nbytes), np.uint8)
    found = _own[array.nbytes]
    found[:1] = array[:1] + 1
    return found


@contextmanager
def heap_arrays_by_executor(workers: int) -> Iterator[Workers]:
    """Send what lies in the heap of a shmheap.ProcessPoolExecutor."""
    context = multiprocessing.get_context("fork")
    with shmheap.ProcessPoolExecutor(workers, context) as pool:

        def sender(array: Array) -> Send:
            mine = pool.heap.array(array)
            return lambda: pool.submit(answer, mine).result()

        yield Workers(sender)


@contextmanager
def joblib_shmheap(workers: int) -> Iterator[Workers]:
    """Send an array of NumPy's own by joblib, which has it copied once."""
    import shmheap.plugins.joblib

    shmheap.plugins.joblib.register()
    with _joblib(workers, "shmheap") as found:
        yield Workers(found.sender)


SHARED, COPIED, COPIED_BOTH_WAYS = (
    f"shmheap, {what}" for what in ("heap arrays", "plain arrays", "plain both ways")
)
OURS: dict[str, Candidate] = {
    SHARED: heap_arrays,
    COPIED: plain_arrays,
    COPIED_BOTH_WAYS: plain_both_ways,
    "shmheap, executor": heap_arrays_by_executor,
    "shmheap, joblib": joblib_shmheap,
}
BESIDE = {"shmheap, joblib": "loky"}
"""Takes part where this peer does."""

PEERS: dict[str, tuple[Candidate, str | None]] = {
    "Pool": (multiprocessing_pool, None),
    "ProcessPoolExecutor": (executor, None),
    "SharedMemory-fresh": (by_hand_fresh, None),
    "SharedMemory-reused": (by_hand_reused, None),
    "loky": (joblib_loky, "joblib"),
    "Ray": (ray_put, "ray"),
    "Dask": (dask_scatter, "distributed"),
}
"""By name, with the module that it needs. Those that fork come first: others start threads."""


def missing(names: Sequence[str]) -> list[str]:
    """Return those of these peers that are not installed."""
    needs = {name: PEERS[name][1] for name in names}
    return [
        name for name, module in needs.items() if module and not importlib.util.find_spec(module)
    ]
