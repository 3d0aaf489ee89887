"""Allocation sites: with SHMHEAP_TRACK=1, where in the program each block was made.

What a process makes then gets a note in the heap, file and line of whoever called, which every
process can read as long as the block lives (csrc/sites.c). A process that does not track has
nothing of this in its way: the methods are wrapped when shmheap is imported, or never.
"""

from __future__ import annotations

import functools
import os
import sys
from typing import TYPE_CHECKING, NamedTuple

from shmheap import _core

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType
    from typing import Concatenate, ParamSpec

    from shmheap._core import Block, HeapBase

    P = ParamSpec("P")

__all__ = ["Site", "find_sites", "is_tracking", "track"]

MAKERS = ("alloc", "put", "_dict_new", "_list_new", "_box_new")
"""All by which a Python caller gets a new block."""

_OURS = os.path.dirname(__file__) + os.sep
_CUT = "..."


class Site(NamedTuple):
    """Where a block was made that lives."""

    offset: int
    nbytes: int
    where: str
    """file:line"""


def is_tracking() -> bool:
    """Whether this process is to say where it makes blocks."""
    return os.environ.get("SHMHEAP_TRACK", "") not in ("", "0")


def track(heap_type: type[HeapBase]) -> None:
    """Have heaps of that type note where their blocks are made."""
    for name in MAKERS:
        setattr(heap_type, name, _noted(getattr(heap_type, name)))


def find_sites(heap: HeapBase) -> list[Site]:
    """Return where the blocks were made of which that is known, in no order.

    Cost: a look at 65,536 entries, if any process of the heap has ever tracked.
    """
    return [
        Site(offset, nbytes, where.decode(errors="replace"))
        for offset, nbytes, where in heap._sites()
    ]


def _noted(
    make: Callable[Concatenate[HeapBase, P], Block],
) -> Callable[Concatenate[HeapBase, P], Block]:
    @functools.wraps(make)
    def made(heap: HeapBase, /, *args: P.args, **kwargs: P.kwargs) -> Block:
        block = make(heap, *args, **kwargs)
        heap._set_site(block, _caller(sys._getframe(1)))
        return block

    return made


def _caller(frame: FrameType) -> bytes:
    """File and line from which shmheap was called; the end of it, if it is long."""
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_OURS):
        frame = frame.f_back
    where = f"{frame.f_code.co_filename}:{frame.f_lineno}".encode(errors="replace")
    if len(where) <= _core.MAX_SITE_BYTES:
        return where
    return _CUT.encode() + where[len(_CUT) - _core.MAX_SITE_BYTES :]
