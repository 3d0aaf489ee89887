"""Blocks on their way between processes: handles and leases.

A Block pickles as a handle: the arena's path and nonce, offset, generation, and a lease. The lease
is a holder of its own, owned by the sender, so the block lives while nobody but the bytes of a
message knows it. The first process that unpickles the bytes turns the lease into a pin of its own;
further ones get a pin as long as the block lives, and StaleHandle after.

    sender                             arena                        receiver
    pickle: count up, write lease  ->  lease
            give out the bytes     ->                           ->  unpickle: lease becomes a pin
                                       (sender dead: expires
                                        after lease_grace_s)
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple

from shmheap._core import Block
from shmheap.errors import StaleHandle

if TYPE_CHECKING:
    from typing import Self

    from shmheap._core import HeapBase

__all__ = ["Block", "Handle", "Lease", "copy_bytes", "rebuild"]


class Handle(NamedTuple):
    """What names a block and its lease, wherever it is."""

    path: str
    nonce: int
    offset: int
    generation: int
    cell: int
    number: int


FindHeap = Callable[[str, int], "HeapBase"]
_find_heap: list[FindHeap] = []
"""How to find the heap of a handle in this process; heap.py, which stands above, says it here."""


def find_heaps_with(find: FindHeap) -> None:
    """Say how a handle's heap is found: by its path and nonce."""
    _find_heap[:] = [find]


def rebuild(*handle: object) -> Block:
    """Unpickle a Block: take its lease, or else a further hold on it.

    Raises:
        StaleHandle: The block is gone, or the heap is.
        UntrustedArena: The heap's file is not one that this process should use.
    """
    named = Handle(*handle)  # type: ignore[arg-type]
    heap = _find_heap[0](named.path, named.nonce)
    return heap._adopt(named.offset, named.generation, named.cell, named.number)


def copy_bytes(block: Block, path: str, nonce: int) -> Block:
    """Return a new block with the bytes of one that is in the heap of that path and nonce."""
    return _find_heap[0](path, nonce).put(block)


def make_room(path: str, nonce: int, status: int, asked: bool) -> None:
    """Have memory freed for a handle, a lease or a name; raise HeapFull where that was in vain."""
    _find_heap[0](path, nonce)._make_room(status, asked)  # type: ignore[attr-defined]


class Lease:
    """Keeps a block alive on its way: made by Block.lease(), ended by its taker, or by release().

    Pickles like the block itself, any number of times, without making further leases: the first
    process that unpickles takes this one. A context manager: leaving the block releases it if
    nobody took it.
    """

    __slots__ = ("handle",)

    def __init__(self, handle: tuple[str, int, int, int, int, int]) -> None:
        self.handle = Handle(*handle)

    def __reduce__(self) -> tuple[Callable[..., Block], Handle]:
        return rebuild, self.handle

    def take(self) -> Block:
        """Return the block, held by this process from now on.

        Raises StaleHandle if it is gone, and what Heap.attach raises. Cost: the process lock; that
        of attaching where this process has not used the heap yet.
        """
        return rebuild(*self.handle)

    def release(self) -> bool:
        """End the lease if nobody took it.

        Returns whether it was still there. Idempotent. Cost: the process lock.
        """
        named = self.handle
        try:
            heap = _find_heap[0](named.path, named.nonce)
        except StaleHandle:
            return False
        return heap._drop_lease(named.offset, named.generation, named.cell, named.number)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()

    def __repr__(self) -> str:
        named = self.handle
        return (
            f"<shmheap.Lease of offset {named.offset}, generation {named.generation}, "
            f"of {named.path!r}>"
        )
