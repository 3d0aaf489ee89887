"""What the processes of the demo do. Each runs in a process of its own, and gets handles only."""

from __future__ import annotations

import hashlib
import signal
import zlib
from collections.abc import Sequence
from typing import Any

from shmheap.block import Block
from shmheap.heap import Heap
from shmheap.rss import PAGE_BYTES

__all__ = ["attach", "compress_blocks", "compressed", "digest", "touch"]

_heap: list[Heap] = []


def attach(heap: Heap) -> None:
    """Use the heap from now on. A pool's initializer: unpickling the heap has attached to it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which ends its pools
    _heap[:] = [heap]


def compressed(data: Any) -> bytes:
    """The work itself: on a block in the heap, or on plain bytes."""
    return zlib.compress(data, 1)


def compress_blocks(blocks: Sequence[Block]) -> list[Block]:
    """Compress blocks where they lie, each into a new block."""
    [heap] = _heap
    return [heap.put(compressed(block)) for block in blocks]


def touch(blocks: Sequence[Block]) -> int:
    """Read a byte of every page of the blocks, so that this process has them all mapped."""
    seen = 0
    for block in blocks:
        with memoryview(block) as view:
            seen += sum(view[::PAGE_BYTES]) + view[-1]
    return seen


def digest(data: Any) -> bytes:
    """What results are compared by."""
    return hashlib.blake2b(data, digest_size=16).digest()
