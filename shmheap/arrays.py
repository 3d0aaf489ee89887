"""NumPy arrays in blocks: what describes one, and how it is made again without a copy.

    array --form--> (dtype, shape, offset, strides, readonly) and its block --array--> array

An array that lies in a block of the heap, or a view of one, shares it; any other is copied into a
new block, once. A dtype is written as NumPy's own files have it: its str, or the list of its
fields. NumPy is imported only where arrays are.
"""

from __future__ import annotations

import ast
import functools
from typing import TYPE_CHECKING, Any

from shmheap._core import Block

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from shmheap._core import HeapBase

    Form = tuple[str, tuple[int, ...], int, tuple[int, ...] | None, bool]

__all__ = ["Unfit", "array", "block_under", "dtype_of", "form", "is_scalar", "scalar", "text_of"]


class Unfit(Exception):  # noqa: N818 - the name says what it is
    """There is no form for this value, and why not."""


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
    offset = _address(array) - _address(_bytes_of(block))
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
    # A memoryview between them: numpy.ndarray keeps its buffer, but not the export.
    found: NDArray[Any] = numpy.ndarray(shape, dtype, memoryview(block), offset, strides)
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
    first = end = _address(array)
    for n, stride in zip(array.shape, array.strides, strict=True):
        first += min((n - 1) * stride, 0)
        end += max((n - 1) * stride, 0)
    return heap._block_at(first, end + array.itemsize - first)


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


def _copied(array: NDArray[Any], heap: HeapBase) -> tuple[NDArray[Any], Block]:
    import numpy

    # What lies between the fields of a record is not copied: it shall not show what was there.
    block = heap.alloc(array.nbytes, zero=array.dtype.names is not None)
    order: Any = "F" if array.flags.f_contiguous and not array.flags.c_contiguous else "C"
    copy: NDArray[Any] = numpy.ndarray(array.shape, array.dtype, memoryview(block), order=order)
    copy[...] = array
    return copy, block


def _bytes_of(block: Block) -> NDArray[Any]:
    import numpy

    found: NDArray[Any] = numpy.frombuffer(memoryview(block), numpy.uint8)
    return found


def _address(array: NDArray[Any]) -> int:
    address: int = array.__array_interface__["data"][0]
    return address
