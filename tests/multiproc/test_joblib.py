"""joblib's backend "shmheap": what users of joblib expect, and arrays that are not copied."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import pytest

joblib = pytest.importorskip("joblib")
numpy = pytest.importorskip("numpy")

import joblib_work as work  # noqa: E402

import shmheap  # noqa: E402
import shmheap.plugins.joblib  # noqa: E402
from shmheap.payload import unpack  # noqa: E402

FORK = multiprocessing.get_context("fork")
LENGTH = 1 << 17
"""Of an array of 1 MiB, which is as much as joblib copies once."""


@pytest.fixture(autouse=True)
def _registered() -> None:
    shmheap.plugins.joblib.register()


@pytest.fixture
def backend() -> Iterator[Any]:
    """The backend that a Parallel of the test uses: two workers, forked, for that is quick."""
    with joblib.parallel_config(backend="shmheap", n_jobs=2, context=FORK):
        yield joblib.parallel.get_active_backend()[0]


def run(*tasks: Any, **options: Any) -> Any:
    return joblib.Parallel(**options)(tasks)


def test_functions_that_only_cloudpickle_can_pickle() -> None:
    """With workers that start as loky's do; arguments and results, too."""
    bias = 3
    with joblib.parallel_config(backend="shmheap", n_jobs=2):
        found = run(*(joblib.delayed(lambda n: lambda m: n + m + bias)(n) for n in range(5)))
    assert [one(1) for one in found] == [4, 5, 6, 7, 8]


def test_a_namespace_is_sent_as_it_is_now(heap: shmheap.Heap) -> None:
    """Also where another one was at the same place in memory."""
    space: dict[str, Any] = {"__name__": "not a file"}
    exec("def function(): pass", space)
    packer = shmheap.plugins.joblib._Packer(heap)
    for package in ("first", "second"):
        space["__package__"] = package
        there, _ = unpack(packer.pack(space["function"]).body)
        assert there.__globals__["__package__"] == package


@pytest.mark.usefixtures("backend")
def test_many_small_tasks_come_back_in_order() -> None:
    assert run(*map(joblib.delayed(abs), range(-500, 500))) == [*map(abs, range(-500, 500))]


@pytest.mark.parametrize(
    ("mode", "copies", "writeable"),
    [("r", 1, False), ("r+", 1, True), ("c", 4, True), (None, 4, True)],
)
def test_a_plain_array_is_copied_once_where_joblib_maps_it(
    backend: Any, mode: str | None, copies: int, writeable: bool
) -> None:
    array = numpy.ones(LENGTH)
    tasks = [joblib.delayed(work.total_and_writeable)(array)] * 4
    assert run(*tasks, mmap_mode=mode, batch_size=1) == [(LENGTH, writeable)] * 4
    assert backend._pool.stats().arguments.copied_bytes == copies * array.nbytes


def test_max_nbytes_says_what_is_large(backend: Any) -> None:
    array = numpy.ones(LENGTH)
    tasks = [joblib.delayed(work.total_and_writeable)(array)] * 2
    assert run(*tasks, max_nbytes=array.nbytes + 1, batch_size=1) == [(LENGTH, True)] * 2
    assert run(*tasks, max_nbytes=array.nbytes, batch_size=1) == [(LENGTH, False)] * 2
    assert run(*tasks, max_nbytes=None, batch_size=1) == [(LENGTH, True)] * 2


@pytest.mark.usefixtures("backend")
def test_an_array_that_changed_is_sent_as_it_is_now() -> None:
    array = numpy.ones(LENGTH)
    assert run(joblib.delayed(work.total_and_writeable)(array)) == [(LENGTH, False)]
    array[:] = 2
    assert run(joblib.delayed(work.total_and_writeable)(array)) == [(2 * LENGTH, False)]


def test_an_array_in_the_heap_is_shared(backend: Any, heap: shmheap.Heap) -> None:
    array = heap.zeros(LENGTH)
    run(*(joblib.delayed(work.write)(array[1::2], place) for place in range(100)))
    assert array[1:200:2].tolist() == list(range(100))
    assert run(joblib.delayed(work.total_and_writeable)(shmheap.readonly(array))) == [(4950, False)]
    assert backend._pool.stats().arguments.copied_bytes == 0


def test_the_heap_can_be_the_users(heap: shmheap.Heap) -> None:
    with joblib.parallel_config(backend="shmheap", n_jobs=2, context=FORK, heap=heap):
        [made] = run(joblib.delayed(numpy.full)(LENGTH, 7.0))
        backend = joblib.parallel.get_active_backend()[0]
        assert backend._pool.heap is heap
        assert backend._pool.stats().results.handle_bytes == made.nbytes
    assert made.sum() == 7 * LENGTH, "results stay when the pool has gone"


@pytest.mark.usefixtures("backend")
def test_an_error_says_where_it_happened() -> None:
    with pytest.raises(LookupError, match="5") as caught:
        run(joblib.delayed(work.fail)(5), *[joblib.delayed(abs)(1)] * 9)
    assert "in fail" in str(caught.value.__cause__)
    assert run(joblib.delayed(abs)(-1)) == [1]


@pytest.mark.usefixtures("backend")
def test_the_death_of_a_worker_is_an_error() -> None:
    with joblib.Parallel() as parallel:
        with pytest.raises(BrokenProcessPool, match="worker"):
            parallel([joblib.delayed(work.die)()] * 3)
        assert parallel([joblib.delayed(abs)(-1)] * 3) == [1] * 3


@pytest.mark.usefixtures("backend")
def test_a_timeout_ends_what_runs() -> None:
    with pytest.raises(multiprocessing.TimeoutError):
        run(*[joblib.delayed(work.never)()] * 3, timeout=0.1)
    assert run(joblib.delayed(abs)(-1)) == [1]


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("return_as", ["generator", "generator_unordered"])
def test_results_one_by_one(return_as: str) -> None:
    found = run(*map(joblib.delayed(abs), range(50)), return_as=return_as)
    assert sorted(found) == [*range(50)]


@pytest.mark.filterwarnings("ignore:.*tasks:UserWarning")
@pytest.mark.usefixtures("backend")
def test_a_generator_that_nobody_reads_to_its_end() -> None:
    found = run(*map(joblib.delayed(abs), range(50)), return_as="generator")
    assert next(found) == 0
    found.close()
    assert run(joblib.delayed(abs)(-1)) == [1]


@pytest.mark.usefixtures("backend")
def test_a_parallel_in_a_task_runs_in_that_worker() -> None:
    [(worker, inner)] = run(joblib.delayed(work.nested)(4))
    assert inner == {worker}


def test_workers_stay_for_the_next_parallel(backend: Any) -> None:
    run(*map(joblib.delayed(work.pid), range(8)))
    pool = backend._pool
    workers = {worker.pid for worker in pool._pool}
    assert set(run(*map(joblib.delayed(work.pid), range(8)))) <= workers
    assert set(run(*map(joblib.delayed(work.pid), range(8)), n_jobs=3)).isdisjoint(workers)
    with pytest.raises(ValueError, match="not running"):
        pool.apply(abs, (1,))


def test_workers_end_with_the_configuration() -> None:
    with joblib.parallel_config(backend="shmheap", n_jobs=2, context=FORK):
        run(*map(joblib.delayed(work.pid), range(8)))
        pool = joblib.parallel.get_active_backend()[0]._pool
    with pytest.raises(ValueError, match="not running"):
        pool.apply(abs, (1,))


@pytest.mark.usefixtures("backend")
def test_the_number_of_jobs_is_found_as_ever() -> None:
    assert joblib.effective_n_jobs(-1) == joblib.cpu_count()
    assert joblib.effective_n_jobs(3) == 3
    assert run(*[joblib.delayed(work.pid)()] * 2, n_jobs=1) == [work.pid()] * 2
    with pytest.raises(ValueError, match="n_jobs == 0"):
        joblib.effective_n_jobs(0)


def test_it_can_be_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joblib.parallel, "DEFAULT_BACKEND", joblib.parallel.DEFAULT_BACKEND)
    shmheap.plugins.joblib.register(make_default=True)
    assert isinstance(
        joblib.parallel.get_active_backend()[0], shmheap.plugins.joblib.ShmheapBackend
    )
