"""How values travel: packed and unpacked in one process."""

from __future__ import annotations

import gc
import pickle
import warnings
from collections.abc import Iterator
from multiprocessing.reduction import ForkingPickler
from typing import Any

import numpy as np
import pytest
from by_hand import HeapByHand
from numpy.typing import NDArray

from shmheap import Config, Heap, HeapFull, StaleHandle, readonly
from shmheap.payload import MIN_BYTES, Counts, Packer, discard, unpack


@pytest.fixture
def hand(hand: HeapByHand) -> Iterator[HeapByHand]:
    yield hand
    gc.collect()
    assert (hand.stats.heap_objects, hand.stats.leases) == (0, 0), "all of it is gone"


@pytest.fixture
def heap(hand: HeapByHand) -> Heap:
    return hand.heap


@pytest.fixture
def packer(heap: Heap) -> Packer:
    return Packer(heap)


def sent(value: Any, packer: Packer) -> tuple[Any, Counts]:
    """The value as it arrives, and what became of its buffers."""
    parcel = packer.pack(value)
    found, counts = unpack(parcel.body)
    assert counts == parcel.counts
    parcel.release()
    return found, counts


def number_of(heap: Heap, shape: tuple[int, ...] = (300, 400)) -> NDArray[Any]:
    array = heap.empty(shape)
    array[...] = np.arange(array.size).reshape(shape)
    return array


# What lies in the heap


@pytest.mark.parametrize(
    "view",
    [
        lambda a: a,
        lambda a: a[::2],
        lambda a: a[:, ::-3],
        lambda a: a.T,
        lambda a: a[5:6, 7:8],
        lambda a: a[::-1, ::-1].T,
        lambda a: a[None, :10, 3],
        lambda a: np.broadcast_to(a[0], (5, 400)),
        lambda a: a.view("i8"),
        lambda a: a.view("M8[s]"),
        lambda a: a.view("u1")[:, 3:11],
        lambda a: a.reshape(-1)[17],
        lambda a: a.view([("x", "f4"), ("y", "i4")])["y"],
    ],
)
def test_views_of_the_heap_are_shared_as_what_they_are(
    heap: Heap, packer: Packer, view: Any
) -> None:
    array = number_of(heap)
    here = view(array)
    there, counts = sent(here, packer)
    assert np.array_equal(there, here)
    assert there.dtype == here.dtype
    if not isinstance(here, np.ndarray):
        return
    assert there.strides == here.strides or here.flags.forc
    assert there.flags.writeable == here.flags.writeable
    assert np.shares_memory(there, here)
    assert counts.copied_bytes == 0
    assert counts.handle_bytes > 0


def test_what_is_read_only_stays_so(heap: Heap, packer: Packer) -> None:
    array = number_of(heap)
    for here in (readonly(array), readonly(array[::2])):
        there, _ = sent(here, packer)
        assert np.shares_memory(there, here)
        assert not there.flags.writeable
        with pytest.raises(ValueError, match="read-only"):
            there[0] = 1
    array[0, 0] = 5
    assert array.flags.writeable


def test_blocks_and_collections(heap: Heap, packer: Packer) -> None:
    block, shared = heap.put(b"abc"), heap.dict(value={"a": 1})
    (there, again), counts = sent((block, shared), packer)
    assert there == block
    again["b"] = 2
    assert shared == {"a": 1, "b": 2}
    assert counts == Counts()


@pytest.mark.parametrize("format", ["B", "d"])
def test_memoryviews(heap: Heap, packer: Packer, format: str) -> None:
    block = heap.put(bytes(range(64)))
    here = memoryview(block).cast(format)[1:3]
    there, _ = sent(here, packer)
    assert (there.tolist(), there.format) == (here.tolist(), format)
    there[0] = 7
    assert here[0] == 7
    assert sent(readonly(block), packer)[0].readonly
    assert sent(memoryview(b"not in the heap"), packer)[0] == b"not in the heap"


def test_of_small_results_the_block_is_not_kept(heap: Heap) -> None:
    results = Packer(heap, views=False)
    array = number_of(heap)
    first, counts = sent(array.reshape(-1)[:10], results)
    assert not np.shares_memory(first, array)
    assert (counts.small_buffers, counts.small_bytes) == (1, 80)
    half, _ = sent(array[150:], results)
    assert np.shares_memory(half, array)
    small = number_of(heap, (10,))
    assert np.shares_memory(sent(small, results)[0], small), "it is all of its block"


@pytest.mark.parametrize("writable", [True, False])
@pytest.mark.parametrize(
    "part", [lambda a: a[0, :10], lambda a: a[::100, 7], lambda a: np.broadcast_to(a[0, :1], (9,))]
)
def test_they_are_the_receivers(heap: Heap, part: Any, writable: bool) -> None:
    """However far apart the elements lie: what counts is how many they are."""
    array = number_of(heap)
    here = part(array) if writable else readonly(part(array))
    there, counts = sent(here, Packer(heap, views=False))
    assert there.tolist() == here.tolist()
    assert there.flags.writeable
    assert not np.shares_memory(there, array)
    assert counts.handle_bytes == 0


def test_a_result_that_would_be_large_as_a_copy(heap: Heap) -> None:
    here = np.broadcast_to(number_of(heap)[0, :1], (100, 1000))
    there, counts = sent(here, Packer(heap, views=False))
    assert np.shares_memory(there, here)
    assert (there.shape, counts.handle_bytes) == (here.shape, 8)


def test_other_heaps_have_handles_too(heap: Heap, packer: Packer, new_heap_name: Any) -> None:
    with Heap.create(new_heap_name(), capacity="8MiB") as other:
        other.unlink()
        array = number_of(other)
        there, counts = sent(array, packer)
        assert np.shares_memory(there, array)
        assert counts.handle_bytes == array.nbytes
        del there, array


# What does not


@pytest.mark.parametrize(
    "here",
    [
        np.arange(20_000.0),
        np.arange(20_000.0).reshape(100, 200).T,
        np.arange(40_000.0)[::2],
        np.arange(40_000.0).reshape(200, 200)[:, :100],
        np.zeros(10_000, [("x", "i1"), ("y", "f8")]),
        np.arange("2000-01-01", "2100-01-01", dtype="M8[D]"),
        np.array(["a", "long text"] * 5000),
        np.zeros(9_000, [("at", "M8[s]"), ("x", "f4")]),
        np.arange(9_000, dtype="f2"),
        np.array(1.0),
        np.zeros((0, 5)),
    ],
)
def test_plain_arrays_are_copied_once_and_are_the_receivers(
    packer: Packer, here: NDArray[Any]
) -> None:
    there, counts = sent(here, packer)
    assert np.array_equal(there, here)
    assert (there.dtype, there.shape) == (here.dtype, here.shape)
    assert there.flags.writeable
    assert there.flags.f_contiguous == here.flags.f_contiguous or not here.flags.forc
    assert not np.shares_memory(there, here)
    large = here.nbytes >= MIN_BYTES
    assert counts.copied_bytes == (here.nbytes if large else 0)
    assert counts.small_buffers == (not large)


@pytest.mark.parametrize("n", [10, 20_000])
@pytest.mark.parametrize("step", [1, 2])
def test_a_copy_of_what_was_read_only_is_writable(packer: Packer, n: int, step: int) -> None:
    """As in multiprocessing's own pool: pandas has read-only arrays in many places."""
    here = readonly(np.arange(float(n))[::step])
    there, _ = sent(here, packer)
    assert np.array_equal(there, here)
    assert there.flags.writeable


def test_objects_are_pickled(packer: Packer) -> None:
    here = np.array([{"a": 1}, None, "x" * 10] * 100, dtype=object)
    there, counts = sent(here, packer)
    assert there.tolist() == here.tolist()
    assert counts == Counts()


class Subclass(np.ndarray[Any, Any]):
    pass


def test_subclasses_travel_as_pickle_has_them(packer: Packer) -> None:
    here = np.arange(20_000.0).view(Subclass)
    there, _ = sent(here, packer)
    assert type(there) is Subclass
    assert np.array_equal(there, here)


@pytest.mark.parametrize(
    "large", [b"x" * 300_000, bytearray(b"y" * 300_000), "\N{SNOWMAN}" * 99_999]
)
def test_large_bytes_and_text_go_through_the_heap(packer: Packer, large: Any) -> None:
    for here in (large, [large, {"small": 1, "again": large}]):
        there, counts = sent(here, packer)
        assert there == here
        assert counts.copied_bytes > 299_000
        parcel = packer.pack(here)
        assert len(parcel.body) < 500
        parcel.release()


def test_a_large_stream_of_small_things_goes_through_the_heap(packer: Packer) -> None:
    here = list(range(100_000))
    there, counts = sent(here, packer)
    assert there == here
    assert counts.copied_bytes > 100_000


def test_shared_and_copied_together(heap: Heap, packer: Packer) -> None:
    array = number_of(heap)
    here = {"shared": array, "plain": np.ones(10_000), "small": np.ones(3), "bytes": b"z" * 99_999}
    there, counts = sent([here, here], packer)
    assert np.shares_memory(there[0]["shared"], array)
    assert there[0]["plain"] is there[1]["plain"]
    assert counts.handle_bytes == array.nbytes
    assert counts.small_buffers == 1
    assert counts.copied_bytes > 80_000 + 99_999


def test_the_threshold(heap: Heap) -> None:
    for n, copied in ((99, 0), (100, 100)):
        _, counts = sent(np.zeros(n, "u1"), Packer(heap, 100))
        assert counts.copied_bytes == copied
        assert counts.small_bytes == n - copied


@pytest.mark.parametrize("package", ["pandas", "pyarrow"])
def test_frames_and_tables(packer: Packer, package: str) -> None:
    module = pytest.importorskip(package)
    data = {"a": np.arange(50_000), "b": np.arange(50_000) / 7}
    here = module.DataFrame(data) if package == "pandas" else module.table(data)
    there, counts = sent(here, packer)
    assert there.equals(here)
    assert counts.copied_bytes >= 800_000
    if package == "pandas":
        part, _ = sent(here[["b"]][10:20_000], packer)
        assert part.equals(here[["b"]][10:20_000])
        there["a"] += 1
        assert there["a"].sum() == here["a"].sum() + 50_000


# When it does not work


def test_what_cannot_be_pickled_leaves_nothing(heap: Heap, packer: Packer) -> None:
    array = number_of(heap)
    for here in ([array, np.ones(20_000), heap.put(b"abc"), lambda: None],):
        with pytest.raises((AttributeError, pickle.PicklingError)):
            packer.pack(here)
        assert heap.stats().leases == 0
    del here
    gc.collect()
    assert heap.stats().heap_objects == 1


@pytest.mark.parametrize(
    "here",
    [np.ones(10**7), np.ones((5000, 5000))[::2], readonly(np.ones(10**7)), b"x" * 10**8],
)
def test_what_does_not_fit(packer: Packer, heap: Heap, here: Any) -> None:
    with pytest.raises(HeapFull):
        packer.pack(here, strict=True)
    with pytest.warns(RuntimeWarning, match="bytes go through a pipe: no room"):
        there, counts = sent(here, packer)
    assert np.array_equal(there, here) if isinstance(here, np.ndarray) else there == here
    assert counts.refused_bytes >= 10**7
    assert counts.copied_bytes == 0


def test_one_buffer_that_fits_and_one_that_does_not(packer: Packer) -> None:
    here = [np.ones(10**5), np.full(10**7, 2.0), b"x" * 100_000]
    with pytest.warns(RuntimeWarning, match="through a pipe"):
        there, counts = sent(here, packer)
    assert there[0].sum() + there[1].sum() == 10**5 + 2 * 10**7
    assert counts.copied_bytes == 800_000


def test_a_parcel_is_good_as_long_as_it_is_not_released(heap: Heap, packer: Packer) -> None:
    parcel = packer.pack([np.ones(20_000), heap.put(b"abc")])
    assert heap.stats().leases == 2
    parcel.release()
    parcel.release()
    assert (heap.stats().leases, heap.stats().heap_objects) == (0, 0)
    with pytest.raises(StaleHandle):
        unpack(parcel.body)


def test_what_is_stale_in_the_middle_leaves_nothing(heap: Heap, packer: Packer) -> None:
    parcel = packer.pack([np.ones(20_000), np.ones(30_000), heap.put(b"abc")])
    parcel.leases[1].release()
    with pytest.raises(StaleHandle):
        unpack(parcel.body)
    assert (heap.stats().leases, heap.stats().heap_objects) == (0, 0)


def test_a_parcel_that_nobody_unpacks(heap: Heap, packer: Packer) -> None:
    discard(packer.pack([np.ones(20_000), heap.put(b"abc"), b"x" * 100_000, heap.dict()]).body)
    discard(packer.pack(1).body)
    assert heap.stats().leases == 0
    gc.collect()
    assert heap.stats().heap_objects == 0


def test_a_heap_that_is_closed(heap_name: str) -> None:
    heap = Heap.create(heap_name, capacity="8MiB", config=Config(lease_grace_s=0))
    array, packer = heap.zeros(20_000), Packer(heap)
    parcel = packer.pack(array)
    heap.unlink()
    heap.close()
    parcel.release()
    with pytest.raises(ValueError, match="closed"):
        packer.pack(array)
    with pytest.raises(StaleHandle):
        unpack(parcel.body)
    assert array.sum() == 0


def test_the_users_own_reducers_are_used(packer: Packer) -> None:
    class Odd:
        pass

    try:
        for number in (42, 43):
            ForkingPickler.register(Odd, lambda _, number=number: (int, (number,)))
            assert sent([Odd()], packer)[0] == [number], "the one that is registered now"
    finally:
        ForkingPickler._extra_reducers.pop(Odd)  # type: ignore[attr-defined]


def test_no_circle_keeps_what_was_packed(packer: Packer) -> None:
    gc.collect()
    gc.disable()
    try:
        array = np.ones(20_000)
        parcel = packer.pack([array])
        parcel.release()
        assert packer.heap.stats().heap_objects == 0
    finally:
        gc.enable()


def test_readonly_of_what_is_no_buffer() -> None:
    with pytest.raises(TypeError, match="bytes-like"):
        readonly(1)
    assert readonly(b"abc") == b"abc"
    view = readonly(np.ones(3))
    assert not view.flags.writeable


def test_it_warns_as_an_error_too(heap: Heap, packer: Packer) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeWarning):
            packer.pack([heap.put(b"abc"), np.ones(10**7)])
    gc.collect()
    assert heap.stats().leases == 0
