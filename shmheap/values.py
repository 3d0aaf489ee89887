"""Values as bytes: what shared lists and dicts and named roots hold, and how it comes back.

A value is (kind, bytes, blocks): its encoded bytes, and the blocks that it names. The core reads
and writes the kinds up to BYTES itself; whatever else goes through encode and decode.

    item     kind:1 length:varint bytes      a value inside another: of a tuple, a datetime, ...
    block    varint                          its index among the blocks of the whole value
    FAR      kind:1 levels:1                 bytes longer than BIG_BYTES lie in the last block, and
                                             of more than MAX_BLOCKS blocks each level is a box of
                                             up to MAX_BLOCKS

Only exact types are taken, so that nothing loses its type on the way: a subclass, like everything
that has no form here, needs a codec. What a codec wrote is read by a codec of that name only.
"""

from __future__ import annotations

import datetime as dt
import io
import itertools
import pickle
import struct
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol, TypeAlias

from shmheap import _core, arrays
from shmheap._core import Block
from shmheap.arrays import Unfit
from shmheap.errors import HeapCorrupt

if TYPE_CHECKING:
    from shmheap._core import HeapBase

__all__ = [
    "BIG_BYTES",
    "AnyCodec",
    "Codec",
    "Encoded",
    "Home",
    "check_codec",
    "decode",
    "encode",
    "open_node",
    "share_as",
    "written",
]

BIG_BYTES: Final = _core.MAX_VALUE_BYTES
"""Longer bytes get a block of their own, of which a view comes back; shorter ones are copied."""

MAX_BLOCKS: Final = _core.MAX_VALUE_BLOCKS
"""Blocks that the core lets one value name."""

NONE, FALSE, TRUE, INT, FLOAT, STR, BYTES = range(7)
BIGINT, COMPLEX, TUPLE, FROZENSET, DATETIME, DATE, TIME, TIMEDELTA, TIMEZONE, ZONE = range(16, 26)
SCALAR, TEXT_SCALAR, ARRAY, VIEW, BLOCK, NODE, CODED, FAR = range(26, 34)

Encoded = tuple[int, bytes, tuple[Block, ...]]
"""What the core keeps of a value."""


class Codec(Protocol):
    """Writes and reads what has no form of its own."""

    @property
    def name(self) -> str:
        """Stored with each value: whoever reads it must have a codec of this name."""

    def dumps(self, value: Any, /) -> bytes:
        """Return the value's bytes, or raise whatever says that it is not taken."""

    def loads(self, data: bytes, /) -> Any:
        """Return the value of those bytes."""


AnyCodec: TypeAlias = Codec | Literal["pickle"] | None


class Home(Protocol):
    """Where a value is: a shared list or dict, or the roots of a heap."""

    @property
    def heap(self) -> HeapBase:
        """The heap that its blocks are of."""

    @property
    def codec(self) -> AnyCodec:
        """For what has no form of its own."""


class Shared(Home, Protocol):
    """A shared list or dict, as containers.py has them."""

    @classmethod
    def _new(cls, heap: HeapBase, codec: AnyCodec) -> Any:
        """An empty one."""

    @classmethod
    def _of(cls, block: Block, heap: HeapBase, codec: AnyCodec) -> Any:
        """The one behind a node block."""

    @property
    def _block(self) -> Block:
        """That node block."""


_node_types: dict[int, type[Shared]] = {}
_plain_types: dict[type, type[Shared]] = {}


def share_as(shared: type[Shared], node_kind: int, plain: type) -> None:
    """Say what is behind a node of that kind, and what a plain collection becomes."""
    _node_types[node_kind] = _plain_types[plain] = shared
    _WRITERS[shared] = lambda writer, value: (NODE, writer.hold(value._block))
    _WRITERS[plain] = lambda writer, value: writer.value(writer.shared(value))


def encode(home: Home, value: object) -> Encoded:
    """Return a value's kind, bytes and blocks.

    A plain list or dict, also inside others, becomes a shared one; cycles stay cycles.

    Raises:
        TypeError: It has no form, and the codec does not take it.
        HeapFull: There is no room for what gets a block of its own.
    """
    kind, data, blocks = written(home, value)
    if len(data) > BIG_BYTES or len(blocks) > MAX_BLOCKS:
        return _far(home, kind, data, blocks)
    return kind, data, blocks


def written(home: Home, value: object) -> Encoded:
    """Return kind, bytes and blocks however many there are: the same for what is the same value."""
    writer = _Writer(home)
    kind, data = writer.value(value)
    return kind, data, tuple(writer.blocks)


def decode(home: Home, kind: int, data: bytes, blocks: tuple[Block, ...]) -> Any:
    """Return the value that encode made these of.

    Raises:
        TypeError: It was written by a codec that the home does not have.
        HeapCorrupt: They are no value's.
    """
    reader = _Reader(home, blocks)
    try:
        return reader.value(kind, data)
    except (ValueError, TypeError, LookupError, OverflowError, struct.error) as error:
        if reader.outside or home.heap.closed:
            raise
        raise HeapCorrupt(f"a value of kind {kind} is damaged: {error}") from error


def check_codec(codec: AnyCodec) -> AnyCodec:
    """Return it. Raises TypeError or ValueError if it is no codec."""
    if isinstance(codec, str) and codec != "pickle":
        raise ValueError(f'a codec is "pickle" or an object with name, dumps, loads: not {codec!r}')
    if codec is None or codec == "pickle":
        return codec
    found = [getattr(codec, name, None) for name in ("name", "dumps", "loads")]
    if not isinstance(found[0], str) or not all(map(callable, found[1:])):
        raise TypeError(f"a codec has name, dumps and loads: {type(codec).__name__} has not")
    return codec


def open_node(home: Home, block: Block) -> Any:
    """Return the shared list or dict that a node block is."""
    shared = _node_types.get(block._node_kind)
    if shared is None:
        raise ValueError(f"{block!r} is no shared list or dict")
    return shared._of(block, home.heap, home.codec)


# Plain lists and dicts become shared ones


class _Sharing:
    """Replaces each plain list and dict in a value by a shared one, the same by the same."""

    def __init__(self, home: Home) -> None:
        self._home = home
        self._made: dict[int, tuple[Any, Any]] = {}  # by id(), with what keeps that its own
        self._todo: list[tuple[Any, Any]] = []

    def all(self, value: object) -> object:
        """The value with all that is in it, however deep."""
        found = self._one(value)
        while self._todo:
            plain, new = self._todo.pop()
            if isinstance(plain, dict):
                new.update({key: self._one(item) for key, item in plain.items()})
            else:
                new.extend(list(map(self._one, plain)))
        return found

    def _one(self, value: Any) -> Any:
        if type(value) is tuple:
            return tuple(map(self._one, value))
        kind = _plain_types.get(type(value))
        if kind is None:
            return value
        if id(value) not in self._made:
            self._made[id(value)] = value, kind._new(self._home.heap, self._home.codec)
            self._todo.append(self._made[id(value)])
        return self._made[id(value)][1]


# Writing


class _Writer:
    """Makes bytes of values, and collects the blocks that they name."""

    def __init__(self, home: Home) -> None:
        self.home = home
        self.blocks: list[Block] = []
        self._sharing: _Sharing | None = None

    def value(self, value: Any) -> tuple[int, bytes]:
        """Kind and bytes."""
        kind = type(value)
        write = _WRITERS.get(kind) or _FOREIGN_WRITERS.get(f"{kind.__module__}.{kind.__name__}")
        if write is None and arrays.is_scalar(value):
            write = _write_scalar
        if write is None:
            return CODED, self.coded(value, "")
        try:
            return write(self, value)
        except Unfit as unfit:
            return CODED, self.coded(value, f" ({unfit})")

    def item(self, value: Any) -> bytes:
        """A value inside another."""
        kind, data = self.value(value)
        return b"%c%b%b" % (kind, _varint(len(data)), data)

    def items(self, *values: Any) -> bytes:
        return b"".join(map(self.item, values))

    def shared(self, plain: object) -> object:
        """A shared list or dict made of a plain one, for all of the value the same of the same."""
        if self._sharing is None:
            self._sharing = _Sharing(self.home)
        return self._sharing.all(plain)

    def hold(self, block: Block) -> bytes:
        """The block's index."""
        self.blocks.append(block)
        return _varint(len(self.blocks) - 1)

    def coded(self, value: object, why: str) -> bytes:
        """By the codec."""
        codec = self.home.codec
        what = f"a value of type {type(value).__module__}.{type(value).__qualname__}{why}"
        if codec is None:
            raise TypeError(
                f"{what} cannot be shared without a codec: "
                'codec="pickle", or an object with name, dumps and loads'
            )
        name = codec if isinstance(codec, str) else codec.name
        try:
            data = self.pickled(value) if isinstance(codec, str) else codec.dumps(value)
        except (MemoryError, RecursionError):
            raise
        except Exception as error:
            raise TypeError(
                f"{what} cannot be shared: the codec {name!r} does not take it: {error}"
            ) from error
        if not isinstance(data, bytes):
            raise TypeError(f"the codec {name!r} returned {type(data).__name__}, not bytes")
        return self.item(name) + data

    def pickled(self, value: object) -> bytes:
        file = io.BytesIO()
        _Pickler(file, self).dump(value)
        return file.getvalue()


Write = Callable[[_Writer, Any], tuple[int, bytes]]


def _write_int(_writer: _Writer, value: int) -> tuple[int, bytes]:
    if -(1 << 63) <= value < 1 << 63:
        return INT, value.to_bytes(8, "little", signed=True)
    return BIGINT, value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)


def _write_bytes(writer: _Writer, value: bytes) -> tuple[int, bytes]:
    return _write_view(writer, memoryview(value)) if len(value) > BIG_BYTES else (BYTES, value)


def _write_view(writer: _Writer, view: memoryview) -> tuple[int, bytes]:
    try:
        memoryview(bytes(view.itemsize)).cast(view.format)  # type: ignore[call-overload]
    except ValueError:
        raise Unfit(f"its format is {view.format!r}") from None
    form = view.format, view.shape, view.readonly
    if view.nbytes == 0:
        return VIEW, writer.items(form, None)
    return VIEW, writer.items(form, _block_of_all(view, writer.home.heap))


def _block_of_all(view: memoryview, heap: HeapBase) -> Block:
    """The block of this heap that a view shows: all its bytes, in their order. Else a copy."""
    if view.c_contiguous:
        found = heap._block_of(view)
        if found is not None and view.nbytes == found[0].nbytes:
            return found[0]
    return heap.put(view if view.c_contiguous else view.tobytes())


def _write_datetime(writer: _Writer, value: dt.datetime) -> tuple[int, bytes]:
    date = _DATE.pack(value.year, value.month, value.day)
    return DATETIME, date + _time_bytes(writer, value)


def _time_bytes(writer: _Writer, value: dt.datetime | dt.time) -> bytes:
    time = _TIME.pack(value.hour, value.minute, value.second, value.microsecond, value.fold)
    return time + writer.item(value.tzinfo)


def _write_timezone(writer: _Writer, value: dt.timezone) -> tuple[int, bytes]:
    return TIMEZONE, writer.items(*value.__getinitargs__())  # type: ignore[attr-defined]


def _write_zone(writer: _Writer, value: Any) -> tuple[int, bytes]:
    if value.key is None:
        raise Unfit("it has no key")
    return ZONE, writer.item(value.key)


def _write_array(writer: _Writer, value: Any) -> tuple[int, bytes]:
    form, block = arrays.form(value, writer.home.heap)
    return ARRAY, writer.items(form, block)


def _write_scalar(writer: _Writer, value: Any) -> tuple[int, bytes]:
    text = arrays.text_of(value.dtype)
    if isinstance(value, str | bytes):  # NumPy would lose zeros at their end
        plain = str.__str__(value) if isinstance(value, str) else bytes(value)
        return TEXT_SCALAR, writer.items(text[1], plain)
    return SCALAR, writer.item(text) + value.tobytes()


def _far(home: Home, kind: int, data: bytes, blocks: tuple[Block, ...]) -> Encoded:
    """Bytes in a block, and blocks in as many levels of boxes as are needed."""
    held = [*blocks, home.heap.put(data)]
    levels = 0
    while len(held) > MAX_BLOCKS:
        parts = (held[at : at + MAX_BLOCKS] for at in range(0, len(held), MAX_BLOCKS))
        held = [home.heap._box_new(tuple(part), home) for part in parts]
        levels += 1
    return FAR, bytes((kind, levels)), tuple(held)


_DATE = struct.Struct("<HBB")
_TIME = struct.Struct("<BBBIB")
_TIMEDELTA = struct.Struct("<iII")
_COMPLEX = struct.Struct("<dd")
_FLOAT = struct.Struct("<d")

_WRITERS: dict[type, Write] = {
    type(None): lambda _w, _v: (NONE, b""),
    bool: lambda _w, v: (TRUE if v else FALSE, b""),
    int: _write_int,
    float: lambda _w, v: (FLOAT, _FLOAT.pack(v)),
    str: lambda _w, v: (STR, v.encode("utf-8", "surrogatepass")),
    bytes: _write_bytes,
    bytearray: lambda w, v: _write_view(w, memoryview(v)),
    memoryview: _write_view,
    complex: lambda _w, v: (COMPLEX, _COMPLEX.pack(v.real, v.imag)),
    tuple: lambda w, v: (TUPLE, w.items(*v)),
    # Sorted: equal sets of what names no blocks have equal bytes.
    frozenset: lambda w, v: (FROZENSET, b"".join(sorted(map(w.item, v)))),
    dt.datetime: _write_datetime,
    dt.date: lambda _w, v: (DATE, _DATE.pack(v.year, v.month, v.day)),
    dt.time: lambda w, v: (TIME, _time_bytes(w, v)),
    dt.timedelta: lambda _w, v: (TIMEDELTA, _TIMEDELTA.pack(v.days, v.seconds, v.microseconds)),
    dt.timezone: _write_timezone,
    Block: lambda w, v: (BLOCK, w.hold(v)),
}
_FOREIGN_WRITERS: dict[str, Write] = {
    "zoneinfo.ZoneInfo": _write_zone,
    "numpy.ndarray": _write_array,
}
"""Of modules that are not imported here."""


# Reading


class _Reader:
    """Makes values of bytes and blocks. Trusts neither."""

    def __init__(self, home: Home, blocks: tuple[Block, ...]) -> None:
        self.home = home
        self.blocks = blocks
        self.outside = 0
        """Not 0: what is raised now is not about our bytes."""

    def value(self, kind: int, data: bytes) -> Any:
        """One value, which takes all of the data."""
        read = _READERS.get(kind)
        if read is None:
            raise ValueError("unknown kind")
        return read(self, data)

    def items(self, data: bytes) -> Iterator[Any]:
        """Values inside another, as many as there are."""
        at = 0
        while at < len(data):
            found, at = self.item(data, at)
            yield found

    def item(self, data: bytes, at: int = 0) -> tuple[Any, int]:
        """The value inside another that starts there, and where it ends."""
        start = at + 1
        length, start = _read_varint(data, start)
        end = start + length
        if end > len(data):
            raise ValueError("an item is longer than what it is in")
        return self.value(data[at], data[start:end]), end

    def block(self, data: bytes) -> Block:
        return self.blocks[_read_varint(data, 0)[0]]

    def formed(self, data: bytes) -> tuple[Any, Block | None]:
        """The form of an array or view, and its block, if it has one."""
        form, block = self.items(data)
        if block is not None and not isinstance(block, Block):
            raise ValueError("not in a block")
        return form, block

    def coded(self, data: bytes) -> Any:
        name, at = self.item(data)
        if not isinstance(name, str):
            raise ValueError("a codec's name is text")
        codec = self.home.codec
        self.outside += 1
        own = codec if codec is None or isinstance(codec, str) else codec.name
        if codec is None or own != name:
            has = "none" if own is None else repr(own)
            raise TypeError(f"this value was written by the codec {name!r}, and the codec is {has}")
        if isinstance(codec, str):
            found = _Unpickler(io.BytesIO(data[at:]), self).load()
        else:
            found = codec.loads(bytes(data[at:]))
        self.outside -= 1
        return found

    def far(self, data: bytes) -> Any:
        kind, levels = data
        held = self.blocks
        for _ in range(levels):
            boxes = [self.home.heap._unbox(box, self.home) for box in held]
            held = tuple(itertools.chain.from_iterable(boxes))
        self.blocks = held[:-1]
        return self.value(kind, bytes(held[-1]))


Read = Callable[[_Reader, bytes], Any]


def _read_view(reader: _Reader, data: bytes) -> memoryview:
    (format, shape, readonly), block = reader.formed(data)
    view = memoryview(block or bytearray())
    view = view.cast(format, shape) if len(shape) != 1 and block else view.cast(format)
    return view.toreadonly() if readonly else view


def _read_datetime(reader: _Reader, data: bytes) -> dt.datetime:
    date = dt.date(*_DATE.unpack_from(data))
    return dt.datetime.combine(date, _read_time(reader, data[_DATE.size :]))


def _read_time(reader: _Reader, data: bytes) -> dt.time:
    hour, minute, second, microsecond, fold = _TIME.unpack_from(data)
    zone, _ = reader.item(data, _TIME.size)
    return dt.time(hour, minute, second, microsecond, zone, fold=fold)


def _read_timedelta(_reader: _Reader, data: bytes) -> dt.timedelta:
    days, seconds, microseconds = _TIMEDELTA.unpack(data)
    return dt.timedelta(days, seconds, microseconds)


def _read_zone(reader: _Reader, data: bytes) -> Any:
    import zoneinfo

    key, _ = reader.item(data)
    if not isinstance(key, str):
        raise ValueError("a zone's key is text")
    reader.outside += 1  # this machine may not have it
    found = zoneinfo.ZoneInfo(key)
    reader.outside -= 1
    return found


def _read_array(reader: _Reader, data: bytes) -> Any:
    return arrays.array(*reader.formed(data))


def _read_scalar(reader: _Reader, data: bytes) -> Any:
    text, at = reader.item(data)
    return arrays.scalar(text, data[at:])


def _read_text_scalar(reader: _Reader, data: bytes) -> Any:
    char, value = reader.items(data)
    return arrays.dtype_of(char).type(value)


_READERS: dict[int, Read] = {
    NONE: lambda _r, _d: None,
    FALSE: lambda _r, _d: False,
    TRUE: lambda _r, _d: True,
    INT: lambda _r, d: int.from_bytes(d, "little", signed=True),
    FLOAT: lambda _r, d: _FLOAT.unpack(d)[0],
    STR: lambda _r, d: str(d, "utf-8", "surrogatepass"),
    BYTES: lambda _r, d: d,
    BIGINT: lambda _r, d: int.from_bytes(d, "little", signed=True),
    COMPLEX: lambda _r, d: complex(*_COMPLEX.unpack(d)),
    TUPLE: lambda r, d: tuple(r.items(d)),
    FROZENSET: lambda r, d: frozenset(r.items(d)),
    DATETIME: _read_datetime,
    DATE: lambda _r, d: dt.date(*_DATE.unpack(d)),
    TIME: _read_time,
    TIMEDELTA: _read_timedelta,
    TIMEZONE: lambda r, d: dt.timezone(*r.items(d)),
    ZONE: _read_zone,
    SCALAR: _read_scalar,
    TEXT_SCALAR: _read_text_scalar,
    ARRAY: _read_array,
    VIEW: _read_view,
    BLOCK: lambda r, d: r.block(d),
    NODE: lambda r, d: open_node(r.home, r.block(d)),
    CODED: lambda r, d: r.coded(d),
    FAR: lambda r, d: r.far(d),
}


# Pickles, in which blocks and shared collections are references as elsewhere


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO, writer: _Writer) -> None:
        super().__init__(file, protocol=5)
        self._writer = writer

    def persistent_id(self, value: Any) -> bytes | None:
        shared = type(value) is Block or type(value) in _node_types.values()
        return self._writer.item(value) if shared else None


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, reader: _Reader) -> None:
        super().__init__(file)
        self._reader = reader

    def persistent_load(self, item: Any) -> Any:
        return self._reader.item(item)[0]


# Lengths and indexes, seven bits a byte, the lowest first


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    """The number that starts there, and where it ends."""
    number = shift = 0
    while shift < 63:
        byte = data[at]
        at += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, at
        shift += 7
    raise ValueError("a number is too long")
