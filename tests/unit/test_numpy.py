"""NumPy arrays in a heap: those that the heap makes, and those that NumPy makes itself."""

from __future__ import annotations

import asyncio
import contextvars
import ctypes
import gc
import importlib
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from by_hand import HeapByHand, stopped
from numpy.typing import NDArray

from shmheap import Config, Heap, HeapFull
from shmheap.arrays import block_under
from shmheap.coordinator import WANT_MEMORY
from shmheap.payload import MIN_BYTES
from shmheap.plugins import _numpy
from shmheap.plugins import numpy as plugin
from shmheap.plugins.numpy import allocator

MIB = 1 << 20


@pytest.fixture
def hand(heap_name: str) -> Iterator[HeapByHand]:
    with HeapByHand(heap_name, 16 * MIB) as hand:
        yield hand
        gc.collect()
        hand.assert_sound()


@pytest.fixture
def heap(hand: HeapByHand) -> Heap:
    return hand.heap


@pytest.fixture
def to_close(heap_name: str) -> Iterator[HeapByHand]:
    """Of which nobody asks afterwards."""
    with HeapByHand(heap_name, 16 * MIB) as hand:
        yield hand


def lies_in(heap: Heap, array: np.ndarray[Any, Any]) -> bool:
    return block_under(array, heap) is not None


# Made by the heap

DTYPES = [
    "?",
    "i1",
    "u8",
    "f2",
    "f8",
    "g",
    "c16",
    ">i4",
    ">f8",
    "S5",
    "U3",
    "V7",
    "M8[ns]",
    "m8[s]",
    [("x", "<f8"), ("name", "S3"), ("at", "<M8[D]", (2,))],
    np.dtype([("a", "i1"), ("b", "f8")], align=True),
    ("f4", (2, 3)),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_are_as_numpy_makes_them(heap: Heap, dtype: Any, order: Any) -> None:
    for shape in (7, (), (3, 4), (2, 3, 4), [5, 2], np.array([2, 2])):
        expected = np.zeros(shape, dtype, order)  # type: ignore[arg-type]
        for found in (heap.zeros(shape, dtype, order), heap.empty(shape, dtype, order)):
            assert type(found) is np.ndarray
            assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
            assert found.strides == expected.strides
            assert found.flags.writeable
            assert found.flags.aligned
            assert lies_in(heap, found)
        np.testing.assert_array_equal(heap.zeros(shape, dtype, order), expected)


@pytest.mark.parametrize("shape", [0, (0,), (3, 0), (0, 3, 2)])
def test_an_array_of_no_bytes_needs_no_block(hand: HeapByHand, shape: Any) -> None:
    empty: np.ndarray[Any, Any] = np.empty(shape)
    made = [hand.heap.empty(shape), hand.heap.zeros(shape, "i4"), hand.heap.full(shape, 7)]
    made += [hand.heap.array(empty), hand.heap.asarray(empty), hand.heap.zeros(3, "V0")]
    assert [array.size for array in made] == [0] * 5 + [3]
    assert made[0].shape == empty.shape
    assert made[3] is not empty
    assert made[4] is empty
    assert hand.stats.heap_objects == 0


def test_text_without_a_length_is_one_character(heap: Heap) -> None:
    for dtype in ("S", "U"):
        assert heap.zeros(3, dtype).dtype == np.zeros(3, dtype).dtype


def test_full(heap: Heap) -> None:
    assert heap.full((2, 2), 7).tolist() == [[7, 7], [7, 7]]
    assert heap.full(3, 2.5).dtype == np.full(3, 2.5).dtype
    assert heap.full(3, 2.5, "i4").tolist() == [2, 2, 2]
    assert heap.full((2, 3), [1, 2, 3], order="F").tolist() == [[1, 2, 3], [1, 2, 3]]
    assert heap.full(2, "ab").tolist() == ["ab", "ab"]
    with pytest.raises(ValueError, match="broadcast"):
        heap.full(3, [1, 2])


def test_array_is_always_a_new_one(hand: HeapByHand) -> None:
    source = np.arange(12.0).reshape(3, 4)
    for given in (source, source.T, source[::-1, ::2], source.tolist(), 5, b"text", [[1], [2]]):
        made = hand.heap.array(given)
        assert lies_in(hand.heap, made)
        np.testing.assert_array_equal(made, np.array(given))
        assert hand.heap.array(made) is not made
        assert not np.shares_memory(hand.heap.array(made), made)
    assert hand.heap.array([1, 2], "f4").dtype == np.float32
    assert hand.heap.array(source.T).flags.f_contiguous
    assert hand.heap.array(source.T, order="C").flags.c_contiguous
    assert hand.heap.array(source, order="F").flags.f_contiguous
    made = given = None
    assert hand.stats.heap_objects == 0


def test_asarray_takes_what_lies_in_the_heap_as_it_is(hand: HeapByHand) -> None:
    made = hand.heap.asarray([1.5, 2.5])
    assert lies_in(hand.heap, made)
    for view in (made, made[1:], made[::-1], made.view("i8")):
        assert hand.heap.asarray(view) is view
        assert hand.heap.array(view, copy=None) is view
        assert hand.heap.array(view, copy=False) is view
    other = hand.heap.asarray(made, "f4")
    assert other.tolist() == [1.5, 2.5]
    assert lies_in(hand.heap, other)
    with pytest.raises(ValueError, match="copy"):
        hand.heap.array(made, "f4", copy=False)
    with pytest.raises(ValueError, match="copy"):
        hand.heap.array([1], copy=False)


def test_a_copy_shows_nothing_of_what_was_there(heap: Heap) -> None:
    heap.put(b"\xee" * 64).free()
    made = heap.array(np.zeros(4, np.dtype([("a", "i1"), ("b", "f8")], align=True)))
    assert bytes(block_under(made, heap) or b"") == bytes(64)


OBJECTS = [object, "O", [("a", "i4"), ("b", object)]]
if hasattr(np.dtypes, "StringDType"):
    OBJECTS.append(np.dtypes.StringDType())


@pytest.mark.parametrize("dtype", OBJECTS, ids=str)
def test_objects_are_refused(hand: HeapByHand, dtype: Any) -> None:
    makers: list[Callable[[], object]] = [
        lambda: hand.heap.empty(3, dtype),
        lambda: hand.heap.zeros(3, dtype),
        lambda: hand.heap.ndarray(3, dtype),
        lambda: hand.heap.full(3, 0, dtype),
        lambda: hand.heap.array(np.zeros(3, dtype)),
        lambda: hand.heap.asarray(np.zeros(3, dtype)),
    ]
    for make in makers:
        with pytest.raises(ValueError, match="objects cannot be shared"):
            make()
    assert hand.stats.heap_objects == 0


@pytest.mark.parametrize(
    ("shape", "error"),
    [
        *((shape, TypeError) for shape in ("x", 1.5, (1.5,), None)),
        *((shape, ValueError) for shape in (-1, (-1, -8), (0, -1))),
        *((shape, HeapFull) for shape in (1 << 40, (1 << 62, 8))),
    ],
)
def test_shapes_that_are_none(hand: HeapByHand, shape: Any, error: type[Exception]) -> None:
    for make in (hand.heap.empty, hand.heap.zeros):
        with pytest.raises(error):
            make(shape)
    assert hand.stats.heap_objects == 0


# Made by NumPy


def test_what_numpy_makes_in_the_block_lies_in_the_heap(hand: HeapByHand) -> None:
    before = np.arange(100_000.0)
    with allocator(hand.heap):
        results = [
            before * 2 + 1,
            np.empty_like(before),
            np.arange(100_000),
            before.copy(),
            before.astype("f4"),
            np.sort(before),
            np.concatenate([before, before]),
            before.reshape(100, 1000) @ before.reshape(1000, 100) + np.ones((100, 100)),
            before[::2] > 3,
            np.where(before > 5, before, 0),
            np.frombuffer(before.tobytes(), "f8") + 0,
            pickle.loads(pickle.dumps(before[:1000].astype(">f8").repeat(10), 4)) + 0,
        ]
    after = before * 2
    assert all(lies_in(hand.heap, array) for array in results)
    assert not any(lies_in(hand.heap, array) for array in (before, after))
    np.testing.assert_array_equal(results[0], before * 2 + 1)
    assert hand.stats.heap_objects == len(results)
    del results
    assert hand.stats.heap_objects == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_are_shared_as_what_they_are(hand: HeapByHand, dtype: Any) -> None:
    kind = np.dtype(dtype)
    source = np.arange(kind.itemsize * 24) % 2
    source = source.astype("u1").tobytes()
    if kind.char == "U":
        source = np.full(24, "abc").tobytes()
    with allocator(hand.heap, min_bytes=1, zeros=kind.char == "U"):
        array = np.ndarray((4, 6), kind.base, source[: kind.base.itemsize * 24]).copy()
    hand.heap.roots["array"] = array
    objects = hand.stats.heap_objects
    views = [
        array,
        array[1:3],
        array.T,
        array[::-1, ::2],
        array[:, 1:2],
        np.broadcast_to(array, (2, 4, 6)),
    ]
    for view in views:
        shared = hand.heap.dict(value={"view": view})
        found = shared["view"]
        assert np.shares_memory(found, array)
        assert (found.dtype, found.shape, found.strides) == (view.dtype, view.shape, view.strides)
        np.testing.assert_array_equal(found, view)
        del shared, found
    assert hand.stats.heap_objects == objects, "nothing was copied"
    expected = array.tobytes()
    del view, views, array
    assert hand.heap.roots["array"].tobytes() == expected


def test_smaller_arrays_are_made_as_ever(hand: HeapByHand) -> None:
    with allocator(hand.heap):
        small, edge = np.empty(MIN_BYTES - 1, "u1"), np.empty(MIN_BYTES, "u1")
    assert not lies_in(hand.heap, small)
    assert lies_in(hand.heap, edge)
    with allocator(hand.heap, min_bytes="1MiB"):
        assert not lies_in(hand.heap, np.empty(MIB - 1, "u1"))
        assert lies_in(hand.heap, np.empty(MIB, "u1"))
    with allocator(hand.heap, min_bytes=1):
        many = [np.full(n, n % 256, "u1") for n in range(3000)]
    assert all(lies_in(hand.heap, array) for array in many[1:])
    assert all((array == n % 256).all() for n, array in enumerate(many))
    del many[::3], many[::2], many
    assert hand.stats.heap_objects == 1


def test_zeroed_arrays_lie_outside_unless_asked_for(hand: HeapByHand) -> None:
    with allocator(hand.heap, min_bytes=1):
        assert not lies_in(hand.heap, np.zeros(MIB, "u1"))
        used = np.full(MIB, 7, "u1")
    del used
    with allocator(hand.heap, min_bytes=1, zeros=True):
        zeros = np.zeros(MIB, "u1")
    assert lies_in(hand.heap, zeros)
    assert not zeros.any()


def test_arrays_of_objects_lie_outside(hand: HeapByHand) -> None:
    with allocator(hand.heap, min_bytes=1):
        made = [np.array([[], None], object), np.empty(1000, object), np.full(9, "x", object)]
        made += [made[0].copy(), made[1].astype(object), np.zeros(4, OBJECTS[2])]
        made[0].resize(2000, refcheck=False)
    assert not any(lies_in(hand.heap, array) for array in made)
    assert made[0].tolist()[:2] == [[], None]


def test_arrays_grow_and_shrink(hand: HeapByHand) -> None:
    with allocator(hand.heap, min_bytes=1000):
        array = np.arange(200)
        small = np.arange(10)
    place = array.ctypes.data
    for n in (190, 100, 130, 40_000, 39_000, 300, 20, 50_000):
        kept = array[:n].tolist()
        array.resize(n, refcheck=False)
        assert array.tolist()[: len(kept)] == kept
        assert not array[len(kept) :].any()
        assert n not in {190, 100} or array.ctypes.data == place, "in place"
    assert hand.stats.heap_objects == 0, "what was outside once stays there"
    small.resize(10_000, refcheck=False)
    assert not lies_in(hand.heap, small)


def test_what_does_not_fit_is_made_as_ever(hand: HeapByHand) -> None:
    with allocator(hand.heap):
        first, second = np.full(10 * MIB, 1, "u1"), np.full(10 * MIB, 2, "u1")
        assert lies_in(hand.heap, first)
        assert not lies_in(hand.heap, second)
        assert hand.steward.take_wants() & WANT_MEMORY, "the coordinator was told"
        huge = np.empty(1 << 33, "u1")
        assert not lies_in(hand.heap, huge)
        assert (first == 1).all()
        assert (second == 2).all()
        del first
        second = second * 1
        assert lies_in(hand.heap, second)
        with pytest.raises(MemoryError):
            np.empty(1 << 62, "u1")


def test_an_array_outlives_block_and_heap(to_close: HeapByHand) -> None:
    mapped = len(mappings(to_close))
    with allocator(to_close.heap):
        array = np.arange(100_000)
        to_close.heap.close()
        late = np.arange(100_000)
        assert lies_in_mapping(to_close, array)
        assert not lies_in_mapping(to_close, late)
    view = array[5:10]
    del array
    assert view.tolist() == [5, 6, 7, 8, 9]
    view[:] = 3
    assert len(mappings(to_close)) == mapped
    del view
    assert len(mappings(to_close)) == mapped - 1, "the last array let the heap go"


@pytest.mark.parametrize(
    "make",
    [
        lambda heap: heap.zeros(10_000),
        lambda heap: heap.array(np.zeros((100, 100)).T),
        lambda heap: heap.list(value=[np.zeros((100, 100))])[0],
        lambda heap: heap.list(value=[np.zeros((100, 100)).T[::2]])[0],
        lambda heap: heap.roots.setdefault("zeros", np.zeros(10_000)),
    ],
)
def test_an_array_in_a_block_outlives_the_heap(
    to_close: HeapByHand, make: Callable[[Heap], NDArray[Any]]
) -> None:
    mapped = len(mappings(to_close))
    array = make(to_close.heap)
    to_close.heap.close()
    array += 1
    assert array.sum() == array.size
    assert len(mappings(to_close)) == mapped
    del array
    assert len(mappings(to_close)) == mapped - 1


def mappings(hand: HeapByHand) -> list[tuple[int, int]]:
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    inode = str(os.fstat(hand.fd).st_ino)
    spans = [line[0].split("-") for line in lines if line[4] == inode and line[1] == "rw-s"]
    return [(int(first, 16), int(end, 16)) for first, end in spans]


def lies_in_mapping(hand: HeapByHand, array: np.ndarray[Any, Any]) -> bool:
    return any(first <= array.ctypes.data < end for first, end in mappings(hand))


def test_it_is_freed_by_whatever_thread_drops_it(hand: HeapByHand) -> None:
    with allocator(hand.heap):
        arrays = [np.arange(20_000) for _ in range(8)]
    threads = [threading.Thread(target=arrays.pop) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert hand.stats.heap_objects == 0


def test_what_a_stopped_process_keeps_from_being_freed_is_freed_later(hand: HeapByHand) -> None:
    with allocator(hand.heap):
        arrays = [np.arange(20_000) for _ in range(3)]
        one = arrays.pop()
        with stopped(hand, 1):
            del arrays[:]
            assert not lies_in_mapping(hand, np.arange(20_000)), "it does not wait for long"
        assert hand.stats.heap_objects == 3
        np.empty(20_000)
        assert hand.stats.heap_objects == 1, "with the next array that comes and goes"
    del one
    assert hand.stats.heap_objects == 0


# Where it is in force


def name_in_force() -> str:
    core = "_core" if np.lib.NumpyVersion(np.__version__) >= "2.0.0" else "core"
    name: str = importlib.import_module(f"numpy.{core}.multiarray").get_handler_name()
    return name


def test_blocks_nest_and_errors_leave_them(heap: Heap, new_heap_name: Callable[[], str]) -> None:
    outside = name_in_force()
    with HeapByHand(new_heap_name(), 16 * MIB) as other:
        with allocator(heap):
            with allocator(other.heap, min_bytes=MIB):
                large, small = np.empty(MIB, "u1"), np.empty(MIB - 1, "u1")
            with pytest.raises(KeyError), allocator(other.heap, min_bytes=MIB):
                raise KeyError
            again = np.empty(MIB, "u1")
            assert name_in_force() == "shmheap"
        assert name_in_force() == outside
        assert lies_in(other.heap, large)
        assert lies_in(heap, small), "what the inner one does not take"
        assert lies_in(heap, again)
        del large


def test_it_decorates(heap: Heap) -> None:
    @allocator(heap)
    def make() -> np.ndarray[Any, Any]:
        return np.arange(20_000)

    assert lies_in(heap, make())
    assert lies_in(heap, make())
    assert not lies_in(heap, np.arange(20_000))


def test_other_threads_keep_what_they_have(heap: Heap) -> None:
    seen: list[bool] = []

    def look() -> None:
        seen.append(lies_in(heap, np.empty(MIB, "u1")))
        with allocator(heap):
            seen.append(lies_in(heap, np.empty(MIB, "u1")))

    with allocator(heap):
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
        assert lies_in(heap, np.empty(MIB, "u1"))
    assert seen == [False, True]


def test_a_context_keeps_what_was_in_force(heap: Heap) -> None:
    with allocator(heap):
        context = contextvars.copy_context()
    assert not lies_in(heap, np.empty(MIB, "u1"))
    assert lies_in(heap, context.run(np.empty, MIB, "u1"))


def test_tasks_do_not_disturb_each_other(heap: Heap) -> None:
    async def make(inside: bool, turns: list[asyncio.Event], number: int) -> bool:
        with allocator(heap) if inside else allocator(heap, min_bytes=1 << 40):
            turns[number + 1].set()
            await turns[2].wait()
            return lies_in(heap, np.empty(MIB, "u1"))

    async def both() -> list[bool]:
        turns = [asyncio.Event() for _ in range(3)]
        return await asyncio.gather(make(True, turns, 0), make(False, turns, 1))

    assert asyncio.run(both()) == [True, False]


def test_a_generator_restores_what_was_in_force(heap: Heap) -> None:
    outside = name_in_force()

    def rows() -> Iterator[np.ndarray[Any, Any]]:
        with allocator(heap):
            yield np.empty(MIB, "u1")
            yield np.empty(MIB, "u1")

    assert all(lies_in(heap, row) for row in rows())
    assert name_in_force() == outside
    given_up = rows()
    next(given_up)
    given_up.close()
    assert name_in_force() == outside


def test_nothing_is_left_of_a_block(to_close: HeapByHand) -> None:
    def use() -> None:
        with allocator(to_close.heap, min_bytes=1):
            array = np.arange(50)
            array.resize(200, refcheck=False)
            np.sort(array)[::-1].copy()

    for _ in range(10):
        use()
    before = sys.getallocatedblocks()
    for _ in range(1000):
        use()
    assert sys.getallocatedblocks() - before < 500
    assert to_close.stats.heap_objects == 0
    assert to_close.stats.pins == 0
    mapped = len(mappings(to_close))
    to_close.heap.close()
    assert len(mappings(to_close)) == mapped - 1


# What it refuses


def test_wrong_arguments(to_close: HeapByHand) -> None:
    outside = name_in_force()
    wrong: list[tuple[type[Exception], dict[str, Any]]] = [
        (TypeError, {"heap": "demo"}),
        (TypeError, {"heap": None}),
        (ValueError, {"min_bytes": 0}),
        (ValueError, {"min_bytes": -1}),
        (ValueError, {"min_bytes": "much"}),
        (OverflowError, {"min_bytes": 1 << 63}),
    ]
    for error, arguments in wrong:
        with pytest.raises(error), allocator(**{"heap": to_close.heap, **arguments}):
            pass
    to_close.heap.close()
    with pytest.raises(ValueError, match="closed"), allocator(to_close.heap):
        pass
    assert name_in_force() == outside


NUMBER = ctypes.CFUNCTYPE(ctypes.c_uint)
OBJECT = ctypes.PYFUNCTYPE(ctypes.py_object)


def capsule(table: ctypes.Array[Any], name: bytes | None = None) -> object:
    new = ctypes.pythonapi.PyCapsule_New
    new.restype = ctypes.py_object
    new.argtypes = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p
    made: object = new(ctypes.addressof(table), name, None)
    return made


@pytest.mark.parametrize(
    ("abi", "features", "version", "says"),
    [
        (0x03000000, 0x20, 1, "ABI 0x3000000"),
        (0x01000009, 0x0E, 1, "since 1.22"),
        (0x02000000, 0x20, 2, "of version 2, not 1"),
    ],
)
def test_a_numpy_that_is_not_known(
    heap: Heap, abi: int, features: int, version: int, says: str
) -> None:
    handler = ctypes.create_string_buffer(b"\0" * 127 + bytes([version]), 168)
    in_force = capsule(handler, b"mem_handler")
    functions = {
        0: NUMBER(lambda: abi),
        211: NUMBER(lambda: features),
        305: OBJECT(lambda: in_force),
    }
    table = (ctypes.c_void_p * 306)()
    for number, function in functions.items():
        table[number] = ctypes.cast(function, ctypes.c_void_p)  # type: ignore[call-overload]
    with pytest.raises(ImportError, match=says):
        _numpy.enter(capsule(table), heap, 1, False)


def test_what_is_no_capsule(heap: Heap) -> None:
    for wrong in (None, object(), capsule((ctypes.c_void_p * 1)(), b"another")):
        with pytest.raises(ValueError, match=r"[Cc]apsule"):
            _numpy.enter(wrong, heap, 1, False)
        with pytest.raises(ValueError, match=r"[Cc]apsule"):
            _numpy.leave(wrong, None)
    for wrong in (object(), plugin._array_api()):
        with pytest.raises(ValueError, match=r"[Cc]apsule"):
            _numpy.leave(plugin._array_api(), wrong)


# At the end of the process


@pytest.mark.parametrize("ends", ["pass", "heap.close()", "sys.exit()", "os._exit(0)"])
def test_arrays_that_live_to_the_end_are_let_go(heap_name: str, ends: str) -> None:
    script = f"""
import os, sys, numpy, shmheap
from shmheap.plugins.numpy import allocator
heap = shmheap.Heap.attach({heap_name!r})
manager = allocator(heap)
manager.__enter__()
arrays = [numpy.arange(20_000) for _ in range(10)]
class Late:
    def __del__(self):
        arrays.clear()
late = Late()
{ends}
"""
    with Heap.create(heap_name, capacity="64MiB", config=Config(keep=True)) as heap:
        done = subprocess.run(
            [sys.executable, "-P", "-W", "error", "-c", script], capture_output=True, text=True
        )
        assert (done.returncode, done.stderr) == (0, "")
        heap.gc()
        assert heap.stats().heap_objects == 0
        heap.unlink()
