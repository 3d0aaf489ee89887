"""SharedDict and SharedList: collections that all processes of a heap share.

The core does what is done with one key or one place, each in one atomic step (csrc/table.c,
csrc/list.c, and their types DictBase and ListBase). What is here completes the interfaces of dict
and list from those steps:

    of one step         get, set, delete, append, insert, extend, pop, clear, setdefault, a slice
    looks, then tries   remove, sort, reverse, slices with a step, *=: again if it changed meanwhile
    of many steps       update, |=, comparing, iterating over a dict; with `lock` as one

Values are written and read by values.py. A handle of a collection is a block; pickling one sends
that, and never what is in it.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import operator
import os
import reprlib
import sys
import threading
import time
from collections.abc import (
    Callable,
    ItemsView,
    Iterable,
    Iterator,
    KeysView,
    Mapping,
    MutableMapping,
    MutableSequence,
    ValuesView,
)
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar, cast

from shmheap import _core, values
from shmheap._core import Block, DictBase, ListBase

if TYPE_CHECKING:
    from typing import Self, SupportsIndex

    from shmheap._core import HeapBase
    from shmheap.values import AnyCodec

__all__ = ["Lock", "SharedDict", "SharedList"]

K = TypeVar("K")
V = TypeVar("V")
T = TypeVar("T")
C = TypeVar("C", bound="SharedDict[Any, Any] | SharedList[Any]")

FIRST_NAP_S = 20e-6
LONGEST_NAP_S = 1e-3
"""How long somebody who waits for a collection's lock sleeps before looking again: doubled from
the first to the longest. A lock that is free again is so taken within a millisecond."""

END: Final = sys.maxsize


class Lock:
    """A collection's lock while it is held: what `with d.lock() as held:` gives."""

    def __init__(self, base: DictBase | ListBase, name: _Name, timeout: float | None) -> None:
        self._base = base
        self._name = name
        self._timeout = timeout
        self._pid = 0
        self.abandoned = False
        """Whether the process that held it before was killed with it: what it did may be half
        done."""

    def __enter__(self) -> Self:
        deadline = None if self._timeout is None else time.monotonic() + self._timeout
        try:
            self._wait(self._claim, deadline)
            self.abandoned = self._wait(self._base._try_lock, deadline) == 2
        except BaseException:
            self._release()
            raise
        self._pid = os.getpid()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._pid == os.getpid():  # a forked child does not hold what its parent does
            self._release()

    def _claim(self) -> bool:
        """Be the one thread of this process that asks for it: then an interrupted one can tell."""
        first = _claims.setdefault(self._name, (self, threading.get_ident()))
        if first[0] is not self and first[1] == threading.get_ident():
            raise RuntimeError("this thread holds the lock of this collection already")
        return first[0] is self

    def _release(self) -> None:
        if _claims.get(self._name, (None,))[0] is self:
            with contextlib.suppress(RuntimeError):  # not ours: the wait for it was broken off
                self._base._unlock()
            del _claims[self._name]

    def _wait(self, attempt: Callable[[], int], deadline: float | None) -> int:
        nap = FIRST_NAP_S
        while not (got := attempt()):
            if deadline is not None and time.monotonic() >= deadline:
                raise TimeoutError(f"the lock was not free within {self._timeout} s")
            time.sleep(nap)  # serves signals
            nap = min(2 * nap, LONGEST_NAP_S)
        return got


_Name = tuple[int, int, int]
"""Which collection: nonce, offset, generation."""
_claims: dict[_Name, tuple[Lock, int]] = {}
"""Of each lock that this process holds or waits for: by whom, and in which thread."""
os.register_at_fork(after_in_child=_claims.clear)


class _Shared:
    """What both collections have: heap, codec, lock, and how they are copied and sent."""

    heap: HeapBase
    """The heap that it is in."""
    codec: AnyCodec
    """Takes values that have no form of their own; nested collections have the same."""

    if TYPE_CHECKING:

        @property
        def _block(self) -> Block: ...

    @classmethod
    def _of(cls, block: Block, heap: HeapBase, codec: AnyCodec) -> Self:
        """The one behind a node block."""
        self = cls.__new__(cls, block)  # type: ignore[call-arg]
        self.heap = heap
        self.codec = codec
        return self

    @property
    def _name(self) -> _Name:
        block = self._block
        return self.heap.nonce, block.offset, block.generation

    def lock(self, timeout: float | None = None) -> Lock:
        """Return the collection's lock, to hold it in a `with`: several operations as one.

        Advisory: it keeps out those who take it, too, and nobody else. A process that is killed
        with it passes it on, and the next holder's `abandoned` says so. Not reentrant: a thread
        that takes it twice gets a RuntimeError.

        Args:
            timeout: Seconds to wait for it, after which entering raises TimeoutError; None: for
                ever, 0: not at all. Signals are served meanwhile.

        Cost: a compare-and-swap, if it is free.
        """
        if timeout is not None and not timeout >= 0:
            raise ValueError(f"a timeout is a number of seconds from 0 on, or None: not {timeout}")
        return Lock(self, self._name, timeout)  # type: ignore[arg-type]

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self._block, self.heap, self.codec)

    def __copy__(self) -> Self:
        return self._filled_with(self.copy())

    def __deepcopy__(self, memo: dict[Any, Any]) -> Self:
        """A new one in the same heap, and so for each that is in it."""
        if self._name not in memo:
            memo[self._name] = made = self._filled_with(())
            made._fill(copy.deepcopy(self.copy(), memo))
        found: Self = memo[self._name]
        return found

    def _filled_with(self, value: Any) -> Self:
        made: Self = self._new(self.heap, self.codec)
        made._fill(value)
        return made

    if TYPE_CHECKING:  # each has its own

        @classmethod
        def _new(cls, heap: HeapBase, codec: AnyCodec) -> Self: ...
        def _fill(self, value: Any) -> None: ...
        def copy(self) -> Any: ...

    def _is(self, other: object) -> bool:
        """Whether both are handles of the same collection."""
        return type(other) is type(self) and self._name == other._name

    def __repr__(self) -> str:
        return _repr.repr(self)


def _rebuild(kind: type[C], block: Block, heap: HeapBase, codec: AnyCodec) -> C:
    return kind._of(block, heap, codec)  # type: ignore[return-value]


class SharedDict(_Shared, DictBase, MutableMapping[K, V], Generic[K, V]):
    """A dict that all processes of a heap share. Made by Heap.dict, or of a plain one.

    Behaves as dict does, in the order in which keys came. Keys are None, bool, int, float,
    complex, str and bytes, and 1, 1.0 and True are one key. A value is what it was when it was
    put in: a plain list or dict becomes a shared one, an array or bytearray lies in a block, and
    bytes longer than 16 KiB come back as a read-only memoryview of one.

    Each operation on one key is atomic. update and |= are atomic for each key, not as a whole.
    Iterating, also by copy and ==, raises RuntimeError when the dict changed its size meanwhile,
    by whomever. For more, use `lock`.
    """

    __hash__ = None  # type: ignore[assignment]

    @classmethod
    def _new(cls, heap: HeapBase, codec: AnyCodec) -> Self:
        return cls._of(heap._dict_new(), heap, codec)

    def _fill(self, value: Any) -> None:
        self.update(value)

    def __iter__(self) -> Iterator[K]:
        return (key for key, _ in self._entries(True))

    def __reversed__(self) -> Iterator[K]:
        return reversed([*self])

    def _entries(self, keys_only: bool = False) -> Iterator[tuple[K, V]]:
        stamp = self._stamp()
        position = 0
        while (entry := self._next(position, stamp, keys_only)) is not None:
            position = entry[0]
            yield entry[1:]

    def keys(self) -> KeysView[K]:
        """Return a view of the keys, which is like a set."""
        return _Keys(self)

    def values(self) -> ValuesView[V]:
        """Return a view of the values."""
        return _Values(self)

    def items(self) -> ItemsView[K, V]:
        """Return a view of the pairs of keys and values."""
        return _Items(self)

    def update(self, other: Any = (), /, **more: V) -> None:
        """Set all keys of a mapping or of pairs, then those given by name, each in one step."""
        super().update(other.items() if isinstance(other, Mapping) else other, **more)

    def copy(self) -> dict[K, V]:
        """Return a plain dict of the same values; what is nested in it is shared as before."""
        return dict(self._entries())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Mapping):
            return NotImplemented
        return self._is(other) or self.copy() == dict(other.items())

    def __or__(self, other: object) -> dict[K, V]:
        return self.copy() | dict(other.items()) if isinstance(other, Mapping) else NotImplemented

    def __ror__(self, other: object) -> dict[K, V]:
        return dict(other.items()) | self.copy() if isinstance(other, Mapping) else NotImplemented

    def __ior__(  # type: ignore[misc]  # as dict's
        self, other: Mapping[K, V] | Iterable[tuple[K, V]]
    ) -> Self:
        self.update(other)
        return self


class _Keys(KeysView[K]):
    _mapping: SharedDict[K, Any]

    def __reversed__(self) -> Iterator[K]:
        return reversed([*self])


class _Items(ItemsView[K, V]):
    _mapping: SharedDict[K, V]

    def __contains__(self, item: object) -> bool:
        return isinstance(item, tuple) and len(item) == 2 and super().__contains__(item)

    def __iter__(self) -> Iterator[tuple[K, V]]:
        return self._mapping._entries()

    def __reversed__(self) -> Iterator[tuple[K, V]]:
        return reversed([*self])


class _Values(ValuesView[V]):
    _mapping: SharedDict[Any, V]

    def __iter__(self) -> Iterator[V]:
        return (value for _, value in self._mapping._entries())

    def __contains__(self, value: object) -> bool:
        return any(found is value or found == value for found in self)

    def __reversed__(self) -> Iterator[V]:
        return reversed([*self])


class SharedList(_Shared, ListBase, MutableSequence[V], Generic[V]):
    """A list that all processes of a heap share. Made by Heap.list, or of a plain one.

    Behaves as list does; what it holds is told at SharedDict. A slice of it is a plain list.

    Each operation is atomic. What depends on all that is in it (remove, sort, reverse, *=, slices
    with a step) is tried again if the list changed meanwhile. Iterating, also by copy, index,
    count and ==, is over all values as they were at one moment. For more, use `lock`.
    """

    __hash__ = None  # type: ignore[assignment]

    @classmethod
    def _new(cls, heap: HeapBase, codec: AnyCodec) -> Self:
        return cls._of(heap._list_new(), heap, codec)

    def _fill(self, value: Any) -> None:
        self.extend(value)

    def __iter__(self) -> Iterator[V]:
        return iter(self.copy())

    def __reversed__(self) -> Iterator[V]:
        return reversed(self.copy())

    def __contains__(self, value: object) -> bool:
        return value in self._snapshot()

    def _set_slice(self, index: slice, value: Iterable[V]) -> None:
        given = list(value)
        if _is_whole(index):
            self._replace(index, given)
        else:
            self._change(lambda found: found.__setitem__(index, given))

    def _delete(self, index: SupportsIndex | slice) -> None:
        if isinstance(index, slice) and not _is_whole(index):
            self._change(lambda found: found.__delitem__(index))
        else:
            self._replace(index, [])

    def insert(self, index: SupportsIndex, value: V) -> None:
        """Put a value before the one at a place."""
        self._replace(slice(index, index), [value])

    def extend(self, values: Iterable[V]) -> None:
        """Append values, all of them in one step."""
        self._splice(-1, -1, list(values), 0)

    def clear(self) -> None:
        """Remove all values in one step."""
        self._replace(slice(None), [])

    def pop(self, index: SupportsIndex = -1) -> V:
        """Remove and return the value at a place. Raises IndexError if there is none."""
        place = operator.index(index)
        if place == -1:
            return cast(V, self._pop())
        while True:
            stamp = self._stamp()
            size = len(self)
            at = _place(place, size, "pop index out of range" if size else "pop from empty list")
            value: V = self[at]
            if self._splice(at, at + 1, [], stamp, True):
                return value

    def remove(self, value: V) -> None:
        """Remove the first such value. Raises ValueError if there is none. Cost: reads all."""
        self._change(lambda found: found.remove(value))

    def index(self, value: Any, start: int = 0, stop: int = END) -> int:
        """Return the place of the first such value. Raises ValueError if there is none."""
        return self._snapshot().index(value, start, stop)

    def count(self, value: Any) -> int:
        """Return how many such values there are."""
        return self._snapshot().count(value)

    def reverse(self) -> None:
        """Reverse the order. Cost: reads and writes all."""
        self._change(lambda found: found.reverse())

    def sort(self, *, key: Callable[[V], Any] | None = None, reverse: bool = False) -> None:
        """Sort, stably; again if the list changed meanwhile. Cost: reads and writes all.

        Args:
            key: What to compare of each value; None: the value.
            reverse: Whether the largest comes first.
        """
        self._change(lambda found: found.sort(key=key, reverse=reverse))

    def copy(self) -> list[V]:
        """Return a plain list of the same values; what is nested in it is shared as before."""
        return self._snapshot()

    def _replace(self, part: SupportsIndex | slice, values: list[V]) -> None:
        """Put values in the place of a part of it, in one step."""
        while True:
            stamp = self._stamp()
            size = len(self)
            if isinstance(part, slice):
                start, stop, _ = part.indices(size)
            else:
                start = _place(operator.index(part), size, "list assignment index out of range")
                stop = start + 1
            if self._splice(start, max(start, stop), values, stamp):
                return

    def _change(self, change: Callable[[list[V]], object]) -> None:
        """Change it as a plain list, in one step; again if it changed meanwhile."""
        while True:
            stamp = self._stamp()
            found = self._snapshot()
            size = len(found)
            change(found)
            if self._splice(0, size, found, stamp, True):
                return

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, list | SharedList):
            return NotImplemented
        return self._is(other) or self._snapshot() == list(other)

    def __lt__(self, other: object) -> Any:
        return self._compared(operator.lt, other)

    def __le__(self, other: object) -> Any:
        return self._compared(operator.le, other)

    def __gt__(self, other: object) -> Any:
        return self._compared(operator.gt, other)

    def __ge__(self, other: object) -> Any:
        return self._compared(operator.ge, other)

    def _compared(self, compare: Callable[[Any, Any], Any], other: object) -> Any:
        if not isinstance(other, list | SharedList):
            return NotImplemented
        return compare(self._snapshot(), list(other))

    def __add__(self, other: object) -> list[V]:
        return self.copy() + list(other) if isinstance(other, list | SharedList) else NotImplemented

    def __radd__(self, other: object) -> list[V]:
        return other + self.copy() if isinstance(other, list) else NotImplemented

    def __mul__(self, times: SupportsIndex) -> list[V]:
        return self.copy() * times

    __rmul__ = __mul__

    def __imul__(self, times: SupportsIndex) -> Self:
        number = operator.index(times)
        self._change(lambda found: found.__imul__(number))
        return self


def _place(index: int, size: int, otherwise: str) -> int:
    """The place that an index of a list of that size means."""
    if not -size <= index < size:
        raise IndexError(otherwise)
    return index % size


def _is_whole(part: slice) -> bool:
    """Whether a slice is a part without gaps, in the list's order."""
    return part.step is None or operator.index(part.step) == 1


class _Repr(reprlib.Repr):
    """Bounded: so many values, so deep; and a collection that is in itself is shown once."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 4
        self.maxdict = self.maxlist = self.maxtuple = 6
        self.maxstring = self.maxother = 40
        self._inside = threading.local()

    def repr_SharedDict(self, found: SharedDict[Any, Any], level: int) -> str:  # noqa: N802
        def pairs() -> Iterator[str]:
            for key, value in found._entries():
                yield f"{self.repr1(key, level - 1)}: {self.repr1(value, level - 1)}"

        return f"SharedDict({{{self._some(found, pairs(), self.maxdict, level)}}})"

    def repr_SharedList(self, found: SharedList[Any], level: int) -> str:  # noqa: N802
        def shown() -> Iterator[str]:
            for value in found[: self.maxlist + 1]:
                yield self.repr1(value, level - 1)

        return f"SharedList([{self._some(found, shown(), self.maxlist, level)}])"

    def _some(self, found: _Shared, shown: Iterator[str], most: int, level: int) -> str:
        inside: set[_Name] = self._inside.__dict__.setdefault("names", set())
        try:
            name = found._name
        except ValueError:
            return "closed"
        if name in inside or level <= 0:
            return "..."
        inside.add(name)
        try:
            some = [*itertools.islice(shown, most + 1)]
        except Exception:  # it changes, was closed, needs a codec, or the codec raises
            return "..."
        finally:
            inside.discard(name)
        return ", ".join([*some[:most], *["..."] * (len(some) > most)])


_repr = _Repr()
values.share_as(SharedDict, _core.NODE_DICT, dict)
values.share_as(SharedList, _core.NODE_LIST, list)
