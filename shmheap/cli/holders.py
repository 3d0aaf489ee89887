"""`shmheap holders`: who keeps a block alive, or the largest blocks.

It becomes a user of the heap for as long as it takes: holders are looked at under a process lock,
so that nothing of them goes away meanwhile.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

from shmheap.cli.show import print_json, print_table, size
from shmheap.heap import Heap
from shmheap.holders import Holder, find_holders

__all__ = ["holders"]

HEADINGS = ("held by", "times", "age", "block", "at", "size", "allocated at")

LARGEST = 10
"""How many blocks are shown if none is named."""

SHOWN = 20
"""Of one block's holders, where people read; JSON has all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldBlock:
    """A block as `holders` shows it.

    Attributes:
        nbytes: None if the block was asked for by its offset.
        what: "block", or what kind of a shared collection it is, or is a part of.
    """

    offset: int
    nbytes: int | None = None
    what: str = "block"
    holders: tuple[Holder, ...]


def holders(options: argparse.Namespace) -> int:
    """Show who keeps the block at an offset alive, or the largest blocks with those who do."""
    with Heap.attach(options.name, directory=options.directory) as heap:
        blocks = _largest(heap) if options.offset is None else [_at(heap, options.offset)]
    if options.json:
        print_json({"name": options.name, "blocks": [asdict(block) for block in blocks]})
    elif blocks:
        tracked = any(one.allocated_at for block in blocks for one in block.holders)
        shown = HEADINGS if tracked else HEADINGS[:-1]
        print_table(shown, (row[: len(shown)] for block in blocks for row in _rows(block)))
    else:
        print(f"{options.name} has no blocks")
    return 0


def _largest(heap: Heap) -> Sequence[HeldBlock]:
    found = heap._largest(LARGEST)
    held = find_holders(heap, [offset for offset, _, _ in found])
    return [
        HeldBlock(offset=offset, nbytes=nbytes, what=what, holders=held[offset])
        for offset, nbytes, what in found
    ]


def _at(heap: Heap, offset: int) -> HeldBlock:
    held = find_holders(heap, [offset])[offset]
    if not held:
        raise ValueError(f"nobody holds a block at {offset}")
    return HeldBlock(offset=offset, holders=held)


def _rows(block: HeldBlock) -> Iterator[tuple[object, ...]]:
    """A row for each holder; the block stands in the first."""
    nbytes = "" if block.nbytes is None else size(block.nbytes)
    if not block.holders:
        yield ("nobody, by now", "", "", block.what, block.offset, nbytes, "")
    for i, one in enumerate(block.holders[:SHOWN]):
        age = f"{one.age_s:.1f} s" if one.kind == "lease" else ""
        this = ("",) * 4 if i else (block.what, block.offset, nbytes, one.allocated_at)
        yield (" -> ".join(one.path), one.count, age, *this)
    if len(block.holders) > SHOWN:
        yield (f"and {len(block.holders) - SHOWN:,} more", *("",) * 6)
