"""Named roots: blocks that live because they have a name, for every process of the heap."""

from __future__ import annotations

from collections.abc import ItemsView, Iterator, MutableMapping, ValuesView
from typing import TYPE_CHECKING, Any, Final, TypeVar, overload

from shmheap import _core
from shmheap._core import Block

if TYPE_CHECKING:
    from shmheap._core import HeapBase

__all__ = ["Roots"]

T = TypeVar("T")
_RAISE: Final = object()


class Roots(MutableMapping[str, Block]):
    """The named roots of a heap: a mapping from str to Block that all its processes share.

    Setting and deleting are atomic: others see the old block or the new one. So are setdefault,
    pop and popitem: of several at once, one adds the name, and one gets the block. Iteration is
    over the names that there were at its start; that of items() and values() leaves out what was
    deleted meanwhile. A name has 1 to 224 bytes of UTF-8. Cost of each operation: the roots lock,
    no system call but for the first names of a heap.
    """

    def __init__(self, heap: HeapBase) -> None:
        self._heap = heap

    def __getitem__(self, name: str) -> Block:
        block = self._heap._root_get(_encoded(name))
        if block is None:
            raise KeyError(name)
        return block

    def __setitem__(self, name: str, block: Block) -> None:
        self._heap._root_set(_encoded(name), _checked(block))

    def __delitem__(self, name: str) -> None:
        if not self._heap._root_clear(_encoded(name)):
            raise KeyError(name)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._heap._root_get(_encoded(name)) is not None

    def __iter__(self) -> Iterator[str]:
        return iter([name.decode() for name in self._heap._root_names()])

    def __len__(self) -> int:
        return len(self._heap._root_names())

    @overload
    def pop(self, name: str) -> Block: ...
    @overload
    def pop(self, name: str, default: Block | T) -> Block | T: ...
    def pop(self, name: str, default: Any = _RAISE) -> Any:
        """Delete a name and return its block, or the default if there is none.

        Raises KeyError without a default.
        """
        encoded = _encoded(name)
        while (block := self._heap._root_get(encoded)) is not None:
            if self._heap._root_clear(encoded, block):
                return block
        if default is _RAISE:
            raise KeyError(name)
        return default

    def popitem(self) -> tuple[str, Block]:
        """Delete some name and return it with its block. Raises KeyError if there is none."""
        for name in self:
            block = self.pop(name, None)
            if block is not None:
                return name, block
        raise KeyError("there are no roots")

    def setdefault(self, name: str, default: Block | None = None) -> Block:
        """Return the name's block; if there is none, let it stand for the default.

        Raises TypeError if the default is needed and no Block.
        """
        encoded = _encoded(name)
        while (block := self._heap._root_get(encoded)) is None:
            if self._heap._root_set(encoded, _checked(default), True):
                return _checked(default)
        return block

    def items(self) -> ItemsView[str, Block]:
        """Return a view of the names and their blocks."""
        return _Items(self)

    def values(self) -> ValuesView[Block]:
        """Return a view of the blocks."""
        return _Values(self)

    def clear(self) -> None:
        """Delete the names that there are now. Cost: that of deleting each."""
        for name in self:
            self.pop(name, None)

    def __repr__(self) -> str:
        return f"<shmheap.Roots: {', '.join(map(repr, self)) or 'none'}>"


class _Items(ItemsView[str, Block]):
    _mapping: Roots

    def __iter__(self) -> Iterator[tuple[str, Block]]:
        for name in self._mapping:
            block = self._mapping.get(name)
            if block is not None:
                yield name, block


class _Values(ValuesView[Block]):
    _mapping: Roots

    def __iter__(self) -> Iterator[Block]:
        return (block for _, block in _Items(self._mapping))


def _checked(block: object) -> Block:
    if not isinstance(block, Block):
        raise TypeError(
            f"a root is a Block, not {type(block).__name__}: allocate with heap.put() first"
        )
    return block


def _encoded(name: str) -> bytes:
    if not isinstance(name, str):
        raise TypeError(f"a root's name is a str, not {type(name).__name__}")
    encoded = name.encode()
    if not 0 < len(encoded) <= _core.MAX_ROOT_NAME_BYTES:
        raise ValueError(
            f"a root's name has 1 to {_core.MAX_ROOT_NAME_BYTES} bytes, this one {len(encoded)}"
        )
    return encoded
