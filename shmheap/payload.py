"""How a value travels to another process: what is small through a pipe, the rest where it lies.

    value --pack--> Parcel.body --pipe--> body --unpack--> value
                    Parcel.leases: what the body names; the sender ends them with the task

    body   = length of the head | head | stream
    head   = handles and counts, by marshal; empty where the stream is all there is
    stream = pickle, protocol 5

Large buffers are not in the stream. One that lies in an open heap, found by its address, travels as
a handle: shared. Any other is copied into the pool's heap once, and the copy is the receiver's
alone. Pickle gives bytes and bytearrays no buffers of their own; but it hands large ones to its
file one by one, so that a stream of many bytes is written into a block once and read from there.

Nothing here runs once per small object: a pickler calls back for buffers and for exact arrays and
blocks, and for nothing else.
"""

from __future__ import annotations

import copyreg
import marshal
import pickle
import struct
import sys
import warnings
from contextlib import suppress
from multiprocessing.reduction import ForkingPickler
from typing import TYPE_CHECKING, Any, NamedTuple, overload

from shmheap import arrays
from shmheap.block import Block, Lease, rebuild
from shmheap.errors import HeapError, HeapFull
from shmheap.heap import Heap, ask_open_heaps

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from typing import TypeVar

    import numpy as np
    from numpy.typing import NDArray
    from typing_extensions import Buffer

    A = TypeVar("A", bound=NDArray[Any])
    T = TypeVar("T")

__all__ = [
    "MIN_BYTES",
    "PROTOCOL",
    "Carried",
    "Counts",
    "Packer",
    "Packing",
    "Parcel",
    "Pieces",
    "block_under",
    "discard",
    "readonly",
    "rebuild_array",
    "rebuild_memoryview",
    "reducers",
    "release_all",
    "slice_under",
    "unpack",
]

MIN_BYTES = 32768
"""From this size on a block, a lease and two pins cost less than two copies through a pipe, in each
run of `tools/bench.py pool`; below 16 KiB runs disagree. Its table: docs/reference/bench.md."""

EXTRA: dict[type, Any] = ForkingPickler._extra_reducers  # type: ignore[attr-defined]
"""Reducers that multiprocessing and its users have registered."""
LENGTH = struct.Struct("<I")
NO_HEAD = LENGTH.pack(0)
PROTOCOL = 5
BUFFERS = "biufcSU"
"""The kinds of dtypes of which NumPy always gives pickle a buffer; not of times, for one."""


class Counts(NamedTuple):
    """What became of the buffers of a value."""

    handle_bytes: int = 0
    """In blocks already: sent by handle."""
    copied_bytes: int = 0
    """Copied into a block first."""
    small_buffers: int = 0
    small_bytes: int = 0
    """Below the threshold: through the pipe."""
    refused_bytes: int = 0
    """Through the pipe, because the heap had no room."""


NONE = Counts()
NOTHING = list(NONE)
NO_LEASES: tuple[Lease, ...] = ()


class Head(NamedTuple):
    """What a stream refers to, in plain tuples, lists and numbers: marshal writes it."""

    stream: tuple[Any, ...] | None
    """The slice in which the stream is, if it is not in the body."""
    buffers: Sequence[tuple[Any, ...]]
    """(Handle, start, nbytes): slices of blocks, in the order in which the stream asks for them."""
    handles: Sequence[tuple[Any, ...]]
    """Further handles that are inside the stream."""
    counts: Sequence[int]


class Parcel(NamedTuple):
    """A value on its way, and what the sender has to end when nobody needs it any more."""

    body: bytes
    leases: Sequence[Lease] = NO_LEASES
    counts: Counts = NONE

    def release(self) -> None:
        """End what nobody took. Idempotent."""
        release_all(self.leases)


class Packer:
    """Packs values for the other processes of a heap.

    Args:
        heap: Where plain buffers are copied to.
        min_bytes: The size from which on they are.
        strict: Raise HeapFull where there is no room, instead of sending through the pipe.
        views: Send every view of a heap as a handle, however small. Results are not: an array of
            ten elements shall not keep the block of a million alive of which it is a slice.
        stream_bytes: A stream of more bytes goes into a block.

    Raises ValueError if min_bytes is less than 1: no block is empty.
    """

    def __init__(
        self,
        heap: Heap,
        min_bytes: int = MIN_BYTES,
        *,
        strict: bool = False,
        views: bool = True,
        stream_bytes: int = MIN_BYTES,
    ) -> None:
        if min_bytes < 1:
            raise ValueError(f"min_bytes is at least 1, not {min_bytes}")
        if not isinstance(heap, Heap):
            raise TypeError(f"heap is a shmheap.Heap or None, not {type(heap).__name__!r}")
        if heap.closed:
            raise ValueError("the heap is closed")
        self.heap = heap
        self.min_bytes = min_bytes
        self.strict = strict
        self.views = views
        self.stream_bytes = stream_bytes
        self._spare: list[Packing] = []
        """One for each thread that was here at once."""

    def pickler(self, file: Pieces, packing: Packing) -> pickle.Pickler:
        """Return what writes a value to a file, and asks the packing about what is large."""
        return _Pickler(file, packing)

    def pack(self, value: object, *, strict: bool | None = None) -> Parcel:
        """Return a value as a parcel.

        Raises what pickling it raises, and HeapFull if strict; nothing is kept then.
        Cost: a pickling, and for each buffer a lease, or a block and a copy without the GIL.
        """
        packing = self._take_spare()
        packing.strict = self.strict if strict is None else strict
        try:
            parcel = packing.pack(value)
        except BaseException:
            packing.pickler = None
            release_all(packing.leases)
            raise
        if parcel.leases is NO_LEASES:
            self._spare.append(packing)
        return parcel

    def _take_spare(self) -> Packing:
        try:
            packing = self._spare.pop()
        except IndexError:
            return Packing(self)
        return packing if packing.knows_all_reducers() else Packing(self)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_spare": []}

    def close(self) -> None:
        """Keep nothing that would keep the heap until a collection."""
        for packing in self._spare:
            packing.pickler = None
        self._spare.clear()


class Packing:
    """One value that is being packed: what its pickler calls, and what it left behind.

    As good as new after a small value, and used again.
    """

    def __init__(self, packer: Packer) -> None:
        self.packer = packer
        self.strict = False
        self.written = Pieces()
        self.reducers = EXTRA.copy(), "numpy" in sys.modules
        self.pickler: pickle.Pickler | None = packer.pickler(self.written, self)
        self.leases: list[Lease] = []
        self.buffers: list[tuple[Any, ...]] = []
        self.handles: list[tuple[Any, ...]] = []
        self.counts = NOTHING.copy()
        self.copies: list[Block] = []
        """Made here, and alive until the stream is written."""
        self.found: tuple[Block, int] | None = None
        """Where the next buffer lies, if it is known, and known to be worth a handle."""

    def knows_all_reducers(self) -> bool:
        """Whether there are still those of which its pickler's table was made."""
        return self.reducers == (EXTRA, "numpy" in sys.modules)

    def pack(self, value: object) -> Parcel:
        """Return it as a parcel."""
        assert self.pickler is not None
        written = self.written
        self.pickler.dump(value)
        is_small = len(written) == 1 and len(written[0]) <= self.packer.stream_bytes
        if is_small and not self.leases and self.counts == NOTHING:
            self.pickler.clear_memo()
            return Parcel(NO_HEAD + written.pop())
        self.pickler = None  # which has methods of this: a circle that would keep the value
        pieces = [raw.raw() if type(raw) is pickle.PickleBuffer else raw for raw in written]
        moved = self.stream_in_block(pieces, sum(map(len, pieces)))
        head = marshal.dumps((moved, self.buffers, self.handles, self.counts))
        body = b"".join((LENGTH.pack(len(head)), head, *pieces))
        return Parcel(body, self.leases, Counts(*self.counts))

    def stream_in_block(self, pieces: list[Any], nbytes: int) -> tuple[Any, ...] | None:
        """Write a large stream into a block, if there was room for what is in none so far."""
        if nbytes <= self.packer.stream_bytes or self.counts[4]:
            return None
        block = self.unless_full(nbytes, lambda heap: heap.alloc(nbytes, zero=False))
        if block is None:
            return None
        end = 0
        with memoryview(block) as view:
            for piece in pieces:
                start, end = end, end + len(piece)
                view[start:end] = piece
        pieces.clear()
        self.counts[1] += nbytes
        return self.slice_of(block, 0, nbytes)

    # What the pickler calls

    def buffer(self, buffer: pickle.PickleBuffer) -> bool:
        """Take a buffer out of the stream: whether it stays in."""
        raw = buffer.raw()
        found, self.found = self.found, None
        if found is None:
            found = ask_open_heaps(lambda heap: heap._block_of(raw))
            if found is not None and not self.worth_a_handle(found[0], raw.nbytes):
                found = None
        if found is not None:
            block, start = found
            self.counts[1 if block in self.copies else 0] += raw.nbytes
        elif raw.nbytes < self.packer.min_bytes:
            self.counts[2] += 1
            self.counts[3] += raw.nbytes
            return True
        elif (copy := self.unless_full(raw.nbytes, lambda heap: heap.put(raw))) is None:
            return True
        else:
            block, start = copy, 0
            self.counts[1] += raw.nbytes
        self.buffers.append(self.slice_of(block, start, raw.nbytes))
        return False

    def array(self, array: NDArray[Any]) -> Any:
        """Reduce an exact array: to a slice of a block and its form, or as NumPy does."""
        flags, dtype = array.flags, array.dtype
        if dtype.hasobject or array.nbytes == 0:
            return array.__reduce_ex__(PROTOCOL)
        if flags.forc and dtype.kind in BUFFERS:
            raw: Any = array if flags.c_contiguous else array.T
            found = ask_open_heaps(lambda heap: heap._block_of(raw))
            if found is not None and self.worth_a_handle(found[0], array.nbytes):
                self.found = found
                strides = None if flags.c_contiguous else array.strides
                form = arrays.name_of(dtype), array.shape, 0, strides
                return rebuild_array, (pickle.PickleBuffer(raw), *form)
            if flags.writeable:
                return array.__reduce_ex__(PROTOCOL)
        elif (block := block_under(array)) is not None and self.worth_a_handle(block, array.nbytes):
            raw, form = slice_under(array, block)
            self.found = ask_open_heaps(lambda heap: heap._block_of(raw))
            return rebuild_array, (pickle.PickleBuffer(raw), *form)
        large = array.nbytes >= self.packer.min_bytes
        if large and (copy := self.copy(array)) is not None:
            return self.array(copy)
        # As an older protocol has it: one that was read-only here is writable there, as it is in
        # any other pool. It is a copy of its own.
        return array.__reduce_ex__(2)

    def copy(self, array: NDArray[Any]) -> NDArray[Any] | None:
        """Copy an array into the heap; None if it is full and that is no error."""
        copy = self.unless_full(array.nbytes, lambda heap: heap.array(array))
        if copy is not None:
            block = block_under(copy)
            assert block is not None
            self.copies.append(block)
        return copy

    def view(self, view: memoryview) -> Any:
        """Reduce a memoryview, which pickle itself does not."""
        if not view.c_contiguous:  # what goes are its bytes, and they come as rows
            raise BufferError("a memoryview that is not contiguous row by row cannot be sent")
        return rebuild_memoryview, (pickle.PickleBuffer(view), view.format, view.shape)

    def block(self, block: Block) -> Any:
        """Reduce a block: as ever, but we keep the lease in mind."""
        lease = block.lease()
        self.leases.append(lease)
        self.handles.append(tuple(lease.handle))
        return lease.__reduce__()

    # What they need

    def worth_a_handle(self, block: Block, nbytes: int) -> bool:
        """Whether so many bytes of a block are sent as a handle, and not as a copy."""
        packer = self.packer
        return packer.views or nbytes >= min(packer.min_bytes, block.nbytes / 2)

    def unless_full(self, nbytes: int, make: Callable[[Heap], T]) -> T | None:
        """What is made in the heap; None if it is full and that is no error."""
        try:
            return make(self.packer.heap)
        except HeapFull as full:
            if self.strict:
                raise
            self.counts[4] += nbytes
            warnings.warn(f"{nbytes} bytes go through a pipe: {full}", RuntimeWarning, stacklevel=2)
            return None

    def slice_of(self, block: Block, start: int, nbytes: int) -> tuple[Any, ...]:
        """Return a handle of a part of a block, with a lease of its own."""
        lease = block.lease()
        self.leases.append(lease)
        return tuple(lease.handle), start, nbytes


def block_under(array: NDArray[Any]) -> Block | None:
    """Return the block of an open heap in which an array lies."""
    extent = arrays.extent(array)
    return ask_open_heaps(lambda heap: heap._block_at(*extent))


class Pieces(list[Any]):
    """A file for a pickler: it gets small things in one piece, and large ones as they are."""

    write = list.append


class _Pickler(ForkingPickler):
    """multiprocessing's, with a third kind of callback."""

    def __init__(self, file: Pieces, packing: Packing) -> None:
        pickle.Pickler.__init__(self, file, PROTOCOL, buffer_callback=packing.buffer)
        self.dispatch_table = reducers(packing)


class _Reducers(dict[type, Any]):
    """A table over that of copyreg: asked in C, and not copied, for some packages fill it."""

    __missing__ = staticmethod(copyreg.dispatch_table.__getitem__)


def reducers(packing: Packing) -> dict[type, Callable[[Any], Any]]:
    """Return what a pickler is to do with which types: multiprocessing's way, or ours."""
    table = _Reducers(EXTRA)
    table[Block] = packing.block
    table[memoryview] = packing.view
    if (numpy := sys.modules.get("numpy")) is not None:
        table[numpy.ndarray] = packing.array
    return table


def unpack(body: Buffer, start: int = 0) -> tuple[Any, Counts]:
    """Return the value of a parcel's body, and what became of its buffers.

    Args:
        body: The bytes.
        start: Where in them it begins.

    Raises StaleHandle if a block of it is gone, and what unpickling raises.
    Cost: an unpickling, and for each buffer a pin.
    """
    head, stream = _head_of(body, start)
    if head is None:
        return pickle.loads(stream), NONE
    try:
        buffers = [_take(*buffer) for buffer in head.buffers]
        if head.stream is not None:
            stream = _take(*head.stream)
        return pickle.loads(stream, buffers=buffers), Counts(*head.counts)
    except BaseException:
        _release(head)
        raise


class Carried:
    """A value that a process gets as it starts: as it is if that is forked, packed if not.

    Args:
        value: The value.
        packer: Who packs it; None where it has arrived.
    """

    def __init__(self, value: Any, packer: Packer | None = None) -> None:
        self.value = value
        self._packer = packer
        self._parcels: list[Parcel] = []

    def __reduce__(self) -> tuple[Callable[[bytes], Carried], tuple[bytes]]:
        assert self._packer is not None, "it goes one way"
        self._parcels.append(self._packer.pack(self.value))
        return _arrived, (self._parcels[-1].body,)

    def release(self) -> None:
        """End what no process took, and forget the value. Idempotent."""
        for parcel in self._parcels:
            parcel.release()
        self.value = self._packer = None


def _arrived(body: bytes) -> Carried:
    return Carried(unpack(body)[0])


def discard(body: Buffer, start: int = 0) -> None:
    """End the leases of a parcel that nobody unpacks."""
    head, _ = _head_of(body, start)
    if head is not None:
        _release(head)


def _head_of(body: Buffer, start: int) -> tuple[Head | None, memoryview]:
    (nbytes,) = LENGTH.unpack_from(body, start)
    start += LENGTH.size
    end = start + nbytes
    view = memoryview(body)
    return (Head(*marshal.loads(view[start:end])) if nbytes else None), view[end:]


def _take(handle: tuple[Any, ...], start: int, nbytes: int) -> memoryview:
    return memoryview(rebuild(*handle))[start : start + nbytes]


def _release(head: Head) -> None:
    slices = [*head.buffers, *([head.stream] if head.stream else [])]
    release_all(Lease(handle) for handle in (*(named for named, _, _ in slices), *head.handles))


def release_all(leases: Iterable[Lease]) -> None:
    """End leases, as far as their heaps are still in use."""
    for lease in leases:
        with suppress(HeapError, ValueError):
            lease.release()


# Views


@overload
def readonly(value: A) -> A: ...
@overload
def readonly(value: Buffer) -> memoryview: ...
def readonly(value: Any) -> Any:
    """Return a view of an array, or of anything bytes-like, through which nobody writes.

    Sent to another process it arrives as read-only there, too. That is a matter of manners: the
    memory can be written to by whoever has it under another name. What does not lie in a heap is
    copied on its way, and the copy of an array is the receiver's own to write to.

    Cost: O(1).
    """
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.ndarray):
        view = value.view()
        view.flags.writeable = False
        return view
    return memoryview(value).toreadonly()


def slice_under(array: NDArray[Any], block: Block) -> tuple[memoryview, tuple[Any, ...]]:
    """Return the bytes of a block that an array spans, and what rebuild_array needs besides."""
    first, nbytes = arrays.extent(array)
    start = first - arrays.address(arrays.bytes_of(block))
    raw = memoryview(block)[start : start + nbytes]
    if not array.flags.writeable:
        raw = raw.toreadonly()
    offset = arrays.address(array) - first
    return raw, (arrays.name_of(array.dtype), array.shape, offset, array.strides)


def rebuild_memoryview(raw: Buffer, format: str, shape: tuple[int, ...]) -> memoryview:
    """Return a view of these bytes; one of no bytes has no form that cast would give it."""
    flat = memoryview(raw)
    return flat.cast(format, shape) if flat.nbytes else flat  # type: ignore[call-overload]


def rebuild_array(
    raw: Buffer,
    dtype: str | np.dtype[Any],
    shape: tuple[int, ...],
    offset: int,
    strides: tuple[int, ...] | None,
) -> NDArray[Any]:
    """Return an array over these bytes."""
    import numpy

    kind = arrays.dtype_of(dtype) if isinstance(dtype, str) else dtype
    return numpy.ndarray(shape, kind, arrays.bytes_of(raw), offset, strides)
