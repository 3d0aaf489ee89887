"""Values as bytes: each type comes back as what it was, and bytes that are no value's are told."""

from __future__ import annotations

import contextlib
import datetime as dt
import enum
import math
import os
import pickle
import sys
import zoneinfo
from collections import OrderedDict, namedtuple
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from by_hand import HeapByHand
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from shmheap import Block, Heap, HeapCorrupt, SharedDict, SharedList, arrays, values
from shmheap.roots import Roots

FIXTURES = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


@dataclass
class Point:
    x: int
    inside: list[Any] = field(default_factory=list)


class Color(enum.IntEnum):
    RED = 1


class Text(str):
    __slots__ = ()


Pair = namedtuple("Pair", "a b")

EAST = dt.timezone(dt.timedelta(hours=5, minutes=30))


@pytest.fixture
def heap(hand: HeapByHand) -> Heap:
    return hand.heap


def passed(heap: Heap, value: Any, codec: Any = None) -> Any:
    """What a value comes back as."""
    home = Roots(heap, codec)
    kind, data, blocks = values.encode(home, value)
    assert type(data) is bytes
    assert len(data) <= values.BIG_BYTES
    assert len(blocks) <= values.MAX_BLOCKS
    return values.decode(home, kind, data, blocks)


def in_core(heap: Heap, value: Any) -> Any:
    """What a value comes back as that the core writes and reads, as far as it does."""
    home = Roots(heap)
    return heap._unbox(heap._box_new(value, home), home)


PLAIN = [
    None, False, True, 0, 1, -1, 2**63 - 1, 2**63, -(2**63), -(2**63) - 1, 10**400, -(10**400),
    0.0, -0.0, math.inf, sys.float_info.min, "", "x", "é\0\U0001f600", "x" * 100_000, "\udc80",
    b"", b"\0\xff", b"x" * 16384, "x" * 16384, 0j, complex(-0.0, math.inf),
    (), (1, "a", b"b", None, True, 1.5, ((),)), tuple(range(100_000)), frozenset(),
    frozenset({1, "a", (2, frozenset({b"c"}))}),
]  # fmt: skip
TIMES = [
    dt.timedelta.min, dt.timedelta.max, dt.timedelta(0), dt.timedelta(-1, 5, 7),
    dt.date.min, dt.date.max, dt.date(2024, 2, 29),
    dt.time.min, dt.time.max, dt.time(1, 2, 3, 4, EAST, fold=1), dt.time(12),
    dt.datetime.min, dt.datetime.max, dt.datetime(2024, 2, 29, 1, 2, 3, 4),
    dt.datetime(2024, 10, 27, 2, 30, tzinfo=zoneinfo.ZoneInfo("Europe/Berlin"), fold=1),
    dt.datetime(2024, 1, 1, tzinfo=dt.UTC), dt.UTC, EAST,
    dt.timezone(dt.timedelta(hours=-1), "minus one"), zoneinfo.ZoneInfo("Asia/Tokyo"),
]  # fmt: skip
SCALARS = [
    np.float64(1.5), np.float32(-0.0), np.float16(2), np.longdouble(3), np.int8(-1),
    np.uint64(2**64 - 1), np.bool_(True), np.complex64(1j), np.str_(""), np.str_("a\0"),
    np.bytes_(b"a\0"),
    np.datetime64("2024-02-29T01:02", "ms"), np.timedelta64(5, "D"),
]  # fmt: skip


@pytest.mark.parametrize(
    "value", [*PLAIN, *TIMES, *SCALARS], ids=lambda value: type(value).__name__
)
def test_values_come_back_as_they_were(heap: Heap, value: Any) -> None:
    for found in [passed(heap, value), passed(heap, (value,))[0], in_core(heap, value)]:
        assert found == value
        assert type(found) is type(value)
        assert repr(found) == repr(value)
        assert getattr(found, "fold", 0) == getattr(value, "fold", 0)
        assert getattr(found, "dtype", None) == getattr(value, "dtype", None)


def test_nan_and_zeros_keep_their_bits(heap: Heap) -> None:
    assert math.isnan(passed(heap, math.nan))
    assert math.copysign(1, passed(heap, (-0.0,))[0]) == -1


SCALAR = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
SCALAR |= st.binary() | st.complex_numbers(allow_nan=False)
ZONES = st.none() | st.timezones() | st.just(EAST)
HASHABLE = SCALAR | st.dates() | st.timedeltas() | st.times(timezones=ZONES)
HASHABLE |= st.datetimes(timezones=ZONES)
HASHABLE = st.recursive(
    HASHABLE, lambda inside: st.lists(inside).map(tuple) | st.frozensets(inside), max_leaves=10
)


@FIXTURES
@given(value=HASHABLE)
def test_any_nesting_comes_back_as_it_was(heap: Heap, value: Any) -> None:
    for found in (passed(heap, value), in_core(heap, value)):
        assert found == value
        assert type(found) is type(value)


def test_deep_nesting_is_a_recursion_error_and_no_crash(heap: Heap) -> None:
    value: Any = ()
    for _ in range(100_000):
        value = (value,)
    with pytest.raises(RecursionError):
        passed(heap, value)
    while value:
        value = value[0]


# Bytes in blocks


def test_long_bytes_come_back_as_a_view(heap: Heap) -> None:
    data = os.urandom(values.BIG_BYTES + 1)
    found = passed(heap, data)
    assert isinstance(found, memoryview)
    assert found.readonly
    assert found == data
    assert isinstance(found.obj, Block)
    assert passed(heap, (data,)) == (data,)
    again = passed(heap, found)
    assert again.obj == found.obj, "a view of a whole block shares it"


@pytest.mark.parametrize(
    "value",
    [
        bytearray(b"abc"),
        bytearray(),
        memoryview(b"abc"),
        memoryview(bytearray(100_000)),
        memoryview(np.arange(12.0).reshape(3, 4)),
        memoryview(np.arange(12, dtype="i2"))[::-2],
        memoryview(b""),
        memoryview(b"abcd").cast("i", ()),
    ],
    ids=lambda value: repr(bytes(value)[:5]),
)
def test_bytearrays_and_views_come_back_as_views(heap: Heap, value: Any) -> None:
    found = passed(heap, value)
    view = memoryview(value)
    assert isinstance(found, memoryview)
    assert (found.format, found.shape, found.readonly) == (view.format, view.shape, view.readonly)
    assert found == view
    assert not found.nbytes or isinstance(found.obj, Block)


def test_a_part_of_a_block_is_copied(heap: Heap) -> None:
    block = heap.put(b"abcdef")
    found = passed(heap, block[1:3])
    assert found == b"bc"
    assert found.obj != block
    assert passed(heap, memoryview(block)).obj == block
    assert passed(heap, memoryview(block)[::-1]) == b"fedcba"


def test_a_view_of_all_of_a_block_is_that_block_by_whatever_name(heap: Heap) -> None:
    array = heap.array(np.arange(12.0).reshape(3, 4))
    found = passed(heap, memoryview(array))
    assert np.shares_memory(found, array)
    assert (found.format, found.shape) == ("d", (3, 4))
    assert not np.shares_memory(passed(heap, memoryview(array.T)), array), "another order"


def test_blocks_and_collections_are_the_same_ones(heap: Heap) -> None:
    block, shared = heap.put(b"abc"), heap.dict(value={"a": 1})
    found = passed(heap, (block, shared, frozenset({block})))
    assert found[0] == block
    assert found[2] == {block}
    found[1]["b"] = 2
    assert shared == {"a": 1, "b": 2}


@pytest.mark.parametrize("count", [254, 255, 256, 70_000])
def test_as_many_blocks_as_there_are(heap: Heap, count: int) -> None:
    block = heap.put(b"x")
    found = passed(heap, (block, 5) * count)
    assert found == (block, 5) * count


def test_blocks_of_another_heap_are_refused_and_their_bytes_copied(
    heap: Heap, heap_name: str
) -> None:
    with Heap.create(f"{heap_name}-other", capacity="1MiB") as other:
        block = other.put(b"abc")
        array = other.ndarray(3)
        shared = heap.list()
        for foreign in (block, (1, block), other.list()):
            with pytest.raises(ValueError, match="another heap"):
                shared.append(foreign)
        shared.extend([memoryview(block), array])
        assert shared[0] == b"abc"
        shared[1][0] = 5.0
        assert array[0] == 0.0
        other.unlink()
    assert len(shared) == 2


# Arrays

RECORD = np.dtype([("a", "i4"), ("b", ">f8", (2,)), ("c", [("d", "U3")])])
ALIGNED = np.dtype([("a", "i1"), ("b", "f8")], align=True)


@pytest.mark.parametrize(
    "array",
    [
        np.arange(12.0),
        np.arange(12, dtype=">u2").reshape(3, 4),
        np.asfortranarray(np.arange(12).reshape(3, 4)),
        np.arange(24).reshape(2, 3, 4)[:, ::-2, 1:],
        np.array(5),
        np.zeros((0, 3), "f4"),
        np.zeros(2, RECORD),
        np.ones(2, ALIGNED),
        np.array(["a", "bcd"]),
        np.array([b"a\0b"]),
        np.array(["2024-01-01", "NaT"], "M8[D]"),
        np.broadcast_to(np.arange(3), (4, 3)),
        np.array([True, False]),
        np.zeros(3, "V5"),
    ],
    ids=lambda array: f"{array.dtype.char}{array.shape}",
)
def test_arrays_are_copied_in_once(heap: Heap, array: np.ndarray[Any, Any]) -> None:
    home = Roots(heap)
    encoded = values.encode(home, array)
    found, again = values.decode(home, *encoded), values.decode(home, *encoded)
    assert type(found) is np.ndarray
    assert (found.dtype, found.shape) == (array.dtype, array.shape)
    np.testing.assert_array_equal(found, array)
    assert found.flags.writeable
    assert found.flags.f_contiguous == array.flags.f_contiguous or not array.flags.forc
    if array.size:
        found.reshape(-1)[0] = np.zeros(1, array.dtype)[0]
        assert found.tobytes() == again.tobytes(), "the same memory"
        assert np.shares_memory(passed(heap, found), found), "and no copy from here on"


@pytest.mark.parametrize(
    "view",
    [
        lambda a: a,
        lambda a: a[2:5, ::-3],
        lambda a: a.T,
        lambda a: a[::-1],
        lambda a: a.reshape(5, 20)[:, 1:2],
        lambda a: a.view("i4")[1:],
        lambda a: np.frombuffer(a, "f8", offset=8),
        lambda a: np.lib.stride_tricks.as_strided(a, (3, 3), (0, 16)),
    ],
)
def test_views_of_arrays_in_the_heap_share_its_memory(heap: Heap, view: Any) -> None:
    array = heap.ndarray((10, 10))
    array[:] = np.arange(100).reshape(10, 10)
    objects = heap.stats().heap_objects
    shown = view(array)
    found = passed(heap, shown)
    assert heap.stats().heap_objects == objects
    np.testing.assert_array_equal(found, shown)
    assert (found.strides, found.dtype) == (shown.strides, shown.dtype)
    array[:] = 7
    np.testing.assert_array_equal(found, shown)


def test_what_may_not_be_written_stays_so(heap: Heap) -> None:
    array = heap.ndarray(3)
    array.flags.writeable = False
    assert not passed(heap, array).flags.writeable
    assert passed(heap, np.frombuffer(b"abc", "u1")).flags.writeable, "a copy is ours"


def test_an_array_keeps_its_block(heap: Heap) -> None:
    objects = heap.stats().heap_objects
    found = passed(heap, np.arange(1000.0))[10:20]
    assert heap.stats().heap_objects == objects + 1
    assert found.sum() == sum(range(10, 20))
    del found
    assert heap.stats().heap_objects == objects


DTYPES = hnp.scalar_dtypes() | hnp.array_dtypes() | hnp.nested_dtypes()


@FIXTURES
@given(data=st.data())
def test_any_array_comes_back_as_it_was(heap: Heap, data: st.DataObject) -> None:
    dtype = data.draw(DTYPES)
    array = data.draw(hnp.arrays(dtype, hnp.array_shapes(min_dims=0, min_side=0)))
    found = passed(heap, array)
    assert (found.dtype, found.shape) == (array.dtype, array.shape)
    assert found.tobytes() == array.tobytes()
    for scalar in array.reshape(-1)[:1]:
        again = passed(heap, scalar)
        assert type(again) is type(scalar)
        assert again.tobytes() == scalar.tobytes()


def test_what_lies_between_the_fields_of_a_record_shows_nothing(heap: Heap) -> None:
    for _ in range(8):
        heap.put(b"\xee" * 16)
    found = passed(heap, np.zeros(1, ALIGNED))
    assert bytes(arrays.block_under(found, heap) or b"") == bytes(16)


# Codecs


class Reversed:
    """A codec of one's own."""

    name = "reversed"

    def dumps(self, value: Any) -> bytes:
        return pickle.dumps(value)[::-1]

    def loads(self, data: bytes) -> Any:
        return pickle.loads(data[::-1])


NO_FORM = [
    {1, 2}, Point(1, [2]), Color.RED, Text("a"), Pair(1, 2), OrderedDict(a=1), range(3), object(),
    np.zeros(1).view(np.ma.MaskedArray), np.recarray((2,), [("a", "i4")]), np.array([object()]),
    print, Point, ...,
    memoryview(np.zeros(1, RECORD)), np.dtype("f4"), NotImplemented,
]  # fmt: skip


@pytest.mark.parametrize("value", NO_FORM, ids=lambda value: type(value).__name__)
def test_what_has_no_form_needs_a_codec(heap: Heap, value: Any) -> None:
    name = type(value).__name__
    with pytest.raises(TypeError, match=rf'\b{name}\b.* without a codec: codec="pickle", or'):
        passed(heap, value)
    with pytest.raises(TypeError, match=rf"\b{name}\b"):
        passed(heap, (1, value))


@pytest.mark.parametrize("value", NO_FORM[:7], ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("codec", ["pickle", Reversed()])
def test_codecs_take_what_has_no_form(heap: Heap, value: Any, codec: Any) -> None:
    assert passed(heap, value, codec) == value
    assert type(passed(heap, (value,), codec)[0]) is type(value)
    long = Point(1, [value] * 99_999)
    assert passed(heap, long, codec) == long


@pytest.mark.parametrize("codec", ["pickle", Reversed()])
def test_what_the_codec_does_not_take_either(heap: Heap, codec: Any) -> None:
    with pytest.raises(TypeError, match=r"function .*the codec '\w+' does not take it"):
        passed(heap, lambda: 0, codec)


def test_nothing_is_unpickled_unasked(heap: Heap) -> None:
    encoded = values.encode(Roots(heap, "pickle"), Point(1))
    for codec, has in [(None, "none"), (Reversed(), "'reversed'")]:
        with pytest.raises(TypeError, match=f"by the codec 'pickle', and the codec is {has}"):
            values.decode(Roots(heap, codec), *encoded)
    assert values.decode(Roots(heap, "pickle"), *encoded) == Point(1)


def test_errors_of_a_codec_are_its_own(heap: Heap) -> None:
    class Failing(Reversed):
        def loads(self, data: bytes) -> Any:
            raise ValueError("no more")

    encoded = values.encode(Roots(heap, Reversed()), (1, Point(1)))
    with pytest.raises(ValueError, match="no more"):
        values.decode(Roots(heap, Failing()), *encoded)


def test_a_codec_returns_bytes(heap: Heap) -> None:
    class Wrong(Reversed):
        def dumps(self, value: Any) -> Any:
            return "text"

    with pytest.raises(TypeError, match="'reversed' returned str, not bytes"):
        passed(heap, Point(1), Wrong())


def test_a_pickle_names_blocks_and_collections_and_has_no_leases(heap: Heap) -> None:
    block, shared = heap.put(b"abc"), heap.list()
    found = passed(heap, Point(1, [block, shared]), "pickle")
    assert heap.stats().leases == 0
    assert found.inside[0] == block
    found.inside[1].append(5)
    assert shared == [5]


@pytest.mark.parametrize(
    ("codec", "error"), [("json", ValueError), (5, TypeError), (pickle, TypeError)]
)
def test_what_is_no_codec(heap: Heap, codec: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="codec"):
        heap.dict(codec=codec)


# Plain lists and dicts


def test_plain_collections_become_shared_ones(heap: Heap) -> None:
    found = passed(heap, {"a": [1, {"b": ({},)}], "c": ()})
    assert isinstance(found, SharedDict)
    assert isinstance(found["a"], SharedList)
    assert isinstance(found["a"][1]["b"][0], SharedDict)
    assert found == {"a": [1, {"b": ({},)}], "c": ()}


def test_cycles_and_what_is_there_twice_stay_so(heap: Heap) -> None:
    plain: dict[str, Any] = {"twice": [1]}
    plain["again"] = (plain["twice"],)
    plain["self"] = (plain, [plain])
    found = passed(heap, plain)
    found["twice"].append(2)
    assert found["again"][0] == [1, 2]
    assert found["self"][0]._block == found._block
    assert found["self"][1][0]._block == found._block
    heap_tuple = passed(heap, (plain, plain))
    assert heap_tuple[0]._block == heap_tuple[1]._block


def test_a_deep_plain_list_needs_no_deep_stack(heap: Heap) -> None:
    plain: list[Any] = []
    top = plain
    for _ in range(3000):
        plain.append([])
        plain = plain[0]
    found = passed(heap, top)
    depth = 0
    while found:
        found = found[0]
        depth += 1
    assert depth == 3000


def test_what_cannot_be_shared_leaves_nothing(heap: Heap) -> None:
    objects = heap.stats().heap_objects
    with pytest.raises(TypeError, match="set"):
        passed(heap, [1, [2, {3}]])
    assert heap.stats().heap_objects == objects


# Bytes that are no value's


@contextlib.contextmanager
def error_or_value() -> Iterator[None]:
    """What may come of any bytes: a name of a zone or codec may be one that is not here."""
    try:
        yield
    except TypeError as error:
        if "was written by the codec" not in str(error):
            raise
    except (HeapCorrupt, ValueError, OSError, zoneinfo.ZoneInfoNotFoundError):
        pass


def wrong_bytes(home: Any) -> Any:
    block = home.heap.put(b"x" * 16)
    item = values._Writer(home).items
    return [
        (99, b"", ()), (7, b"", ()), (values.FLOAT, b"123", ()), (values.STR, b"\xff", ()),
        (values.COMPLEX, b"", ()), (values.TUPLE, b"\x03", ()), (values.TUPLE, b"\x03\x08\0", ()),
        (values.TUPLE, b"\x03\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", ()),
        (values.FROZENSET, item((memoryview(bytearray(1)),))[2:], (block,)),
        (values.DATETIME, b"", ()), (values.DATETIME, bytes(20), ()), (values.DATE, bytes(4), ()),
        (values.TIME, b"\x19" + bytes(9), ()), (values.TIMEDELTA, b"\xff\xff\xff\x7f" * 3, ()),
        (values.TIMEZONE, b"", ()), (values.TIMEZONE, item(5), ()), (values.ZONE, b"", ()),
        (values.ZONE, item(None), ()),
        (values.SCALAR, item("<f8") + b"123", ()), (values.SCALAR, item("|O") + bytes(8), ()),
        (values.SCALAR, item("?!"), ()), (values.SCALAR, item("[" * 500), ()),
        (values.SCALAR, item("[('a', 'O')]") + bytes(8), ()), (values.SCALAR, item(5), ()),
        (values.TEXT_SCALAR, item("U"), ()),
        (values.ARRAY, item(("<f8", (3,), 0, None, False)) + item(block), (block,)),
        (values.ARRAY, item(("<f8", (2,), 1, None, False)) + item(block), (block,)),
        (values.ARRAY, item(("<f8", (2,), 0, (-8,), False)) + item(block), (block,)),
        (values.ARRAY, item(("<f8", (2,), -8, None, False)) + item(block), (block,)),
        (values.ARRAY, item(("<f8", (2**62, 4), 0, (0, 0), False)) + item(block), (block,)),
        (values.ARRAY, item(("|O", (2,), 0, None, False)) + item(block), (block,)),
        (values.ARRAY, item(("<f8", (2,), 0, None, False)) + item(None), ()),
        (values.ARRAY, item(("<f8", (2,), 0, None, False)) + item(b"x" * 16), ()),
        (values.ARRAY, item(("<f8", "ab", 0, None, False)) + item(block), (block,)),
        (values.VIEW, item(("d", (2, 2), False)) + item(block), (block,)),
        (values.VIEW, item(("d", (2,), False)) + item(b"x" * 16), ()),
        (values.VIEW, item(("O", (2,), False)) + item(block), (block,)),
        (values.VIEW, item(5), ()), (values.BLOCK, b"\1", (block,)), (values.BLOCK, b"", ()),
        (values.NODE, b"\0", (block,)), (values.CODED, b"", ()), (values.CODED, item(None), ()),
        (values.FAR, b"", (block,)),
        (values.FAR, bytes((values.STR, 0)), ()), (values.FAR, bytes((values.STR, 1)), (block,)),
    ]  # fmt: skip


def test_bytes_that_are_no_value(heap: Heap) -> None:
    home = Roots(heap, "pickle")
    for wrong in wrong_bytes(home):
        with pytest.raises((HeapCorrupt, ValueError)):
            print(wrong, values.decode(home, *wrong))


@settings(FIXTURES, max_examples=500)
@given(
    kind=st.sampled_from(sorted(values._READERS)), data=st.binary(max_size=60), blocks=st.booleans()
)
def test_any_bytes_are_a_value_or_an_error(
    heap: Heap, kind: int, data: bytes, blocks: bool
) -> None:
    held = (heap.put(data or b"x"),) if blocks else ()
    with error_or_value():
        values.decode(Roots(heap), kind, data, held)


@settings(FIXTURES, max_examples=300)
@given(value=HASHABLE, at=st.integers(0), new=st.integers(0, 255), cut=st.integers(0))
def test_spoilt_bytes_are_a_value_or_an_error(
    heap: Heap, value: Any, at: int, new: int, cut: int
) -> None:
    kind, data, blocks = values.encode(Roots(heap), value)
    spoilt = bytearray(data)
    if spoilt:
        spoilt[at % len(spoilt)] = new
    with error_or_value():
        values.decode(Roots(heap), kind, bytes(spoilt[: len(spoilt) - cut % 3]), blocks)
