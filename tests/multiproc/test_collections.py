"""Shared lists and dicts between processes: at once, handed over, and with holders that are killed.

What is done at once has no order, so what must hold is said of every order: nothing is lost,
doubled, or half of one and half of another.
"""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import shared_work
from processes import METHODS, Worker

from shmheap import Heap

TWO = (0, 1)


@pytest.fixture
def two(heap: Heap) -> Iterator[tuple[Worker, Worker]]:
    """Two processes that have the heap."""
    with Worker("forkserver", heap=heap) as one, Worker("forkserver", heap=heap) as other:
        yield one, other
    heap.check()


def at_once(two: tuple[Worker, Worker], key: str, name: str, *args: Any) -> list[Any]:
    """Both do the same, each with its number."""
    for number, worker in enumerate(two):
        worker.start("work", key, name, number, *args)
    return [worker.result() for worker in two]


def give(two: tuple[Worker, Worker], shared: Any) -> Any:
    for worker in two:
        worker.do("keep", "shared", shared)
    return shared


@pytest.mark.parametrize("method", METHODS)
def test_all_processes_see_the_same(heap: Heap, method: str) -> None:
    shared = heap.dict("settings", {"db": {"ports": [1, 2]}, "array": np.zeros(3)})
    with Worker(method, heap=heap) as worker:
        worker.do("keep", "shared", shared["db"]["ports"])
        worker.do("attempt", "shared:append", 3)
        assert shared["db"]["ports"] == [1, 2, 3]
        shared["db"]["ports"].append("é")
        assert worker.do("attempt", "shared:copy") == "returned [1, 2, 3, 'é']"
        worker.do("root_get", "all", "settings")
        back = worker.do("get", "all")
        back["array"][1] = 5
        assert shared["array"].tolist() == [0, 5, 0]


def test_keys_of_each_are_all_there(heap: Heap, two: tuple[Worker, Worker]) -> None:
    shared = give(two, heap.dict())
    at_once(two, "shared", "set_keys", 500)
    expected = {f"{who} {number}": [who, number] for who in TWO for number in range(500)}
    assert shared == expected
    assert [key for key in shared if key[0] == "0"] == [f"0 {number}" for number in range(500)]


def test_a_value_is_seen_whole(heap: Heap, two: tuple[Worker, Worker]) -> None:
    shared = give(two, heap.dict(value={"pair": ("", "")}))
    for number, worker in enumerate(two):
        worker.start("work", "shared", "set_pairs", number, 600)
    wrong = shared_work.see_pairs(shared, 1000)
    for worker in two:
        worker.result()
    assert wrong == 0


def test_one_of_two_is_first(heap: Heap, two: tuple[Worker, Worker]) -> None:
    shared = give(two, heap.dict())
    first = at_once(two, "shared", "claim_keys", 500)
    assert sum(first) == 500 == len(shared)
    assert first == [Counter(shared.values())[who] for who in TWO]


def test_each_item_is_taken_by_one(heap: Heap, two: tuple[Worker, Worker]) -> None:
    shared = give(two, heap.dict(value={number: "x" * number for number in range(500)}))
    for worker in two:
        worker.start("work", "shared", "take_items")
    taken = [worker.result() for worker in two]
    assert sorted(itertools.chain(*taken)) == [*range(500)]
    assert not shared
    assert all(keys == sorted(keys, reverse=True) for keys in taken), "the last ones first"


def test_tables_that_grow_and_shrink_lose_nothing(heap: Heap, two: tuple[Worker, Worker]) -> None:
    shared = give(two, heap.dict(value={"kept": "é", **{n: n for n in range(50)}}))
    for number, worker in enumerate(two):
        worker.start("work", "shared", "churn", number, 300)
    for _ in range(300):
        assert shared["kept"] == "é"
        assert shared[25] == 25
        assert "missing" not in shared
    for worker in two:
        worker.result()
    left = {f"{who} {number}" for who in TWO for number in range(280, 300)}
    assert shared.keys() == {"kept", *range(50)} | left
    assert all(shared[key]["list"] == [int(key.split()[1])] for key in left)
    del shared
    for worker in two:
        worker.do("drop", "shared")
    heap.gc()
    heap.gc()
    assert heap.stats().heap_objects == 0


def test_appended_values_are_all_there_in_order(heap: Heap, two: tuple[Worker, Worker]) -> None:
    shared = give(two, heap.list())
    at_once(two, "shared", "append_own", 1000)
    assert len(shared) == 2000
    for who in TWO:
        assert [number for one, number in shared if one == who] == [*range(1000)]


def test_extending_is_one_step(heap: Heap, two: tuple[Worker, Worker]) -> None:
    shared = give(two, heap.list())
    at_once(two, "shared", "extend_own", 200)
    runs = [(value, len([*run])) for value, run in itertools.groupby(shared)]
    assert Counter(runs) == {((who, number), 5): 1 for who in TWO for number in range(200)}


def test_each_value_is_taken_by_one(heap: Heap, two: tuple[Worker, Worker]) -> None:
    shared = give(two, heap.list(value=range(1000)))
    for worker in two:
        worker.start("work", "shared", "take_values")
    taken = [worker.result() for worker in two]
    assert sorted(itertools.chain(*taken)) == [*range(1000)]
    assert not shared


def test_what_moves_all_values_loses_none(heap: Heap, two: tuple[Worker, Worker]) -> None:
    shared = give(two, heap.list(value=range(30)))
    for worker in two:
        worker.start("work", "shared", "turn", 100)
    for number in range(100):
        shared.append(100 + number)
    for worker in two:
        worker.result()
    assert sorted(shared) == [*range(30), *range(100, 200)]


def test_a_lock_makes_one_step_of_many(heap: Heap, two: tuple[Worker, Worker]) -> None:
    shared = give(two, heap.dict(value={"n": 0}))
    for worker in two:
        worker.start("work", "shared", "count_up", 300)
    shared_work.count_up(shared, 300)
    for worker in two:
        worker.result()
    assert shared["n"] == 900


def test_a_root_is_replaced_by_one(heap: Heap, two: tuple[Worker, Worker]) -> None:
    heap.roots["n"] = 0
    for worker in two:
        worker.start("work", "heap", "count_root", 200)
    for worker in two:
        worker.result()
    assert heap.roots["n"] == 400


# Deaths


@pytest.mark.parametrize("kind", ["dict", "list"])
def test_a_lock_of_the_dead_is_passed_on(heap: Heap, kind: str) -> None:
    shared = getattr(heap, kind)()
    with Worker("forkserver", heap=heap) as worker:
        worker.do("keep", "held", shared.lock())
        worker.do("attempt", "held:__enter__")
        with pytest.raises(TimeoutError), shared.lock(0):
            pass
        worker.kill()
        with shared.lock(60) as held:
            assert held.abandoned
        with shared.lock(0) as held:
            assert not held.abandoned
    heap.check()


def test_whoever_waits_for_the_lock_of_one_that_is_killed_gets_it(heap: Heap) -> None:
    shared = heap.dict(value={"half": ""})
    with Worker("forkserver", heap=heap) as worker:
        worker.do("keep", "shared", shared)
        worker.start("work", "shared", "die_with_lock")
        while not shared["half"]:
            pass
        with shared.lock(60) as held:
            assert held.abandoned
        worker.process.join(60)


STARTS: dict[str, Any] = {
    "churn": {},
    "set_pairs": {"pair": ("", "")},
    "append_own": [],
    "extend_own": [],
    "turn": [*range(20)],
}


@pytest.mark.parametrize("name", STARTS)
def test_whoever_is_killed_at_work_leaves_it_whole(heap: Heap, name: str) -> None:
    start = STARTS[name]
    shared: Any = heap.list() if isinstance(start, list) else heap.dict()
    for _ in range(5):
        shared.clear()
        (shared.extend if isinstance(start, list) else shared.update)(start)
        with Worker("forkserver", heap=heap) as worker:
            worker.do("keep", "shared", shared)
            worker.start("work", "shared", name, *((10**9,) if name == "turn" else (0, 10**9)))
            while len(shared) < 5 if name == "churn" else shared == start:
                pass
            worker.kill()
        heap.check()
        if name == "churn":
            shared["after"] = 1  # whoever changes it next puts right what was half done
            assert shared.pop("after") == 1
        found = shared.copy()
        assert len(found) == len(shared)
        if name == "extend_own":
            assert len(found) % 5 == 0
        if name == "turn":
            assert set(found) <= {*start}
            assert len(found) in (19, 20), "one may have been in its hands"
    shared.clear()
    del shared, found
    heap.gc()
    heap.gc()
    assert heap.stats().heap_objects == 0


def test_cycles_of_the_dead_and_the_living_are_collected(heap: Heap) -> None:
    shared = heap.dict("kept", {"array": np.arange(1000)})
    shared["self"] = [shared]
    shared_work.make_cycles(heap, 100)
    with Worker("forkserver", heap=heap) as worker:
        worker.do("work", "heap", "make_cycles", 100)
        assert heap.stats().heap_objects > 1000
        worker.kill()
    heap.gc()
    heap.gc()
    assert shared["self"][0]["array"].sum() == 499_500
    assert heap.stats().heap_objects < 10
    del heap.roots["kept"], shared
    heap.gc()
    heap.gc()
    assert heap.stats().heap_objects == 0


def test_what_a_dead_process_put_in_stays(heap: Heap) -> None:
    shared = heap.dict()
    with Worker("forkserver", heap=heap) as worker:
        worker.do("keep", "shared", shared)
        worker.do("attempt", "shared:__setitem__", "a", [{"bytes": os.urandom(100_000)}, (1, "é")])
        worker.kill()
    heap.gc()
    assert len(shared["a"][0]["bytes"]) == 100_000
    assert shared["a"][1] == (1, "é")
