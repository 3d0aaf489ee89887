"""Named roots: what lives because it has a name."""

from __future__ import annotations

import datetime as dt
import itertools
import pickle
import threading
from collections.abc import Callable, Iterator, MutableMapping
from typing import Any

import pytest
from by_hand import HeapByHand

from shmheap import Heap, HeapError, Roots


@pytest.fixture
def hand(heap_name: str) -> Iterator[HeapByHand]:
    with HeapByHand(heap_name) as hand:
        yield hand
        hand.assert_sound()


@pytest.fixture
def heap(hand: HeapByHand) -> Heap:
    return hand.heap


def test_roots_are_a_mapping(heap: Heap) -> None:
    roots = heap.roots
    assert isinstance(roots, MutableMapping)
    assert list(roots) == []
    assert len(roots) == 0
    assert not roots
    roots["a"] = block = heap.put(b"abc")
    assert roots["a"] == block
    assert "a" in roots
    assert "b" not in roots
    assert list(roots) == ["a"]
    assert roots.get("b") is None
    assert "'a'" in repr(roots)
    del roots["a"]
    assert len(roots) == 0
    assert isinstance(roots, Roots)


def test_missing_names_are_key_errors(heap: Heap) -> None:
    with pytest.raises(KeyError):
        heap.roots["a"]
    with pytest.raises(KeyError):
        del heap.roots["a"]
    with pytest.raises(KeyError):
        heap.roots.pop("a")


def test_a_root_keeps_its_block(hand: HeapByHand) -> None:
    hand.heap.roots["a"] = hand.heap.put(b"abc")
    hand.heap.roots["large"] = hand.heap.alloc(1 << 20)
    hand.collect()
    hand.release()
    assert bytes(hand.heap.roots["a"]) == b"abc"
    assert hand.stats.heap_objects == 2
    del hand.heap.roots["a"]
    hand.heap.roots.clear()
    assert hand.stats.heap_objects == 0


def test_a_new_block_for_a_name_frees_the_old_one(hand: HeapByHand) -> None:
    roots = hand.heap.roots
    for number in range(5):
        roots["a"] = hand.heap.put(bytes([number]) * 50_000)
        assert hand.stats.heap_objects == 1
    held = roots["a"]
    roots["a"] = roots["a"]
    assert roots.pop("a") == held
    assert hand.stats.heap_objects == 1
    del held
    assert hand.stats.heap_objects == 0


def test_one_block_under_many_names(hand: HeapByHand) -> None:
    roots, block = hand.heap.roots, hand.heap.put(b"abc")
    for number in range(100):
        roots[f"name {number}"] = block
    del block
    for number in range(99):
        del roots[f"name {number}"]
    hand.collect()
    assert bytes(roots["name 99"]) == b"abc"


def test_thousands_of_names(hand: HeapByHand) -> None:
    roots = hand.heap.roots
    names = [f"número {number} {'x' * (number % 200)}" for number in range(5000)]
    for name in names:
        roots[name] = hand.heap.put(name.encode())
    assert sorted(roots) == sorted(names)
    assert len(roots) == 5000
    assert all(bytes(roots[name]) == name.encode() for name in names)
    for name in names[::2]:
        del roots[name]
    assert sorted(roots) == sorted(names[1::2])
    for name in names[::4]:
        roots[name] = hand.heap.put(b"again")
    assert len(roots) == 2500 + 1250
    assert all(bytes(roots[name]) == name.encode() for name in names[1::2])
    roots.clear()
    assert hand.stats.heap_objects == 0


@pytest.mark.parametrize("name", ["x", "é" * 112, "x" * 224, "a b/c\0d\n", "\U0001f600"])
def test_names_are_any_text(heap: Heap, name: str) -> None:
    heap.roots[name] = heap.put(b"abc")
    assert list(heap.roots) == [name]
    assert bytes(heap.roots[name]) == b"abc"


@pytest.mark.parametrize(
    ("name", "error"),
    [("", ValueError), ("x" * 225, ValueError), ("é" * 113, ValueError), (b"x", TypeError)],
)
def test_bad_names(heap: Heap, name: str, error: type[Exception]) -> None:
    block = heap.put(b"abc")
    with pytest.raises(error):
        heap.roots[name] = block
    with pytest.raises(error):
        del heap.roots[name]
    assert len(heap.roots) == 0


def test_only_blocks_of_this_heap_can_be_roots(
    hand: HeapByHand, heap_name: str, new_heap_name: object
) -> None:
    with HeapByHand(f"{heap_name}-other") as other:
        block = other.heap.put(b"abc")
        with pytest.raises(ValueError, match="another heap"):
            hand.heap.roots["a"] = block
        with pytest.raises(ValueError, match="another heap"):
            hand.heap.roots["a"] = (1, block)
        assert len(hand.heap.roots) == 0


def test_deleting_while_iterating(heap: Heap) -> None:
    for name in "abcdef":
        heap.roots[name] = heap.put(b"x")
    for name in heap.roots:
        del heap.roots[name]
    assert len(heap.roots) == 0


def test_pop_of_a_name_that_another_process_deletes_meanwhile_is_the_default(
    hand: HeapByHand, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MutableMapping's own pop raised KeyError there, default or not, and clear() with it."""
    heap = hand.heap
    get = type(heap)._root_get

    def get_and_lose(self: Heap, name: bytes) -> object:
        block = get(self, name)
        self._root_clear(name)  # in the role of the other process
        return block

    heap.roots["a"] = heap.put(b"abc")
    monkeypatch.setattr(type(heap), "_root_get", get_and_lose)
    assert heap.roots.pop("a", None) is None
    monkeypatch.undo()
    heap.roots["a"] = block = heap.put(b"abc")
    assert heap.roots.pop("a") == block
    with pytest.raises(KeyError, match="a"):
        heap.roots.pop("a")
    assert heap.roots.pop("a", default=block) is block


class Meanwhile:
    """Does what another process does, once, between two steps of an operation."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, method: str, deed: Callable[[], object]):
        original = getattr(Heap, method)
        self.done = 0

        def and_then(heap: Heap, *args: object) -> object:
            found = original(heap, *args)
            if self.done == 0:
                self.done = 1
                deed()
            return found

        monkeypatch.setattr(Heap, method, and_then)


def test_pop_deleted_what_another_had_set_meanwhile(
    heap: Heap, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = heap.put(b"first"), heap.put(b"second")
    heap.roots["a"] = first
    meanwhile = Meanwhile(monkeypatch, "_root_get", lambda: heap._root_set(b"a", second))
    assert heap.roots.pop("a") == second
    assert meanwhile.done == 1
    assert "a" not in heap.roots


def test_setdefault_replaced_what_another_had_set_meanwhile(
    heap: Heap, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = heap.put(b"ours"), heap.put(b"theirs")
    meanwhile = Meanwhile(monkeypatch, "_root_get", lambda: heap._root_set(b"a", theirs))
    assert heap.roots.setdefault("a", ours) == theirs
    assert meanwhile.done == 1
    assert heap.roots["a"] == theirs
    assert heap.roots.setdefault("b", ours) is ours
    assert heap.roots.setdefault("c") is None
    assert "c" in heap.roots


def test_items_and_popitem_raised_for_what_another_had_deleted_meanwhile(
    heap: Heap, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "abc":
        heap.roots[name] = heap.put(name.encode())
    with monkeypatch.context() as patch:
        meanwhile = Meanwhile(patch, "_root_names", lambda: heap._root_clear(b"b"))
        assert {name: bytes(block) for name, block in heap.roots.items()} == {"a": b"a", "c": b"c"}
        assert meanwhile.done == 1
    with monkeypatch.context() as patch:
        Meanwhile(patch, "_root_names", lambda: heap._root_clear(b"a"))
        assert [bytes(block) for block in heap.roots.values()] == [b"c"]
    with monkeypatch.context() as patch:
        Meanwhile(patch, "_root_names", lambda: heap._root_clear(b"c"))
        with pytest.raises(KeyError, match="no roots"):
            heap.roots.popitem()
    heap.roots["d"] = block = heap.put(b"d")
    assert heap.roots.popitem() == ("d", block)
    assert len(heap.roots) == 0


def test_a_root_can_be_pickled_on(hand: HeapByHand) -> None:
    hand.heap.roots["a"] = hand.heap.put(b"abc")
    data = pickle.dumps(hand.heap.roots["a"])
    del hand.heap.roots["a"]
    hand.collect()
    assert bytes(pickle.loads(data)) == b"abc"


def test_there_is_a_largest_number_of_names(hand: HeapByHand) -> None:
    block, roots = hand.heap.put(b"abc"), hand.heap.roots
    for number in range(65536):
        roots[str(number)] = block
    with pytest.raises(HeapError, match="65536 named roots"):
        roots["one more"] = block
    roots["7"] = block
    del roots["8"]
    roots["one more"] = block
    assert len(roots) == 65536
    assert bytes(roots["65535"]) == b"abc"


# Values that are no blocks

VALUES = [None, 5, 2**100, 0.5, "é", b"abc", (1, ("a",)), frozenset({1}), dt.date(2024, 2, 29)]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_a_root_is_any_value(hand: HeapByHand, value: Any) -> None:
    roots = hand.heap.roots
    roots["a"] = value
    hand.collect()
    assert roots["a"] == value
    assert type(roots["a"]) is type(value)
    assert [*roots.items()] == [("a", value)]
    assert roots.setdefault("a", 7) == value
    assert roots.setdefault("b", value) == value
    assert roots.pop("a") == value
    assert roots.popitem() == ("b", value)
    assert hand.stats.heap_objects == 0


def test_roots_of_arrays_and_collections(hand: HeapByHand) -> None:
    roots = hand.heap.roots
    array = hand.heap.ndarray((2, 3))
    roots["array"] = array[:, 1:]
    roots["dict"] = {"a": [1]}
    roots["list"] = shared = hand.heap.list()
    roots["both"] = (array, hand.heap.put(b"abc"), roots["dict"])
    array[1, 2] = 5.0
    del array
    hand.collect()
    assert roots["array"].tolist() == [[0, 0], [0, 5]]
    roots["dict"]["a"].append(2)
    assert roots["both"][2] == {"a": [1, 2]}
    assert bytes(roots["both"][1]) == b"abc"
    roots["list"].append(roots["list"])
    assert shared[0] == shared
    roots.clear()
    shared.clear()
    del shared
    assert hand.stats.heap_objects == 0


def test_what_needs_a_codec_is_a_type_error(heap: Heap) -> None:
    with pytest.raises(TypeError, match="set cannot be shared without a codec"):
        heap.roots["a"] = {1}
    with pytest.raises(TypeError, match="without a codec"):
        heap.roots.setdefault("a", {1})
    assert "a" not in heap.roots
    heap.roots["a"] = heap.dict(value={"b": {1}}, codec="pickle")
    with pytest.raises(TypeError, match="by the codec 'pickle'"):
        heap.roots["a"]["b"]
    assert heap.dict("a", codec="pickle")["b"] == {1}


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_compare_and_set(heap: Heap, value: Any) -> None:
    roots = heap.roots
    assert not roots.compare_and_set("a", value, 1)
    assert "a" not in roots
    roots["a"] = value
    assert not roots.compare_and_set("a", "other", 1)
    assert roots["a"] == value
    assert roots.compare_and_set("a", value, {"b": 1})
    assert roots["a"] == {"b": 1}


def test_compare_and_set_of_what_lies_in_blocks(hand: HeapByHand) -> None:
    roots = hand.heap.roots
    block, array, shared = hand.heap.put(b"a"), hand.heap.ndarray(3), hand.heap.dict()
    lie_in_blocks = [block, array, shared, bytes(100_000), (block, array)]
    for value, other in itertools.pairwise([*lie_in_blocks, 1]):
        roots["a"] = value
        now = roots["a"]
        assert roots.compare_and_set("a", now, other)
        assert not roots.compare_and_set("a", now, 2)
    roots["a"] = array
    assert roots.compare_and_set("a", array[:], array)
    for equal in (hand.heap.ndarray(3), array.copy(), array[:2], hand.heap.put(b"a"), {}):
        assert not roots.compare_and_set("a", equal, array)
    for one, other in [(1, True), (1, 1.0), (0.0, -0.0), ("a", b"a")]:
        roots["a"] = one
        assert not roots.compare_and_set("a", other, 2), "of another type"


@pytest.mark.parametrize(
    "value", ["a" * 20_000, (1,) * 9000, 1 << 200_000], ids=lambda value: type(value).__name__
)
def test_compare_and_set_took_a_long_value_for_another(heap: Heap, value: Any) -> None:
    heap.roots["a"] = value
    assert heap.roots.compare_and_set("a", value, (value, value))
    assert heap.roots.compare_and_set("a", heap.roots["a"], 1)


def test_compare_and_set_took_many_blocks_for_others(heap: Heap) -> None:
    many = tuple(heap.alloc(1) for _ in range(600))
    heap.roots["a"] = many
    assert heap.roots.compare_and_set("a", many, 1)


def test_compare_and_set_when_another_sets_it_meanwhile(
    heap: Heap, monkeypatch: pytest.MonkeyPatch
) -> None:
    heap.roots["a"] = 1
    other, same = heap.put(b"x"), heap._box_new(1, heap.roots)
    for theirs, done in [(other, False), (same, True)]:
        with monkeypatch.context() as patch:
            Meanwhile(patch, "_root_get", lambda theirs=theirs: heap._root_set(b"a", theirs))
            assert heap.roots.compare_and_set("a", 1, 2) is done
        heap.roots["a"] = 1


def test_a_counter_of_many_threads(heap: Heap) -> None:
    heap.roots["n"] = 0

    def count() -> None:
        for _ in range(200):
            while not heap.roots.compare_and_set("n", now := heap.roots["n"], now + 1):
                pass

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert heap.roots["n"] == 800
