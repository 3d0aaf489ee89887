from __future__ import annotations

import copy
import errno
import pickle
from typing import get_args

import pytest

from shmheap import errors
from shmheap.errors import (
    CoordinatorLost,
    HeapCorrupt,
    HeapError,
    HeapExists,
    HeapFull,
    HeapNotFound,
    Limit,
    StaleHandle,
    UntrustedArena,
)


def full() -> HeapFull:
    return HeapFull(
        "memory_limit",
        requested_bytes=3 << 20,
        limit_bytes=64 << 20,
        capacity_bytes=1 << 30,
        in_use_bytes=60 << 20,
        idle_bytes=4 << 20,
        free_bytes=968884224,
        largest_free_bytes=2 << 20,
        holders=[("root", "a", 40 << 20), ("pin", 17, 2048), ("lease", 23, 512)],
        allocated_at=[("/app/work.py:12", 30 << 20)],
    )


@pytest.mark.parametrize("name", errors.__all__)
def test_every_error_is_a_heap_error(name: str) -> None:
    if name != "Limit":
        assert issubclass(getattr(errors, name), HeapError)


@pytest.mark.parametrize(
    ("error", "builtin"),
    [(HeapFull, MemoryError), (HeapNotFound, FileNotFoundError), (HeapExists, FileExistsError)],
)
def test_errors_that_python_has_a_name_for_are_that_too(
    error: type[HeapError], builtin: type[Exception]
) -> None:
    assert issubclass(error, builtin)


@pytest.mark.parametrize(
    ("error", "number"), [(HeapNotFound, errno.ENOENT), (HeapExists, errno.EEXIST)]
)
def test_file_errors_have_their_errno_and_say_only_their_message(
    error: type[OSError], number: int
) -> None:
    raised = error("no heap named 'x'")
    assert raised.errno == number
    assert str(raised) == "no heap named 'x'"
    assert error(errno.EIO, "what the system said").errno == errno.EIO


@pytest.mark.parametrize(
    "error",
    [
        HeapError("a"),
        StaleHandle("b"),
        HeapNotFound("c"),
        HeapExists("d"),
        UntrustedArena("e"),
        CoordinatorLost("f"),
        HeapCorrupt("g"),
        full(),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("again", [lambda e: pickle.loads(pickle.dumps(e)), copy.copy])
def test_errors_survive_pickling_whole(error: HeapError, again) -> None:
    twin = again(error)
    assert type(twin) is type(error)
    assert str(twin) == str(error)
    assert vars(twin) == vars(error)
    assert getattr(twin, "errno", None) == getattr(error, "errno", None)


def test_full_tells_limit_numbers_holders_and_remedy() -> None:
    assert str(full()) == (
        "no room for 3.0 MiB: the heap may not take more memory: Config.memory_limit is reached "
        "(limit 64.0 MiB, capacity 1.0 GiB, in use 60.0 MiB, idle 4.0 MiB, free 924.0 MiB, "
        "longest free run 2.0 MiB); largest holders: root 'a' 40.0 MiB, pid 17 2048 B, "
        "leases of pid 23 512 B; allocated at: /app/work.py:12 30.0 MiB; "
        "raise Config.memory_limit, or drop blocks"
    )


def test_full_leaves_out_what_was_not_measured_and_keeps_zeros_that_were() -> None:
    text = str(HeapFull("capacity", requested_bytes=64, remedy="close some"))
    assert "(capacity 0 B, in use 0 B, idle 0 B, free 0 B); close some" in text


@pytest.mark.parametrize("limit", get_args(Limit))
def test_every_limit_has_a_remedy_of_its_own(limit: Limit) -> None:
    others = {HeapFull(other).remedy for other in get_args(Limit) if other != limit}
    assert HeapFull(limit).remedy not in others


def test_an_unknown_limit_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown limit 'sky'"):
        HeapFull("sky")  # type: ignore[arg-type]


def test_holders_are_tuples() -> None:
    assert full().holders == (("root", "a", 40 << 20), ("pin", 17, 2048), ("lease", 23, 512))
    assert full().allocated_at == (("/app/work.py:12", 30 << 20),)
