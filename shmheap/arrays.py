"""NumPy arrays in blocks: what describes one, and how it is made again without a copy.

    array --form--> (dtype, shape, offset, strides, readonly) and its block --array--> array
    ArrayHeap: empty, zeros, full, array, asarray

An array that lies in a block of the heap, or a view of one, shares it; any other is copied into a
new block, once. A dtype is written as NumPy's own files have it: its str, or the list of its
fields. NumPy is imported only where arrays are.
"""

from __future__ import annotations

import ast
import functools
import math
import operator
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal, SupportsIndex

from shmheap._core import Block, HeapBase

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike, DTypeLike, NDArray
    from typing_extensions import Buffer

    Form = tuple[str, tuple[int, ...], int, tuple[int, ...] | None, bool]
    Shape = SupportsIndex | Iterable[SupportsIndex]

__all__ = [
    "ArrayHeap",
    "Unfit",
    "address",
    "array",
    "block_under",
    "bytes_of",
    "dtype_of",
    "extent",
    "form",
    "is_scalar",
    "name_of",
    "scalar",
    "text_of",
]


class Unfit(Exception):  # noqa: N818 - the name says what it is
    """There is no form for this value, and why not."""


class ArrayHeap(HeapBase):
    """A heap that makes NumPy arrays: plain ones, whose memory is a block of it.

    The block lives as long as the array or a view of it. An array of no bytes needs no block.
    """

    def empty(
        self, shape: Shape, dtype: DTypeLike = float, order: Literal["C", "F"] = "C"
    ) -> NDArray[Any]:
        """Return an array whose elements are arbitrary: whatever was in that memory before.

        Args:
            shape: The array's: an int, or one for each dimension.
            dtype: Anything that NumPy takes for one, without objects.
            order: Row by row ("C") or column by column ("F").

        Raises ImportError without NumPy, ValueError for dtypes with objects, and what alloc raises.

        Cost: alloc's with zero=False, and two microseconds of NumPy.
        """
        return _new(self, shape, dtype, order, zero=False)

    def zeros(
        self, shape: Shape, dtype: DTypeLike = float, order: Literal["C", "F"] = "C"
    ) -> NDArray[Any]:
        """Return an array of zeros. Also by the name of ndarray.

        Args:
            shape: The array's: an int, or one for each dimension.
            dtype: Anything that NumPy takes for one, without objects.
            order: Row by row ("C") or column by column ("F").

        Raises what empty raises.

        Cost: alloc's, and two microseconds of NumPy.
        """
        return _new(self, shape, dtype, order, zero=True)

    ndarray = zeros

    def full(
        self,
        shape: Shape,
        fill_value: ArrayLike,
        dtype: DTypeLike | None = None,
        order: Literal["C", "F"] = "C",
    ) -> NDArray[Any]:
        """Return an array of one value, or of several that NumPy can broadcast to that shape.

        Args:
            shape: The array's: an int, or one for each dimension.
            fill_value: What each element is.
            dtype: Anything that NumPy takes for one, without objects. None: the value's.
            order: Row by row ("C") or column by column ("F").

        Raises what empty raises.

        Cost: that of empty, and filling it.
        """
        import numpy

        kind = numpy.asarray(fill_value).dtype if dtype is None else dtype
        found = self.empty(shape, kind, order)
        found[...] = fill_value
        return found

    def array(
        self,
        object: ArrayLike,
        dtype: DTypeLike | None = None,
        *,
        copy: bool | None = True,
        order: Literal["K", "C", "F"] = "K",
    ) -> NDArray[Any]:
        """Return an array of what NumPy can make one of.

        Args:
            object: An array, or numbers in nested sequences, or the like.
            dtype: Anything that NumPy takes for one, without objects. None: what NumPy chooses.
            copy: True: always a new one. None: only if it is not such an array in this heap
                already. False: never, but a ValueError.
            order: Of a copy: row by row ("C"), column by column ("F"), or as the object is ("K").

        Raises what empty raises.

        Cost: that of empty, and a copy; without one that of finding the block.
        """
        import numpy

        source: NDArray[Any] = numpy.asarray(object, dtype)
        _check_dtype(source.dtype)
        if source.nbytes == 0:
            return source.copy(order) if copy else source
        if not copy and block_under(source, self) is not None:
            return source
        if copy is False:
            raise ValueError("it does not lie in the heap: a copy is needed")
        return _copied(source, self, order)[0]

    def asarray(self, object: ArrayLike, dtype: DTypeLike | None = None) -> NDArray[Any]:
        """Return an array in this heap of what NumPy can make one of: itself, if it is one.

        Args:
            object: An array, or numbers in nested sequences, or the like.
            dtype: Anything that NumPy takes for one, without objects. None: what NumPy chooses.

        Raises what empty raises.

        Cost: that of array(object, dtype, copy=None).
        """
        return self.array(object, dtype, copy=None)


def form(array: NDArray[Any], heap: HeapBase) -> tuple[Form, Block | None]:
    """Describe an array; its block is None if it has no bytes.

    Raises Unfit for dtypes that cannot be told in words, such as objects.
    """
    text = text_of(array.dtype)
    if array.nbytes == 0:
        return (text, array.shape, 0, None, False), None
    block = block_under(array, heap)
    readonly = False
    if block is None:
        array, block = _copied(array, heap)
    else:
        readonly = not array.flags.writeable
    offset = address(array) - address(bytes_of(block))
    strides = None if array.flags.c_contiguous else array.strides
    return (text, array.shape, offset, strides, readonly), block


def array(form: Form, block: Block | None) -> NDArray[Any]:
    """Return the array of that form: a view of the block, which it keeps.

    Raises ValueError or TypeError where the form does not fit the block.
    """
    import numpy

    text, shape, offset, strides, readonly = form
    dtype = dtype_of(text)
    if block is None:
        if dtype.itemsize and 0 not in shape:
            raise ValueError(f"an array of shape {shape} has bytes")
        return numpy.empty(shape, dtype)
    found: NDArray[Any] = numpy.ndarray(shape, dtype, bytes_of(block), offset, strides)
    if readonly:
        found.flags.writeable = False
    return found


def is_scalar(value: Any) -> bool:
    """Whether a value is a NumPy scalar, and nothing that is made of one."""
    kind = type(value)
    return (
        kind.__module__ == "numpy"
        and getattr(value, "dtype", kind) is not kind
        and (getattr(value.dtype, "type", None) is kind)
    )


def scalar(text: str, data: bytes) -> Any:
    """Return the NumPy scalar of that dtype and those bytes."""
    import numpy

    dtype = dtype_of(text)
    if len(data) != dtype.itemsize:
        raise ValueError(f"{len(data)} bytes for a {dtype}")
    return numpy.ndarray((), dtype, bytearray(data))[()]


def block_under(array: NDArray[Any], heap: HeapBase) -> Block | None:
    """Return the block of the heap in which an array lies; None if it lies in none.

    Found by its address: whoever made it, and whatever keeps its memory.
    """
    return heap._block_at(*extent(array))


def extent(array: NDArray[Any]) -> tuple[int, int]:
    """Return the address of the first byte of an array's elements, and how many bytes they span."""
    first = end = address(array)
    for n, stride in zip(array.shape, array.strides, strict=True):
        first += min((n - 1) * stride, 0)
        end += max((n - 1) * stride, 0)
    return first, end + array.itemsize - first


@functools.lru_cache(maxsize=256)
def text_of(dtype: np.dtype[Any]) -> str:
    """Write a dtype so that dtype_of makes the same again. Raises Unfit if that cannot be."""
    try:
        text = dtype.str if dtype.names is None else repr(dtype.descr)
        again = dtype_of(text)
    except (ValueError, TypeError) as error:
        raise Unfit(f"its dtype is {dtype}: {error}") from error
    if again != dtype or again.type is not dtype.type:
        raise Unfit(f"its dtype is {dtype}")
    return text


@functools.lru_cache(maxsize=256)
def name_of(dtype: np.dtype[Any]) -> str | np.dtype[Any]:
    """Return the text of a dtype, or what it is if there is none: shorter to pickle."""
    try:
        return text_of(dtype)
    except Unfit:
        return dtype


@functools.lru_cache(maxsize=256)
def dtype_of(text: str) -> np.dtype[Any]:
    """Read a dtype. Raises ValueError if there is none of that text, or it has objects."""
    import numpy
    from numpy.lib.format import descr_to_dtype

    try:
        found: np.dtype[Any] = (
            descr_to_dtype(ast.literal_eval(text)) if text[:1] == "[" else numpy.dtype(text)
        )
    except (TypeError, SyntaxError, MemoryError, RecursionError) as error:
        raise ValueError(f"no dtype: {text!r}") from error
    if found.hasobject:
        raise ValueError("objects cannot be shared")
    return found


def _new(
    heap: HeapBase, shape: Shape, dtype: DTypeLike, order: Literal["C", "F"], zero: bool
) -> NDArray[Any]:
    import numpy

    kind: np.dtype[Any] = numpy.dtype(dtype)
    lengths = _lengths(shape)
    _check_dtype(kind)
    if kind.itemsize == 0:
        kind = numpy.empty(0, kind).dtype  # "S" is "S1" there
    nbytes = math.prod(lengths) * kind.itemsize
    if nbytes == 0:
        return numpy.empty(lengths, kind, order)
    return numpy.ndarray(lengths, kind, bytes_of(heap.alloc(nbytes, zero=zero)), order=order)


def _check_dtype(dtype: np.dtype[Any]) -> None:
    if dtype.hasobject:
        raise ValueError("objects cannot be shared: choose a dtype without object")


def _lengths(shape: Shape) -> tuple[int, ...]:
    try:
        lengths = [operator.index(shape)]  # type: ignore[arg-type]
    except TypeError:
        lengths = [operator.index(n) for n in shape]  # type: ignore[union-attr]
    if min(lengths, default=0) < 0:
        raise ValueError(f"a length below 0: {lengths}")
    return tuple(lengths)


def _copied(
    array: NDArray[Any], heap: HeapBase, order: Literal["K", "C", "F"] = "K"
) -> tuple[NDArray[Any], Block]:
    import numpy

    # What lies between the fields of a record is not copied: it shall not show what was there.
    block = heap.alloc(array.nbytes, zero=array.dtype.names is not None)
    if order == "K":
        order = "F" if array.flags.f_contiguous and not array.flags.c_contiguous else "C"
    copy: NDArray[Any] = numpy.ndarray(array.shape, array.dtype, bytes_of(block), order=order)
    copy[...] = array
    return copy, block


def bytes_of(buffer: Buffer) -> NDArray[Any]:
    """Return bytes as an array, which keeps them exported.

    What is given to numpy.ndarray as its buffer must be one: of a block, and of a memoryview of a
    block, that keeps the handle only, and the heap is unmapped under it when it is closed.
    """
    import numpy

    found: NDArray[Any] = numpy.frombuffer(buffer, numpy.uint8)  # type: ignore[call-overload]
    return found


def address(array: NDArray[Any]) -> int:
    """Return where the first element of an array is."""
    found: int = array.__array_interface__["data"][0]
    return found
