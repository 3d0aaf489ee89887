"""Named roots: blocks that live because they have a name, for every process of the heap."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
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

    Setting and deleting are atomic: others see the old block or the new one. Iteration is over the
    names that there were at its start, as far as they still exist. A name has 1 to 224 bytes of
    UTF-8. Cost of each operation: the roots lock, no system call but for the first names of a heap.
    """

    def __init__(self, heap: HeapBase) -> None:
        self._heap = heap

    def __getitem__(self, name: str) -> Block:
        block = self._heap._root_get(_encoded(name))
        if block is None:
            raise KeyError(name)
        return block

    def __setitem__(self, name: str, block: Block) -> None:
        if not isinstance(block, Block):
            raise TypeError(
                f"a root is a Block, not {type(block).__name__}: allocate with heap.put() first"
            )
        self._heap._root_set(_encoded(name), block)

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
        """Delete a name and return its block, or the default if there is none or it has just gone.

        Of several that pop one name at once, one gets the block. Raises KeyError without a default.
        """
        block = self._heap._root_get(_encoded(name))
        if block is not None and self._heap._root_clear(_encoded(name)):
            return block
        if default is _RAISE:
            raise KeyError(name)
        return default

    def clear(self) -> None:
        """Delete the names that there are now. Cost: that of deleting each."""
        for name in self:
            self.pop(name, None)

    def __repr__(self) -> str:
        return f"<shmheap.Roots: {', '.join(map(repr, self)) or 'none'}>"


def _encoded(name: str) -> bytes:
    if not isinstance(name, str):
        raise TypeError(f"a root's name is a str, not {type(name).__name__}")
    encoded = name.encode()
    if not 0 < len(encoded) <= _core.MAX_ROOT_NAME_BYTES:
        raise ValueError(
            f"a root's name has 1 to {_core.MAX_ROOT_NAME_BYTES} bytes, this one {len(encoded)}"
        )
    return encoded
