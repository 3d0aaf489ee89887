"""Named roots between processes: whole values, no lost compare-and-set, names of one moment."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from processes import Worker

from shmheap import Heap


@pytest.fixture
def two(heap: Heap) -> Iterator[tuple[Worker, Worker]]:
    """Two processes that have the heap."""
    with Worker("forkserver", heap=heap) as one, Worker("forkserver", heap=heap) as other:
        yield one, other
    heap.check()


def test_a_name_stands_for_the_old_value_or_the_new_one(
    heap: Heap, two: tuple[Worker, Worker]
) -> None:
    heap.roots["pair"] = ("", "")
    writer, reader = two
    writer.start("work", "heap", "set_root_pairs", 1500)
    reader.start("work", "heap", "see_root_pairs", 3000)
    assert reader.result() == 0
    writer.result()
    assert heap.roots.pop("pair")
    heap.gc()
    assert heap.stats().heap_objects == 0, "what was replaced is gone"


def test_compare_and_set_loses_none(heap: Heap, two: tuple[Worker, Worker]) -> None:
    heap.roots["n"] = 0
    for worker in two:
        worker.start("work", "heap", "add_one", 300)
    for worker in two:
        worker.result()
    assert heap.roots["n"] == 600


def test_names_are_those_of_one_moment(heap: Heap, two: tuple[Worker, Worker]) -> None:
    """One of two names is always there; in the table others lie between them."""
    heap.roots["a"] = 1
    for number in range(500):
        heap.roots[f"between {number}"] = None
    renamer, reader = two
    renamer.start("work", "heap", "rename", 4000)
    reader.start("work", "heap", "see_no_name", 400)
    assert reader.result() == 0
    renamer.result()
