"""What pools and the executor take from the standard library: its interface, all of it; and parts
that are not public, all of them listed here. A Python that changes one fails here, and no pool
hangs."""

from __future__ import annotations

import concurrent.futures
import inspect
import multiprocessing
import multiprocessing.pool
from collections.abc import Callable
from inspect import Parameter
from multiprocessing.pool import ExceptionWithTraceback, Pool, worker  # type: ignore[attr-defined]
from multiprocessing.reduction import ForkingPickler
from typing import Any

import pytest

import shmheap
from shmheap.wires import keeps_from_forking, no_fork

# The interface


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (multiprocessing.pool.Pool, shmheap.Pool),
        (concurrent.futures.ProcessPoolExecutor, shmheap.ProcessPoolExecutor),
    ],
)
def test_it_is_called_as_theirs(theirs: type, ours: type) -> None:
    """With the same parameters; what we have more of has to be named."""
    public = {name for name in dir(theirs) if name[0] != "_"} | {"__init__", "__enter__"}
    for name in public - {"Process"}:  # which no documentation names
        call = getattr(theirs, name)
        expected, found = parameters(call), parameters(getattr(ours, name))
        assert found[: len(expected)] == expected, name
        assert all(kind is Parameter.KEYWORD_ONLY for _, kind, _ in found[len(expected) :]), name


def parameters(call: Callable[..., Any]) -> list[tuple[str, Any, Any]]:
    found = inspect.signature(call).parameters.values()
    return [(one.name, one.kind, one.default) for one in found]


# What is not public


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (Pool._setup_queues, "self"),
        (Pool._get_sentinels, "self"),
        (Pool.Process, "ctx args kwds"),
        (Pool._map_async, "self func iterable mapper chunksize callback error_callback"),
        (Pool._help_stuff_finish, "inqueue task_handler size"),
        (
            Pool._terminate_pool,
            "taskqueue inqueue outqueue pool change_notifier worker_handler task_handler"
            " result_handler cache",
        ),
        (Pool._handle_tasks, "taskqueue put outqueue pool cache"),
        (Pool._handle_results, "outqueue get cache"),
        (worker, "inqueue outqueue initializer initargs maxtasks wrap_exception"),
        (ExceptionWithTraceback, "exc tb"),
        (multiprocessing.pool._helper_reraises_exception, "ex"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_functions(call: Any, expected: str) -> None:
    assert list(inspect.signature(call).parameters) == expected.split()


def test_attributes() -> None:
    with multiprocessing.get_context("fork").Pool(1) as pool:
        result = pool.map_async(abs, range(-6, 0), chunksize=2)
        parts = vars(pool)
        assert {"_pool", "_inqueue", "_outqueue", "_quick_put", "_quick_get"} < parts.keys()
        assert parts["_state"] == parts["_worker_handler"]._state == multiprocessing.pool.RUN
        assert parts["_cache"].notifier is parts["_change_notifier"]
        assert parts["_change_notifier"]._reader.fileno() >= 0
        assert result.get() == [6, 5, 4, 3, 2, 1]
        assert (result._chunksize, result._number_left) == (2, 0)  # type: ignore[attr-defined]
    assert type(ForkingPickler._extra_reducers) is dict  # type: ignore[attr-defined]


def test_a_lock_knows_whose_it_is() -> None:
    assert not keeps_from_forking()
    with no_fork:
        assert keeps_from_forking()
