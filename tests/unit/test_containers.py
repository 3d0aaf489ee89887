"""Shared lists and dicts in one process: what they do beyond what dict and list do.

That they do what dict and list do is tests/model/test_collections.py.
"""

from __future__ import annotations

import copy
import gc
import os
import pickle
import signal
import threading
from collections.abc import Callable, Iterator, MutableMapping, MutableSequence
from typing import Any

import numpy as np
import pytest
from by_hand import HeapByHand

import shmheap
from shmheap import Heap, HeapFull, SharedDict, SharedList, containers


class Unreadable:
    """A codec."""

    name = "pickle"

    def dumps(self, value: Any, /) -> bytes:
        return pickle.dumps(value)

    def loads(self, data: bytes, /) -> Any:
        raise KeyError(data)


@pytest.fixture
def heap(hand: HeapByHand) -> Heap:
    return hand.heap


@pytest.fixture
def closing(heap_name: str) -> Iterator[Heap]:
    """One that the test closes."""
    with Heap.create(heap_name) as heap:
        yield heap


def until_full(act: Callable[[int], object]) -> None:
    for number in range(100_000):
        act(number)


# Making and finding


def test_they_are_what_their_interfaces_say(heap: Heap) -> None:
    assert isinstance(heap.dict(), MutableMapping)
    assert isinstance(heap.list(), MutableSequence)
    for shared in (heap.dict(), heap.list()):
        assert shared.heap is heap
        assert shared.codec is None
        assert not shared
        with pytest.raises(TypeError, match="unhashable"):
            hash(shared)
    assert SharedDict[str, int]
    assert SharedList[int]


def test_a_name_is_get_or_create(heap: Heap) -> None:
    made = heap.dict("settings", {"a": 1}, codec="pickle")
    found = heap.dict("settings", {"b": 2})
    assert found == {"a": 1}
    found["c"] = 3
    assert made == {"a": 1, "c": 3} == heap.roots["settings"]
    assert (made.codec, found.codec) == ("pickle", None)
    assert heap.list("names", "ab") == ["a", "b"] == heap.list("names")
    assert heap.dict(None, [("a", 1)]) == {"a": 1}


def test_a_name_of_something_else_is_a_type_error(heap: Heap) -> None:
    heap.list("list")
    heap.roots["block"] = heap.put(b"x")
    heap.roots["none"] = None
    for name, kind in [("list", "SharedList"), ("block", "Block"), ("none", "NoneType")]:
        with pytest.raises(TypeError, match=f"'{name}' is a {kind}, no SharedDict"):
            heap.dict(name)


def test_of_two_who_make_one_at_once_both_have_the_same(
    heap: Heap, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked = type(heap)._root_set
    theirs = heap.dict(value={"theirs": 1})

    def somebody_is_faster(self: Heap, name: bytes, block: Any, *more: Any) -> bool:
        monkeypatch.undo()
        looked(self, name, theirs._block)
        return looked(self, name, block, *more)

    monkeypatch.setattr(type(heap), "_root_set", somebody_is_faster)
    assert heap.dict("a", {"ours": 1}) == {"theirs": 1}


def test_a_value_that_cannot_be_shared_makes_no_root(heap: Heap) -> None:
    with pytest.raises(TypeError, match="set"):
        heap.dict("a", {"b": {1}})
    assert len(heap.roots) == 0


# What lives how long


def test_what_nobody_holds_is_free_at_once(hand: HeapByHand) -> None:
    shared = hand.heap.dict(value={"a": [1, {"b": np.arange(100)}], "c": b"x" * 100_000})
    array = shared["a"][1]["b"]
    del shared
    assert hand.stats.heap_objects == 1
    assert array.sum() == 4950
    del array
    assert hand.stats.heap_objects == 0


def test_what_is_replaced_or_removed_is_free(hand: HeapByHand) -> None:
    mapping, sequence = hand.heap.dict(), hand.heap.list()
    mapping["a"] = sequence
    sequence.append(0)
    objects = hand.stats.heap_objects
    for _ in range(3):
        mapping["b"] = [[1]]
        mapping["b"] = {"c": (b"x" * 100_000, [2])}
        mapping.pop("b")
        sequence.append([1])
        sequence[-1] = {}
        sequence[0] = np.arange(10)
        sequence[0] = 0
        del sequence[1:]
    assert mapping == {"a": [0]}
    assert hand.stats.heap_objects <= objects + 2, "a table that has grown may stay so"
    mapping.clear()
    sequence.clear()
    del mapping, sequence
    assert hand.stats.heap_objects == 0


@pytest.mark.parametrize("kind", ["dict", "list", "tuple", "both"])
def test_cycles_are_collected(hand: HeapByHand, kind: str) -> None:
    mapping, sequence = hand.heap.dict(), hand.heap.list()
    match kind:
        case "dict":
            mapping["self"] = mapping
        case "list":
            sequence.append(sequence)
        case "tuple":
            sequence.append((1, frozenset(), (sequence,)))
        case "both":
            mapping["list"] = sequence
            sequence.append({"dict": mapping, "array": np.arange(1000)})
    hand.heap.roots["a"] = mapping
    hand.collect()
    if kind == "both":
        assert hand.heap.roots["a"]["list"][0]["array"].sum() == 499_500
    del hand.heap.roots["a"]
    del mapping, sequence
    gc.collect()
    hand.collect()
    hand.collect()
    assert hand.stats.heap_objects == 0


def nested(depth: int) -> tuple[Any, ...]:
    return (nested(depth - 1), depth) if depth else ()


@pytest.mark.parametrize(
    "value",
    [
        (), (1,), (None, True, False, -1, 2**63 - 1, -(2**63), 0.5, -0.0, "é", "\ud800", b"\0"),
        (2**63,), (1j,), *(("x" * n,) for n in (14, 15, 97, 98, 99, 255, 256, 20_000)),
        (0,) * 100, (0,) * 101, *map(nested, range(12)), nested(100), ("a", (1, frozenset({2}))),
    ],
    ids=lambda value: f"{len(repr(value))}",
)  # fmt: skip
def test_tuples_come_back_as_they_were(heap: Heap, value: tuple[Any, ...]) -> None:
    """By the core, the small ones of scalars; by shmheap.values the others."""
    mapping, sequence = heap.dict(value={1: value}), heap.list(value=[value])
    heap.roots["value"] = value
    for found in (mapping[1], sequence[0], *sequence, heap.roots["value"]):
        assert repr(found) == repr(value)


def test_no_room_changes_nothing(heap_name: str) -> None:
    with Heap.create(heap_name, capacity="1MiB") as heap:
        mapping, sequence = heap.dict(value={"a": 1}), heap.list(value=[1])
        for value in (bytes(1 << 21), [bytes(1 << 21)], np.zeros(1 << 21)):
            with pytest.raises(HeapFull):
                mapping["a"] = value
            with pytest.raises(HeapFull):
                mapping["b"] = value
            with pytest.raises(HeapFull):
                sequence.append(value)
            with pytest.raises(HeapFull):
                sequence[0] = value
        assert (mapping, sequence) == ({"a": 1}, [1])
        with pytest.raises(HeapFull):
            until_full(lambda number: mapping.__setitem__(number, "x" * 100))
        count = len(mapping)
        assert [*mapping] == ["a", *range(count - 1)]
        mapping.clear()
        mapping["a"] = 1
        with pytest.raises(HeapFull):
            until_full(lambda _: sequence.append("x" * 100))
        assert {sequence[index] for index in range(1, len(sequence))} == {"x" * 100}
        heap.unlink()


def test_reading_needs_no_room(heap_name: str) -> None:
    """Iterating over a list took an array of the heap."""
    with Heap.create(heap_name, capacity="1MiB") as heap:
        values = [1, "x" * 50, "y" * 1000, (1, "z" * 300), *range(500)]
        sequence, mapping = heap.list(value=values), heap.dict(value=dict(enumerate(values)))
        kept = []
        for nbytes in (8192, 16):
            with pytest.raises(HeapFull):
                until_full(lambda _, nbytes=nbytes: kept.append(heap.alloc(nbytes)))
        assert [*sequence] == [*reversed(sequence)][::-1] == values == sequence
        assert (sequence[1:3], sequence[::-7]) == (values[1:3], values[::-7])
        assert 77 in sequence
        assert sequence.index(78) == values.index(78)
        assert [*mapping.values()] == [mapping[index] for index in range(len(values))] == values
        assert sequence.pop() == 499
        assert mapping.popitem() == (503, 499)
        heap.unlink()


def test_what_cannot_be_read_is_not_taken_out(heap: Heap) -> None:
    """It was gone then."""
    mapping = heap.dict(value={"a": {1}}, codec="pickle")
    sequence = heap.list(value=[{1}], codec="pickle")
    mapping.codec, sequence.codec = None, Unreadable()
    with pytest.raises(TypeError, match="'pickle'"):
        mapping.pop("a", 1)
    with pytest.raises(TypeError, match="'pickle'"):
        mapping.popitem()
    mapping.codec = Unreadable()
    with pytest.raises(KeyError):
        mapping.pop("a", "not there")
    with pytest.raises(KeyError):
        sequence.pop()
    with pytest.raises(KeyError):
        sequence.pop(0)
    mapping.codec = sequence.codec = "pickle"
    assert (mapping, sequence) == ({"a": {1}}, [{1}])
    assert (mapping.pop("a"), sequence.pop(), len(mapping), len(sequence)) == ({1}, {1}, 0, 0)


# Sending and copying


def test_a_pickle_is_a_handle(heap: Heap) -> None:
    shared = heap.dict(value={"a": bytes(50_000)}, codec="pickle")
    data = pickle.dumps(shared)
    assert len(data) < 500
    found = pickle.loads(data)
    assert type(found) is SharedDict
    found["b"] = {1}
    assert shared["b"] == {1}
    sequence = pickle.loads(pickle.dumps(heap.list(value=[1])))
    assert sequence == [1], "its lease kept it"


def test_copies_are_their_own(heap: Heap) -> None:
    shared = heap.dict(value={"a": [1]}, codec="pickle")
    shared["self"] = shared
    shallow, deep, plain = copy.copy(shared), copy.deepcopy(shared), shared.copy()
    shared["a"].append(2)
    shared["b"] = 1
    assert type(plain) is dict
    assert (plain["a"], shallow["a"], deep["a"]) == ([1, 2], [1, 2], [1])
    assert not {"b"} & (plain.keys() | shallow.keys() | deep.keys())
    assert deep["self"]._block == deep._block
    assert shallow["self"]._block == shared._block
    assert deep.codec == "pickle"
    sequence = heap.list(value=[[1]])
    assert copy.copy(sequence)[0]._block == sequence[0]._block
    assert copy.deepcopy(sequence)[0]._block != sequence[0]._block


# Representations


def test_representations_show_what_is_in_them(heap: Heap) -> None:
    shared = heap.dict(value={"a": [1, {"b": (1.5, None)}]})
    assert repr(shared) == "SharedDict({'a': SharedList([1, SharedDict({'b': (1.5, None)})])})"


def test_representations_are_bounded(heap: Heap) -> None:
    wide = heap.list(value=[[[["x" * 1000] * 100] * 100] * 100])
    assert len(repr(wide)) < 50_000
    assert repr(heap.list(value=range(1000))) == "SharedList([0, 1, 2, 3, 4, 5, ...])"
    assert repr(heap.dict(value={n: n for n in range(1000)})).endswith("5: 5, ...})")
    loop = heap.list()
    loop.append(loop)
    loop.append({"loop": loop})
    assert repr(loop) == "SharedList([SharedList([...]), SharedDict({'loop': SharedList([...])})])"
    deep: list[Any] = []
    for _ in range(100):
        deep = [deep]
    assert repr(heap.list(value=deep)).count("SharedList") < 10


def test_representations_do_not_fail(closing: Heap) -> None:
    shared = closing.dict(value={"a": {1}}, codec="pickle")
    for shared.codec in (None, Unreadable()):
        assert repr(shared) == "SharedDict({...})"
    closing.close()
    assert repr(shared) == "SharedDict({closed})"


# Closing


def test_a_closed_heap_is_a_value_error(closing: Heap) -> None:
    mapping, sequence = closing.dict(value={"a": 1}), closing.list(value=[1])
    closing.close()
    for use in [
        lambda: mapping["a"], lambda: mapping.get("a"), lambda: len(mapping), lambda: [*mapping],
        lambda: mapping.update(a=1), lambda: mapping.clear(), lambda: mapping.pop("a"),
        lambda: sequence[0], lambda: sequence.append(1), lambda: len(sequence), sequence.clear,
        lambda: [*sequence], lambda: sequence.pop(), lambda: closing.dict(),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match="closed"):
            use()


# Views and iteration


def test_views_are_sets_and_follow_the_dict(heap: Heap) -> None:
    shared = heap.dict(value={"a": 1, "b": 2})
    keys, items, found = shared.keys(), shared.items(), shared.values()
    shared["c"] = 3
    assert (len(keys), len(items), len(found)) == (3, 3, 3)
    assert keys & {"a", "x"} == {"a"}
    assert keys | {"x"} == {"a", "b", "c", "x"}
    assert items - {("a", 1)} == {("b", 2), ("c", 3)}
    assert ("b", 2) in items
    assert ("b", 3) not in items
    assert 3 in found
    assert (next(reversed(keys)), next(reversed(items))) == ("c", ("c", 3))
    assert next(reversed(found)) == 3
    assert next(reversed(shared)) == "c"
    assert keys == {"a", "b", "c"}


@pytest.mark.parametrize("change", ["set", "delete", "clear"])
@pytest.mark.parametrize("view", ["keys", "items", "values"])
def test_a_dict_that_changes_its_size_ends_iteration(heap: Heap, view: str, change: str) -> None:
    shared = heap.dict(value={n: n for n in range(10)})
    iterator = iter(getattr(shared, view)())
    next(iterator)
    match change:
        case "set":
            shared["new"] = 1
        case "delete":
            del shared[9]
        case "clear":
            shared.clear()
    with pytest.raises(RuntimeError, match="changed size"):
        next(iterator)


def test_a_key_that_went_while_another_dict_took_it_was_a_key_error(
    heap: Heap, monkeypatch: pytest.MonkeyPatch
) -> None:
    look = SharedDict._next

    def look_and_lose(self: Any, *place: Any) -> Any:
        entry = look(self, *place)
        if entry is not None:
            del self[entry[1]]
        return entry

    monkeypatch.setattr(SharedDict, "_next", look_and_lose)
    for use in (SharedDict.update, SharedDict.__or__, SharedDict.__ior__):
        shared = heap.dict(value={"a": 1, "b": 2})
        with pytest.raises(RuntimeError, match="changed size"):
            use(heap.dict(), shared)


def test_a_dict_whose_values_change_can_be_iterated(heap: Heap) -> None:
    shared = heap.dict(value=dict.fromkeys(range(100), 0))
    for key, value in shared.items():
        shared[key] = value + 1
    assert set(shared.values()) == {1}


def test_a_list_is_iterated_as_it_was(heap: Heap) -> None:
    shared = heap.list(value=[1, 2, 3])
    assert [shared.append(n) or n for n in shared] == [1, 2, 3]
    assert shared == [1, 2, 3, 1, 2, 3]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda s: s.sort(), [1, 2, 3, 4]),
        (lambda s: s.reverse(), [4, 2, 1, 3]),
        (lambda s: s.remove(1), [3, 2, 4]),
        (lambda s: s.__delitem__(-2), [3, 1, 4]),
        (lambda s: s.__delitem__(slice(None, None, 2)), [1, 4]),
        (lambda s: s.__setitem__(slice(None, None, 2), [7, 8]), [7, 1, 8, 4]),
        (lambda s: s.__imul__(2), [3, 1, 2, 4, 3, 1, 2, 4]),
    ],
)
def test_what_looks_at_all_is_done_again_if_it_changed_meanwhile(
    heap: Heap, monkeypatch: pytest.MonkeyPatch, change: Any, expected: list[int]
) -> None:
    shared = heap.list(value=[3, 1, 2])
    tried = SharedList._splice

    def splice(self: Any, *args: Any) -> bool:
        monkeypatch.undo()
        self.append(4)  # in the role of another process
        return tried(self, *args)

    monkeypatch.setattr(SharedList, "_splice", splice)
    change(shared)
    assert shared == expected


def test_setting_meanwhile_is_not_lost_either(heap: Heap, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = heap.list(value=[3, 1, 2])
    tried = SharedList._splice

    def splice(self: Any, *args: Any) -> bool:
        monkeypatch.undo()
        self[0] = 9
        return tried(self, *args)

    monkeypatch.setattr(SharedList, "_splice", splice)
    shared.sort()
    assert shared == [1, 2, 9]


# The lock


def test_a_lock_is_held_by_one(heap: Heap) -> None:
    for shared in (heap.dict("a"), heap.list("b")):
        same = pickle.loads(pickle.dumps(shared))
        with shared.lock() as held:
            assert not held.abandoned
            with pytest.raises(RuntimeError, match="this thread holds"), same.lock():
                pass
        with same.lock(0):
            assert shared._try_lock() == 0
        assert not containers._claims


def test_another_thread_waits_for_it(heap: Heap) -> None:
    shared = heap.list()
    went, outcomes = threading.Event(), []

    def other() -> None:
        for timeout in (0, 0.001):
            try:
                with shared.lock(timeout):
                    outcomes.append("had it")
            except TimeoutError as error:
                outcomes.append(str(error))
        went.set()
        with shared.lock():
            outcomes.append("had it")

    thread = threading.Thread(target=other)
    with shared.lock():
        thread.start()
        assert went.wait(60)
    thread.join(60)
    assert outcomes == [f"the lock was not free within {t} s" for t in (0, 0.001)] + ["had it"]


def test_errors_inside_release_it(heap: Heap) -> None:
    shared = heap.dict()
    with pytest.raises(KeyError), shared.lock():
        shared["missing"]
    with shared.lock(0):
        pass


@pytest.mark.parametrize("timeout", [-1, float("nan")])
def test_a_timeout_is_a_number_from_0_on(heap: Heap, timeout: float) -> None:
    with pytest.raises(ValueError, match="timeout"):
        heap.dict().lock(timeout)


def test_signals_are_served_while_it_waits(heap: Heap) -> None:
    def wake(*_args: object) -> None:
        raise InterruptedError

    shared = heap.list()
    has, done = threading.Event(), threading.Event()

    def holder() -> None:
        with shared.lock():
            has.set()
            done.wait(60)

    thread = threading.Thread(target=holder)
    thread.start()
    assert has.wait(60)
    before = signal.signal(signal.SIGALRM, wake)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.01)
        with pytest.raises(InterruptedError), shared.lock():
            pass
    finally:
        signal.signal(signal.SIGALRM, before)
        done.set()
        thread.join(60)
    with shared.lock(0):
        pass


def test_naps_start_short_and_stay_short(heap: Heap, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = heap.list()
    naps: list[float] = []

    def sleep(nap: float) -> None:
        naps.append(nap)
        if len(naps) == 10:
            shared._unlock()

    assert shared._try_lock() == 1  # in the role of another process
    monkeypatch.setattr(containers.time, "sleep", sleep)
    with shared.lock():
        assert naps[:3] == [20e-6, 40e-6, 80e-6]
        assert naps[-1] == max(naps) == 1e-3


def test_an_interrupted_wait_leaves_it_to_its_holder(
    heap: Heap, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever is interrupted between getting it and saying so gives it back."""
    shared = heap.list()

    def interrupted(self: Any) -> int:
        monkeypatch.undo()
        assert self._try_lock() == 1
        raise KeyboardInterrupt

    monkeypatch.setattr(SharedList, "_try_lock", interrupted, raising=False)
    with pytest.raises(KeyboardInterrupt), shared.lock():
        pass
    with shared.lock(0):
        pass


def test_a_forked_child_does_not_hold_it(heap: Heap) -> None:
    shared = heap.list()
    with shared.lock():
        child = os.fork()
        if child == 0:
            try:
                os._exit(0 if shared._try_lock() == 0 and not containers._claims else 1)
            finally:
                os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert shared._try_lock() == 0


def test_names_are_public() -> None:
    assert {"SharedDict", "SharedList"} <= set(shmheap.__all__)
