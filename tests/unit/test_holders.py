"""Who keeps a block alive: each kind of holder, and the way up to it."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator

import pytest

from shmheap import Heap, Holder, StaleHandle, _core
from shmheap.holders import find_holders

ME = f"pid {os.getpid()}"


@pytest.fixture
def heap() -> Iterator[Heap]:
    with Heap.create(capacity="64MiB") as made:
        yield made


def of_kind(holders: tuple[Holder, ...], kind: str) -> list[Holder]:
    return [one for one in holders if one.kind == kind]


def test_handles_are_counted_by_process(heap: Heap) -> None:
    block = heap.put(b"x")
    again = pickle.loads(pickle.dumps(block))
    assert heap.holders(block) == (Holder(kind="pin", pid=os.getpid(), count=2, path=(ME,)),)
    again.free()
    assert heap.holders(block)[0].count == 1


def test_names_hold(heap: Heap) -> None:
    block = heap.roots["b"] = heap.roots["a"] = heap.put(b"x")
    heap.roots["other"] = heap.put(b"y")
    named = of_kind(heap.holders(block), "root")
    assert [(one.name, one.path) for one in named] == [
        ("a", ("root 'a'",)),
        ("b", ("root 'b'",)),
    ]


def test_a_lease_has_an_owner_and_an_age(heap: Heap) -> None:
    block = heap.put(b"x")
    with block.lease():
        [first] = of_kind(heap.holders(block), "lease")
        [second] = of_kind(heap.holders(block), "lease")
        assert (first.pid, first.count, first.path) == (os.getpid(), 1, (f"lease of {ME}",))
        assert 0 < first.age_s < second.age_s
    assert of_kind(heap.holders(block), "lease") == []


def test_a_reference_names_its_block_and_the_way_from_a_name(heap: Heap) -> None:
    block, inner, outer = heap.put(b"x"), heap._node_new(2), heap._node_new(1)
    heap._node_store(inner, 0, block)
    heap._node_store(inner, 1, block)
    heap._node_store(outer, 0, inner)
    heap.roots["settings"] = outer
    at = inner.offset
    outer.free()
    inner.free()
    assert of_kind(heap.holders(block), "reference") == [
        Holder(kind="reference", count=2, offset=at, path=("root 'settings'", "node", "node"))
    ]


def test_a_shared_dict_is_named_from_its_root_to_the_record(heap: Heap) -> None:
    block, settings = heap.put(bytes(100_000)), heap._dict_new()
    shared = _core.DictBase(settings)
    shared["image"] = block
    heap.roots["settings"] = settings
    settings.free()
    assert of_kind(heap.holders(shared), "root")[0].name == "settings"
    [one] = of_kind(heap.holders(block), "reference")
    assert one.path == ("root 'settings'", "dict", "table", "record")


def test_a_name_says_more_than_a_process_that_is_nearer(heap: Heap) -> None:
    block, near, far = heap.put(b"x"), heap._node_new(1), heap._node_new(1)
    heap._node_store(near, 0, block)
    heap._node_store(far, 0, near)
    [one] = of_kind(heap.holders(block), "reference")
    assert one.path == (ME, "node")
    heap.roots["far"] = far
    [one] = of_kind(heap.holders(block), "reference")
    assert one.path == ("root 'far'", "node", "node")


def test_a_circle_that_nobody_reaches_ends_the_way(heap: Heap) -> None:
    block, one, two = heap.put(b"x"), heap._node_new(2), heap._node_new(1)
    heap._node_store(one, 0, block)
    heap._node_store(one, 1, two)
    heap._node_store(two, 0, one)
    one.free()
    two.free()
    [held] = of_kind(heap.holders(block), "reference")
    assert held.path == ("node",)
    heap.gc()
    assert of_kind(heap.holders(block), "reference") == []


def test_several_blocks_are_asked_about_at_once(heap: Heap) -> None:
    one, two = heap.put(b"x"), heap.put(bytes(3 << 20))
    found = find_holders(heap, [one.offset, two.offset, one.offset, 1 << 60])
    assert {at: len(holders) for at, holders in found.items()} == {
        one.offset: 1,
        two.offset: 1,
        1 << 60: 0,
    }


def test_an_array_is_as_its_block(heap: Heap) -> None:
    np = pytest.importorskip("numpy")
    array = heap.roots["a"] = heap.zeros((100, 100))
    for view in (array, array.T, array[::2, ::-3]):
        mine, named = heap.holders(view)
        assert (mine.kind, mine.count) == ("pin", 1)
        assert named.path[0] == "root 'a'"
    with pytest.raises(ValueError, match="does not lie in this heap"):
        heap.holders(np.ones(3))
    with pytest.raises(TypeError, match="not 'list'"):
        heap.holders([1.0])  # type: ignore[arg-type]


def test_what_is_no_handle_of_the_heap_is_refused(heap: Heap) -> None:
    block = heap.put(b"x")
    with Heap.create(capacity="8MiB") as other, pytest.raises(ValueError, match="another heap"):
        other.holders(block)
    block.free()
    with pytest.raises(StaleHandle):
        heap.holders(block)
    with pytest.raises(TypeError):
        heap._holders_of(["no number"])  # type: ignore[list-item]


def test_the_largest_blocks_come_first(heap: Heap) -> None:
    blocks = [heap.put(bytes(n)) for n in (100, 3 << 20, 70_000, 5000)]
    node = heap._node_new(500)
    assert heap._largest(3) == [
        (blocks[1].offset, 3 << 20, "block"),
        (blocks[2].offset, 70_000, "block"),
        (blocks[3].offset, 5000, "block"),
    ]
    assert (node.offset, node.nbytes, "node") in heap._largest(100)
    assert len(heap._largest(100)) == 5
    assert heap._largest(0) == []
