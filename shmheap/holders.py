"""Who keeps a block alive: processes by their handles, names, handles on their way, other blocks.

The core lists the cells that hold given blocks. What holds a block that holds this one is asked of
it in turn, a level at a time, up to the nearest name: a process that uses a shared dict has handles
of its parts too, which say less. Each level is one pass over the heap, however many blocks are
asked about.

    root 'settings' -> dict -> table -> record -> block
                       \\__________ asked for, from right to left
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from shmheap.sites import find_sites

if TYPE_CHECKING:
    from shmheap._core import HeapBase

__all__ = ["Holder", "HolderKind", "find_holders"]

HolderKind = Literal["pin", "root", "lease", "reference"]

MAX_DEPTH = 64
"""Levels that are looked through: each costs a pass. A dict in a dict takes three of them."""

MAX_WIDTH = 256
"""Blocks of a level that are asked about: one way up is enough for each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """One that keeps a block alive, from ``heap.holders(block)``.

    Attributes:
        kind: "pin" (a process has handles), "root" (a name), "lease" (a handle on its way),
            "reference" (another block, such as the record that a shared dict has of it).
        pid: of the process that has the handles, or gave out the lease; 0 for others.
        count: number of its handles, or of that block's references.
        name: of the root; "" for others.
        age_s: since the lease was made, seconds; 0 for others.
        offset: of the block that refers; -1 for others.
        allocated_at: file and line that made the block that is held, if its maker ran with
            SHMHEAP_TRACK=1; else "".
        path: from a name, else a process or lease, through blocks, to this holder. Of a reference
            whose block nobody reaches (a cycle, until it is collected), or only through very many:
            that block alone.
    """

    kind: HolderKind
    pid: int = 0
    count: int = 1
    name: str = ""
    age_s: float = 0.0
    offset: int = -1
    allocated_at: str = ""
    path: tuple[str, ...]


class _Cell(NamedTuple):
    """What the core says of one cell that holds a block."""

    kind: HolderKind
    who: int = 0
    """The pid; of a reference: the offset of the block it is in."""
    what: str = ""
    """The name of a root; of a reference: what the block it is in is."""
    made_ns: int = 0

    def __str__(self) -> str:
        if self.kind == "root":
            return f"root {self.what!r}"
        return f"pid {self.who}" if self.kind == "pin" else f"lease of pid {self.who}"


_ORDER: tuple[HolderKind, ...] = ("root", "pin", "lease", "reference")
"""In which holders are told."""

_Held = Mapping[int, Sequence[_Cell]]
"""What holds the block at each offset."""


def find_holders(heap: HeapBase, offsets: Iterable[int]) -> dict[int, tuple[Holder, ...]]:
    """Return what holds the block at each of these offsets: names first, then pins, leases, blocks.

    Nobody holds what is no block. Others go on meanwhile: it is of no one moment. Cost: a pass over
    the heap for each level of blocks above, up to the nearest name.
    """
    wanted = tuple(dict.fromkeys(offsets))
    names = _names(heap)
    held: dict[int, Sequence[_Cell]] = {}
    level: Sequence[int] = wanted
    for depth in range(MAX_DEPTH):
        held |= _ask(heap, names, level)
        open_ends = [at for at in level if depth == 0 or not names.get(at)]
        above = {cell.who for at in open_ends for cell in held[at] if cell.kind == "reference"}
        level = sorted(above - held.keys())[:MAX_WIDTH]
        if not level:
            break
    sites = {site.offset: site.where for site in find_sites(heap)}
    return {at: _holders(held, at, sites.get(at, "")) for at in wanted}


def _names(heap: HeapBase) -> Mapping[int, Sequence[str]]:
    """The names of each block that has any, by its offset."""
    names: dict[int, list[str]] = defaultdict(list)
    for name in heap._root_names():
        block = heap._root_get(name)
        if block is not None:
            names[block.offset].append(name.decode())
    return names


def _ask(
    heap: HeapBase, names: Mapping[int, Sequence[str]], offsets: Sequence[int]
) -> dict[int, list[_Cell]]:
    """What holds each of these blocks, as the core sees it."""
    held = {at: [_Cell("root", what=name) for name in names.get(at, ())] for at in offsets}
    for at, kind, who, what, made_ns in heap._holders_of(offsets):
        held[at].append(_Cell(kind, who, what, made_ns))  # type: ignore[arg-type]
    for cells in held.values():
        cells.sort(key=lambda cell: (_ORDER.index(cell.kind), cell))
    return held


def _holders(held: _Held, offset: int, allocated_at: str) -> tuple[Holder, ...]:
    now_ns = time.monotonic_ns()
    return tuple(
        Holder(
            kind=cell.kind,
            count=count,
            pid=0 if cell.kind == "reference" else cell.who,
            name=cell.what if cell.kind == "root" else "",
            age_s=max(now_ns - cell.made_ns, 0) / 1e9 if cell.kind == "lease" else 0.0,
            offset=cell.who if cell.kind == "reference" else -1,
            allocated_at=allocated_at,
            path=_path(held, cell),
        )
        for cell, count in Counter(held[offset]).items()
    )


def _path(held: _Held, cell: _Cell) -> tuple[str, ...]:
    """The shortest way from a name down to this holder, else from a process or lease."""
    if cell.kind != "reference":
        return (str(cell),)
    ways: deque[tuple[int, tuple[str, ...]]] = deque([(cell.who, (cell.what,))])
    seen = {cell.who}
    nearest: tuple[str, ...] | None = None
    while ways:
        at, way = ways.popleft()
        for above in held.get(at, ()):
            if above.kind == "root":
                return (str(above), *way)
            if above.kind != "reference":
                nearest = nearest or (str(above), *way)
            elif above.who not in seen:
                seen.add(above.who)
                ways.append((above.who, (above.what, *way)))
    return nearest or (cell.what,)
