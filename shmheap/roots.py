"""Named roots: what lives because it has a name, for every process of the heap.

A root is a block: the one that was given, that of a shared list or dict, or, for every other value,
a box: a node that holds the value's bytes, and the blocks that it names.
"""

from __future__ import annotations

from collections.abc import ItemsView, Iterator, MutableMapping, ValuesView
from typing import TYPE_CHECKING, Any, Final

from shmheap import _core, values
from shmheap._core import Block

if TYPE_CHECKING:
    from shmheap._core import HeapBase
    from shmheap.values import AnyCodec

__all__ = ["Roots"]

_NOTHING: Final = object()


class Roots(MutableMapping[str, Any]):
    """The named roots of a heap: a mapping from str to objects that all its processes share.

    A value is a Block, a NumPy array, a shared list or dict, or a plain value, as in a SharedDict:
    a plain list or dict becomes a shared one. What needs a codec is in a heap.dict that has one.

    Setting and deleting are atomic: others see the old value or the new one. So are setdefault,
    pop, popitem and compare_and_set: of several at once, one adds the name, and one gets the
    value. Iteration is over the names that there were at its start; that of items() and values()
    leaves out what was deleted meanwhile. A name has 1 to 224 bytes of UTF-8. Cost of each
    operation: the roots lock, no system call but for the first names of a heap; and of what is no
    block already, making or reading it.
    """

    def __init__(self, heap: HeapBase, codec: AnyCodec = None) -> None:
        self.heap: Final = heap
        self.codec: Final = codec

    def __getitem__(self, name: str) -> Any:
        block = self.heap._root_get(_encoded(name))
        if block is None:
            raise KeyError(name)
        return self._value_of(block)

    def __setitem__(self, name: str, value: object) -> None:
        encoded = _encoded(name)
        self.heap._root_set(encoded, self._block_of(value))

    def __delitem__(self, name: str) -> None:
        if not self.heap._root_clear(_encoded(name)):
            raise KeyError(name)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self.heap._root_get(_encoded(name)) is not None

    def __iter__(self) -> Iterator[str]:
        return iter([name.decode() for name in self.heap._root_names()])

    def __len__(self) -> int:
        return len(self.heap._root_names())

    def pop(self, name: str, default: Any = _NOTHING) -> Any:
        """Delete a name and return its value, or the default if there is none.

        Raises KeyError without a default.
        """
        encoded = _encoded(name)
        while (block := self.heap._root_get(encoded)) is not None:
            value = self._value_of(block)
            if self.heap._root_clear(encoded, block):
                return value
        if default is _NOTHING:
            raise KeyError(name)
        return default

    def popitem(self) -> tuple[str, Any]:
        """Delete some name and return it with its value. Raises KeyError if there is none."""
        for name in self:
            try:
                return name, self.pop(name)
            except KeyError:
                continue
        raise KeyError("there are no roots")

    def setdefault(self, name: str, default: Any = None) -> Any:
        """Return the name's value; if there is none, let it stand for the default."""
        encoded = _encoded(name)
        while (block := self.heap._root_get(encoded)) is None:
            block = self._block_of(default)
            if self.heap._root_set(encoded, block, True):
                return default if default is block else self._value_of(block)
        return self._value_of(block)

    def compare_and_set(self, name: str, old: object, new: object) -> bool:
        """Let a name stand for another value if it stands for the old one now, in one step.

        Values are the same if they are of one type and equal (0.0 and -0.0 are two); what lies in a
        block (blocks, shared lists and dicts, arrays, long bytes) if it is the same memory. There
        is no old value that means "none": that is setdefault.

        Args:
            name: The root's.
            old: What it must stand for.
            new: What it then stands for.

        Returns whether it does now; False also if there is no such name.
        """
        encoded = _encoded(name)
        expected = values.written(self, old)
        block = self._block_of(new)
        while (found := self.heap._root_get(encoded)) is not None:
            if values.written(self, self._value_of(found)) != expected:
                return False
            if self.heap._root_set(encoded, block, False, found):
                return True
        return False

    def items(self) -> ItemsView[str, Any]:
        """Return a view of the names and their values."""
        return _Items(self)

    def values(self) -> ValuesView[Any]:
        """Return a view of the values."""
        return _Values(self)

    def clear(self) -> None:
        """Delete the names that there are now. Cost: that of deleting each."""
        for name in self:
            self.heap._root_clear(_encoded(name))

    def __repr__(self) -> str:
        return f"<shmheap.Roots: {', '.join(map(repr, self)) or 'none'}>"

    # Blocks of values

    def _block_of(self, value: object) -> Block:
        kind, _, blocks = values.encode(self, value)
        if kind in (values.BLOCK, values.NODE):
            return blocks[0]
        return self.heap._box_new(value, self)

    def _value_of(self, block: Block) -> Any:
        if block._node_kind == _core.NODE_RECORD:
            return self.heap._unbox(block, self)
        return values.open_node(self, block) if block._node_kind else block


class _Items(ItemsView[str, Any]):
    _mapping: Roots

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        for name in self._mapping:
            block = self._mapping.heap._root_get(_encoded(name))
            if block is not None:
                yield name, self._mapping._value_of(block)


class _Values(ValuesView[Any]):
    _mapping: Roots

    def __iter__(self) -> Iterator[Any]:
        return (value for _, value in _Items(self._mapping))


def _encoded(name: str) -> bytes:
    if not isinstance(name, str):
        raise TypeError(f"a root's name is a str, not {type(name).__name__}")
    encoded = name.encode()
    if not 0 < len(encoded) <= _core.MAX_ROOT_NAME_BYTES:
        raise ValueError(
            f"a root's name has 1 to {_core.MAX_ROOT_NAME_BYTES} bytes, this one {len(encoded)}"
        )
    return encoded
